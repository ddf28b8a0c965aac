"""The sites of a transformer block, and the state of one pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from ..backbones.architectures import Stream
from ..backbones.backbone import Block, VisionBackbone
from ..backbones.paths import is_in
from .grid import Grid, TokenLayout, from_tokens
from .site import (
    NO_GRID_IN_TEXTS,
    NO_LAYOUT,
    NO_TOKENS_IN_TEXTS,
    AttentionSite,
    BlockSite,
    Site,
    attention_in,
    joins_others,
    why_none_join,
)


Reads = Literal["input", "normed", "stream", "output", "sum", "block"]

_WHERE = {
    "input": "before {}, on the stream",
    "normed": "beside {}, on the output of its norm",
    "stream": "beside {}, on the stream before its norm",
    "output": "after {}, on what the sub-layer adds",
    "sum": "after {}, on the stream",
    "block": "beside the block, on the stream before it",
}


class BranchEquation(Protocol):
    """What a branch is called with."""

    def __call__(self, x: Tensor, *more: Any) -> Tensor:
        """The addition to the stream.

        Args:
            x: (batch, tokens, width).
            more: a `TokenLayout`, functions that attend or cross, as the site asks for them; shared modules.
        """
        ...


class TokenEquation(Protocol):
    """What an equation that returns tokens is called with."""

    def __call__(self, source: int | Tensor, *more: Any) -> Tensor:
        """Tokens of shape (batch, tokens, width).

        Args:
            source: the batch size; the tokens that the block before hands on; or the stream, if the site reads it.
            more: a `TokenLayout` if the site reads the stream, a function that makes queries of tokens if it asks for
                one, shared modules.
        """
        ...


@dataclass(frozen=True)
class BranchSite(BlockSite):
    """A branch at attention or MLP, added to the token stream after the sub-layer.

    The equation is called with (batch, tokens, width) and returns the same shape. Branches beside the sub-layer
    (`"normed"`, `"stream"`) also read the additions of those before it (`"input"`). Branches after it come last
    (`"output"`, then `"sum"`).

    Attributes:
        sublayer: which of the two.
        reads: the branch's input. `"input"`: the stream before the sub-layer, which the branch also changes for the
            sub-layer; `"normed"`: the output of the norm before the sub-layer; `"stream"`: the stream before that
            norm; `"output"`: the output of the sub-layer, after layer scale and stochastic depth; `"sum"`: the stream
            after the sub-layer, with all earlier branches; `"block"`, at the MLP only: the stream at the block's
            input, so that the branch stands beside both sub-layers.
        drop_path: whether the branch is dropped at the block's stochastic depth rate, independently of the sub-layer.
        needs_layout: whether the equation is called with a `TokenLayout` as second argument.
        attends: whether the equation is also called with a function that applies the block's first norm and its
            attention to any (batch, tokens, width), without masks, position biases and layer scale.
        crosses: whether the equation is also called with a function `cross(x, others)`: attention from x, (batch,
            tokens, width), to others, (batch or 1, other tokens, width), by the projections of the block's attention,
            without norms before them, adapters at them, positions, masks and layer scale.

    An equation that none of the last three holds for treats each token by itself.
    """

    sublayer: Literal["attention", "mlp"]
    reads: Reads
    drop_path: bool = False
    needs_layout: bool = False
    attends: bool = False
    crosses: bool = False

    @property
    def tokenwise(self) -> bool:
        """Whether nothing but the token itself is read, and nothing is dropped for a sample as a whole."""
        return not (self.needs_layout or self.attends or self.crosses or self.drop_path)

    @property
    def at(self) -> str:
        """The sub-layer."""
        return self.sublayer

    def exists_at(self, block: Block, whole: VisionBackbone) -> bool:
        """Not at a sub-layer that the block lacks, nor, if it needs a layout, at tokens that are not patches."""
        unlaid = whole.architecture.grid is not None and (block.table or whole.architecture).grid is None
        return self.sublayer in block.sublayers and not (self.needs_layout and unlaid)

    def why_not(self, block: Block | None, whole: VisionBackbone) -> str | None:
        """It may need a known grid, or attention that can be called."""
        table = (block.table if block is not None else None) or whole.architecture
        if self.needs_layout and table.grid is None:
            return NO_LAYOUT
        if (self.attends or self.crosses) and not table.softmax:
            return ": its attention is not the softmax attention of projected tokens."
        return None

    def why_no_text(self) -> str | None:
        """A text has no grid, and attention that the equation calls has no mask."""
        if self.needs_layout:
            return NO_GRID_IN_TEXTS
        return ": attention that it calls would not see which tokens the mask hides." if self.attends else None

    def turn(self) -> tuple[str, int]:
        """Those on the stream after the sub-layer come last."""
        return self.sublayer, int(self.reads == "sum")

    def why_late(self, path: str) -> str:
        """It reads what the others add."""
        place = "MLP" if self.sublayer == "mlp" else self.sublayer
        return f"reads the stream after the {place} of {path!r} with all that other branches add there"

    def reaches(self, block: Block, prompts: str | None) -> Sequence[str]:
        """The attention, if the equation calls it."""
        return (attention_in(block),) if self.attends or self.crosses else ()

    def connect(self, layer: Any, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Watch the grid, and try the attention on other tokens."""
        if self.needs_layout:
            layer.exchange.record_grid(model, backbone)
        if self.attends:
            layer.require_alone()
        if self.crosses:
            layer.require_cross()

    def describe(self, names: Mapping[str, str]) -> str:
        """Where the branch stands, and what it reads."""
        about = (
            (self.attends, "through the block's attention"),
            (self.crosses, "attending to learned tokens by the block's projections"),
            (self.needs_layout, "with the tokens' places"),
            (self.drop_path, "dropped with stochastic depth"),
        )
        return ", ".join([_WHERE[self.reads], *(words for true, words in about if true)])


@dataclass(frozen=True)
class TokenSite(AttentionSite):
    """Tokens put into the sequence after the prefix tokens and taken out again after the block.

    From outside, a block has only the backbone's own tokens. The equation returns (batch, tokens, width). New tokens
    come from the batch size, or from the stream (`reads`); an equation at a site that `takes` tokens is called with
    what the block before hands on, and without an equation they stay as they are. If attention does not read the
    block's sequence, the tokens join it as extra keys and values in all windows (`Architecture.prompts`), and none
    leave the block.

    Attributes:
        takes: whether the tokens come from the block before; else they are new.
        hands_on: whether the next block gets the output of the tokens.
        keeps_input: whether it also gets the tokens as they entered this block, before their outputs:
            (batch, 2 x tokens, width).
        reads: whether the equation is called with the block's input without extra tokens, (batch, tokens, width), and
            a `TokenLayout`, in place of the batch size.
        queries: whether such an equation is also called with a function that makes queries of any (batch, tokens,
            width), by the block's first norm and the projection of its attention: (batch, tokens, channels of all
            heads), without positions.
        part: tells several sets of tokens of one adapter apart.
    """

    takes: bool = False
    hands_on: bool = False
    keeps_input: bool = False
    reads: bool = False
    queries: bool = False
    part: str = ""

    def exists_at(self, block: Block, whole: VisionBackbone) -> bool:
        """Not where no tokens can join, beside blocks where they can, unless they pass from block to block."""
        passes = self.takes or self.hands_on
        return super().exists_at(block, whole) and (passes or not joins_others(block, whole))

    def why_not(self, block: Block | None, whole: VisionBackbone) -> str | None:
        """Attention may let no tokens join, or only as keys."""
        table = (block.table if block is not None else None) or whole.architecture
        if table.prompts is not None and table.prompts != "sequence" and (self.takes or self.hands_on):
            return (
                " with tokens that pass from block to block: they can only join its attention. Give each block its "
                "own tokens, as VPT does with deep=True."
            )
        return why_none_join(block, whole) or (NO_LAYOUT if self.reads and table.grid is None else None)

    def why_no_text(self) -> str | None:
        """Positions and mask are those of words."""
        return NO_TOKENS_IN_TEXTS

    def reaches(self, block: Block, prompts: str | None) -> Sequence[str]:
        """The position biases, and the attention that they join."""
        return (*block.roles["position_bias"], *([attention_in(block)] if prompts == "keys" else ()))

    def connect(self, layer: Any, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Let tokens pass from block to block, and join; watch the grid, if the equation reads it."""
        if self.reads:
            layer.exchange.record_grid(model, backbone)
        if self.queries:
            layer.find_attention()
        layer.exchange.checkpoint_blocks(model, backbone)
        layer.let_tokens_join()

    def describe(self, names: Mapping[str, str]) -> str:
        """Where they stand."""
        source = ", from the block before" if self.takes else ", from the stream" if self.reads else ""
        return f"tokens after the prefix tokens{source}"


@dataclass
class Pass:
    """One pass through one block: its input, and the additions of the equations."""

    grid: Grid | None
    frames: int | None
    tokens: dict[str, Tensor]
    prefix: int
    before: Tensor | None = None  # the block's own stream before the running sub-layer
    entered: Tensor | None = None  # the stream at the block's input
    between: Tensor | None = None  # the stream between attention and MLP, with all additions, for side networks
    images: int = 0  # if they belong to videos
    inside: int = 1  # cells of a patch, if these are the rows of the stream
    beside: tuple[tuple[Tensor, Tensor], ...] = ()  # keys and values with a softmax of their own
    joining: Tensor | None = None  # tokens that are not in the sequence, as attention reads them
    layouts: dict[str, TokenLayout] = field(default_factory=dict)  # of the states of side networks before the block
    layouts_after: dict[str, TokenLayout] = field(default_factory=dict)  # and after it
    pixels: Tensor | None = None
    patches: Tensor | None = None  # of the patch embedding
    ask: Callable[[Tensor], Tensor] | None = None  # runs extra tokens through the block, for side networks
    seen: Tensor | None = None  # which tokens are not padding, for side networks
    added: Tensor | None = None  # by all branches so far
    chosen: Tensor | None = None  # factors of the tokens that the MLP acts on, (batch, tokens)
    weights: Tensor | None = None  # of attention to the patches, for what takes tokens out
    stay: Tensor | None = None  # the patches that stay, (batch, left)
    merged: int = 0  # how many of these are merged tokens, the last ones
    rows: Tensor | None = None  # tokens that the MLP acts on, while it runs on them alone
    like: Tensor | None = None  # and its input before
    skipped: bool = False  # whether its output is zero for the others
    finished: bool = False  # whether the stream is after the last sub-layer

    def with_added(self, x: Tensor, stream: Stream = "tokens") -> Tensor:
        """The stream with all additions of branches so far."""
        return x if self.added is None else x + from_tokens(self.added, x, stream)


def reaches_into(sites: Iterable[Site], block: Block, prompts: str | None, path: str) -> bool:
    """Whether sites of a block change one of its modules by more than hooks, so that a copy would lack the change.

    Args:
        sites: that adapters have at the block.
        block: the block.
        prompts: how prompts join its attention, from the architecture's table.
        path: full name of the module.
    """
    reached = [name for site in sites for name in site.reaches(block, prompts) if name]
    norm = (*block.roles["norm1"], "")[0]
    around = norm.startswith(f"{path}.")  # which is called by itself, too
    return around or any(is_in(path, name) or is_in(name, path) for name in reached)
