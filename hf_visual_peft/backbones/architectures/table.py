"""The role table of a family of backbones, and the register of all tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn


Names = tuple[str, ...]
GridKind = Literal["full", "frames_last", "given", "map", "units", "halved", "unfolded", "spatial_shapes", "masked"]
Stream = Literal["tokens", "packed", "channels_last", "channels_first"]


@dataclass(frozen=True)
class ArchitecturePaths:
    """Where things are: the modules of a backbone, by name.

    Paths are dotted attribute names, in which `*` stands for any number or name, or for a part of one. Paths of roles
    in a block are relative to the block, paths of heads to the model that holds the backbone, all others to the
    backbone. A role with several names takes every module that exists under one of them. A role marked *optional* may
    have no module; a role that the table leaves empty does not occur in the architecture. A path that leads nowhere is
    an error, with what was looked for.

    Attributes:
        backbones: names of the backbone's classes, with their module (`"timm.models.resnet.ResNet"`) if the bare name
            is ambiguous; subclasses are recognised. If one class holds several architectures, add a module that this
            one has (`"FeatureListNet:layer1"`).
        blocks: the list or lists of blocks, in order.
        patch_embedding: the convolution or linear that turns pixels into tokens, or the stem whose last one does; of
            several names the first existing one counts. Empty if there is none.
        embeddings: the module that returns the first block's input; or the modules, one for each list of blocks, that
            return the input of its first block. `""`: the backbone.
        norm1: norm of attention, before it (or after it: `post_norm`).
        query: projection to queries; the same module as `key` and `value` if they are fused.
        key: projection to keys.
        value: projection to values.
        output: projection after attention.
        norm2: norm of the MLP.
        fc1: first linear(s) of the MLP; two if it is gated.
        fc2: last linear of the MLP.
        norms: optional; norms of the backbone after its blocks.
        heads: optional; task heads. Those of larger models depend on the model's class, see `register_heads`.
        own_heads: optional; task heads that are part of the backbone.
        drop_path: optional; the block's stochastic depth, with its rate in `drop_prob`.
        input_norms: optional; norms of the backbone before its blocks. Of these and the other names of norms those
            count that are norms.
        outer_norms: optional; norms after the backbone in the model that holds it.
        pooled_norms: optional; norms of only the pooled output, which the `heads` do not read.
        norm1_readers: (!) the linears that read `norm1`; by default query, key and value. Empty if other modules read
            it.
        norm2_readers: (!) the linears that read `norm2`; by default `fc1`. Empty if other modules read it.
        reduction: (!) optional; the convolution, without padding, through which keys and values read `norm1`.
        between: optional; linears, convolutions and norms between the lists of blocks, such as those that merge
            patches. `"all"`: all outside the blocks without another role.
        operations: optional; other linears, convolutions and norms of a block. `"all"`: all without another role.
        position_bias: optional; module that computes the block's bias on attention logits.
        uncalled: optional; query, key and value projections, or the one for all, whose weight attention reads without
            calling the module. Then they have no other role.
        skipped_blocks: optional; names of classes in the lists, or of modules in the backbone, that are not blocks.
        variants: optional; where blocks differ, the fields of a block that are others there, by the name of their
            class, or by the name of the block in the backbone, which counts before.
        remedy: optional; what to do where a block lacks a role, in place of the general advice.
    """

    backbones: Names
    blocks: str | Names
    patch_embedding: str | Names
    embeddings: str = "embeddings"
    norm1: Names = ("layernorm_before",)
    query: Names = ("attention.q_proj",)
    key: Names = ("attention.k_proj",)
    value: Names = ("attention.v_proj",)
    output: Names = ("attention.o_proj",)
    norm2: Names = ("layernorm_after",)
    fc1: Names = ("mlp.fc1",)
    fc2: Names = ("mlp.fc2",)
    norms: Names = ("layernorm",)
    heads: Names = ("classifier",)
    own_heads: Names = ()
    drop_path: Names = ("drop_path",)
    input_norms: Names = ()
    outer_norms: Names = ()
    pooled_norms: Names = ()
    norm1_readers: Names | None = None
    norm2_readers: Names | None = None
    reduction: Names = ()
    between: Names | Literal["all"] = ()
    operations: Names | Literal["all"] = ()
    position_bias: Names = ()
    uncalled: Names = ()
    skipped_blocks: Names = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    remedy: str = ""


@dataclass(frozen=True)
class ArchitectureBlocks:
    """What blocks can do: how attention and MLP stand in them, and what may join.

    Attributes:
        softmax: (!) whether attention is softmax attention of projected tokens, as in `nn.MultiheadAttention`.
        post_norm: (!) whether the norms follow their sub-layers (x + norm(f(x))); or the name of the block's attribute
            that says so.
        post_norm_blocks: (!) optional; names of classes of blocks whose norms follow their sub-layers, if only some
            do.
        prompts: how prompts can join a block. `"sequence"`: they are put into its input; `"keys"`: their keys and
            values are appended to those of its attention, in every window. None: not at all. `"sequence"` is wrong if
            the index of a token in the sequence is its position, for example if rotary embeddings count all tokens:
            prompts would move the patches.
        equal_parts: (!) whether queries, keys and values of a fused projection have the same size, in this order.
        sublayers: sub-layers of a block that can have branches: `"attention"` (or what mixes tokens in its place),
            `"mlp"`, both or none.
        halves: whether a block is only one sub-layer, attention or MLP, and has only its roles.
        reads_attention: module of the block whose input is the stream that attention reads; by default `norm1`, with
            `post_norm` the block (`""`).
        reads_mlp: the same of the MLP; by default `norm2`, with `post_norm` the first module of `fc1`.
        reads_result: (!) optional; module of the block whose input is the stream after the MLP, if the block
            continues.
        window: optional; the block's attribute for rows and columns of its attention's windows.
        pools: whether the block changes the width or the number of tokens, other than by an attention whose norms tell
            that by their sizes.
        width: optional; channels of the block's stream, where no role tells them or where roles tell others.
    """

    softmax: bool = True
    post_norm: bool | str = False
    post_norm_blocks: Names = ()
    prompts: Literal["sequence", "keys"] | None = None
    equal_parts: bool = True
    sublayers: Names = ("attention", "mlp")
    halves: bool = False
    reads_attention: str | None = None
    reads_mlp: str | None = None
    reads_result: Names = ()
    window: str = ""
    pools: bool = False
    width: int | None = None


@dataclass(frozen=True)
class ArchitectureTokens:
    """How tokens lie: in memory, and in the image.

    Attributes:
        grid: (!) how the patch tokens lie in the image. `"full"`: all cells of the patch embedding's output, row by
            row (frame by frame); `"frames_last"`: the same with the frames of each cell side by side; `"given"`: as
            told by the block's arguments `input_dimensions`, or `height` and `width`; `"map"`: as the stream lies;
            `"units"`: as told by the method `reroll` of the module that holds the lists; `"halved"`: cells of the
            patch embedding's output, halved until they fit; `"unfolded"`: the same of patches, whose cells are the
            stream's rows and which are its columns; `"spatial_shapes"`: as told by the embeddings' argument of that
            name, padded at the end; `"masked"`: some cells, shuffled, as told by the embeddings' third output
            `ids_restore`. None: it is not known.
        prefix_tokens: (!) optional; parameters of `embeddings` that are put before the patches (CLS, distillation,
            registers), each of shape (1, tokens, width) or (width,); or how many tokens these are. timm's models tell
            their number themselves.
        stream: how the block's input lies in memory. `"tokens"`: (batch, tokens, width); `"packed"`: (tokens, width),
            the tokens of all images of a batch in one row; `"channels_last"`: (batch, height, width, channels);
            `"channels_first"`: (batch, channels, height, width).
        stream_inside: the same for the input of these modules, if it has four dimensions; by default as `stream`.
        video: whether the backbone takes videos.
    """

    grid: GridKind | None = "full"
    prefix_tokens: Names | int = ("cls_token",)
    stream: Stream = "tokens"
    stream_inside: Stream | None = None
    video: bool = False


@dataclass(frozen=True)
class Architecture(ArchitectureTokens, ArchitectureBlocks, ArchitecturePaths):
    """The role table of one family of backbones. Its fields are in three parts, each in order of importance.

    - `ArchitecturePaths`: where things are. The first dozen fields describe most backbones.
    - `ArchitectureBlocks`: what blocks can do.
    - `ArchitectureTokens`: how tokens lie.

    A wrong path is an error. A field marked (!) is silently wrong if its default does not fit: no module is missed,
    but an adapter computes something else. Look at these of a new table: `prefix_tokens`, `softmax`, `post_norm`,
    `equal_parts`, `grid`, and for merging `norm1_readers`, `norm2_readers` and `reduction`. `prompts` is None by
    default, so that no prompts join where nobody has looked.

    A vision transformer with fused queries, keys and values, whose `forward` puts `cls_token` before the patches and
    adds absolute positions:

        register_architecture(
            Architecture(
                backbones=("MyViT",),
                blocks="blocks",
                patch_embedding="patch_embed",
                embeddings="",
                norm1=("norm1",),
                query=("attn.qkv",),
                key=("attn.qkv",),
                value=("attn.qkv",),
                output=("attn.proj",),
                norm2=("norm2",),
                norms=("norm",),
                heads=(),
                own_heads=("head",),
                drop_path=(),
                prompts="sequence",
                prefix_tokens=("cls_token",),
            )
        )

    Then look at what was found: `find_backbone(model)`.
    """

    def of_block(self, class_name: str, path: str) -> Architecture:
        """The table as it is for one block.

        Args:
            class_name: the name of the block's class.
            path: the block's name in the backbone.
        """
        different = self.variants.get(path, self.variants.get(class_name))
        return replace(self, **different) if different else self


Tower = Literal["vision", "text"]
TOWERS: tuple[Tower, ...] = ("vision", "text")
_ARCHITECTURES: dict[Tower, dict[str, Architecture]] = {tower: {} for tower in TOWERS}
_HEADS: dict[str, Names] = {}


def register_architecture(architecture: Architecture, tower: Tower = "vision") -> None:
    """Make a family of backbones known, also one of the user's own.

    Args:
        architecture: the role table. A backbone class that has a table already gets the new one.
        tower: `"text"` for text towers, which have no `patch_embedding`, no `prefix_tokens` and no `grid`.

    Raises:
        ValueError: the table names no backbone class, the tower is none of both, or the table does not fit a text.
    """
    if not architecture.backbones:
        raise ValueError("Architecture.backbones is empty: name at least one class of backbone.")
    if tower not in TOWERS:
        raise ValueError(f"tower is {tower!r}: must be one of {', '.join(map(repr, TOWERS))}.")
    if tower == "text":
        for name, empty in (("patch_embedding", ()), ("prefix_tokens", ()), ("grid", None), ("prompts", None)):
            if getattr(architecture, name) != empty:
                raise ValueError(
                    f"Architecture.{name} is {getattr(architecture, name)!r}: must be {empty!r} for a text tower, "
                    "which has no patches."
                )
    for name in architecture.backbones:
        _ARCHITECTURES[tower][name] = architecture


def architecture_of(module: nn.Module, tower: Tower = "vision") -> Architecture | None:
    """The role table for a module by its class or the nearest of its bases, or None."""
    bases = type(module).__mro__
    names = [name for base in bases for name in (f"{base.__module__}.{base.__qualname__}", base.__name__)]
    names += [f"{name}:{child}" for name in names[:2] for child, _ in module.named_children()]
    tables = _ARCHITECTURES[tower]
    return next((tables[name] for name in names if name in tables), None)


def register_heads(model: str, heads: Names) -> None:
    """Tell the task heads of a model around a backbone.

    Args:
        model: name of its class; subclasses are recognised.
        heads: names of the modules in it that a new task needs anew; `()` says that it has none.
    """
    _HEADS[model] = heads


def heads_of(cls: type) -> Names | None:
    """The task heads of a class of models, or of the nearest of its bases; None if nothing is known."""
    return next((_HEADS[base.__name__] for base in cls.__mro__ if base.__name__ in _HEADS), None)


def known_backbones(tower: Tower = "vision") -> Names:
    """Names of all backbone classes that have a table, sorted."""
    return tuple(sorted(_ARCHITECTURES[tower]))
