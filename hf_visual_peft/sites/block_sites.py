"""The sites of a transformer block, and what one pass through it has to remember."""

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

    The equation is called with (batch, tokens, width) and returns the same shape. Branches before the sub-layer
    (`"input"`) are part of what those beside it read (`"normed"`, `"stream"`), and these come before those that follow
    it (`"output"`, then `"sum"`).

    Attributes:
        sublayer: which of the two.
        reads: the branch's input. `"input"`: the stream as it comes to the block, which the branch changes for the
            attention, too; `"normed"`: the output of the norm before the sub-layer; `"stream"`: the stream before that
            norm; `"output"`: what the sub-layer adds to the stream, after layer scale and stochastic depth; `"sum"`:
            the stream after the sub-layer, with all branches before this one; `"block"`, at the MLP only: the stream
            as it comes to the block, the branch standing beside both sub-layers.
        drop_path: whether the branch is dropped at the block's stochastic depth rate, independently of the sub-layer.
        needs_layout: whether the equation is called with a `TokenLayout` as second argument.
        attends: whether the equation is then called with a function, too, that applies the block's first norm and its
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

    From outside, a block has the backbone's own tokens only. The equation is called with the batch size and returns
    (batch, tokens, width). Where attention does not take a sequence as it comes to the block, the tokens join it
    there as further keys and values (`Architecture.prompts`), those of all windows, and none leave the block.

    Attributes:
        takes: whether the tokens are those that the block before handed on, and not new ones.
        hands_on: whether the block after gets the tokens as this block leaves them.
    """

    takes: bool = False
    hands_on: bool = False


@dataclass
class Pass:
    """One pass through one block: what comes in, and what the equations add on the way."""

    grid: Grid | None
    frames: int | None
    tokens: dict[str, Tensor]
    prefix: int
    before: Tensor | None = None  # the block's own stream before the sub-layer at work
    entered: Tensor | None = None  # the stream as it came to the block
    between: Tensor | None = None  # the stream between attention and MLP, with all that was added, for side networks
    images: int = 0  # where they belong to videos
    inside: int = 1  # cells of a patch, where these are the rows of the stream
    joining: Tensor | None = None  # tokens that are not in the sequence, as attention reads them
    layouts: dict[str, TokenLayout] = field(default_factory=dict)  # of the states of side networks as they come
    layouts_behind: dict[str, TokenLayout] = field(default_factory=dict)  # and as they leave
    pixels: Tensor | None = None
    ask: Callable[[Tensor], Tensor] | None = None  # takes further tokens through the block, for side networks
    seen: Tensor | None = None  # which tokens are no padding, for side networks
    added: Tensor | None = None  # by all branches so far
    finished: bool = False  # whether the stream is behind the last sub-layer

    def with_added(self, x: Tensor, stream: Stream = "tokens") -> Tensor:
        """The stream with all that branches have added so far."""
        return x if self.added is None else x + from_tokens(self.added, x, stream)
