"""Visual Fourier prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...core.registry import Paper, register
from ...training.defaults import Training
from .vpt import Prompts, VPTConfig


class FourierPrompts(Prompts):
    """Prompts of which the first ones are taken to the frequency domain.

        tokens = [Re FFT_tokens(FFT_channels(T_1..f)); T_f+1..p],  T: the tokens of `Prompts`,  f = floor(fraction p)

    Args:
        num_virtual_tokens: p.
        width: channels of the prompts.
        patch_features: elements of one patch, channels x height x width.
        dropout: probability, for each element of each image.
        fraction: of the prompts that are transformed.
        from_data: whether `choose` sets T.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        width: int,
        patch_features: int,
        dropout: float,
        fraction: float,
        from_data: bool = False,
    ) -> None:
        super().__init__(num_virtual_tokens, width, patch_features, dropout, from_data)
        self.transformed = int(fraction * num_virtual_tokens)

    def forward(self, batch_size: int, projection: nn.Module | None = None) -> Tensor:
        """Tokens of shape (batch, num_virtual_tokens, width of the backbone)."""
        tokens = super().forward(batch_size, projection)
        chosen, others = tokens.tensor_split([self.transformed], dim=1)
        # in float32, as transforms of half precision take powers of two only
        transformed = torch.fft.fft2(chosen.float(), dim=(1, 2)).real if self.transformed else chosen
        return torch.cat([transformed.to(others.dtype), others], dim=1)


@register(
    name="vfpt",
    paper=Paper("Visual Fourier Prompt Tuning", "NeurIPS 2024", "2411.01327"),
    summary="as VPT, the first prompts of a block by their Fourier transform",
    visual_tuning="prompt: vision-driven",
    equation="x_i = [prefix; Re FFT2(P_i[:f]); P_i[f:]; patches] into block i (deep), or before the first (shallow)",
    counts=(({"num_virtual_tokens": 10}, 92_160),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class VFPTConfig(VPTConfig):
    """Config of visual Fourier prompt tuning (VFPT), arXiv 2411.01327.

    As VPT, but the first prompts of every block are the real part of their Fourier transform, over channels and then
    over these tokens, after dropout and projection. It adds no parameters. The start is that of VPT, as in the
    authors' code, so transformed prompts are larger by about the root of half the number of their elements.

    Args:
        num_virtual_tokens: prompts a block; the paper tunes it.
        deep: new prompts in every block, or one set before the first of `layers_to_transform`, which must then be
            consecutive.
        dropout: probability of dropping an element of a prompt.
        projection_dim: width of the prompts before a linear that all blocks share raises it to the backbone's; None:
            prompts have the backbone's width.
        init: first values of the prompts: `"random"`, or tokens of `"data"`, which are then transformed, too.
        stages: with `deep=False`, number of equal groups of blocks, each with prompts of its own; None: one.
        biases: whether all biases of the backbone train, too.
        fraction: part of the prompts that is transformed; the paper tunes it, 0.5 in the authors' configs.
    """

    fraction: float = field(default=0.5, metadata={"help": "Part of the prompts that is transformed."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_number("fraction", 0.0)
        if self.fraction > 1:
            self._fail("fraction", "a number from 0 to 1")

    def _prompts(self, width: int, patch_features: int) -> FourierPrompts:
        sizes = (self.num_virtual_tokens, width, patch_features)
        return FourierPrompts(*sizes, self.dropout, self.fraction, self.init == "data")
