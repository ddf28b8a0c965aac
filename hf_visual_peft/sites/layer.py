"""The base of all adapter layers: peft's interface of a layer, and its equations by adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import _set_layer_requires_grad
from torch import Tensor, nn

from ..backbones.backbone import VisionBackbone, stands_in
from .exchange import Exchange
from .losses import WithLoss, left_by
from .mixed import BASE, count_rows, run_parts
from .site import Shared, SharedSite, Site


CHILD = "adapters"  # name of the child of a block or backbone that holds its adapters
RANDOM_STD = 0.05  # of the random values that `init_weights=False` adds to every weight


class Equation(NamedTuple):
    """An active equation: the module (None if a site only passes something on), and its shared arguments.

    Attributes:
        adapter: whose equation it is.
        module: the equation.
        site: where it acts.
        shared: its last arguments, none or one.
        owner: method and adapter, as adapters of two methods may have one name.
        slot: name of the equation in its layer, without the method.
    """

    adapter: str
    module: nn.Module | None
    site: Any
    shared: tuple[nn.Module, ...]
    owner: str
    slot: str = ""

    @property
    def key(self) -> str:
        """The name under which something of it passes from block to block."""
        return self.site.key(self.owner)


class Planned(NamedTuple):
    """One slot of an adapter at a layer.

    Attributes:
        attribute: of the layer, which holds the equation by adapter.
        site: where it acts.
        shared: name of the shared module that it uses, or None.
        prefix: of the method.
    """

    attribute: str
    site: Site
    shared: str | None
    prefix: str


class VisualTunerLayer(BaseTunerLayer):
    """Mixin of `ModuleLayer`, `WholeLayer` and `BlockAdapters`.

    Each slot is an `nn.ModuleDict` of equations by adapter, so that parameter names are
    `<module>.<method>_<slot>.<adapter>.<parameter>`, as peft and transformers expect. `plans` has the slots of an
    adapter, with their sites and shared modules.
    """

    exchange: Exchange
    where: str = ""  # full name of what it acts on, without adapters
    other_param_names = ("plans",)
    serves: ClassVar[type[Site]]  # the sites that it carries
    stands_in: ClassVar[bool] = False  # whether it is a child of its module, and not around it
    mixes_by_itself: ClassVar[bool] = False  # whether a batch that mixes adapters is not split before the module

    @classmethod
    def create(
        cls, target: nn.Module, path: str, model: nn.Module, backbone: VisionBackbone | None, exchange: Exchange
    ) -> VisualTunerLayer:
        """A layer of this kind for a module.

        Args:
            target: the module.
            path: its full name in the model.
            model: the whole model.
            backbone: in it; None if the config names target modules.
            exchange: shared with the other adapter layers of the model.
        """
        make: Any = cls
        return make(target, exchange)

    def attach(self) -> None:
        """Attach to the module, for layers that stand in it."""
        raise NotImplementedError(f"{type(self).__name__} stands around its module.")

    def detach(self) -> None:
        """Undo it."""
        raise NotImplementedError(f"{type(self).__name__} stands around its module.")

    @classmethod
    def require_room(cls, module: nn.Module) -> None:
        """Check that such a layer can stand at a module.

        Raises:
            ValueError: it cannot.
        """

    @classmethod
    def in_the_way(cls, module: nn.Module) -> nn.Module | None:
        """The layer of another adapter that prevents this kind of layer at a module; None if none does."""
        return module if isinstance(module, BaseTunerLayer) and not isinstance(module, cls) else None

    @staticmethod
    def made_from(module: nn.Module) -> nn.Module:
        """What equations are built from.

        Args:
            module: that the layer acts on.
        """
        return module

    def _init_layer(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.training = self.get_base_layer().training
        # peft defines these on the class; each layer needs its own
        self.adapter_layer_names: tuple[str, ...] = ()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._may_train: set[str] = set()  # adapters whose parameters may require gradients
        self._muted: set[str] = set()  # prefixes of methods that are disabled here, where others are not
        self._off: set[str] = set()  # owners that are not active, though an adapter of their name is
        self.plans: dict[str, tuple[Planned, ...]] = {}

    def get_base_layer(self) -> nn.Module:
        """The module that the layer acts on."""
        raise NotImplementedError

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
        """Put an equation of an adapter into a slot.

        Args:
            adapter_name: whose equation it is.
            prefix: of the method, e.g. `"vpt_"`.
            slot: of the method.
            site: where it acts.
            equation: None if the site only passes something on.
            init_weights: whether the weights keep their initial values; else random values are added to all.
            shared: the shared module of the equation; created and kept here if the adapter does not have it yet.
        """
        key = None if shared is None else f"{prefix}{shared.name}"
        if shared is not None and (key, adapter_name) not in self.exchange.shared:
            module = shared.build()
            self.add_equation(adapter_name, prefix, shared.name, SharedSite(), module, init_weights)
            self.exchange.shared[key, adapter_name] = module
        attribute = f"{prefix}{slot}"
        planned = Planned(attribute, site, key, prefix)
        self.plans[adapter_name] = (*self.plans.get(adapter_name, ()), planned)
        if equation is not None:
            if not init_weights:
                randomise(equation)
            if attribute not in self.adapter_layer_names:
                setattr(self, attribute, nn.ModuleDict())
                self.adapter_layer_names = (*self.adapter_layer_names, attribute)
            getattr(self, attribute)[adapter_name] = equation
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._may_train.add(adapter_name)
        self.set_adapter(self.active_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in peft, but without visiting adapters that neither were nor will be active: there may be a thousand."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._let_train(self.adapter_layer_names, names, inference_mode)
        self._may_train = set(names)
        self._off.clear()
        self._active_adapter = names
        self._changed()

    def switch(self, prefix: str, names: list[str], inference_mode: bool) -> None:
        """Set the active adapters of one method; those of others stay as they are.

        Args:
            prefix: of the method.
            names: of its adapters that are to be active.
            inference_mode: whether they are frozen.
        """
        plans = {name: {planned.prefix for planned in plan} for name, plan in self.plans.items()}
        others = [name for name in self.active_adapters if plans.get(name, set()) - {prefix}]
        slots = {each.attribute for plan in self.plans.values() for each in plan if each.prefix == prefix}
        self._let_train([each for each in self.adapter_layer_names if each in slots], names, inference_mode)
        self._may_train |= set(names)
        self._off = {owner for owner in self._off if not owner.startswith(prefix)}
        self._off |= {f"{prefix}{name}" for name in others if name not in names}
        self._off -= {f"{each}{name}" for name in names for each in plans.get(name, ()) if each == prefix}
        joined = [name for name in names if name not in others]
        alone = [name for name in joined if plans.get(name, set()) - {prefix}]
        self._off |= {f"{each}{name}" for name in alone for each in plans[name] if each != prefix}
        self._active_adapter = [*others, *joined]
        self._changed()

    def _let_train(self, slots: Sequence[str], names: Sequence[str], inference_mode: bool) -> None:
        for attribute in slots:
            slot = getattr(self, attribute)
            for name in self._may_train.union(names):
                if name in slot:
                    _set_layer_requires_grad(slot[name], name in names and not inference_mode)
        self._freeze_non_trainable_peft_weights(list(names))

    def enable_adapters(self, enabled: bool) -> None:
        """As peft's."""
        super().enable_adapters(enabled)
        self._changed()

    def _changed(self) -> None:
        """React to a change of the active adapters."""

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As peft's."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        if requires_grad:
            self._may_train |= names
        super().set_requires_grad(names, requires_grad)

    def delete_adapter(self, adapter_name: str, prefix: str = "") -> None:
        """Remove an adapter from the layer.

        Args:
            adapter_name: its name.
            prefix: of the one method whose adapter it is, where adapters of several methods may have that name.
        """
        plan = self.plans.get(adapter_name, ())
        kept = tuple(planned for planned in plan if prefix and planned.prefix != prefix)
        for planned in plan:
            if planned not in kept and isinstance(planned.site, SharedSite):
                self.exchange.shared.pop((planned.attribute, adapter_name), None)
        active = {name for name in self.active_adapters if f"{prefix}{name}" not in self._off}
        own = [name for name in self.plans if name != adapter_name and prefix in self.methods_of(name)]
        if kept:
            for planned in plan:
                slot: Any = getattr(self, planned.attribute, ())
                if planned not in kept and adapter_name in slot:
                    del slot[adapter_name]
            self.plans[adapter_name] = kept
        else:
            if prefix:  # peft's would activate another one, of any method
                self._active_adapter = [name for name in self.active_adapters if name != adapter_name]
            super().delete_adapter(adapter_name)
        if prefix and adapter_name in active and own and not active.intersection(own):
            self.switch(prefix, own[:1], inference_mode=False)
        self._changed()

    def check_mergeable(self) -> None:
        """Refuse active adapters that cannot be merged into any backbone.

        Raises:
            ValueError: there is one.
        """

    def check_merge(self) -> None:
        """Check that the active adapters can be merged, before anything is merged.

        Raises:
            ValueError: one cannot be merged.
        """

    def check_alone(self, prefix: str) -> None:
        """Refuse to merge one method alone where adapters of another act on the same module in between.

        Args:
            prefix: of the method.

        Raises:
            ValueError: they do.
        """

    @property
    def holds_weights(self) -> bool:
        """Whether there are weights from before a merge, to be put back."""
        return self.merged

    def methods(self) -> set[str]:
        """Prefixes of the methods that have adapters here."""
        return {planned.prefix for plan in self.plans.values() for planned in plan}

    def methods_of(self, adapter_name: str) -> set[str]:
        """Prefixes of the methods that have an adapter of a name here."""
        return {planned.prefix for planned in self.plans.get(adapter_name, ())}

    @property
    def adapters_off(self) -> frozenset[str]:
        """Methods, and adapters of a method, that do not act here, though adapters of their names do."""
        return frozenset(self._muted | self._off)

    def mute(self, prefix: str, muted: bool) -> None:
        """Switch a method off here, or on again, whose adapters are active.

        Args:
            prefix: of the method.
            muted: whether it is off.
        """
        if muted and self.methods() > {prefix}:
            self._muted.add(prefix)
        else:
            self._muted.discard(prefix)
            self.enable_adapters(not muted)
        self._changed()

    def equations_of(self, adapter_name: str) -> Iterator[Equation]:
        """The equations of one adapter at this layer."""
        for attribute, site, key, prefix in self.plans.get(adapter_name, ()):
            if isinstance(site, SharedSite):
                continue
            slot: Any = getattr(self, attribute, ())
            module = slot[adapter_name] if adapter_name in slot else None  # noqa: SIM401 - ModuleDict has no get
            shared = () if key is None else (self.exchange.shared[key, adapter_name],)
            slot_name = attribute.removeprefix(prefix)
            yield Equation(adapter_name, module, site, shared, f"{prefix}{adapter_name}", slot_name)

    def _active(self) -> Iterator[Equation]:
        """The equations of the active adapters, or of those that a mixed batch names."""
        if self.disable_adapters:
            return
        mixed = self.exchange.mixed
        for name in self.active_adapters if mixed is None else mixed.adapters:
            for equation in self.equations_of(name):
                if equation.owner not in self._off and not equation.owner.startswith(tuple(self._muted)):
                    yield equation

    def _left(self, equation: Equation, result: Any) -> Any:
        """The output in what an equation returned; its term of an auxiliary loss is kept if it is asked for."""
        if not isinstance(result, WithLoss):
            return result
        if self.exchange.left is not None:
            assert equation.module is not None
            left = left_by(equation.owner, self.where, equation.module, result.loss)
            self.exchange.left.append(left._replace(slot=equation.slot))
        return result.output

    def _at(self, *kinds: type[Site]) -> Iterator[Equation]:
        """Those at some kinds of sites."""
        return (equation for equation in self._active() if isinstance(equation.site, kinds))

    def _parts(self, args: tuple) -> dict[str, list[int]]:
        """The rows of the first argument by their adapter here; none if all rows are treated alike."""
        mixed = self.exchange.mixed
        if mixed is None or self.disable_adapters or not any(name in self.plans for name in mixed.adapters):
            return {}
        parts: dict[str, list[int]] = {}
        base = self.get_base_layer()
        for row, name in enumerate(mixed.of_rows(count_rows(base, args), base)):
            parts.setdefault(name if name in self.plans else BASE, []).append(row)
        return parts if len(parts) > 1 else {}

    def _run_parts(
        self, parts: dict[str, list[int]], run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Call a function as `run_parts` does, with only one active adapter in each call."""

        def alone(name: str, index: Tensor, *args: Any, **kwargs: Any) -> Any:
            with self.exchange.mixing([name]):
                return run(name, index, *args, **kwargs)

        return run_parts(self.get_base_layer(), parts, alone, args, kwargs)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        for parameter in base_layer.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        return None, None

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError(
            f"{type(self).__name__} cannot run under torch.nn.DataParallel, whose copies of a layer share its state. "
            "Start one process a GPU instead: `accelerate launch` or torchrun (DistributedDataParallel)."
        )


def layers_of(model: nn.Module) -> dict[str, VisualTunerLayer]:
    """The adapter layers of a model, by the names of the modules that they act on.

    Args:
        model: with adapters or without.
    """
    found: dict[str, VisualTunerLayer] = {}
    for path, module in model.named_modules():
        if isinstance(module, VisualTunerLayer):
            found[path.rpartition(".")[0] if stands_in(module) else path.removesuffix(".base_layer")] = module
    return found


class WrappingLayer(VisualTunerLayer):
    """Mixin of the layers that replace a module and keep it as `base_layer`."""

    base_layer: nn.Module

    def __getattr__(self, name: str) -> Any:
        """Get attributes that the layer lacks from the module inside."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # not there yet, for example while unpickling; or set on the module by accelerate, and not on the layer
            if name in ("base_layer", "_hf_hook", "_old_forward"):
                raise
            return getattr(self.base_layer, name)

    def get_base_layer(self) -> nn.Module:
        """The module inside the layer; peft would continue if that has its own `base_layer`."""
        base = self.base_layer
        return base.get_base_layer() if isinstance(base, BaseTunerLayer) else base

    def check_alone(self, prefix: str) -> None:
        """Refuse to merge one method alone where adapters of another act on the same module in between.

        Args:
            prefix: of the method.

        Raises:
            ValueError: they do.
        """
        inside = self.base_layer
        others = sorted({e.owner for e in self._active() if not e.owner.startswith(prefix)})
        if isinstance(inside, BaseTunerLayer) and not inside.disable_adapters:
            unmerged = set(inside.active_adapters) - set(inside.merged_adapters)
            others = [type(inside).__name__] if unmerged else others
        if others:
            raise ValueError(
                f"Cannot merge: {', '.join(others)} acts on {self.get_base_layer()}, too, and the result depends on "
                "the order. Merge or unload that adapter first, or disable it."
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What peft's own tuner leaves here when it is unloaded: this layer, without its own."""
        inside: Any = self.base_layer
        if isinstance(inside, BaseTunerLayer):
            if merge:
                inside.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.base_layer = inside.get_base_layer()
        return self


@torch.no_grad()
def randomise(equation: nn.Module) -> None:
    """Add random values to every weight, and make parts that choose from data choose at random.

    A part with more state than weights has a method `randomise()`.
    """
    for parameter in equation.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=RANDOM_STD)
    for part in equation.modules():
        again: Any = getattr(part, "randomise", None)
        if again is not None:
            again()


def call_equation(layer: VisualTunerLayer, equation: nn.Module, x: Tensor, *args: Any) -> Any:
    """Evaluate an equation in its own dtype, as peft's layers do, and return the result in the dtype of `x`.

    Args:
        layer: whose `cast_input_dtype_enabled` says whether the input is cast.
        equation: to call.
        x: its first argument.
        args: its other arguments.

    Returns:
        A tensor, or `WithLoss` with one.
    """
    given: tuple[Any, ...] = (x, *args)
    if not torch.is_autocast_enabled(x.device.type):
        modules = (equation, *(a for a in args if isinstance(a, nn.Module)))
        dtype = next((p.dtype for module in modules for p in module.parameters()), x.dtype)
        given = tuple(layer._cast_input_dtype(a, dtype) if isinstance(a, Tensor) else a for a in given)
    result = equation(*given)
    if isinstance(result, WithLoss):
        return result._replace(output=result.output.to(x.dtype))
    return result.to(x.dtype)
