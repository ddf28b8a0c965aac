"""What every site has: where it may stand, what it needs there, and how it is described.

A new place to act is one file: a subclass of `BlockSite`, `ModuleSite` or `ModelSite`, with the `Protocol` of its
equation. These name the layer that carries it, so nothing else lists sites.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..backbones.backbone import Block, VisionBackbone


class Site:
    """A place where an equation acts.

    What a site has beyond this, it has as attributes. So whoever asks "is a gradient needed here?" asks every site,
    and need not know its class.

    Attributes:
        at: `"attention"` or `"mlp"`, if it stands at one of these sub-layers.
        frozen: whether no gradient crosses the backbone on its way to the equation.
        heads: how results reach the task heads, if they do.
        classes: number of classes of the model's output, if the site changes it.
        trains_copy: whether the equation is a copy of the module.
        passes_on: whether a placement without an equation only passes something on to later blocks.
        mixes: whether samples of other adapters, or of none, can be in the same batch.
        own_layer: a special layer for it, if there is one.
    """

    at: Any = None
    frozen: Any = False
    heads: Any = None
    classes: Any = None
    trains_copy = False
    passes_on = False
    mixes = True
    own_layer: ClassVar[Any] = None

    def exists_at(self, block: Block, whole: VisionBackbone) -> bool:
        """Whether a block has this place; where it has not, the placement is left out."""
        return True

    def why_not(self, block: Block | None, whole: VisionBackbone) -> str | None:
        """Why it cannot stand there, as the second half of "... does not fit ..."; None if it can.

        Args:
            block: of the placement; None if it is not a block.
            whole: the backbone.
        """
        return None

    def why_no_text(self) -> str | None:
        """Why it cannot stand in a text tower, as the second half of "... does not fit ..."; None if it can."""
        return None

    def why_not_beside(self, path: str, copied: Sequence[str]) -> str | None:
        """Why the module cannot be adapted beside trained copies of modules, as a sentence; None if it can.

        Args:
            path: name of the module.
            copied: names of the copied modules.
        """
        return None

    def reaches(self, block: Block, prompts: str | None) -> Sequence[str]:
        """The modules of a block that it changes by more than hooks, so that a copy would lack the change.

        Args:
            block: the block.
            prompts: how prompts join its attention, from the architecture's table.
        """
        return ()

    def connect(self, layer: Any, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Make a layer ready for equations at this site.

        Args:
            layer: of the kind that carries the site.
            model: the whole model.
            backbone: in it; None if the config names target modules.
        """

    def in_part(self, label: str) -> Site:
        """The same site for one of several parts of an adapter, which are told apart.

        Args:
            label: of the part.
        """
        return self

    def turn(self) -> tuple[str, int] | None:
        """The point of a module where equations act in turn, and when, lower numbers first; None if there is none."""
        return None

    def why_late(self, path: str) -> str:
        """Why its equation acts after others at a point, as the second half of a sentence.

        Args:
            path: name of the module.
        """
        return f"acts last at {path!r}"

    def describe(self, names: Mapping[str, str]) -> str:
        """What an equation acts on, in words; `{}` stands for the modules or sub-layers.

        Args:
            names: of the modules in words, by their path.
        """
        (summary, *_) = (inspect.getdoc(type(self)) or type(self).__name__).split(".")
        return f"{summary[0].lower()}{summary[1:]}"

    @classmethod
    def arrange(cls, placements: list[Placement], whole: VisionBackbone, name: str, selects: str) -> list[Placement]:
        """All placements of a method, after a look at how those at sites of this class depend on each other.

        Args:
            placements: of the method.
            whole: the backbone.
            name: of the config, for errors.
            selects: what selects its blocks, for errors.

        Raises:
            ValueError: they do not fit together.
        """
        return placements


class ModuleSite(Site):
    """A site at a single linear, norm or convolution; `ModuleLayer` carries it.

    Attributes:
        around: whether the equation acts on the module's output, and not on its weight and bias.
        reads_input: whether it reads the input, too.
        reads_map: whether it is told how tokens of the input lie in the image, by the site's `layout`.
        followers: names of the modules that read the output, if the equation merges into them.
        channelwise: whether the equation is a scale and a shift of each channel.
    """

    around = False
    reads_input = False
    reads_map = False
    followers: Any = None
    channelwise: Any = False

    def turn(self) -> tuple[str, int]:
        """Changes of weight and bias come before those of the output."""
        return "", int(self.around)

    def why_late(self, path: str) -> str:
        """Its output is that of the changed weights."""
        return f"acts on the output of {path!r}, which its weight and bias determine"


class ModelSite(Site):
    """A site at the input or the output of the model; `ModelAdapters` carries it.

    Attributes:
        point: `"images"` or `"logits"`, where equations at such sites act in turn.
    """

    point = ""

    def act(self, layer: Any, equation: Any, x: Tensor, *more: Tensor) -> Tensor:
        """The new value at the point.

        Args:
            layer: what adapters have at the backbone.
            equation: the active equation.
            x: the value, with the changes of equations before it.
            more: what may be read beside it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not act.")

    def addend(self, equation: Any) -> Tensor | None:
        """What an equation adds to any normalised images; None if it does anything else."""
        return None


class BlockSite(Site):
    """A site in or around a block; `BlockAdapters` carries it.

    Attributes:
        takes: whether something comes from the block before.
        hands_on: whether the next block gets something.
        needs_layout: whether the equation needs the layout of the tokens in the image.
        needs_pixels: whether it needs the images.
        needs_mask: whether it needs to know which tokens are padding.
        asks: whether it runs extra tokens through the block.
        attends: whether it calls the block's attention.
        keeps: whether the state after the last block is kept.
        tokenwise: whether the equation treats each token by itself, so that images may lie in one row.
        part: tells several sites of one adapter apart.
    """

    takes: Any = False
    hands_on: Any = False
    needs_layout: Any = False
    needs_pixels: Any = False
    needs_mask: Any = False
    asks: Any = False
    attends: Any = False
    keeps: Any = False
    tokenwise: Any = False
    part: Any = ""

    def key(self, owner: str) -> str:
        """The name under which something of an adapter passes from block to block.

        Args:
            owner: the adapter with its method.
        """
        return f"{owner}:{self.part}" if self.part else owner

    def in_part(self, label: str) -> BlockSite:
        """What passes from block to block has the label in its name."""
        if "part" not in vars(self):
            return self
        site: Any = self
        return replace(site, part="/".join(filter(None, (label, self.part))))


class AttentionSite(BlockSite):
    """A site in the attention of a block."""

    def exists_at(self, block: Block, whole: VisionBackbone) -> bool:
        """Blocks beside those with attention that mix tokens in another way have nothing for it."""
        if any(other.projections for other in whole.blocks):
            return bool(block.projections)
        return "attention" in block.sublayers

    def why_no_text(self) -> str | None:
        """Equations inside attention would act beside the mask of the text."""
        return ": inside the attention of a text tower it would not see which tokens the mask hides."

    def reaches(self, block: Block, prompts: str | None) -> Sequence[str]:
        """Its forward is another one."""
        return (attention_in(block),)

    def connect(self, layer: Any, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Let equations act where queries meet keys."""
        layer.hook_attention()


def attention_in(block: Block) -> str:
    """Full name of the module around a block's query projection; empty if there is none."""
    query = (*block.projections, "")[0]
    return query.rpartition(".")[0]


_PROMPTS = (
    " Its role table says so (Architecture.prompts is None, the default). In a table of your own, set it to 'sequence'"
    " if tokens put into a block's input move no positions of the others, or to 'keys' if they can join its keys and "
    "values only."
)


def why_not_packed(site: Site, block: Block | None, whole: VisionBackbone) -> str | None:
    """Why a site does not fit a stream with the tokens of all images in one row, as in `Site.why_not`."""
    if block is None or not isinstance(site, BlockSite) or site.tokenwise:
        return None
    table = block.table or whole.architecture
    if table.stream != "packed":
        return None
    return ": its stream has the tokens of all images in one row, and the method needs those of each image apart."


def joins_others(block: Block, whole: VisionBackbone) -> bool:
    """Whether no extra tokens can join the attention of a block, while they can join that of others."""
    own, *tables = (each.table or whole.architecture for each in (block, *whole.blocks))
    return own.prompts is None and any(table.prompts for table in tables)


def why_none_join(block: Block | None, whole: VisionBackbone) -> str | None:
    """Why no extra tokens can join the attention of a block, as in `Site.why_not`; None if they can."""
    table = (block.table if block is not None else None) or whole.architecture
    if table.prompts is not None:
        return None
    return f": no tokens can join those of its attention.{_PROMPTS if table.softmax else ''}"


NO_TOKENS_IN_TEXTS = (
    ": no tokens can join a text, as its positions and its mask are those of words. Methods for class texts put "
    "learned vectors in the place of words: CoOpConfig, and MaPLeConfig or IVLPConfig for both towers."
)
NO_GRID_IN_TEXTS = ": the tokens of a text lie in no image."
NO_LAYOUT = ": the layout of its tokens in the image is not known."


@dataclass(frozen=True)
class Shared:
    """A module that several equations of an adapter use. The layer of the first one keeps and saves it.

    Attributes:
        name: identifies it if an adapter has several; part of the parameter names.
        build: creates it.
    """

    name: str
    build: Callable[[], nn.Module]


class SharedSite(Site):
    """Not a site: the place where the first layer of an adapter keeps a shared module."""


@dataclass(frozen=True)
class Placement:
    """One equation at one site of one module.

    Attributes:
        path: full name of the module in the model; `""` for the model itself.
        slot: name of the equation within the module; part of the parameter names.
        site: where it acts.
        build: creates the equation from its module; None if the site needs none.
        shared: a module of the adapter that the equation gets as last argument.
    """

    path: str
    slot: str
    site: Site
    build: Callable[[nn.Module], nn.Module] | None
    shared: Shared | None = None
