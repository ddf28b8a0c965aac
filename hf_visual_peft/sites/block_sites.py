"""The sites of a transformer block, and the state of one pass through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..backbones.architectures import Stream
from .grid import Grid, TokenLayout, from_tokens
from .layer import Site


Reads = Literal["input", "normed", "stream", "output", "sum", "block"]


@dataclass(frozen=True)
class BranchSite(Site):
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
    """

    sublayer: Literal["attention", "mlp"]
    reads: Reads
    drop_path: bool = False
    needs_layout: bool = False
    attends: bool = False


@dataclass(frozen=True)
class TokenSite(Site):
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
        part: tells several sets of tokens of one adapter apart.
    """

    takes: bool = False
    hands_on: bool = False
    keeps_input: bool = False
    reads: bool = False
    part: str = ""


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
    joining: Tensor | None = None  # tokens that are not in the sequence, as attention reads them
    layouts: dict[str, TokenLayout] = field(default_factory=dict)  # of the states of side networks before the block
    layouts_behind: dict[str, TokenLayout] = field(default_factory=dict)  # and after it
    pixels: Tensor | None = None
    ask: Callable[[Tensor], Tensor] | None = None  # runs extra tokens through the block, for side networks
    seen: Tensor | None = None  # which tokens are not padding, for side networks
    added: Tensor | None = None  # by all branches so far
    finished: bool = False  # whether the stream is after the last sub-layer

    def with_added(self, x: Tensor, stream: Stream = "tokens") -> Tensor:
        """The stream with all additions of branches so far."""
        return x if self.added is None else x + from_tokens(self.added, x, stream)
