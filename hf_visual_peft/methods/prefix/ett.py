"""The pieces of eTT: prefixes from class prototypes, offsets, and a map of the features."""

from __future__ import annotations

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
from ...sites import BlockAdapters, BranchSite, KeyValueSite, OutputSite, Placement, Shared, output_channels, to_tokens
from ...training.defaults import Training
from ..prompt.vpt import MAX_VIRTUAL_TOKENS
from ..reparameter.attn_scale import Offset
from .prefix_tuning import Prefixes, PrefixNetwork, ProducedPrefixes, attending, heads_in, key_and_value_widths


class SeededNetwork(PrefixNetwork, SetByData):
    """A `PrefixNetwork` whose E starts as prototypes of classes; until data set it, it is not a number.

    Args:
        num_virtual_tokens: rows of E, one a class.
        width: channels of E.
        hidden: channels of the layer between.
        sizes: channels of the keys and of the values of each block.
        from_data: whether data set E; else it starts from N(0, 1).
    """

    method = "eTT"
    chosen = "embedding"

    def __init__(
        self, num_virtual_tokens: int, width: int, hidden: int, sizes: Sequence[int], from_data: bool
    ) -> None:
        super().__init__(num_virtual_tokens, width, hidden, sizes)
        self._known = not from_data
        if from_data:
            nn.init.constant_(self.embedding, torch.nan)

    def forward(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, (num_virtual_tokens, channels of all heads) each.

        Raises:
            NotCalibratedError: E is not set yet.
        """
        self.require_choice()
        return super().forward(index)

    def drawn(self) -> Tensor:
        """E as without data."""
        return torch.randn_like(self.embedding)


class FeatureMap(nn.Module):
    """A linear map, the identity at the start: f(y) = W y.

    Args:
        width: channels of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, y: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        return F.linear(y, self.weight)


@register(
    name="ett",
    paper=Paper("Exploring Efficient Few-shot Adaptation for Vision Transformers", "TMLR 2023", "2301.02419"),
    summary="keys and values in every attention, made of class prototypes by an MLP; an offset after every sub-layer; "
    "a map of the features",
    visual_tuning="prompt: vision-driven",
    equation="softmax(Q [K; P_k]^T / sqrt(d_head)) [V; P_v], [P_k, P_v] = MLP(prototypes); e1, e2 added to what "
    "attention and MLP add; W LN(x) at the end",
    # prototypes 3,840 and MLP 7,391,616; 24 offsets of 768; W 589,824
    counts=(({"num_virtual_tokens": 5}, 8_003_712), ({"num_virtual_tokens": 5, "reparam_dim": None}, 700_416)),
    mergeable=False,
    identity_at_start=False,
    calibrated=True,
    training=Training(1e-3),
)
@dataclass
class ETTConfig(VisualPeftConfig):
    """Config of the pieces of efficient transformer tuning (eTT), arXiv 2301.02419.

    Every attention gets one key and one value for each class, the same for every image. An MLP makes those of all
    blocks from one vector a class; `store_prefixes` drops the MLP after training and keeps what it makes. These
    vectors start as *attentive prototypes*, which `calibrate` computes with the frozen model: the mean over a class's
    images of the patches as they enter the first adapted block, weighted by the attention of CLS to them in the last
    one, which is a softmax over the patches alone, and a mean over heads. In backbones without CLS, and in those whose
    stages or windows have other tokens, all patches count alike, but for padding; each stage has an MLP of its own,
    with prototypes of its first block's input (of its output, where the block changes the width). Every sub-layer gets
    an offset, which starts at zero, and the last norm a linear map of the features after it, which starts as the
    identity. A backbone without such a norm, or of which only some blocks are adapted, gets no map.

    What is left out: the paper adapts to one few-shot episode at a time. Its classifier is the nearest class mean by
    cosine; here the task head trains. Its second loss, which holds the prototypes near their first values by a random
    projection that is then dropped, is not implemented. Its authors' code trains the map with twice the learning rate.

    Args:
        num_virtual_tokens: keys, and as many values, a block: one for each class. None: the classes of the head.
        reparam_dim: hidden width of the MLP; half of the backbone's width in the paper, which is 384 on ViT-B. None:
            keys and values are parameters themselves and start at random, as after `store_prefixes`.
        init: what the MLP's input starts from: prototypes of classes in the `"data"`, or `"random"` numbers.
        dropout: probability of dropping an element of a key or value.
    """

    num_virtual_tokens: int | None = field(
        default=None, metadata={"help": "Keys, and as many values, a block; default: the head's classes.", "tiny": 2}
    )
    reparam_dim: int | None = field(
        default=384, metadata={"help": "Hidden width of the MLP that makes keys and values.", "tiny": 4}
    )
    init: str = field(
        default="data", metadata={"help": "What the MLP's input starts from: prototypes in the 'data', or 'random'."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Probability of dropping an element of a key or value."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens is not None:
            self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        if self.reparam_dim is not None:
            self._require_integer("reparam_dim", 1, 100_000)
        self._require_choice("init", ("data", "random"))
        self._require_number("dropout", 0.0, below=1.0)

    @property
    def chooses_from_data(self) -> bool:
        """Whether the MLP's input starts from data."""
        return self.reparam_dim is not None and self.init == "data"

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """In every attention, after every sub-layer, and at the last norm."""
        classes, network = self._classes(backbone), None
        blocks = attending(backbone)
        if self.reparam_dim is not None and blocks:
            sizes = [size for block in blocks for size in key_and_value_widths(block, backbone)]
            width = backbone.width_before if blocks[0].pools else None
            build = partial(
                SeededNetwork, classes, width or backbone.width, self.reparam_dim, sizes, self.chooses_from_data
            )
            network = Shared("network", build)
        for index, block in enumerate(blocks):
            yield Placement(block.path, "heads", KeyValueSite(), partial(self._build, index, block, classes), network)
        for block in backbone.blocks:
            for sublayer in ("attention", "mlp"):
                site = BranchSite(sublayer, reads="output")
                yield Placement(block.path, sublayer, site, partial(_offset, block.width or backbone.width))
        for path in backbone.final_norms[-1:]:
            yield Placement(path, "map", OutputSite(), _map)

    def _classes(self, backbone: VisionBackbone) -> int:
        if self.num_virtual_tokens is not None:
            return self.num_virtual_tokens
        known = [outputs for outputs, _ in backbone.head_sizes.values()]
        if not known:
            self._fail("num_virtual_tokens", f"a number of classes: the head of {backbone.class_name} tells none")
        return min(known)

    def _build(self, index: int, block: Block, classes: int, module: nn.Module) -> Prefixes | ProducedPrefixes:
        heads, key_width, value_width = heads_in(block, module)
        if self.reparam_dim is None:
            return Prefixes(classes, heads, key_width, value_width, self.dropout)
        return ProducedPrefixes(index, heads, self.dropout)

    @torch.no_grad()
    def choose(self, calibration: Calibration) -> None:
        """Start the MLP's input as prototypes of the classes.

        Raises:
            ValueError: labels are invalid, a class has no image, or a prototype is not finite.
        """
        names = ["network", *(f"network_stage{number}" for number in range(len(calibration.backbone.blocks)))]
        networks = {path: network for name in names for path, network in calibration.equations(name)}
        layers = [layer for layer in calibration.layers.values() if isinstance(layer, BlockAdapters)]
        blocks = {block.path: block for block in calibration.backbone.blocks}
        adapted = [layer for layer in layers if blocks[layer.where].projections]
        last = max(adapted, key=lambda layer: blocks[layer.where].index)
        seen: dict[str, Any] = {}
        handles = [
            calibration.model.get_submodule(path).register_forward_hook(partial(_keep, seen, path), with_kwargs=True)
            for path in networks
        ]
        classes = len(next(iter(networks.values())).embedding)
        sums = {path: torch.zeros(classes, network.embedding.shape[1]) for path, network in networks.items()}
        counts = torch.zeros(classes)
        try:
            for batch in calibration.batches():
                labels = calibration.class_labels(batch, type(self).__name__, classes).cpu()
                with last.watch_weights() as weights:
                    calibration.output(batch)
                counts += torch.bincount(labels, minlength=classes)
                for path, network in networks.items():
                    pooled = _pooled(
                        calibration.backbone,
                        (blocks[path], blocks[last.where]),
                        seen[path],
                        weights,
                        batch.get("pixel_attention_mask"),
                        (len(labels), network.embedding.shape[1]),
                    )
                    sums[path].index_add_(0, labels, pooled.cpu())
        finally:
            for handle in handles:
                handle.remove()
        missing = [str(number) for number in (counts == 0).nonzero().flatten().tolist()]
        if missing:
            raise ValueError(
                f"dataloader: it has no image of class {', '.join(missing)}; {type(self).__name__} makes a key and "
                f"a value of the images of each of its {classes} classes. Give images of all, or set "
                "num_virtual_tokens to the number of classes, or init to 'random'."
            )
        found = {path: each / counts.unsqueeze(1) for path, each in sums.items()}
        if not all(each.isfinite().all() for each in found.values()):
            raise ValueError(f"{type(self).__name__}: patches of the model are not finite.")
        for path, network in networks.items():
            network.choose(found[path].to(network.embedding))


def _offset(width: int, _: nn.Module) -> Offset:
    return Offset(width)


def _map(norm: nn.Module) -> FeatureMap:
    channels = output_channels(norm)
    assert channels is not None  # a norm has them
    return FeatureMap(channels)


def _keep(seen: dict[str, Any], path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    seen[path] = (args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output)


def _pooled(
    backbone: VisionBackbone,
    ends: tuple[Block, Block],
    streams: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    mask: Tensor | None,
    shape: tuple[int, int],
) -> Tensor:
    """The mean of an image's patches, by the attention of CLS to them where it is known, (batch, width).

    Args:
        backbone: with the blocks.
        ends: the first block, whose patches they are, and the last, whose attention counts.
        streams: before and after the first block.
        weights: of the last block's first token to all keys, (..., heads, 1, keys); one, if they are known.
        mask: of patches that are not padding, (batch, patches).
        shape: of the result.
    """
    (first, last), (images, width) = ends, shape
    table = first.table or backbone.architecture
    x = to_tokens(streams[0], table.stream)
    x = x if x.shape[-1] == width else to_tokens(streams[1], table.stream)
    patches = x[:, first.prefix_tokens :].float().unflatten(0, (images, -1)).flatten(1, 2)  # rows may be parts
    whole = table.grid in ("full", "masked") and backbone.times == 1 and first.width == last.width
    if whole and first.prefix_tokens and last.prefix_tokens:
        (found,) = weights
        found = found.reshape(len(x), -1, found.shape[-1])[..., first.prefix_tokens : x.shape[1]].float()
        shares = (found / found.sum(dim=-1, keepdim=True)).mean(dim=1)
    else:
        shares = patches.new_ones(patches.shape[:2]) if mask is None else mask.flatten(1).to(patches)
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return torch.einsum("bn,bnc->bc", shares, patches)
