"""Effective and efficient visual prompt tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...backbones.finding import find_backbone
from ...backbones.modes import in_eval_mode
from ...core.calibration import Calibration
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import KeyValueSite, Placement, Shared, TokenSite, attention_path, head_sizes, layers_of, projections
from ...training.defaults import Training
from .vpt import MAX_VIRTUAL_TOKENS


class Rewindable(nn.Module):
    """A part whose first values can be drawn again: U(-v, v) from a seed, which is saved with the weights.

    Args:
        shape: of the values.
        bound: v.
    """

    seed: Tensor

    def __init__(self, shape: tuple[int, ...], bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.prompts = nn.Parameter(torch.empty(shape))
        self.register_buffer("seed", torch.randint(2**62, (1,), device="cpu"))
        self.rewind()

    @torch.no_grad()
    def rewind(self) -> None:
        """Give the prompts the values that they started from."""
        if self.prompts.is_meta:
            return
        generator = torch.Generator(device="cpu").manual_seed(int(self.seed))
        first = torch.empty(self.prompts.shape, device="cpu").uniform_(-self.bound, self.bound, generator=generator)
        self.prompts.copy_(first)


class MaskedPrompts(Rewindable):
    """Learned tokens, of which parts may be cut off.

        tokens = dropout(P) * M,  P ~ U(-v, v), v = sqrt(6 / (patch_features + width))

    Args:
        num_virtual_tokens: how many.
        width: channels of the prompts.
        patch_features: input values of one patch, channels x height x width.
        dropout: probability, independent for each image.
    """

    def __init__(self, num_virtual_tokens: int, width: int, patch_features: int, dropout: float) -> None:
        super().__init__((num_virtual_tokens, width), math.sqrt(6.0 / (patch_features + width)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch_size: int, masks: nn.Module) -> Tensor:
        """Tokens of shape (batch, num_virtual_tokens, width)."""
        tokens = self.dropout(self.prompts.expand(batch_size, -1, -1))
        return tokens * masks(self.prompts.shape[-1]).to(tokens.dtype)


class Masks(nn.Module):
    """What remains of the prompts of all blocks.

        M[t, c] = token_mask[t] piece_mask[t, c mod pieces],  all ones at the start

    Args:
        num_virtual_tokens: prompts of a block.
        pieces: of a prompt.
    """

    token_mask: Tensor
    piece_mask: Tensor

    def __init__(self, num_virtual_tokens: int, pieces: int) -> None:
        super().__init__()
        self.register_buffer("token_mask", torch.ones(num_virtual_tokens))
        self.register_buffer("piece_mask", torch.ones(num_virtual_tokens, pieces))

    def forward(self, width: int) -> Tensor:
        """M, (num_virtual_tokens, width)."""
        pieces = self.piece_mask.repeat(1, width // self.piece_mask.shape[1])
        return self.token_mask.unsqueeze(1) * pieces


class TiedPrefixes(Rewindable):
    """Learned keys of one block, which are its learned values, too.

        K' = [K; dropout(P)],  V' = [V; dropout(P)],  P ~ U(-v, v), v = sqrt(6 / (tokens channels of a head))

    Args:
        num_kv_tokens: how many.
        heads: of the attention's keys.
        size: channels of a head.
        dropout: probability, for each element of each image.
    """

    def __init__(self, num_kv_tokens: int, heads: int, size: int, dropout: float) -> None:
        super().__init__((heads, num_kv_tokens, size), math.sqrt(6.0 / (num_kv_tokens * size)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, heads, num_kv_tokens, channels of a head) each."""
        prompts = self.prompts.expand(batch_size, -1, -1, -1)
        return self.dropout(prompts), self.dropout(prompts)


@register(
    name="e2vpt",
    paper=Paper("E2VPT: An Effective and Efficient Approach for Visual Prompt Tuning", "ICCV 2023", "2307.13770"),
    summary="as VPT, with learned keys that are values, too; `prune_prompts` cuts off prompts and pieces of them",
    visual_tuning="prompt: vision-driven",
    equation="x_i = [prefix; M P_i; patches] into block i; softmax(Q [K; R_i]^T / sqrt(d_head)) [V; R_i] in it",
    counts=(({"num_virtual_tokens": 10, "num_kv_tokens": 5}, 138_240),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class E2VPTConfig(VisualPeftConfig):
    """Config of effective and efficient visual prompt tuning (E2VPT), arXiv 2307.13770.

    Prompts as in VPT, and learned keys of every attention, which are its learned values at the same time. On ViT-B/16
    each of the two has 768 parameters for a token and block.

    `prune_prompts` then cuts off the least important prompts, the same in all blocks, and the least important pieces
    of the others; the rest starts again from its first values and is trained once more. A prompt that was cut off is
    zero, not gone: attention still sees it, as in the authors' code. A piece is every 16th channel there (they tile
    the mask), and so it is here.

    Args:
        num_virtual_tokens: prompts per block.
        num_kv_tokens: learned keys per block.
        pieces: of a prompt, for pruning; a divisor of the width.
        dropout: probability, on prompts, keys and values.
    """

    num_virtual_tokens: int = field(default=10, metadata={"help": "Prompts a block."})
    num_kv_tokens: int = field(default=5, metadata={"help": "Learned keys, which are values too, a block.", "tiny": 2})
    pieces: int = field(default=16, metadata={"help": "Pieces of a prompt, for pruning.", "tiny": 4})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on prompts, keys and values."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_integer("num_kv_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_integer("pieces", 1)
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Prompts before every block with attention, and keys and values in it."""
        if backbone.width % self.pieces:
            self._fail("pieces", f"a divisor of {backbone.width}, the backbone's width")
        masks = Shared("masks", partial(Masks, self.num_virtual_tokens, self.pieces))
        sizes = (self.num_virtual_tokens, backbone.width, backbone.patch_features, self.dropout)
        for block in backbone.blocks:
            if block.projections and "attention" in block.sublayers:
                yield Placement(block.path, "tokens", TokenSite(), lambda _: MaskedPrompts(*sizes), masks)
                yield Placement(block.path, "heads", KeyValueSite(), partial(self._prefixes, block))

    def _prefixes(self, block: Block, module: nn.Module) -> TiedPrefixes:
        query, key, value = (path.removeprefix(f"{block.path}.") for path in block.projections)
        form = projections(module, attention_path(module, query), query, key, value)
        heads, key_size, value_size = head_sizes(form)
        if key_size != value_size:
            raise ValueError(
                f"{type(self).__name__} does not fit {type(module).__name__}: heads of its keys have {key_size} "
                f"channels, and those of its values {value_size}, so that they cannot be the same."
            )
        return TiedPrefixes(self.num_kv_tokens, heads, key_size, self.dropout)

    def trained_parameters(self, name: str, shape: tuple[int, ...]) -> int:
        """The number of trained parameters in one tensor of the adapter's file: none in masks and seeds."""
        return 0 if name.endswith((".token_mask", ".piece_mask", ".seed")) else math.prod(shape)


def prune_prompts(
    model: PeftModel,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    token_keep: float = 0.5,
    piece_keep: float = 0.5,
    rewind: bool = True,
    adapter_name: str = "default",
    max_batches: int | None = None,
    progress: bool = True,
) -> None:
    """Cut off the least important prompts of E2VPT, then the least important pieces of each, and start again.

    Call it after training, then train once more, with a new optimizer. Importance is the gradient of the cross entropy
    with respect to the masks, averaged over the batches. As in the authors' code it keeps its sign, so parts go first
    whose growth lowers the loss. At least one prompt, and one piece of each, remain.

    Where a norm precedes attention, it hides the length of a whole prompt: gradients of the masks of tokens are then
    next to nothing, as in the authors' code, and which prompts go is nearly a matter of rounding. Those of pieces are
    not concerned: `token_keep=1` prunes by them alone.

    Args:
        model: with the trained adapter, active.
        dataloader: gives mappings with `pixel_values` and `labels`.
        token_keep: part of the prompts to keep, above 0.
        piece_keep: part of the pieces of each prompt to keep, above 0.
        rewind: whether prompts, keys and values, and copies of heads get the values that they started from.
        adapter_name: which one.
        max_batches: most batches to read; all by default.
        progress: whether to show a bar.

    Raises:
        ValueError: the adapter is none of E2VPT, not active or pruned already, or data or a part are invalid; the
            adapter is then unchanged.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, E2VPTConfig):
        about = "there is none" if config is None else f"its config is {type(config).__name__}"
        raise ValueError(
            f"Adapter {adapter_name!r} has no prompts that can be pruned: {about}, not {E2VPTConfig.__name__}."
        )
    if adapter_name not in model.active_adapters:
        raise ValueError(f"Adapter {adapter_name!r} is not active: call model.set_adapter({adapter_name!r}) first.")
    for name, part in (("token_keep", token_keep), ("piece_keep", piece_keep)):
        if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part <= 1:
            raise ValueError(f"{name} is {part!r}: must be a number above 0 and at most 1.")
    base: Any = model.get_base_model()
    layers = {path: layer for path, layer in layers_of(base).items() if adapter_name in layer.plans}
    equations = [each for layer in layers.values() for each in layer.equations_of(adapter_name)]
    masks = list({id(m): m for each in equations for m in each.shared if isinstance(m, Masks)}.values())
    if any(not mask.all() for m in masks for mask in (m.token_mask, m.piece_mask)):
        raise ValueError(f"Adapter {adapter_name!r} is pruned already: prune once, from the trained whole.")
    backbone = find_backbone(base, config.backbone)
    calibration = Calibration(base, backbone, adapter_name, layers, max_batches, dataloader, progress)
    importance = _importance(calibration, masks)
    with torch.no_grad():
        for m, (tokens, pieces) in zip(masks, importance, strict=True):
            m.token_mask[tokens.argsort()[: _dropped(len(tokens), token_keep)]] = 0.0
            m.piece_mask.scatter_(1, pieces.argsort(dim=1)[:, : _dropped(pieces.shape[1], piece_keep)], 0.0)
    if rewind:
        for each in equations:
            if isinstance(each.module, Rewindable):
                each.module.rewind()
        for module in base.modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                module.modules_to_save[adapter_name].load_state_dict(module.original_module.state_dict())


def _dropped(count: int, keep: float) -> int:
    return min(count - 1, math.floor(count * (1 - keep) + 1e-6))


def _importance(calibration: Calibration, masks: list[Masks]) -> list[tuple[Tensor, Tensor]]:
    """The mean gradients with respect to the masks of tokens and of pieces, of each set of masks."""
    tensors = [mask for m in masks for mask in (m.token_mask, m.piece_mask)]
    totals = [torch.zeros_like(mask, dtype=torch.float32) for mask in tensors]
    try:
        for mask in tensors:
            mask.requires_grad_(True)
        with in_eval_mode(calibration.model), torch.enable_grad():
            for batch in calibration.batches():
                loss = calibration.loss(batch, "E2VPT measures importance")
                for total, gradient in zip(totals, torch.autograd.grad(loss, tensors), strict=True):
                    total += gradient.float()
    finally:
        for mask in tensors:
            mask.requires_grad_(False)
    if not all(total.isfinite().all() for total in totals):
        raise ValueError("E2VPT: a gradient of the loss is not finite, so nothing can be compared.")
    if not any(total.any() for total in totals):
        raise ValueError("E2VPT: all gradients of the loss are zero. Is the head's weight zero?")
    return list(zip(totals[::2], totals[1::2], strict=True))
