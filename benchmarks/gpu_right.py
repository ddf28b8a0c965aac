"""Whether every method computes on a card what it computes on a CPU, and what becomes of it in half precision.

Models have few blocks of real widths. Each check is a function of a `Subject`, and says what it found wrong.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_rows import Case, told
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from step_methods import config_of, merges, setting_of
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import hf_visual_peft
from hf_visual_peft import FeatureCache
from hf_visual_peft.coverage.cell import FRAMES, mean_over_frames
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.coverage.sizes import small_config
from hf_visual_peft.coverage.tiny import TinyModel


BATCH, LABELS = 4, 10
METHODS = ("peft-lora", "peft-ln-tuning", *hf_visual_peft.list_methods())
# float32 on the device against float64 on the CPU: of the logits by their largest, of all gradients by their norm
OUTPUT_BOUND, GRADIENT_BOUND = 2e-5, 2e-4
SAME_BOUND = 2e-5  # the same numbers by another way in float32: merged, in a mixed batch, loaded on the other device
STEPS, MOST_STEPS = 4, 12  # in half precision; the most where a scaler skips some

_PLAIN = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 3, "num_labels": LABELS}
REAL = {
    model.name: model
    for model in (
        TinyModel(
            "vit",
            "plain",
            lambda: ViTForImageClassification(
                ViTConfig(**_PLAIN, intermediate_size=1536, image_size=64, patch_size=16)
            ),
            size=(64, 64),
        ),
        TinyModel(
            "dinov2",
            "plain",
            lambda: Dinov2ForImageClassification(Dinov2Config(**_PLAIN, image_size=56, patch_size=14)),
            size=(56, 56),
        ),
        TinyModel(
            "swin",
            "hierarchical",
            lambda: SwinForImageClassification(
                SwinConfig(
                    embed_dim=96,
                    depths=[2, 2],
                    num_heads=[3, 6],
                    window_size=4,
                    image_size=64,
                    drop_path_rate=0.0,
                    num_labels=LABELS,
                )
            ),
            size=(64, 64),
        ),
    )
}


def with_small_weights(tiny: TinyModel) -> nn.Module:
    """A model of it whose every weight is off its initial value, by as much as real widths bear."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = tiny.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


class Subject:
    """A method on a model, with what it is called with.

    Args:
        method: its name.
        model: key of `REAL`.
        device: to be compared with the CPU.
        smoke: whether to take the smallest models there are, and settings for these.
    """

    def __init__(self, method: str, model: str, device: torch.device, smoke: bool) -> None:
        self.method, self.device = method, device
        self.known = hf_visual_peft.list_methods().get(method)
        tiny = MODELS[model] if smoke else REAL[model]
        self.base = tiny.model() if smoke else with_small_weights(tiny)
        images = tiny.arguments(BATCH * FRAMES)["pixel_values"]
        self.video = self.known is not None and self.known.video
        self.pixels = images.unflatten(0, (BATCH, FRAMES)) if self.video else images[:BATCH]
        self.labels = torch.arange(BATCH) % 2
        torch.manual_seed(2)
        self.config = self._config(smoke)
        self.model: Any = self._adapted("default").eval()
        self.on_device: Any = self.moved(self.model)

    def _config(self, smoke: bool) -> Any:
        if self.known is None:
            config = config_of(self.method, self.base)
            if hasattr(config, "init_lora_weights"):
                config.init_lora_weights = False
            return config
        if smoke:
            return small_config(self.known)
        return self.known.config_cls(**setting_of(self.method), init_weights=False)

    def _adapted(self, name: str, model: Any = None) -> Any:
        if model is None:
            model = get_peft_model(copy.deepcopy(self.base), copy.deepcopy(self.config), adapter_name=name)
        else:
            model.add_adapter(name, copy.deepcopy(self.config))
        if self.known is not None and self.known.calibrated:
            device = next(model.parameters()).device
            batch = {"pixel_values": self.pixels.to(device), "labels": self.labels.to(device)}
            model.set_adapter(name)
            hf_visual_peft.calibrate(model, [batch], progress=False)
        return model

    def with_second(self) -> Any:
        """The model on the device with another adapter of the same kind, `"second"`."""
        model = self._adapted("second", self.moved(self.model))
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".second" in name and parameter.is_floating_point():
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                    parameter.add_(noise, alpha=0.02)
        model.set_adapter("default")
        return model.eval()

    def moved(self, model: nn.Module) -> Any:
        """A copy of a model on the device."""
        return copy.deepcopy(model).to(self.device)

    def logits(self, model: Any, **kwargs: Any) -> Tensor:
        """What a model makes of the images, where it lies and in its precision."""
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        return model(self.pixels.to(parameter.device, parameter.dtype), **kwargs).logits

    @torch.no_grad()
    def evaluated(self, model: Any, **kwargs: Any) -> Tensor:
        """The same without gradients."""
        return self.logits(model, **kwargs)

    @torch.no_grad()
    def base_logits(self, base: nn.Module) -> Tensor:
        """Those of the model without an adapter; of videos it gets the frames, and its head their mean."""
        device = next(base.parameters()).device
        if not self.video:
            return base(self.pixels.to(device)).logits
        with mean_over_frames(base, BATCH, self.config.frames_meet_before_norms):
            return base(self.pixels.flatten(0, 1).to(device)).logits


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference by the largest number."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def require(condition: bool, message: str) -> None:
    """Raise an error with this message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def require_close(found: Tensor, expected: Tensor, bound: float, what: str) -> float:
    """The distance, which must be within the bound."""
    off = distance(found, expected)
    require(off <= bound, f"{what} are off by {off:.1e} of their scale, and at most {bound:.0e} is right")
    return off


def gradients_of(subject: Subject, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a fixed combination of them."""
    model.zero_grad()
    logits = subject.logits(model)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * direction.to(logits)).sum().backward()
    gradients = {
        n: p.grad.double().cpu() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    model.zero_grad()
    return logits, gradients


def numbers(subject: Subject) -> dict[str, float]:
    """Logits and gradients in float32 on the device against float64 on the CPU."""
    expected, exact = gradients_of(subject, copy.deepcopy(subject.model).double())
    found, computed = gradients_of(subject, subject.on_device)
    require(computed.keys() == exact.keys(), "other parameters have gradients than on the CPU")
    require(bool(exact), "no parameter has a gradient")
    output = require_close(found, expected, OUTPUT_BOUND, "logits")
    total = torch.stack([value.norm() for value in exact.values()]).norm()
    parts = {n: ((computed[n] - exact[n]).norm() / max(exact[n].norm(), 1e-2 * total)).item() for n in exact}
    worst = max(parts, key=lambda name: parts[name])
    require(
        parts[worst] <= GRADIENT_BOUND,
        f"the gradient of {worst} is off by {parts[worst]:.1e} of its norm, and at most {GRADIENT_BOUND:.0e} is right",
    )
    return {"output": output, "gradient": parts[worst]}


def half(subject: Subject, dtype: torch.dtype) -> dict[str, float]:
    """Training in half precision stays finite and moves the adapter, in float16 with a scaler."""
    model = subject.moved(subject.model).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    scaler = torch.amp.GradScaler(subject.device.type, enabled=dtype == torch.float16)
    labels, taken, first = subject.labels.to(subject.device), 0, None
    for _ in range(MOST_STEPS):
        with torch.autocast(subject.device.type, dtype):
            loss = F.cross_entropy(subject.logits(model).float(), labels)
        require(bool(loss.isfinite()), f"the loss is {loss.item()} after {taken} steps")
        first = loss.item() if first is None else first
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken += scaler.get_scale() >= scale
        if taken == STEPS:
            break
    require(taken > 0, f"the scaler skipped all of {MOST_STEPS} steps: gradients are not finite")
    bad = [name for name, p in trained.items() if not p.isfinite().all()]
    require(not bad, f"parameters are not finite after {taken} steps: {', '.join(bad[:2])}")
    require(any(not torch.equal(before[name], p) for name, p in trained.items()), "no parameter has moved")
    return {"first": first or 0.0, "last": loss.item(), "steps": taken}


def saving(subject: Subject) -> dict[str, float]:
    """An adapter saved on one device is the same on the other."""
    found = {}
    for name, source, base in (
        ("to_cpu", subject.on_device, copy.deepcopy(subject.base)),
        ("to_device", subject.model, subject.moved(subject.base)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
        where = next(base.parameters()).device.type
        devices = {p.device.type for p in loaded.parameters()}
        require(devices == {where}, f"loaded into a model on {where}, parameters lie on {', '.join(sorted(devices))}")
        saved, read = get_peft_model_state_dict(source), get_peft_model_state_dict(loaded)
        require(saved.keys() == read.keys(), f"{name}: other tensors are loaded than were saved")
        other = [key for key in saved if not torch.equal(saved[key].cpu(), read[key].cpu())]
        require(not other, f"{name}: loaded tensors differ from the saved: {', '.join(other[:2])}")
        found[name] = require_close(
            subject.evaluated(loaded), subject.evaluated(source), SAME_BOUND, f"{name}: logits of the loaded model"
        )
    return found


def disabling(subject: Subject) -> dict[str, float]:
    """Switched off, the model is the base model bit for bit, and after that again the adapted one."""
    model = subject.on_device
    base = subject.moved(subject.base).requires_grad_(False)
    before = subject.evaluated(model)
    with model.disable_adapter():
        off = subject.evaluated(model)
    plain = subject.base_logits(base)
    require(torch.equal(off, plain), f"switched off, logits differ from the base's by {distance(off, plain):.1e}")
    require(torch.equal(subject.evaluated(model), before), "switched on again, logits are others")
    return {"changes": distance(before, plain)}


def merging(subject: Subject) -> dict[str, float]:
    """The merged model computes the same, and so does the unmerged one, bit for bit."""
    if not merges(subject.method):
        return {}
    model = subject.moved(subject.model)
    before = subject.evaluated(model)
    merged = subject.moved(model).merge_and_unload()
    found = require_close(subject.evaluated(merged), before, SAME_BOUND, "logits of the merged model")
    if subject.known is not None:
        model.merge_adapter()
        model.unmerge_adapter()
        require(torch.equal(subject.evaluated(model), before), "unmerged again, logits are others")
    return {"merged": found}


def mixing(subject: Subject) -> dict[str, float]:
    """Each sample of a mixed batch goes through its adapter; not all methods of peft's can."""
    if subject.video or subject.known is None:
        return {}
    model = subject.with_second()
    names = ["default", "__base__", "second", "default"]
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = subject.evaluated(model)
    with model.disable_adapter():
        alone["__base__"] = subject.evaluated(model)
    model.set_adapter("default")
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    mixed = subject.evaluated(model, adapter_names=names)
    return {"mixed": require_close(mixed, expected, SAME_BOUND, "logits of the mixed batch")}


class _Pictures(Dataset[dict[str, Any]]):
    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def __len__(self) -> int:
        return 2 * BATCH

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.subject.pixels[index % BATCH] * (1.0 + index // BATCH)
        return {"pixel_values": pixels, "labels": self.subject.labels[index % BATCH]}


def caching(subject: Subject) -> dict[str, float]:
    """Features of the frozen part, computed on the device, are read on the CPU."""
    if subject.known is None or subject.known.gradients == "full" or subject.video:
        return {}
    pictures, cpu = _Pictures(subject), copy.deepcopy(subject.model).eval()
    with tempfile.TemporaryDirectory() as folder:
        writer = FeatureCache(subject.moved(subject.model).eval(), folder, batch_size=BATCH, progress=False)
        writer.cached(pictures, key="pictures")
        writer.close()
        reader = FeatureCache(cpu, folder, batch_size=BATCH, read_only=True, progress=False)
        features = reader.cached(pictures, key="pictures")
        batch = features.collate(features.__getitems__(list(range(BATCH))))
        with torch.no_grad():
            found = cpu(**batch).logits
        reader.close()
    return {"cached": require_close(found, subject.evaluated(cpu), SAME_BOUND, "logits from cached features")}


CHECKS: dict[str, Callable[[Subject], dict[str, float]]] = {
    "numbers": numbers,
    "bfloat16": partial(half, dtype=torch.bfloat16),
    "float16": partial(half, dtype=torch.float16),
    "saving": saving,
    "disabling": disabling,
    "merging": merging,
    "mixing": mixing,
    "caching": caching,
}


def check(method: str, model: str, device: torch.device, smoke: bool) -> dict[str, Any]:
    """All checks of a method on a model: what they measured, what they found wrong, and what was refused and why."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        subject = Subject(method, model, device, smoke)
    except ValueError as refusal:  # the method has nothing to do on this model, as it says itself
        return {"refused": {"adapting": told(refusal)}}
    found: dict[str, Any] = {}
    refused, failed = {}, {}
    for name, run in CHECKS.items():
        try:
            found[name] = run(subject)
        except ValueError as refusal:
            refused[name] = told(refusal)
        except AssertionError as error:
            failed[name] = str(error)
        except RuntimeError as error:
            if device.type == "cuda" and "CUDA error" in str(error):  # nothing after it would be true
                raise
            failed[name] = told(error)
        except Exception as error:  # the other checks may still say something
            failed[name] = told(error)
    return {**found, "refused": refused, "failed": failed}


def cases(device: torch.device, smoke: bool, methods: Sequence[str] = METHODS) -> list[Case]:
    """Every method on every model, model by model."""
    return [
        Case("right", f"{model}/{method}", partial(check, method, model, device, smoke))
        for model in REAL
        for method in methods
    ]
