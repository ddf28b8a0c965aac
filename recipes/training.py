"""The training loop: steps, evaluation, checkpoints, and early ends."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from augmentation import Mixing
from checkpoints import Checkpoints, Progress, trainable_state
from labels import Loss
from optimization import MovingAverage, follow_schedule
from output_folder import earlier_output
from screen import Screen
from stopping import DivergedError, Finite, InterruptedBySignal, Interruption
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_visual_peft import auxiliary_loss


def rank_of(found: dict[str, float], criterion: str) -> list[float]:
    """The rank of an evaluation, the greater the better: the criterion, then the lower loss."""
    return [-found["loss"] if criterion == "loss" else found[criterion], -found["loss"]]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a program that calls a recipe is told, or does in its place.

    Attributes:
        prepared: called before training, with the number of trained parameters and the names of the splits.
        evaluated: called after each evaluation on validation, with its score (the higher the better, so that a loss
            is negative) and the number of steps so far.
        pretrained: called in place of `AutoModelForImageClassification.from_pretrained`.
    """

    prepared: Callable[[int, Sequence[str]], None] = lambda count, splits: None
    evaluated: Callable[[float, int], None] = lambda score, step: None
    pretrained: Callable[..., Any] | None = None


@dataclasses.dataclass
class Training:
    """A run from `progress` to its last step.

    Attributes:
        accelerator: of the run.
        args: flags of the recipe.
        model: the one that is saved.
        wrapped: as the accelerator prepared it.
        optimizer: prepared.
        scheduler: prepared.
        loader: of the training images, prepared.
        images: the training images, whose epoch is set here.
        evaluate: returns the metrics on validation; None without a validation split.
        checkpoints: writes them.
        screen: shows the progress.
        max_steps: optimizer steps of the whole run.
        loss: of logits and labels.
        inputs: extra arguments of the model.
        mixing: of images within a batch.
        average: moving average of the trained parameters, for evaluation; None for none.
        progress: of the run.
        best_state: weights of the best evaluation; None if the last are kept.
    """

    accelerator: Accelerator
    args: argparse.Namespace
    model: nn.Module
    wrapped: nn.Module
    optimizer: Any
    scheduler: Any
    loader: DataLoader[Any]
    images: Any
    evaluate: Callable[[], dict[str, float]] | None
    checkpoints: Checkpoints
    screen: Screen
    max_steps: int
    loss: Loss
    inputs: dict[str, Any]
    mixing: Mixing
    average: MovingAverage | None
    progress: Progress = dataclasses.field(default_factory=Progress)
    best_state: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self.trainable = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        self.finite = Finite(self.accelerator, self.model)
        self.batch: dict[str, Any] | None = None  # the last one
        self.losses: list[Tensor] = []  # of the steps since the last check
        self.shown: list[float] = []  # of the steps since the last report
        self.saved: tuple[int, int] | None = None  # step and evaluation of the last checkpoint
        every = self.args.checkpointing_steps
        self.save_steps, self.save_epochs = (int(every), 0) if every.isdigit() else (0, int(every == "epoch"))
        self.eval_steps = self.args.eval_steps or 0
        self.eval_epochs = 0 if self.eval_steps else self.args.eval_epochs or 1

    def resume(self, name: str) -> None:
        """Continue from a checkpoint: its path, `latest`, or `auto`, which starts a new run if there is none.

        If the number of steps has changed, the rest follows the schedule of the new length.
        """
        folder = self.checkpoints.folder
        if name == "auto" and not self.checkpoints.all():
            if left := earlier_output(folder):
                raise ValueError(
                    f"--resume_from_checkpoint auto: {folder} has {left[0].name} of a run without checkpoints, which "
                    "cannot continue; delete it with --overwrite_output_dir, or choose another --output_dir."
                )
            return
        self.progress, self.best_state = self.checkpoints.load("latest" if name == "auto" else name)
        tell = self.accelerator.print
        tell(f"Continuing after step {self.progress.step} of {self.max_steps}.")
        if self.checkpoints.steps_before != self.max_steps:
            follow_schedule(self.optimizer, self.scheduler.scheduler)
            tell(
                f"The run had {self.checkpoints.steps_before} steps. From now on it has the learning rates of a run "
                f"of {self.max_steps}: now {max(self.scheduler.get_last_lr()):.3g}."
            )

    def run(self) -> None:
        """Train to the last step or to an early stop.

        Raises:
            DivergedError: the loss or the weights are not finite; they are not saved.
            SystemExit: a signal stopped the run.
        """
        progress = self.progress
        self.started = time.perf_counter() - progress.seconds
        self.screen.start(self.max_steps, progress.step)
        with Interruption(self.accelerator) as self.interruption:
            try:
                if progress.step:
                    self.evaluate_and_save(after_resuming=True)
                while not self.is_over():
                    self.epoch()
                self.check()
            except InterruptedBySignal:
                self.save_and_end()
            except DivergedError as error:
                raise self.explained(error) from None
            except RuntimeError:
                if self.interruption.number is None:
                    raise
                self.save_and_end()  # the signal has also ended the processes that load images
        self.screen.close()

    def explained(self, error: DivergedError) -> DivergedError:
        """The error with the step, the last good checkpoint and a remedy."""
        whole = self.checkpoints.all()
        return DivergedError(
            f"The run diverged: {error} ({self.progress.step} of {self.max_steps} steps are done). Nothing of it is "
            f"saved; the last good checkpoint is {whole[-1] if whole else 'none'}. Lower --learning_rate, or clip by "
            "--max_grad_norm 1."
        )

    def check_result(self) -> None:
        """Check the weights before saving, and the model's output with them."""
        try:
            self.finite.check_weights(self.progress.step)
            self.check_outputs()
        except DivergedError as error:
            raise self.explained(error) from None

    @torch.no_grad()
    def check_outputs(self) -> None:
        """Check the model's output for a training batch: finite weights may still be too large."""
        batch = self.batch or {k: v for k, v in next(iter(self.loader)).items() if k != "labels"}
        self.wrapped.eval()
        largest = self.wrapped(**batch, **self.inputs).logits.float().abs().max()
        self.wrapped.train()
        if self.accelerator.gather(largest.isfinite().logical_not().view(1)).any():
            raise DivergedError(f"the model's output is not finite at step {self.progress.step}")

    def is_over(self) -> bool:
        """Whether the last step is done, or patience has run out."""
        patience = self.args.early_stopping_patience
        return self.progress.step >= self.max_steps or bool(patience and self.progress.stale >= patience)

    def epoch(self) -> None:
        """The rest of an epoch."""
        progress, accelerator = self.progress, self.accelerator
        self.images.epoch = progress.epoch
        self.loader.set_epoch(progress.epoch)  # type: ignore[attr-defined]
        batches: Any = self.loader
        if progress.batch:
            skip = getattr(self.loader, "after", None)  # of a stream
            batches = skip(progress.batch) if skip else accelerator.skip_first_batches(batches, progress.batch)
        if progress.batch == 0:
            progress.train_loss = [0.0, 0]
        self.wrapped.train()
        group: list[tuple[Tensor, int]] = []  # loss and number of images of the batches of a step
        for batch in batches:
            is_last = accelerator.gradient_state.end_of_dataloader
            with accelerator.accumulate(self.wrapped):
                group.append(self.backward(batch, progress.batch + len(group)))
                if accelerator.sync_gradients:
                    norm = self.finish_gradients(sum(count for _, count in group))
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            if not accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
                if self.average is not None:
                    self.average.update()
            progress.step += 1
            progress.batch += len(group)
            if is_last:
                progress.epoch, progress.batch = progress.epoch + 1, 0
            images = sum(count for _, count in group)
            self.losses.append(sum(loss * count for loss, count in group) / images)  # type: ignore[arg-type]
            self.screen.step(images * accelerator.num_processes)
            group = []
            if progress.step % self.args.logging_steps == 0:
                self.report(norm)
            self.evaluate_and_save()
            if self.interruption.asked():
                raise InterruptedBySignal
            if self.is_over():
                break

    def backward(self, batch: dict[str, Any], number: int) -> tuple[Tensor, int]:
        """Add the gradients of a batch; return its loss and size."""
        labels = batch.pop("labels")
        count, self.batch = len(labels), dict(batch)
        if self.mixing.kinds:
            drawn = (self.progress.epoch, number, self.accelerator.process_index)
            batch["pixel_values"], labels = self.mixing(batch["pixel_values"], labels, drawn)
        loss = self.loss_of(batch, labels)
        # batches are weighted by their images, because the last one of an epoch may be smaller
        share = count / self.args.per_device_train_batch_size
        self.accelerator.backward(loss * share if share != 1 else loss)
        return loss.detach(), count

    def loss_of(self, batch: dict[str, Any], labels: Tensor) -> Tensor:
        """The loss of a batch, with that of the method."""
        logits = self.wrapped(**batch, **self.inputs).logits.float()
        loss = self.loss(logits, labels)
        return loss + auxiliary_loss(self.wrapped, labels, lambda logits: self.loss(logits.float(), labels))

    def finish_gradients(self, images: int) -> Tensor | None:
        """Average the gradients over the images of a step, clip them, and return their norm if it is shown.

        accelerate divides by the number of batches that a step should have; the last of an epoch may have fewer.
        """
        args, accelerator = self.args, self.accelerator
        expected = args.gradient_accumulation_steps * args.per_device_train_batch_size
        factor: float | Tensor = expected / images
        if accelerator.num_processes > 1:
            total = accelerator.reduce(torch.tensor(float(images), device=accelerator.device), "sum")
            factor = expected * accelerator.num_processes / total
        divided = accelerator.distributed_type == DistributedType.DEEPSPEED  # by itself, in groups that are whole
        if not divided and not (isinstance(factor, float) and factor == 1):
            for parameter in self.trainable:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        will_show = (self.progress.step + 1) % args.logging_steps == 0
        if not (args.max_grad_norm or will_show):
            return None
        return accelerator.clip_grad_norm_(self.trainable, args.max_grad_norm or float("inf"))

    def check(self) -> None:
        """Check the losses since the last check, and the weights."""
        if self.losses:
            values = self.finite.check_losses(self.losses, self.progress.step)
            self.losses.clear()
            self.shown += values
            for value in values:
                self.progress.train_loss = [self.progress.train_loss[0] + value, self.progress.train_loss[1] + 1]
        self.finite.check_weights(self.progress.step)

    def report(self, norm: Tensor | None) -> None:
        """Show and log the last steps."""
        self.check()
        loss, rate = sum(self.shown) / len(self.shown), max(self.scheduler.get_last_lr())
        self.shown.clear()
        figures = {"train_loss": loss, "learning_rate": rate, "grad_norm": float(norm) if norm is not None else 0.0}
        figures |= self.screen.report(self.progress.step, self.epoch_number(), *figures.values())
        self.accelerator.log(figures, step=self.progress.step)

    def epoch_number(self) -> int:
        """The epoch of the last step, from 1."""
        return self.progress.epoch + (self.progress.batch > 0)

    def is_due(self, every_steps: int, every_epochs: int) -> bool:
        """Whether an action that happens every so many steps or epochs is due now."""
        progress = self.progress
        if every_steps and progress.step % every_steps == 0:
            return True
        return bool(every_epochs) and progress.batch == 0 and progress.epoch % every_epochs == 0

    def evaluate_and_save(self, after_resuming: bool = False) -> None:
        """Evaluate and write a checkpoint, each if it is due."""
        progress, ends = self.progress, self.progress.step >= self.max_steps
        evaluates = self.evaluate is not None and progress.evaluated != progress.step
        evaluates = evaluates and (ends or self.is_due(self.eval_steps, self.eval_epochs))
        saves = self.is_due(self.save_steps, self.save_epochs) or (ends and self.save_epochs > 0)
        if not (evaluates or saves) or (after_resuming and not evaluates):
            return
        self.screen.pause()
        self.check()
        if evaluates:
            self.validate()
        if saves:
            self.save()
        self.screen.resume()

    def validate(self) -> None:
        """Evaluate on validation, and keep the weights if they are the best."""
        args, progress = self.args, self.progress
        assert self.evaluate is not None
        with self.average.in_place() if self.average else contextlib.nullcontext():
            with self.interruption.at_once():
                found = self.evaluate()
            self.accelerator.log({f"eval_{name}": value for name, value in found.items()}, step=progress.step)
            figures = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            self.screen.say(f"Epoch {self.epoch_number()}, step {progress.step}: {figures}")
            rank, best = rank_of(found, args.metric_for_best_model), progress.best
            progress.stale = 0 if best is None or rank > best else progress.stale + 1
            if args.select == "last" or best is None or rank >= best:  # the later one if equal
                progress.kept = {"epoch": self.epoch_number(), "step": progress.step, **found}
                self.best_state = trainable_state(self.model) if args.select == "best" else None
            progress.best = rank if best is None else max(rank, best)
        progress.evaluated = progress.step
        self.wrapped.train()

    def save(self) -> None:
        """Write a checkpoint."""
        if self.args.checkpointing_steps == "no":
            return
        if self.progress.evaluated != self.progress.step:
            self.check_outputs()
        self.progress.seconds = time.perf_counter() - self.started
        self.checkpoints.save(self.progress, self.best_state)
        self.saved = (self.progress.step, self.progress.evaluated)

    def save_and_end(self) -> None:
        """Write a checkpoint if necessary, and end the program because of a signal."""
        if self.saved != (self.progress.step, self.progress.evaluated):
            self.check()
            self.save()
        self.screen.close()
        whole = self.checkpoints.all()
        where = f"--resume_from_checkpoint auto continues from {whole[-1]}" if whole else "no checkpoint is written"
        reason = " (--checkpointing_steps no)" if self.args.checkpointing_steps == "no" else ""
        self.interruption.end(f"step {self.progress.step} of {self.max_steps} was the last; {where}{reason}.")
