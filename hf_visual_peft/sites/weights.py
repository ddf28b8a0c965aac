"""The site of all parameters of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ..backbones.backbone import Block, base_parts
from .layer import Equation
from .module import is_quantised
from .site import BlockSite


class BlockWeightSite(BlockSite):
    """All parameters of a block.

    The equation is called with a dictionary of them by name, and returns a dictionary of the new ones.
    """

    def reaches(self, block: Block, prompts: str | None) -> Sequence[str]:
        """All of the block."""
        return (block.path,)


class _Call(nn.Module):
    """A block with another function as forward, for `functional_call`."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block = block
        self._run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's."""
        return self._run(*args, **kwargs)


def changed_forward(
    block: nn.Module, forward: Callable[..., Any], equations: Iterable[Equation]
) -> Callable[..., Any]:
    """A block's forward with the parameters that equations return.

    Args:
        block: the block.
        forward: its forward.
        equations: the active ones at the block; those of other sites are ignored.
    """
    equations = [equation for equation in equations if isinstance(equation.site, BlockWeightSite)]
    if not equations:
        return forward
    names = own_parameters(block)
    own: dict[str, Tensor] = {name: block.get_parameter(there) for name, there in names.items()}
    changed: dict[str, Tensor] = {}
    for equation in equations:
        assert equation.module is not None
        changed |= equation.module(own | changed)
    call, parameters = _Call(block, forward), {f"block.{names[name]}": tensor for name, tensor in changed.items()}
    return lambda *args, **kwargs: functional_call(call, parameters, args, kwargs)


def trainable_names(block: nn.Module) -> list[str]:
    """Names of a block's parameters.

    Raises:
        ValueError: one is quantised.
    """
    for name, part in block.named_modules():
        if is_quantised(part):
            raise ValueError(
                f"Cannot train {type(block).__name__}: the weight of its {name} is quantised. Leave the backbone "
                "frozen."
            )
    return list(own_parameters(block))


def own_parameters(block: nn.Module) -> dict[str, str]:
    """The names of a block's parameters without adapters, with their present names.

    Args:
        block: with layers of adapters in it, or without.
    """
    found, known = {}, {}
    for name, part in block.named_modules():
        known[id(part)] = name
    for path, module in base_parts(block):
        for name, _ in module.named_parameters(recurse=False):
            there = known[id(module)]
            found[f"{path}.{name}" if path else name] = f"{there}.{name}" if there else name
    return found
