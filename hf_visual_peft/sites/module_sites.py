"""The sites at a single linear, norm or convolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from ..backbones.architectures import GridKind
from ..backbones.backbone import Block, VisionBackbone, running
from ..tables import listed
from .grid import Grid, TokenLayout
from .site import NO_GRID_IN_TEXTS, NO_LAYOUT, ModuleSite


class OutputEquation(Protocol):
    """What an equation on the output of a module is called with."""

    def __call__(self, output: Tensor, *shared: nn.Module) -> Tensor:
        """The new output, (..., channels)."""
        ...


class LinearEquation(Protocol):
    """What an equation on the output and the input of a module is called with."""

    def __call__(self, output: Tensor, x: Tensor, *shared: nn.Module) -> Tensor:
        """The new output, (..., channels)."""
        ...


class WeightEquation(Protocol):
    """What an equation on the weight and the bias of a module is called with.

    It may also have `linear_output(x, weight, bias, *shared)`: the output of a linear with the new ones, where that is
    cheaper than to compute them.
    """

    def __call__(self, weight: Tensor, bias: Tensor | None, *shared: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The new ones."""
        ...


@dataclass(frozen=True)
class OutputSite(ModuleSite):
    """The output of one module. The equation is called with it, (..., channels), and returns the new output.

    Attributes:
        followers: full names of the linears and convolutions that read the output, if the equation merges into them
            and not into the module. It then has `fold_input(weight, bias, *shared) -> (weight, bias)` in place of
            `fold`. Empty if it is not known which modules read the output.
        channelwise: whether the equation is `scale * x + shift`, with these two parameters, one element per channel. A
            layer norm then applies it with its own weight and bias, which keeps no extra activations.
    """

    followers: tuple[str, ...] | None = None
    channelwise: bool = False
    around = True

    def connect(self, layer: Any, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Tell the layer which modules read the output."""
        for path in self.followers or ():
            layer.followers[path] = partial(running, model, path)

    def describe(self, names: Mapping[str, str]) -> str:
        """Whose output, and where it merges."""
        into = listed(list(dict.fromkeys(names[path] for path in self.followers or ())))
        return "output of {}" + (f", merging into {into}" if into else "")


@dataclass(frozen=True)
class LinearSite(ModuleSite):
    """Output and input of one module. The equation is called with both, and returns the new output."""

    around = True
    reads_input = True

    def describe(self, names: Mapping[str, str]) -> str:
        """Of which module."""
        return "input and output of {}"


class MapEquation(Protocol):
    """What an equation on a linear whose input is a map is called with."""

    def __call__(self, output: Tensor, x: Tensor, layout: TokenLayout, *shared: nn.Module) -> Tensor:
        """The new output, (..., channels); `layout` is that of (batch, tokens, channels), flattened from the input."""
        ...


@dataclass(frozen=True)
class MapSite(ModuleSite):
    """Output and input of one linear of attention, with the layout of the input's tokens in the image.

    The tokens are those of the whole image, or of a window. Tokens of other adapters count as prefix tokens.

    Attributes:
        kind: of the grid, from the architecture's table.
        prefix: number of the block's own prefix tokens.
        window: rows and columns of the windows of the block's attention; 0 if it has none.
    """

    kind: GridKind | None = "full"
    prefix: int = 0
    window: int = 0
    around = True
    reads_input = True
    reads_map = True

    def why_no_text(self) -> str | None:
        """A text has no grid."""
        return NO_GRID_IN_TEXTS

    def why_not(self, block: Block | None, whole: VisionBackbone) -> str | None:
        """The linears must read maps, or tokens in the order of a map."""
        if self.kind is None:
            return NO_LAYOUT
        return None if self.kind in _IN_ORDER else ": its linears read tokens in another order than that of a map."

    def connect(self, layer: Any, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Watch the grid."""
        assert backbone is not None
        layer.exchange.record_grid(model, backbone)

    def describe(self, names: Mapping[str, str]) -> str:
        """Of which module."""
        return "input and output of {}, with the tokens' places"

    def layout(self, x: Tensor, grid: Grid | None, rows: Tensor | None) -> TokenLayout:
        """The layout of an input's tokens.

        Args:
            x: (batch, tokens, channels) or (batch, height, width, channels).
            grid: of the patches of the images.
            rows: which samples of the batch these are; None if they are all.

        Raises:
            ValueError: they fill no grid.
        """
        if x.ndim == 4:
            return TokenLayout(0, Grid(x.shape[1], x.shape[2]))
        if self.window and x.shape[1] == self.window**2:
            return TokenLayout(0, Grid(self.window, self.window))
        if grid is None:
            raise ValueError("The patch grid is not known: call the whole model, not a block of it.")
        if grid.cells is not None:
            grid = grid if rows is None else grid.of_samples(rows)
            return TokenLayout(x.shape[1] - grid.cells.shape[1], grid)  # type: ignore[union-attr]
        area = grid.area * grid.times
        if x.shape[1] >= area + self.prefix:
            return TokenLayout(x.shape[1] - area, grid)
        return TokenLayout(self.prefix, grid.halved_to(x.shape[1] - self.prefix))


_IN_ORDER = ("full", "given", "halved", "map", "masked", "spatial_shapes")


@dataclass(frozen=True)
class WeightSite(ModuleSite):
    """Weight and bias of one module. The equation is called with both and returns the new ones.

    The bias may be None. The same call merges the equation.
    """

    def describe(self, names: Mapping[str, str]) -> str:
        """Of which module."""
        return "weight and bias of {}"
