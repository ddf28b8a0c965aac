"""Batches that mix adapters: each sample goes through its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from ..sites import Exchange, VisualTunerLayer
from ..sites.mixed import BASE, check_samples_first, count_rows, instead_of_forward, run_parts
from .labels import check_mixed
from .merging import MergingTuner
from .switching import concerned
from .undoing import Structure


class MixingTuner(MergingTuner):
    """The part of `VisualTuner` that serves `adapter_names`."""

    _exchange: Exchange
    _before: dict[str, Structure]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Send each sample of the batch through its adapter in `adapter_names`.

        Raises:
            TypeError: `adapter_names` is not a list of names.
            ValueError: it does not fit the model or the batch, or the model cannot mix adapters.
        """
        self._before = {}  # who uses an adapter keeps it
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_mixed(names, args, kwargs)
        wrappers = [module for module in concerned(self.model, names) if isinstance(module, ModulesToSaveWrapper)]
        with ExitStack() as stack:
            stack.enter_context(self._exchange.mixing(names))
            for wrapper in wrappers:
                stack.enter_context(instead_of_forward(wrapper, partial(self._run_copies, wrapper)))
            yield

    def _check_mixed(self, names: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(names) - {BASE} - set(self.peft_config))
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        check_mixed(self.model, names)
        given = (kwargs[key] for key in ("pixel_values", *kwargs) if key in kwargs)
        samples = next((value for value in (*args[:1], *given) if isinstance(value, Tensor)), None)
        if samples is None:
            raise ValueError("adapter_names: no tensor among the model's arguments tells the number of inputs.")
        _check_length(names, len(samples))
        layers = [module for module in concerned(self.model, names) if isinstance(module, VisualTunerLayer)]
        in_texts = [layer for layer in layers if layer.exchange.tower == "text"]
        active = [name for layer in in_texts if not layer.disable_adapters for name in layer.active_adapters]
        of_texts = [name for name in (*names, *active) if any(name in layer.plans for layer in in_texts)]
        if of_texts:
            raise ValueError(
                f"adapter_names: the adapter {of_texts[0]!r} acts in the text tower, whose texts are those of all "
                "samples. Activate another one with set_adapter, or use one batch for each adapter."
            )
        if any(layer.merged for layer in layers):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        others = set(names) if len(set(names)) > 1 else set()
        mixing = [each for name in others for layer in layers for each in layer.plans.get(name, ())]
        if any(not each.site.mixes for each in mixing):
            raise ValueError(
                "adapter_names: an adapter takes tokens out of the stream, and samples of other adapters keep theirs. "
                "Use set_adapter and one batch for each adapter."
            )
        if self._exchange.frame_handles:
            raise ValueError("adapter_names: methods for videos cannot mix adapters in a batch. Use set_adapter.")
        config = getattr(self.model, "config", None)
        attentions = kwargs.get("output_attentions")
        if attentions is None:
            attentions = getattr(config, "output_attentions", False)
        in_parts = any(not layer.mixes_by_itself and any(layer.get_base_layer().children()) for layer in layers)
        if attentions and in_parts:
            raise ValueError(
                "output_attentions: a batch that mixes adapters goes through the blocks in parts, whose attentions "
                "are not put together. Leave it False, or use set_adapter and one batch for each adapter."
            )

    def _run_copies(self, wrapper: ModulesToSaveWrapper, *args: Any, **kwargs: Any) -> Any:
        """The forward of a module with copies of adapters, in a mixed batch.

        peft's own code for mixed batches supports only linears and convolutions, and one tensor.
        """
        mixed, original = self._exchange.mixed, wrapper.original_module
        assert mixed is not None
        check_samples_first(original, *args[:1])
        count = count_rows(original, args)
        if len(mixed.names) > 1:  # else it is a part of the batch, for one adapter
            _check_length(mixed.names, count)
        parts: dict[str, list[int]] = {}
        for row, name in enumerate(mixed.of_rows(count, original)):
            parts.setdefault(name if name in wrapper.modules_to_save else BASE, []).append(row)

        def run(name: str, index: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (original if name == BASE else wrapper.modules_to_save[name])(*args, **kwargs)

        return run_parts(original, parts, run, args, kwargs)


def _check_length(names: Sequence[str], inputs: int) -> None:
    if len(names) != inputs:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {inputs} respectively."
        )
