"""The site of a whole module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..backbones.paths import within
from .exchange import Exchange
from .layer import WrappingLayer
from .mixed import BASE, check_samples_first, instead_of_forward
from .module import is_quantised
from .shifts import put
from .site import Placement, Shared, Site


class WholeSite(Site):
    """A whole module: the adapter trains a copy of it, which replaces it. See `whole_module`."""

    trains_copy = True

    def why_not_beside(self, path: str, copied: Sequence[str]) -> str | None:
        """A module of which another copy trains."""
        same = within(path, copied) or next((other for other in copied if within(other, [path])), None)
        return same and f"the method trains {path!r} as a whole anyway. Leave {same!r} out."

    def describe(self, names: Mapping[str, str]) -> str:
        """Which module."""
        return "all of {}"


def whole_module(path: str) -> Placement:
    """The placement that trains a copy of a module.

    Args:
        path: full name of the module.
    """
    return Placement(path, "copy", WholeSite(), _copy_of)


def require_trainable(module: nn.Module) -> None:
    """Refuse a module if no copy of it can be trained.

    Raises:
        ValueError: a weight is quantised.
    """
    for name, part in module.named_modules():
        if is_quantised(part):
            raise ValueError(
                f"Cannot train a copy of {type(module).__name__}: the weight of its {name or 'own'} is quantised. "
                "Leave that module in floating point, or choose a method that adds weights of its own."
            )


def _copy_of(module: nn.Module) -> nn.Module:
    """A copy that can be trained."""
    require_trainable(module)
    return copy.deepcopy(module)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The module with all floating-point tensors in that dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, and statistics of norms, which change while a copy trains."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a tensor of `_state_of` under all its names in the module; other modules keep theirs."""
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    old, new = tensors[name], tensor
    for same in [other for other, value in tensors.items() if value is old]:
        owner, _, last = same.rpartition(".")
        put(module.get_submodule(owner), last, new)
        new = getattr(module.get_submodule(owner), last)


def _count_outputs(module: nn.Module) -> None:
    """Update the number of outputs of linears, because the copy of a head may have more or fewer classes."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.out_features = len(part.weight)


class WholeLayer(WrappingLayer, nn.Module):
    """A module and a copy of it for each adapter.

    Args:
        base_layer: the module.
        exchange: shared with the other adapter layers of the model.
    """

    serves = WholeSite

    @classmethod
    def in_the_way(cls, module: nn.Module) -> nn.Module | None:
        """A copy would have the layers of other adapters in it."""
        inside = (part for part in module.modules() if isinstance(part, BaseTunerLayer))
        return None if isinstance(module, cls) else next(inside, None)

    def __init__(self, base_layer: nn.Module, exchange: Exchange) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._init_layer(exchange)
        self._before_merge: dict[str, Tensor] = {}

    def add_equation(
        self,
        adapter_name: str,
        prefix: str,
        slot: str,
        site: Site,
        equation: nn.Module | None,
        init_weights: bool,
        shared: Shared | None = None,
    ) -> None:
        """Add a copy of the module for an adapter.

        Args:
            adapter_name: whose copy it is.
            prefix: of the method.
            slot: of the method.
            site: this one.
            equation: the copy.
            init_weights: whether the copy keeps its values; else random values are added.
            shared: None.
        """
        assert equation is not None
        if self.merged:  # the copy has the weights of another adapter
            for name, tensor in _state_of(equation).items():
                tensor.data = self._before_merge[name].detach().to(tensor, copy=True)
        super().add_equation(adapter_name, prefix, slot, site, equation, init_weights, shared)

    @property
    def versions(self) -> list[nn.Module]:
        """The module and all copies of it."""
        copies = (e.module for name in self.plans for e in self.equations_of(name))
        return [self.get_base_layer(), *(module for module in copies if module is not None)]

    @property
    def active_name(self) -> str | None:
        """The adapter whose copy runs; `None` where the module itself does."""
        return next((equation.adapter for equation in self._active()), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module or the active copy.

        Raises:
            ValueError: several copies are active.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if parts := self._parts(args):
            return self._mixed_forward(parts, args, kwargs)
        copies = [] if self.merged else list(self._active())
        if len(copies) > 1:
            names = ", ".join(e.adapter for e in copies)
            raise ValueError(f"Only one of {names} can be active: each has a whole {type(self.base_layer).__name__}.")
        if not copies:
            return self.base_layer(*args, **kwargs)
        module: Any = copies[0].module
        return self._in_dtype_of(module, module, *args, **kwargs)

    def _in_dtype_of(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        dtype = next(module.parameters()).dtype
        if dtype == next(self.base_layer.parameters()).dtype or torch.is_autocast_enabled(args[0].device.type):
            return call(*args, **kwargs)
        output = call(*_cast(args, dtype), **_cast(kwargs, dtype))
        return _cast(output, args[0].dtype)

    def _mixed_forward(self, parts: dict[str, list[int]], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module and copies of it, each for a part of the batch.

        They run inside the hooks of the module, so that these see the whole batch once: transformers records hidden
        states there.
        """
        check_samples_first(self.base_layer, args[0])
        base: Any = self.base_layer
        forward = base.forward

        def run(name: str, index: Tensor, *args: Any, **kwargs: Any) -> Any:
            if name == BASE:
                return forward(*args, **kwargs)
            ((_, module, *_),) = self.equations_of(name)
            assert module is not None
            return self._in_dtype_of(module, module.forward, *args, **kwargs)

        with instead_of_forward(base, lambda *args, **kwargs: self._run_parts(parts, run, args, kwargs)):
            return base(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the weights of the active copy into the module.

        Args:
            safe_merge: whether to check them and leave the module unchanged if they are not finite.
            adapter_names: the adapter; the active one by default.

        Raises:
            ValueError: the weights are not finite (with `safe_merge`), or there are several adapters.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.plans]
        if not names:
            return
        if len(names) > 1 or self.merged:
            raise ValueError(f"Cannot merge {', '.join(self.merged_adapters + names)}: each is a whole module.")
        ((_, module, *_),) = self.equations_of(names[0])
        assert module is not None
        new = _state_of(module)
        if safe_merge and not all(value.isfinite().all() for value in new.values()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        for name, tensor in _state_of(self.base_layer).items():
            self._before_merge[name] = tensor
            _put(self.base_layer, name, new[name].detach().to(tensor.dtype))
        _count_outputs(self.base_layer)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the weights of the module."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, tensor in _state_of(self.base_layer).items():
            original = self._before_merge[name]
            original.data = original.to(tensor)  # the model may have been moved since
            _put(self.base_layer, name, original)
        _count_outputs(self.base_layer)
        self._before_merge.clear()
        self.merged_adapters.clear()
