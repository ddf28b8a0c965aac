"""Visual prompt tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...core.calibration import Calibration, SetByData
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import OutputSite, Placement, Shared, TokenSite, to_tokens
from ...training.defaults import Training
from ..specification.bitfit import Shift


MAX_VIRTUAL_TOKENS = 10_000  # the papers stop at 200; attention is quadratic in them
MAX_GRID = 128  # rows or columns of patches for which a method has weights: images of 2048 pixels with patches of 16


class Prompts(SetByData):
    """Learned tokens, the same for every image.

        P ~ U(-v, v), v = sqrt(6 / (patch_features + width)); tokens = dropout(P W^T + b), or dropout(P)

    Args:
        num_virtual_tokens: how many.
        width: channels of P: of the backbone, or of the projection's input.
        patch_features: input values of one patch, channels x height x width.
        dropout: probability, independent for each image.
        from_data: whether `choose` sets P; until then it is not a number.
    """

    method = 'VPT with init="data"'
    chosen = "prompts"

    def __init__(
        self, num_virtual_tokens: int, width: int, patch_features: int, dropout: float, from_data: bool = False
    ) -> None:
        super().__init__(from_data)
        self.bound = math.sqrt(6.0 / (patch_features + width))
        self.prompts = nn.Parameter(torch.full((num_virtual_tokens, width), torch.nan))
        self.dropout = nn.Dropout(dropout)
        if not from_data:
            nn.init.uniform_(self.prompts, -self.bound, self.bound)

    def forward(self, batch_size: int, projection: nn.Module | None = None) -> Tensor:
        """Tokens of shape (batch, num_virtual_tokens, width of the backbone).

        Raises:
            NotCalibratedError: P is not set yet.
        """
        self.require_choice()
        tokens = self.prompts if projection is None else projection(self.prompts)
        return self.dropout(tokens.expand(batch_size, -1, -1))

    def drawn(self) -> Tensor:
        """P as without data."""
        return torch.empty_like(self.prompts).uniform_(-self.bound, self.bound)


class TokenSample:
    """Some of all tokens that it was shown, each as likely as any other.

    Args:
        count: how many to keep.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.tokens: Tensor | None = None
        self.draws: Tensor | None = None

    def show(self, tokens: Tensor) -> None:
        """Keep some of these, (tokens, channels), and of those before."""
        draws = torch.rand(len(tokens), device=tokens.device)
        if self.tokens is not None and self.draws is not None:
            tokens, draws = torch.cat([self.tokens, tokens]), torch.cat([self.draws, draws])
        self.draws, best = draws.topk(min(self.count, len(draws)))
        self.tokens = tokens[best]


def require_consecutive(config: VisualPeftConfig, blocks: Sequence[Block], reason: str) -> None:
    """Refuse blocks between which tokens cannot pass.

    Args:
        config: of the method.
        blocks: to be adapted.
        reason: why tokens pass from block to block.

    Raises:
        ValueError: the blocks are not consecutive.
    """
    numbers = [block.index for block in blocks]
    if numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise ValueError(
            f"{type(config).__name__}{reason}: prompts pass from block to block, so the blocks must be consecutive, "
            f"but they are {numbers}. Choose layers_to_transform or exclude_modules so."
        )


class Projection(nn.Linear):
    """Linear from the prompts' width to the backbone's; weight He-normal over the outputs, bias as in `nn.Linear`."""

    def reset_parameters(self) -> None:
        """Draw new weights."""
        super().reset_parameters()
        nn.init.kaiming_normal_(self.weight, a=0.0, mode="fan_out")


@register(
    name="vpt",
    paper=Paper("Visual Prompt Tuning", "ECCV 2022", "2203.12119"),
    summary="learned tokens before every block, stage, or the first; may start as tokens of images, and train "
    "biases, too",
    visual_tuning="prompt: vision-driven",
    equation="x_i = [prefix; P_i; patches] into block i (deep), or P before the first block only (shallow)",
    counts=(
        ({"num_virtual_tokens": 50, "deep": True}, 460_800),
        ({"num_virtual_tokens": 50, "deep": False}, 38_400),
    ),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class VPTConfig(VisualPeftConfig):
    """Config of visual prompt tuning (VPT), arXiv 2203.12119.

    Learned tokens join the sequence after all prefix tokens (CLS, distillation, registers), without position. *Deep*:
    every block gets its own prompts, and their outputs are dropped. *Shallow*: one set enters before the first block
    and passes through all. Head, pooler and `hidden_states` see only the backbone's own tokens; attention maps include
    the prompts. Attention in windows or with reduced keys gets deep prompts in every window, as extra keys and values;
    blocks whose attention pools the grid get none.

    The paper keeps the backbone in eval mode during training; if the backbone has dropout or stochastic depth, call
    `.eval()` on it to do the same. The defaults here are 10 deep prompts, 92,160 parameters on ViT-B/16. The defaults
    of the authors' code are 5 shallow prompts, 3,840 parameters; the authors choose both per task. Known differences
    in other code: the bound of the initialisation uses the number of tokens instead of the width (Adapter+), and
    prompts stand at the end of the sequence (NOAH).

    *Self-prompt tuning* (arXiv 2402.02382) is `init="data"`: the prompts of each block start as tokens of its input in
    the frozen model, drawn at random from training images by `calibrate`; CLS counts, padding does not. Of that
    paper's other choices, k-means and pooling, none is implemented. `biases=True` also trains all biases, as BitFit
    does (VPT's appendix). `stages` is the part of DePT (arXiv 2210.04831) that stands in the model: prompts pass from
    block to block within a stage, and each stage gets new ones. Its losses and its adaptation without labels are not
    implemented; it puts prompts before CLS, which makes no difference without positions.

    Args:
        num_virtual_tokens: prompts per block; the paper tunes it from 1 to 200.
        deep: new prompts in every block; else one set before the first of `layers_to_transform`, which must then be
            consecutive.
        dropout: probability, on the prompts.
        projection_dim: width of the prompts, which a linear shared by all blocks then maps to the backbone's width;
            None: prompts have the backbone's width and no linear.
        init: first values of the prompts: `"random"`, or tokens of `"data"`.
        stages: with `deep=False`, number of equal groups of blocks, each with prompts of its own; None: one.
        biases: whether all biases of the backbone train, too.
    """

    num_virtual_tokens: int = field(default=10, metadata={"help": "Prompts a block."})
    deep: bool = field(default=True, metadata={"help": "New prompts in every block; else before the first only."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on a prompt."})
    projection_dim: int | None = field(default=None, metadata={"help": "Width of the prompts before a projection."})
    init: str = field(
        default="random", metadata={"help": "First values of the prompts: 'random', or tokens of 'data' (calibrate)."}
    )
    stages: int | None = field(
        default=None, metadata={"help": "With deep=False, groups of blocks that get prompts of their own."}
    )
    biases: bool = field(default=False, metadata={"help": "Train all biases of the backbone, too."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_choice("deep", (True, False))
        self._require_number("dropout", 0.0, below=1.0)
        if self.projection_dim is not None:
            self._require_integer("projection_dim", 1)
        self._require_choice("init", ("random", "data"))
        self._require_choice("biases", (True, False))
        if self.init == "data" and self.projection_dim is not None:
            self._fail("init", "'random' with projection_dim: tokens have the backbone's width")
        if self.stages is not None:
            self._require_integer("stages", 1)
            if self.deep:
                self._fail("stages", "None with deep=True, where every block gets prompts of its own")

    @property
    def chooses_from_data(self) -> bool:
        """Whether the prompts start as tokens of images."""
        return self.init == "data"

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """One set of prompts before every block, or before the first."""
        if self.projection_dim is not None:
            self._require_integer("projection_dim", 1, backbone.width, "the backbone's width")
        blocks, length = backbone.blocks, 1
        if not self.deep:
            require_consecutive(self, blocks, ".deep is False")
            length = len(blocks) // (self.stages or 1)
            if length * (self.stages or 1) != len(blocks):
                self._fail("stages", f"a divisor of {len(blocks)}, the number of blocks")
        width = self.projection_dim or backbone.width
        projection = Shared("shared", partial(Projection, width, backbone.width)) if self.projection_dim else None
        for index, block in enumerate(blocks):
            new, last = index % length == 0, (index + 1) % length == 0
            site = TokenSite(takes=not new, hands_on=not last)
            build = (lambda _: self._prompts(width, backbone.patch_features)) if new else None
            yield Placement(block.path, "tokens", site, build, projection)
        for path in (*backbone.outside, *backbone.modules()) if self.biases else ():
            yield Placement(path, "bias", OutputSite(), Shift)

    @torch.no_grad()
    def choose(self, calibration: Calibration) -> None:
        """Start the prompts of each block as tokens of its input.

        Raises:
            ValueError: there are fewer tokens than prompts, or one is not finite.
        """
        backbone, model = calibration.backbone, calibration.model
        blocks = {block.path: block for block in backbone.blocks}
        equations = dict(calibration.equations("tokens"))
        samples = {path: TokenSample(self.num_virtual_tokens) for path in equations}
        inputs: dict[nn.Module, Any] = {}
        handles = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, kwargs: inputs.update({module: args[0] if args else kwargs["hidden_states"]}),
                with_kwargs=True,
            )
            for path in equations
        ]
        try:
            for batch in calibration.batches():
                batch.pop("labels")
                calibration.output(batch)
                for path, sample in samples.items():
                    block = blocks[path]
                    x = to_tokens(inputs[model.get_submodule(path)], (block.table or backbone.architecture).stream)
                    mask = batch.get("pixel_attention_mask")
                    if mask is not None:  # of the patches
                        x = x[F.pad(mask, (block.prefix_tokens, 0), value=1).bool()]
                    sample.show(x.flatten(0, -2))
        finally:
            for handle in handles:
                handle.remove()
        for path, sample in samples.items():
            assert sample.tokens is not None
            if len(sample.tokens) < self.num_virtual_tokens:
                raise ValueError(
                    f"dataloader: block {path} has {len(sample.tokens)} tokens, fewer than "
                    f"{type(self).__name__}.num_virtual_tokens, {self.num_virtual_tokens}. Give more images."
                )
            if not sample.tokens.isfinite().all():
                raise ValueError(f"{type(self).__name__}: tokens of block {path} are not finite.")
        for path, equation in equations.items():
            tokens = samples[path].tokens
            assert tokens is not None
            equation.choose(tokens.to(equation.prompts))

    def _prompts(self, width: int, patch_features: int) -> Prompts:
        return Prompts(self.num_virtual_tokens, width, patch_features, self.dropout, self.init == "data")
