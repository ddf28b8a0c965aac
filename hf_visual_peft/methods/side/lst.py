"""Ladder side-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.calibration import Calibration
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, Placement, SideSite
from ...sites.module import is_quantised_weight
from ...training.defaults import Training
from ..specification.deltas import Chosen, summed_gradients
from .pruning import best_stream, parts_of, pruned, why_not


HEAD_CHANNELS = 32  # at least, where the config does not give the heads: attention with narrow heads is slow
SAMPLES = 1024  # images of the Fisher information, of the authors' code


class SideBlock(nn.Module):
    """A transformer block, pre-norm.

        s <- s + D(MHSA(LN1 s));  s <- s + D(W_2 D(GELU(W_1 LN2 s + b_1)) + b_2)

    Padding is hidden from all tokens.

    Args:
        width: channels of the stream, a multiple of `num_heads`.
        num_heads: of the attention.
        hidden: channels of the MLP.
        dropout: probability of the dropouts D, and of one on the attention's weights.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, s: Tensor, seen: Tensor | None = None) -> Tensor:
        """Map (batch, tokens, width) to the same shape; `seen` is False for padding, (batch or 1, tokens)."""
        query, key, value = self.qkv(self.norm1(s)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if seen is None else seen[:, None, None, :]
        rate = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
        s = s + self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))
        return s + self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(self.norm2(s))))))


class Piece(nn.Module):
    """One piece of the ladder, beside one block.

        s <- g s + (1 - g) (W b + c),  g = sigmoid(alpha / T);  s <- SideBlock(s);  at the end W_up LN(s) + c_up

    b is the block's output. alpha starts at 0, so g starts at 1/2. Without a gate s <- s + W b + c. The dropout of the
    side block also acts on the stream where the ladder starts, and on LN(s) at the end.

    Args:
        width: channels of the block's stream.
        block: the side block.
        side_width: channels of s.
        temperature: T; None for no gate.
        enters_from: input channels of the linear that maps to s: those of the stream before the block where the ladder
            starts, those of s where a stage of another width ends; None where s does not change.
        ends: whether s is mapped to the backbone's width after this piece.
        chooses: whether the channels of the backbone's stream that it starts from are still to be chosen.
    """

    def __init__(
        self,
        width: int,
        block: SideBlock,
        side_width: int,
        temperature: float | None,
        enters_from: int | None,
        ends: bool,
        chooses: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature or 1.0
        self.enter = nn.Linear(enters_from, side_width) if enters_from else None
        self.down = nn.Linear(width, side_width)
        self.gate = None if temperature is None else nn.Parameter(torch.zeros(1))
        self.block = block
        self.norm = nn.LayerNorm(side_width) if ends else None
        self.up = nn.Linear(side_width, width) if ends else None
        self.stream = Chosen(side_width, width, "LST") if chooses else None

    def forward(self, s: Tensor | None, view: BlockView) -> tuple[Tensor, None]:
        """Map s (batch, tokens, side_width or `enters_from`), None at the start, to s or (batch, tokens, width).

        Raises:
            NotCalibratedError: the parts of the backbone's weights are not chosen yet.
        """
        if self.stream is not None:
            self.stream()
        if s is None:
            assert view.before is not None
            s = self.block.dropout(view.before)
        assert view.after is not None
        if self.enter is not None:
            s = self.enter(s)
        down = self.down(view.after)
        if self.gate is None:
            s = s + down
        else:
            gate = torch.sigmoid(self.gate / self.temperature).to(down.dtype)  # autocast leaves it in float32
            s = torch.lerp(down, s, gate)
        s = self.block(s, view.seen)
        if self.up is not None:
            assert self.norm is not None
            s = self.up(self.block.dropout(self.norm(s)))
        return s, None


@register(
    name="lst",
    paper=Paper(
        "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", "NeurIPS 2022", "2206.06522"
    ),
    summary="a small transformer beside the backbone",
    visual_tuning="adapter: mix",
    equation="s_i = SideBlock_i(g_i s_{i-1} + (1 - g_i) W_i b_i); out = W_up LN(s_L)",
    counts=(({"r": 8}, 2_376_492),),
    mergeable=False,
    identity_at_start=False,
    gradients="none",
    training=Training(1e-3),
)
@dataclass
class LSTConfig(VisualPeftConfig):
    """Config of ladder side-tuning (LST), arXiv 2206.06522.

    A small transformer beside the backbone reads the output of each block. Its result replaces the output of the last
    block. No gradient crosses the backbone. `layers_to_transform` drops side blocks and what they read; the result
    still replaces the last output.

    On ViT-B/16 at r=8: 12 side blocks, 13 linears to them and one from them have 2,376,288 parameters, the norm at the
    end 192, the gates 12. The authors' code is for text, and its side blocks have as many heads as the backbone's.
    That would be 8 channels per head here, which is slow; by default heads have at least 32. Their variants with
    scheduled gates, with pooling in place of the linears, and with linears after the side blocks are not implemented.

    Side blocks can start as the most important parts of the backbone's blocks. Importance is the squared gradient of
    the cross entropy, summed over single images (`init="fisher"`, in `calibrate`), or the absolute value
    (`init="magnitude"`). Here all blocks of a stage get the same channels of the stream, which the linears select at
    the start; in the authors' code each block gets its own channels, and the linears to the side network start at
    random.

    Args:
        r: the side network's width is the backbone's divided by r, rounded down; at least 2.
        num_heads: of side blocks; by default as many as divide the width with at least 32 channels each, at least one
            and at most as many as the backbone's.
        mlp_ratio: width of the MLP of side blocks divided by that of their stream.
        gate: whether a gate mixes each block's stream with the side network's; else they are added.
        temperature: T of the gates.
        dropout: probability, at the input of the side network, in its sub-layers and after them, on its attention
            weights, and after its norm. The authors use that of their text model, 0.1.
        init: first weights of side blocks: `"random"`, `"magnitude"` or `"fisher"`. The latter two are for backbones
            with pre-norm blocks of softmax attention and an MLP without a gate.
    """

    r: int = field(default=8, metadata={"help": "Width of the backbone over that of the side network."})
    num_heads: int | None = field(
        default=None, metadata={"help": "Heads of side blocks; by default as many as have 32 channels or more."}
    )
    mlp_ratio: float = field(
        default=4.0, metadata={"help": "Width of the side blocks' MLP over that of their stream."}
    )
    gate: bool = field(default=True, metadata={"help": "Mix by gates what blocks return; else add it."})
    temperature: float = field(default=0.1, metadata={"help": "Temperature of the gates."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the side network."})
    init: str = field(
        default="random",
        metadata={"help": "First weights of side blocks: 'random', or the backbone's by 'magnitude' or 'fisher'."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        if self.num_heads is not None:
            self._require_integer("num_heads", 1)
        for name in ("mlp_ratio", "temperature"):
            self._require_number(name)
            if getattr(self, name) <= 0:
                self._fail(name, "a finite number above 0")
        self._require_number("dropout", 0.0, below=1.0)
        self._require_choice("gate", (True, False))
        if not self.gate:
            self._require_unset("temperature", "with gate False")
        self._require_choice("init", ("random", "magnitude", "fisher"))

    @property
    def chooses_from_data(self) -> bool:
        """Whether the side blocks start as the parts of the backbone that matter most for some data."""
        return self.init == "fisher"

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """A piece beside every block."""
        width, first, last = backbone.width, backbone.blocks[0], backbone.blocks[-1]
        self._require_integer("r", 1, max(1, width // 2), "half the width: a norm of one channel is constant")
        side_width = width // self.r
        num_heads = self._heads(side_width, backbone.num_heads or 1)
        hidden = max(1, int(self.mlp_ratio * side_width))
        if self.init != "random":
            reason = why_not(backbone, num_heads, side_width, hidden)
            if reason is not None:
                self._fail("init", f"'random' for the blocks of {backbone.class_name}: {reason}")
        starts, ends = backbone.width_before is None, backbone.width_after is None
        for block in backbone.blocks:
            enters_from = None
            if block is first:
                enters_from = width if backbone.width_before is None else backbone.width_before // self.r
            build = partial(
                self._build, width, side_width, num_heads, hidden, enters_from, ends=ends and block is last
            )
            site = SideSite(reads=("before", "after") if starts and block is first else ("after",), needs_mask=True)
            yield Placement(block.path, "rung", site, build)

    def _build(
        self,
        width: int,
        side_width: int,
        num_heads: int,
        hidden: int,
        enters_from: int | None,
        of_backbone: nn.Module,
        ends: bool,
    ) -> Piece:
        if self.init != "random" and any(map(is_quantised_weight, of_backbone.parameters())):
            self._fail(
                "init", f"'random' for {type(of_backbone).__name__}: it is quantised, and no part of it can train"
            )
        block = SideBlock(side_width, num_heads, hidden, self.dropout)
        temperature = self.temperature if self.gate else None
        return Piece(width, block, side_width, temperature, enters_from, ends, self.chooses_from_data)

    def _heads(self, side_width: int, of_backbone: int) -> int:
        if self.num_heads is None:
            most = max(1, min(of_backbone, side_width // HEAD_CHANNELS))
            return next(heads for heads in range(most, 0, -1) if side_width % heads == 0)
        if side_width % self.num_heads:
            self._fail("num_heads", f"a divisor of {side_width}, the width of the side network (backbone's over r)")
        return self.num_heads

    def initialise(self, adapter: Calibration) -> None:
        """Start side blocks as parts of the backbone's blocks, chosen by absolute values."""
        if self.init == "magnitude":
            self._prune(adapter, None)

    def choose(self, calibration: Calibration) -> None:
        """Start side blocks as parts of the backbone's blocks, chosen by Fisher information.

        Raises:
            ValueError: there is no head, or no gradient of the loss is finite and other than zero.
        """
        pieces = dict(calibration.equations("rung"))
        blocks = [block for block in calibration.backbone.blocks if block.path in pieces]
        weights: dict[nn.Parameter, None] = {}
        for block in blocks:
            parts_of(block, calibration.model, lambda parameter: weights.setdefault(parameter) or parameter)
        images = 0
        with summed_gradients(list(weights), of=torch.square) as sums:
            for batch in calibration.batches():
                for index in range(len(batch["labels"])):
                    image = {name: tensor[index : index + 1] for name, tensor in batch.items()}
                    calibration.loss(image, "LST measures Fisher information").backward()
                images += len(batch["labels"])
                if calibration.max_batches is None and images >= SAMPLES:
                    break
        total = torch.stack([each.sum() for each in sums.values()])
        if not total.isfinite().all() or not total.any():
            raise ValueError("LST: no gradient of the loss is finite and non-zero. Is the head's weight zero?")
        self._prune(calibration, sums)

    @torch.no_grad()
    def _prune(self, adapter: Calibration, importance: Mapping[nn.Parameter, Tensor] | None) -> None:
        """Copy parts of the backbone's blocks into the side blocks.

        Args:
            adapter: whose side blocks.
            importance: of the backbone's weights; by default their absolute values.
        """
        pieces: dict[str, Piece] = dict(adapter.equations("rung"))
        for stage in adapter.backbone.stages(adapter.backbone):
            blocks = [block for block in stage.blocks if block.path in pieces]
            if not blocks or pieces[blocks[0].path].down.weight.is_meta:  # loaded weights will replace it
                continue
            found = [
                parts_of(block, adapter.model, torch.abs if importance is None else importance.__getitem__)
                for block in blocks
            ]
            stream = best_stream(found, pieces[blocks[0].path].down.out_features)
            for block, important in zip(blocks, found, strict=True):
                piece, values = pieces[block.path], parts_of(block, adapter.model, torch.Tensor.detach)
                assert block.num_heads is not None
                heads, hidden = piece.block.num_heads, piece.block.fc1.out_features
                state = pruned(values, important, stream, block.num_heads, heads, hidden)
                piece.block.load_state_dict(state)
                enters = piece.enter if piece.enter is not None and piece.enter.in_features == block.width else None
                for linear in (piece.down, enters):
                    if linear is not None:
                        _pick(linear, stream)
                if piece.stream is not None:
                    piece.stream.choose(stream)


@torch.no_grad()
def _pick(linear: nn.Linear, channels: Tensor) -> None:
    """Make a linear return some channels of its input."""
    linear.weight.zero_()
    linear.weight[torch.arange(len(channels), device=channels.device), channels] = 1.0
    linear.bias.zero_()
