"""The layer around a single linear, norm or convolution, for the sites of `module_sites`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..backbones.backbone import is_pointwise, linear_sizes, unwrapped
from ..backbones.operations import is_norm, is_operation
from .affine import has_channels_first, is_activated, is_linear_in_weight
from .exchange import Exchange
from .layer import Equation, VisualTunerLayer, WrappingLayer, call_equation
from .shifts import Flow, Place, place_for_shift, put
from .site import ModuleSite


class _Weights(NamedTuple):
    """Weight and bias of one module."""

    module: nn.Module
    weight: Tensor
    bias: Tensor | None


class ModuleLayer(WrappingLayer, nn.Module):
    """A linear, norm or convolution with equations on its weight and bias and on its output.

    Equations always see channels last. They treat a 1 x 1 convolution as a linear. An equation that can be merged has
    `fold(weight, bias, *shared) -> (weight, bias)`, where `bias` may be None.

    Args:
        base_layer: the module.
        exchange: shared with the other adapter layers of the model.
    """

    serves = ModuleSite
    mixes_by_itself = True

    @classmethod
    def in_the_way(cls, module: nn.Module) -> nn.Module | None:
        """It goes around layers of other libraries at linears, too."""
        around = not isinstance(module, VisualTunerLayer) and linear_sizes(unwrapped(module)) is not None
        return None if around else super().in_the_way(module)

    @staticmethod
    def made_from(module: nn.Module) -> nn.Module:
        """A linear, if the module does the same."""
        return as_linear(module)

    def __init__(self, base_layer: nn.Module, exchange: Exchange) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._init_layer(exchange)
        # by name; functions, because an adapter may train a copy, which then runs
        self.followers: dict[str, Callable[[], nn.Module]] = {}
        self.places: dict[nn.Module, Place] = {}  # for shifts of modules without a bias; found before a merge
        self.given: list[nn.Module] = []  # modules to which merging gave a bias
        self._elsewhere: dict[nn.Module, Tensor] = {}  # shifts to be moved to these places
        self._rows: Tensor | None = None  # of the batch, while they run by themselves
        self._activated: bool | None = None  # once it was looked for
        self._before_merge: list[_Weights] = []
        self._originals: list[tuple[nn.Module, str, Tensor | None]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output with the equations of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        if parts := self._parts(args):
            return self._run_parts(parts, self._part_forward, args, kwargs)
        if self._norm_does_it() or self._activation_follows():
            return evaluate_changed(self.get_base_layer(), self._active(), args[0])
        output = self._base_output(*args, **kwargs)
        dim = channel_dim(self.get_base_layer(), output.ndim)
        output = moved(output, dim, -1)
        for each in self._active():
            if each.site.around:
                assert each.module is not None
                read: tuple[Any, ...] = (moved(args[0], dim, -1),) if each.site.reads_input else ()
                if each.site.reads_map:
                    read = (*read, each.site.layout(read[0], self.exchange.grid, self._rows))
                output = self._left(each, call_equation(self, each.module, output, *read, *each.shared))
        return moved(output, -1, dim)

    def _part_forward(self, name: str, index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The samples of one adapter in a batch that mixes several."""
        self._rows = index
        try:
            return self.forward(*args, **kwargs)
        finally:
            self._rows = None

    def _norm_does_it(self) -> bool:
        """Whether only scales and shifts are active, in the precision of a layer norm that can apply them itself."""
        norm, equations = self.get_base_layer(), list(self._active())
        if type(norm) is not nn.LayerNorm or norm is not self.base_layer or norm.weight is None or not equations:
            return False
        if norm._forward_pre_hooks or norm._forward_hooks or "forward" in norm.__dict__:  # which must be called
            return False
        return all(e.site.channelwise and e.module.scale.dtype == norm.weight.dtype for e in equations)  # type: ignore[union-attr]

    def _activation_follows(self) -> bool:
        """Whether the module is a norm with an activation, and only equations that act before that are active."""
        if self._activated is None:
            self._activated = is_activated(self.get_base_layer())
        if not self._activated:
            return False
        equations = list(self._active())
        return len(equations) > 0 and all(not e.site.around or hasattr(e.module, "fold") for e in equations)

    def _base_output(self, *args: Any, **kwargs: Any) -> Tensor:
        equations = [e for e in self._active() if not e.site.around]
        return self._changed_output(equations, *args, **kwargs)

    def _changed_output(self, equations: list[Equation], *args: Any, **kwargs: Any) -> Tensor:
        """The output with the weight and bias that equations change.

        Raises:
            ValueError: a layer of another library in between prevents it.
        """
        base = self.get_base_layer()
        if not equations:
            return self.base_layer(*args, **kwargs)
        if base is self.base_layer:
            return evaluate_changed(base, equations, args[0])
        new = _apply(equations, _weights_of(base))
        if is_quantised(base) or (new.bias is None) != (getattr(base, "bias", None) is None):
            raise ValueError(
                f"{base} has a layer of another adapter around it ({type(self.base_layer).__name__}), which needs its "
                "weight in floating point, and its bias where it has one. Use one model for each adapter."
            )
        path = next(name for name, module in self.base_layer.named_modules() if module is base)
        changed = {f"{path}.weight": new.weight} | ({} if new.bias is None else {f"{path}.bias": new.bias})
        return functional_call(self.base_layer, changed, args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into weight and bias of the module, or of the linears that follow it.

        Args:
            safe_merge: whether to check the result and leave the modules unchanged if it is not finite.
            adapter_names: adapters to merge, in this order; the active ones by default.

        Raises:
            ValueError: the result is not finite (with `safe_merge`), or a module has no place for it.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.plans]
        if not names:
            return
        equations = [e for name in (*self.merged_adapters, *names) for e in self.equations_of(name)]
        # all from the weights before any merge: followers do not fold in the order of merges
        modules = self._merged_into(equations)
        for module in modules:
            _require_foldable(module, equations)
        before = self._before_merge or [_weights_of(module) for module in modules]
        after = [self._fold(weights, equations) for weights in before]
        if safe_merge and not all(t.isfinite().all() for w in after for t in w[1:] if t is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        if not self.merged:
            self._originals = [(m, name, getattr(m, name, None)) for m in modules for name in ("weight", "bias")]
        self._before_merge = before
        for weights in after:
            self._set(weights)
        self.merged_adapters.extend(names)

    def _set(self, weights: _Weights) -> None:
        base = weights.module
        put(base, "weight", weights.weight)
        if getattr(base, "bias", None) is not None:
            put(base, "bias", weights.bias)
        elif weights.bias is not None and base in self.places:
            self._elsewhere[base] = weights.bias
        elif weights.bias is not None and weights.bias.any():
            self._give(base, weights.bias)

    def _give(self, base: nn.Module, bias: Tensor) -> None:
        """Give a module without a bias one.

        Raises:
            ValueError: modules of its class have none.
        """
        if not isinstance(base, nn.Linear | nn.LayerNorm | nn.modules.conv._ConvNd):
            raise ValueError(f"Cannot merge a shift into {base}: modules of its class have no bias.")
        put(base, "bias", bias)
        self.given.append(base)

    def settle(self) -> None:
        """Move shifts to their places, after all layers of the model are merged, because some places are in these."""
        for base, shift in self._elsewhere.items():
            if not self.places[base].take(shift, base.weight):  # type: ignore[arg-type]
                self._give(base, shift)
        self._elsewhere.clear()

    def find_places(self, flow: Flow, path: str) -> None:
        """Find places for the shifts of modules without a bias, before anything is merged.

        Args:
            flow: of values in the layer's model.
            path: full name of the layer.
        """
        named = {path: self.get_base_layer(), **{name: follower() for name, follower in self.followers.items()}}
        biased = (nn.Linear, nn.modules.conv._ConvNd)
        without = {name: m for name, m in named.items() if isinstance(m, biased) and m.bias is None}
        found = {module: place_for_shift(flow, name) for name, module in without.items()}
        self.places = {module: place for module, place in found.items() if place is not None}

    def check_mergeable(self) -> None:
        """Refuse active adapters that are not affine changes of a weight.

        Raises:
            ValueError: there is one.
        """
        equations = list(self._active())
        for module in self._merged_into(equations):
            _require_affine(module, equations)

    def check_merge(self) -> None:
        """Check that the active adapters can be merged, before anything is merged.

        Raises:
            ValueError: one cannot be merged.
        """
        equations = list(self._active())
        for module in self._merged_into(equations):
            _require_foldable(module, equations)

    def _merged_into(self, equations: list[Equation]) -> list[nn.Module]:
        if any(e.site.followers == () for e in equations):
            raise ValueError(
                f"Cannot merge an adapter on the output of {self.get_base_layer()}: not only linears read it."
            )
        followers = [path for e in equations for path in e.site.followers or ()]
        own = any(e.site.followers is None for e in equations)
        return [
            *([self.get_base_layer()] if own else []),
            *(self.followers[path]() for path in dict.fromkeys(followers)),
        ]

    @torch.no_grad()
    def _fold(self, weights: _Weights, equations: list[Equation]) -> _Weights:
        if weights.module is not self.get_base_layer():
            after = [e for e in equations if e.site.followers]
            weight, bias = _matrix(weights), weights.bias
            for each in reversed(after):  # the last to act on the input is the next to the linear
                fold: Any = each.module.fold_input
                weight, bias = _fold_input(fold, weight, bias, each.shared)
            return _Weights(weights.module, _laid_as_in(weights.module, weight, weights.weight), bias)
        new = _apply([e for e in equations if not e.site.around], weights)
        weight, bias = _matrix(new), new.bias
        for each in equations:
            if each.site.around:
                weight, bias = each.module.fold(weight, bias, *each.shared)  # type: ignore[union-attr,operator]
        return _Weights(weights.module, _laid_as_in(weights.module, weight, weights.weight), bias)

    @property
    def holds_weights(self) -> bool:
        """As the base class's; also after a merge that failed half-way."""
        return bool(self._before_merge)

    def unmerge(self) -> None:
        """Restore weights and biases exactly as before the first merge."""
        if not self._before_merge:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for module, name, original in self._originals:
            if original is not None:  # the model may have been moved since
                original.data = original.to(getattr(module, name))
            put(module, name, original)
        for place in self.places.values():
            place.free()
        self._originals, self._before_merge = [], []
        self._elsewhere.clear()
        self.given.clear()
        self.merged_adapters.clear()


def _fold_input(
    fold: Callable[..., tuple[Tensor, Tensor | None]], weight: Tensor, bias: Tensor | None, shared: tuple
) -> tuple[Tensor, Tensor | None]:
    """Fold an equation on the input of a linear, or of a convolution without padding: for each cell of its kernel."""
    if weight.ndim == 2:
        return fold(weight, bias, *shared)
    cells = weight.movedim((0, 1), (-2, -1))
    new, addend = fold(cells.reshape(-1, cells.shape[-1]), None, *shared)
    new_weight = new.view(cells.shape).movedim((-2, -1), (0, 1)).contiguous()
    if addend is None:
        return new_weight, bias
    addend = addend.view(-1, weight.shape[0]).sum(dim=0)
    return new_weight, addend if bias is None else bias + addend


def _require_foldable(module: nn.Module, equations: Iterable[Equation]) -> None:
    """Refuse to merge into a module whose output is not a linear function of its weight and input.

    Args:
        module: to merge into.
        equations: to be merged. Those that change weight and bias themselves do not depend on the rest of the module.

    Raises:
        ValueError: it is such a module, or its weight is quantised: rounding would lose the adapter.
    """
    if is_quantised(module):
        raise ValueError(
            f"Cannot merge an adapter into {module}: its weight is quantised. Keep the adapter beside the backbone, "
            "or merge it into the backbone in floating point and quantise the result."
        )
    if not is_linear_in_weight(module):
        raise ValueError(f"Cannot merge an adapter into {module}: it standardises its weight.")
    _require_affine(module, equations)
    around = any(e.site.around for e in equations)
    if around and isinstance(module, nn.Linear) and not _does_as_a_linear(module):
        raise ValueError(f"Cannot merge an adapter into {module}: its class does more than a linear does.")


def _require_affine(module: nn.Module, equations: Iterable[Equation]) -> None:
    """Refuse equations that are not affine changes of a weight, on any module.

    Args:
        module: that they act on.
        equations: to be merged.

    Raises:
        ValueError: there is one.
    """
    unfolded = next((e.module for e in equations if e.site.around and not _folds(e.module)), None)
    if unfolded is not None:
        raise ValueError(
            f"{type(unfolded).__name__} at {module} cannot be merged: it is not an affine change of a weight. Keep "
            "the adapter beside the backbone; `unload()` gives the backbone back without it."
        )


def _folds(equation: nn.Module | None) -> bool:
    return hasattr(equation, "fold") or hasattr(equation, "fold_input")


@torch.no_grad()
def _does_as_a_linear(module: nn.Linear) -> bool:
    """Whether a linear computes what `nn.Linear` does, even if its class has its own forward."""
    if type(module).forward is nn.Linear.forward:
        return True
    x = torch.linspace(-1, 1, module.in_features).to(module.weight)[None]
    found = module(x)
    return isinstance(found, Tensor) and torch.equal(found, F.linear(x, module.weight, module.bias))


def is_quantised(module: nn.Module) -> bool:
    """Whether the weight of a module is a quantised one of torchao or bitsandbytes."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and is_quantised_weight(weight)


def is_quantised_weight(weight: Tensor) -> bool:
    """Whether a weight is a quantised one of torchao or bitsandbytes."""
    if not weight.is_floating_point():
        return True
    # Those of torchao claim to be floating-point. `torch.compile` of torch 2.14 cannot trace the check of the name.
    return type(weight) not in (Tensor, nn.Parameter) and type(weight).__module__.startswith("torchao.")


def moved(x: Tensor, source: int, to: int) -> Tensor:
    """`movedim`, but without a view and a node in the graph if the dimension is already in its place."""
    return x if source == to else x.movedim(source, to)


def _weights_of(module: nn.Module) -> _Weights:
    """The tensors that an equation changes; quantised ones as floating-point numbers.

    Raises:
        ValueError: the module has no weight that is or becomes floating-point.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if is_quantised(module):
        weight = dequantize_module_weight(module)
    if weight is None or not weight.is_floating_point():
        raise ValueError(f"Cannot merge an adapter into {module}: it has no floating-point weight.")
    return _Weights(module, weight.detach(), None if bias is None else bias.detach())


def _apply(equations: Iterable[Equation], weights: _Weights) -> _Weights:
    """Weight and bias after the equations that change them, in their own dtype."""
    weight, bias = _matrix(weights), weights.bias
    for each in equations:
        call: Any = each.module
        if each.site.channelwise:  # at a norm
            scale, shift = call.scale, call.shift
            new_weight, new_bias = weight * scale, shift if bias is None else bias * scale + shift
        elif each.site.around:  # at a norm that ends in an activation: one element per channel
            shift = call(torch.zeros_like(weight), *each.shared)
            new_weight, new_bias = (
                call(weight, *each.shared) - shift,
                shift if bias is None else call(bias, *each.shared),
            )
        else:
            new_weight, new_bias = call(weight, bias, *each.shared)
        weight, bias = new_weight.to(weight.dtype), None if new_bias is None else new_bias.to(weight.dtype)
    return _Weights(weights.module, _laid_as_in(weights.module, weight, weights.weight), bias)


def _matrix(weights: _Weights) -> Tensor:
    return as_matrix(weights.module, weights.weight)


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A module's weight, or its gradient, as equations see it: (out, in) for linears, else unchanged."""
    if isinstance(module, Conv1D) and weight.ndim == 2:
        return weight.T
    return weight.flatten(1) if is_pointwise(module) and weight.ndim > 2 else weight


def _laid_as_in(module: nn.Module, matrix: Tensor, before: Tensor) -> Tensor:
    """The inverse of `as_matrix`: a weight in the module's own shape."""
    return matrix.T.contiguous() if isinstance(module, Conv1D) else matrix.reshape(before.shape)


def as_linear(module: nn.Module) -> nn.Module:
    """The module from which equations are built: an equivalent linear for a 1 x 1 convolution or a `Conv1D`."""
    if not is_pointwise(module) and not isinstance(module, Conv1D):
        return module
    sizes = linear_sizes(module)
    assert sizes is not None
    linear = nn.Linear(sizes[1], sizes[0], device="meta")
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    linear.weight = nn.Parameter(_matrix(_Weights(module, weight.detach(), None)), requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear


def output_channels(module: nn.Module) -> int | None:
    """Number of channels of a module's output; None if it has none."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return module.nf
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return module.normalized_shape[0]
    return len(module.weight) if is_norm(module) else None  # type: ignore[arg-type]


def channel_dim(module: nn.Module, ndim: int) -> int:
    """The dimension of a module's output that holds the channels, counted from the end (negative).

    It depends on the module's class, or on the inputs that it takes, not on shapes: height, width and tokens may have
    the same size as the channels.

    Args:
        module: the module.
        ndim: dimensions of its output.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return -1 - len(module.kernel_size)
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
        return 1 - ndim
    if type(module) is nn.LayerNorm or not is_operation(module):
        return -1
    told = getattr(module, "data_format", "")
    maps = told == "channels_first" if told else has_channels_first(module)
    return 1 - ndim if maps else -1


def evaluate_changed(module: nn.Module, equations: Iterable[Equation], x: Tensor) -> Tensor:
    """A module's output with the weight and bias that equations change.

    Args:
        module: it is not changed.
        equations: called with weight and bias; return both.
        x: the module's input.
    """
    equations, weights = list(equations), _weights_of(module)
    run: Any = getattr(equations[0].module, "linear_output", None) if len(equations) == 1 else None
    if run is not None and _is_plain_linear(module):
        return run(x, weights.weight, weights.bias, *equations[0].shared)
    new = _apply(equations, weights)
    return _evaluate(module, x, new.weight, new.bias)


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that does no more with its weight, perhaps a quantised one, than `nn.Linear`."""
    return isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or is_quantised(module))


def _evaluate(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The module's output with another weight and bias.

    Raises:
        ValueError: it is not known how.
    """
    if _is_plain_linear(module):
        return F.linear(x, weight, bias)
    if type(module) is nn.LayerNorm:
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return module._conv_forward(x, weight, bias)  # type: ignore[operator]
    if (bias is None) == (getattr(module, "bias", None) is None):
        return functional_call(module, {"weight": weight} | ({} if bias is None else {"bias": bias}), (x,))
    raise ValueError(f"Cannot run {module} with a bias: modules of its class have none.")
