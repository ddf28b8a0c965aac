"""Checkpoints for the recipes: they hold only trained weights, and a full disk or a kill never damages the last."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if FSDP2 has divided it among the processes; on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def saved_state(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` for `model.save_pretrained`; on every process.

    For a model with adapters only the trained weights are gathered, not the backbone's shards.
    """
    backbone = set()
    if isinstance(model, PeftModel):
        backbone = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor if name in backbone else whole(tensor) for name, tensor in model.state_dict().items()}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that training changes, on every process: parameters, and buffers such as statistics."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    # the parameters of a quantised adapter are not in its state, which is computed from them
    state |= {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: whole(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def load_trainable(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    if state.keys() != trainable_state(model).keys():
        raise ValueError(f"{source} does not fit the model: it was written with another model or method.")
    now = model.state_dict()
    model.load_state_dict({name: _like(now.get(name), tensor) for name, tensor in state.items()}, strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(_like(parameter, state[name]))


def _like(target: Tensor | None, tensor: Tensor) -> Tensor:
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)


@dataclasses.dataclass
class Progress:
    """The progress of a run.

    Attributes:
        epoch: number of finished epochs.
        batch: number of finished batches of the next epoch.
        step: optimizer steps so far.
        seconds: time so far.
        kept: epoch, step and metrics of the evaluation whose weights are kept.
        best: the rank of the best evaluation so far.
        stale: number of evaluations since then.
        evaluated: the step of the last evaluation.
        train_loss: sum of the losses of the steps of this epoch, or of the last one, and their number.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    kept: dict[str, Any] | None = None
    best: list[float] | None = None
    stale: int = 0
    evaluated: int = 0
    train_loss: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0])


class Checkpoints:
    """Folders `checkpoint-STEP` with the trained weights, the optimizer, the schedule and the random states.

    Each is written to a temporary folder and then renamed: a full disk or a kill leaves the last one intact.

    Args:
        run: settings that must be the same in a run that resumes, by name; `max_steps` may grow.

    Attributes:
        steps_before: `max_steps` of the run that wrote the loaded checkpoint.
    """

    steps_before: int | None = None

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, folder: Path, limit: int, run: dict[str, Any]
    ) -> None:
        self.accelerator, self.model, self.folder, self.limit, self.run = accelerator, model, folder, limit, run
        accelerator.register_save_state_pre_hook(self._write_model)
        accelerator.register_load_state_pre_hook(self._read_model)

    def _write_model(self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights.clear()  # so that accelerate does not write the frozen weights
        if self.accelerator.is_main_process:
            save_file(trainable_state(self.model), Path(folder) / "trainable.safetensors")

    def _read_model(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        load_trainable(self.model, load_file(Path(folder) / "trainable.safetensors"), folder)

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]))

    def save(self, progress: Progress, best_state: dict[str, Tensor] | None) -> None:
        """Write a checkpoint; on every process."""
        main = self.accelerator.is_main_process
        target = self.folder / f"checkpoint-{progress.step}"
        aside = self.folder / f".{target.name}.tmp"
        if main:
            for broken in self.folder.glob(".checkpoint-*.tmp"):
                shutil.rmtree(broken)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(aside))
            if main:
                if best_state is not None:
                    save_file(best_state, aside / "best.safetensors")
                content = {"run": self.run, "progress": dataclasses.asdict(progress)}
                (aside / "progress.json").write_text(json.dumps(content, indent=2, default=sorted), encoding="utf-8")
        except Exception as error:  # a full disk is an OSError here, a RuntimeError in torch.save
            shutil.rmtree(aside, ignore_errors=True)
            whole = self.all()
            raise OSError(
                f"Cannot write {target}: {error}. The last complete checkpoint is {whole[-1] if whole else 'none'}."
            ) from error
        self.accelerator.wait_for_everyone()
        if main:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
            for old in self.all()[: -self.limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self, name: str) -> tuple[Progress, dict[str, Tensor] | None]:
        """Load a checkpoint by path or `latest`; return its progress and the weights of its best evaluation."""
        whole = self.all()
        if name == "latest" and not whole:
            raise ValueError(
                f"--resume_from_checkpoint latest: no checkpoint in {self.folder}. With auto a run starts there."
            )
        path = whole[-1] if name == "latest" else Path(name)
        try:
            content = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"--resume_from_checkpoint {name}: {path} is not a checkpoint of this recipe. Give latest, auto, or "
                f"{self.folder}/checkpoint-STEP."
            ) from error
        now = json.loads(json.dumps(self.run, default=sorted))  # sets, as in peft's configs, as lists
        before = content["run"]
        changed = [f"{k} {old} (now {new})" for k, old, new in differences(before, now) if k != "max_steps"]
        if changed:
            raise ValueError(
                f"{path} comes from a run with {', '.join(changed)}: it cannot continue with other settings."
            )
        if content["progress"]["step"] > now["max_steps"]:
            raise ValueError(
                f"{path} is at step {content['progress']['step']}, and --num_train_epochs or --max_train_steps end "
                f"the run at step {now['max_steps']}: give more."
            )
        self.accelerator.load_state(str(path))
        self.steps_before = before["max_steps"]
        best = path / "best.safetensors"
        return Progress(**content["progress"]), load_file(best) if best.exists() else None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Names and values of what differs; of the fields of one method each by itself."""
    found: list[tuple[str, Any, Any]] = []
    for key, new in now.items():
        old: Any = before.get(key)
        kinds = [value.get("peft_type") if isinstance(value, dict) else None for value in (old, new)]
        if kinds[0] is not None and kinds[0] == kinds[1]:
            found += differences(old, new)
        elif kinds[0] != kinds[1]:
            found.append((f"{key} of", kinds[0], kinds[1]))
        elif old != new:
            found.append((key, old, new))
    return found
