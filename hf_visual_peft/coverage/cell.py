"""One cell of the matrix: a method on an architecture, through everything that a user does with an adapter."""

from __future__ import annotations

import copy
import re
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ..backbones.finding import find_backbone
from ..backbones.found import carry_over
from ..backbones.frozen_norms import freeze_norms
from ..core.calibration import calibrate
from ..core.registry import Method
from ..peft_methods.methods import PeftMethod
from .sizes import small_config_for
from .tiny import Size, TinyModel


Status = Literal["works", "not applicable", "skipped", "fails"]

TOLERANCE = 1e-5  # of the output's scale, for a merged model in float32
LEAST = 1e-5  # smallest change of the output, relative to its scale, by two steps of the adapter alone
FRAMES = 2
STEP = 0.1  # length of a training step, whatever the gradient's: random models have tiny and huge ones
_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Cell:
    """The result of a method on an architecture.

    Attributes:
        status: *works*; *not applicable*, if the method or the library refused before any work; *skipped*, if a
            package is missing; or *fails*.
        reason: why it does not work, or a restriction if it does.
    """

    status: Status
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The inverse of `str`.

        Raises:
            ValueError: the text does not start with a known status.
        """
        status, _, reason = text.partition(": ")
        if status not in ("works", "not applicable", "skipped", "fails"):
            raise ValueError(f"{text!r} is not a cell: it must start with works, not applicable, skipped or fails.")
        return cls(status, reason)  # type: ignore[arg-type]


class _Refusal(Exception):  # noqa: N818
    """The library refused the method on this model."""


class _Check(Exception):  # noqa: N818
    """An adapted model does not behave as promised."""


def first_sentence(message: str) -> str:
    """The first sentence, without its full stop, on one line."""
    return re.split(r"\.(?=\s|$)", " ".join(message.split()), maxsplit=1)[0]


def broken(error: BaseException) -> str:
    """An unexpected exception in a few words."""
    return f"{type(error).__name__}: {first_sentence(str(error))[:300]}"


def is_ours(error: BaseException) -> bool:
    """Whether this library refused something: a `ValueError` that its own code raised."""
    last = list(traceback.walk_tb(error.__traceback__))[-1:]
    where = [frame.f_globals.get("__name__", "") for frame, _ in last]
    return isinstance(error, ValueError) and any(name.startswith(f"{_PACKAGE}.") for name in where)


def what_went_wrong(error: BaseException) -> str:
    """The message of a refusal by this library, in a sentence; any other exception in a few words."""
    return first_sentence(str(error)) if is_ours(error) else broken(error)


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returned, however deep."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in tensors_of(item)]
    return []


class _Subject:
    """A model with its arguments, for one method: images, or videos if the method takes them."""

    def __init__(self, tiny: TinyModel, method: Method | PeftMethod, batch: int = 2) -> None:
        self.tiny = tiny
        self.batch = batch
        self.makes_videos = method.video and not tiny.video
        self.before_norms = isinstance(method, Method) and bool(method.config_cls.frames_meet_before_norms)  # type: ignore[attr-defined]

    def arguments(self, size: Size | None) -> dict[str, Any]:
        if not self.makes_videos:
            return self.tiny.arguments(self.batch, size)
        made = self.tiny.arguments(self.batch * FRAMES, size)
        if "pixel_values" in made:
            made["pixel_values"] = made["pixel_values"].unflatten(0, (self.batch, FRAMES))
        return made

    def call(self, model: nn.Module, size: Size | None = None) -> list[Tensor]:
        return tensors_of(self.tiny.call(model, self._in_dtype_of(model, self.arguments(size))))

    @torch.no_grad()
    def outputs(self, model: nn.Module, size: Size | None = None) -> list[Tensor]:
        return self.call(model.eval(), size)

    def _in_dtype_of(self, model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        cast = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
        return {name: cast(value) for name, value in arguments.items()}

    @torch.no_grad()
    def outputs_of_base(self, base: nn.Module, size: Size | None = None) -> list[Tensor]:
        """The base model's output for images, or for videos whose frames are averaged before its heads or norms."""
        arguments = self.arguments(size)
        if not self.makes_videos or "pixel_values" not in arguments:
            return tensors_of(self.tiny.call(base, arguments))
        arguments["pixel_values"] = arguments["pixel_values"].flatten(0, 1)
        with mean_over_frames(base, self.batch, self.before_norms):
            return tensors_of(self.tiny.call(base, arguments))


@contextmanager
def mean_over_frames(base: nn.Module, batch: int, before_norms: bool) -> Iterator[None]:
    """Average the frames of videos before the heads of a model, or before the norms, inside the context.

    Args:
        base: whose batches are the frames of all videos.
        batch: videos.
        before_norms: `frames_meet_before_norms` of a method's config.
    """

    def mean(module: nn.Module, args: tuple) -> tuple:
        if len(args[0]) == batch:
            return args
        return (args[0].unflatten(0, (batch, FRAMES)).mean(dim=1), *args[1:])

    backbone = find_backbone(base)
    paths = (*(backbone.final_norms if before_norms and backbone.heads else ()), *backbone.heads)
    handles = [base.get_submodule(path).register_forward_pre_hook(mean) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_cell(method: Method | PeftMethod, tiny: TinyModel, base: nn.Module, alone: bool = False) -> Cell:
    """Adapt, train a step, switch off, save, load, merge, and take another image size.

    Args:
        method: to try, on a copy of the model.
        tiny: the architecture.
        base: a model of it that was never called, as `tiny.model()` makes one.
        alone: whether the adapter trains without the task head, and must change the output by itself; then refusals by
            other libraries make the cell fail.

    Returns:
        The result. Only a `ValueError` from `get_peft_model` or `calibrate` makes a cell not applicable; for a method
        of peft, any exception in peft's code.
    """
    torch.manual_seed(2)
    stage = ["adapting"]
    try:
        return Cell("works", _live(method, tiny, base, stage, alone))
    except _Refusal as refusal:
        if alone and refusal.__cause__ is not None and not is_ours(refusal.__cause__):
            return Cell("fails", f"{stage[-1]}: {broken(refusal.__cause__)}")
        return Cell("not applicable", first_sentence(str(refusal)))
    except _Check as check:
        return Cell("fails", f"{stage[-1]}: {check}")
    except Exception as error:  # any error in any method must become a cell, so that the others still run
        if isinstance(method, PeftMethod) and not alone:
            return Cell("not applicable", f"peft, {stage[-1]}: {broken(error)}")
        return Cell("fails", f"{stage[-1]}: {broken(error)}")


def accept(method: Method | PeftMethod, model: nn.Module) -> Cell:
    """Adapt a model, for example on the meta device, without running it.

    Returns:
        A cell that works if nothing refuses, is not applicable if this library refuses, and else fails.
    """
    try:
        get_peft_model(model, _config(method, model, alone=True))
    except Exception as error:  # any, see `run_cell`
        return Cell("not applicable" if is_ours(error) else "fails", what_went_wrong(error))
    return Cell("works")


def _live(method: Method | PeftMethod, tiny: TinyModel, base: nn.Module, stage: list[str], alone: bool) -> str:
    """What a user does with an adapter; the restriction under which all of it works, empty where there is none."""
    subject = _Subject(tiny, method)
    model = _adapted(method, subject, base, alone)
    # frozen as in the adapted model: torch rounds some products differently if a factor requires a gradient
    reference = copy.deepcopy(base).requires_grad_(False)
    before = subject.outputs_of_base(reference)

    stage.append("training")
    started = subject.outputs(model) if alone else []
    _train_a_step(model, subject, method)
    trained = subject.outputs(model)
    if alone:
        moved = _distance(trained, started)
        _require(moved >= LEAST, f"two steps move the output by {moved:.0e} of its scale")
    _require(not _equal(trained, before), "the trained adapter changes nothing")

    stage.append("disable_adapter")
    with model.disable_adapter():
        _require_equal(subject.outputs(model), before, "the base model's output")

    stage.append("save and load")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        # trainable as the saved one, for the same reason
        loaded = PeftModel.from_pretrained(copied(base), folder, is_trainable=True)
    _require_equal(subject.outputs(loaded), trained, "the saved model's output")

    restriction = ""
    if tiny.other_size:
        stage.append("another image size")
        restriction = _refused_size(model, subject, reference, tiny.other_size)

    if method.mergeable:
        stage.append("merging")
        restriction = "; ".join(filter(None, (restriction, _refused_merge(model, subject, method, alone))))
    return restriction


def _config(method: Method | PeftMethod, model: nn.Module, alone: bool) -> Any:
    """The config of a method; the task head stays frozen if the adapter is alone and does not train modules."""
    given: dict[str, Any] = {"modules_to_save": []} if alone and not method.whole_modules else {}
    return small_config_for(method, model, **given)


def copied(base: nn.Module) -> nn.Module:
    """A copy of a model, in which nothing has to be found again."""
    with suppress(Exception):  # any: it is raised again where it belongs
        find_backbone(base)
    model = copy.deepcopy(base)
    carry_over(base, model)
    return model


def _adapted(method: Method | PeftMethod, subject: _Subject, base: nn.Module, alone: bool) -> PeftModel:
    """The model with a random adapter, calibrated if its method chooses from data.

    Raises:
        _Refusal: the library refuses the method on this model.
    """
    try:
        if isinstance(method, PeftMethod):
            try:
                config = _config(method, base, alone)
            except (KeyError, TypeError, AttributeError) as error:  # of this library's code
                raise _Check(broken(error)) from error
            model = get_peft_model(copied(base), config)
            freeze_norms(model)
            return model
        config = _config(method, base, alone)
        if hasattr(config, "prompt_size"):  # tiny models may say another size than their images have
            sizes = (t.shape[-2:] for t in subject.arguments(None).values() if isinstance(t, Tensor) and t.ndim > 3)
            config.prompt_size = next((list(size) for size in sizes), None)
        model = get_peft_model(copied(base), config)
        if method.calibrated:
            batch = _Subject(subject.tiny, method, batch=4).arguments(None) | {"labels": torch.tensor([0, 1, 0, 1])}
            calibrate(model, [batch], max_batches=1, progress=False)
    except ValueError as error:
        raise _Refusal(str(error)) from error
    return model


def _train_a_step(model: PeftModel, subject: _Subject, method: Method | PeftMethod) -> None:
    """Two steps of SGD, which change the loss and the adapter, and no parameter that is frozen."""
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _require(bool(trained), "nothing is trainable")
    started = {name: p.detach().clone() for name, p in trained.items()}

    def loss() -> Tensor:
        torch.manual_seed(3)
        outputs = subject.call(model)  # against random targets, as the mean square of a normed output hardly moves
        return torch.stack([(tensor - torch.randn_like(tensor)).square().mean() for tensor in outputs]).sum()

    model.train()
    first = loss()
    _require(bool(first.isfinite()), "the loss is not finite")
    first.backward()
    gradients = [p.grad for p in trained.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, error_if_nonfinite=True).item()
    _require(norm > 0, "no trainable parameter has a gradient")
    optimizer = torch.optim.SGD(trained.values(), lr=STEP / norm)
    optimizer.step()
    second = loss()
    _require(bool(second.isfinite()), "the loss is not finite after a step")
    _require(bool(second != first), "a step does not change the loss")
    optimizer.zero_grad()
    second.backward()
    torch.nn.utils.clip_grad_norm_(trained.values(), norm)  # so that it is not longer than the first
    optimizer.step()
    moved = [name for name, p in trained.items() if not torch.equal(p, started[name])]
    prefix = method.prefix if isinstance(method, PeftMethod) else f"{method.name}_"
    own = moved if method.whole_modules else [name for name in moved if f".{prefix}" in name]
    _require(bool(own), "a step moves no parameter of the adapter")
    current = dict(model.named_parameters())
    drifted = [name for name, value in frozen.items() if not torch.equal(current[name], value)]
    _require(not drifted, f"a step moves frozen parameters, {', '.join(drifted[:2])}")


def _refused_size(model: PeftModel, subject: _Subject, reference: nn.Module, size: Size) -> str:
    """Why the adapted model takes no images of that size, as its error says; empty if it does.

    Raises:
        _Check: the model takes them, but its output is wrong.
    """
    before = subject.outputs_of_base(reference, size)
    try:
        found = subject.outputs(model, size)
    except ValueError as error:
        return f"no other image size: {first_sentence(str(error))}"
    _require(all(tensor.isfinite().all() for tensor in found), "the output is not finite")
    _require([t.shape for t in found] == [t.shape for t in before], "the output has a different shape from the base's")
    with model.disable_adapter():
        _require_equal(subject.outputs(model, size), before, "the base model's output")
    return ""


def _refused_merge(model: PeftModel, subject: _Subject, method: Method | PeftMethod, alone: bool) -> str:
    """Why the adapter does not merge here, as its error says; empty if it does.

    In double precision, so that differences come from the algebra: norms of small variance amplify rounding errors.

    Raises:
        _Check: the merged model computes something else.
    """
    if alone or not isinstance(method, PeftMethod):  # some of these keep tensors that do not follow
        model.double()
    before = subject.outputs(model)
    try:
        merged = model.merge_and_unload()
    except ValueError as error:
        if not str(error).startswith("Cannot merge"):  # of a layer that merges elsewhere
            raise
        return f"not merged: {first_sentence(str(error))}"
    except Exception as error:  # of peft's code, which cannot put back heads of several modules
        if not isinstance(method, PeftMethod):
            raise
        return f"not merged: {broken(error)}"
    _require_close(subject.outputs(merged), before)
    return ""


def _equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _Check(message)


def _require_equal(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    if not _equal(found, expected):
        raise _Check(f"differs from {what} by {_distance(found, expected):.0e} of its scale")


def _require_close(found: list[Tensor], expected: list[Tensor]) -> None:
    distance = _distance(found, expected)
    _require(distance <= TOLERANCE, f"differs from the output before by {distance:.0e} of its scale")


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of two outputs, relative to the scale of its tensor."""
    _require([t.shape for t in found] == [t.shape for t in expected], "the output has a different shape")
    distances = [0.0]
    for a, b in zip(found, expected, strict=True):
        if not torch.equal(a, b):
            distances.append(((a - b).abs().max() / b.abs().max()).item())
    return max(distances)
