"""The description of a vision backbone: its blocks, and the names of their modules by role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from .architectures import Architecture, Tower, is_own


BLOCK_ROLES = ("norm1", "query", "key", "value", "output", "norm2", "fc1", "fc2")
LINEAR_ROLES = ("query", "key", "value", "output", "fc1", "fc2")
NORM_ROLES = ("norm1", "norm2")
WIDTH_ROLES = ("norm2", "norm1", "fc2", "output")  # that tell the channels of a block's stream, the first that exists
OTHER_ROLES = ("operations", "further_norms")  # linears and convolutions, and norms, without another role
ALL_ROLES = (*BLOCK_ROLES, *OTHER_ROLES)
OPTIONAL_BLOCK_ROLES = ("drop_path", "position_bias", "uncalled")
SUBLAYER_ROLES = {"attention": ("norm1", "query", "key", "value", "output"), "mlp": ("norm2", "fc1", "fc2")}


class BackboneError(ValueError):
    """The model has no vision backbone that a role table describes."""


class SeveralError(BackboneError):
    """The model has several vision backbones, of which one has to be chosen.

    Args:
        message: that names them.
        paths: of the backbones in the model.
    """

    def __init__(self, message: str, paths: Sequence[str]) -> None:
        super().__init__(message)
        self.paths = tuple(paths)


class NotRunError(BackboneError):
    """The model has no role table, and cannot be run to see what its modules do."""


class NoTokensError(BackboneError):
    """The backbone is a convolutional network: it has no blocks with a stream of tokens."""


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        index: position in the backbone, from 0.
        path: its name in the model.
        roles: full names of the modules in each role.
        group: index of the list of blocks that it belongs to.
        width: channels of its token stream (after the attention, if that pools tokens); None without a stream.
        num_heads: of its attention; None if not known.
        prefix_tokens: tokens before the patches.
        sublayers: where branches can be put, `"attention"` and `"mlp"`.
        post_norm: whether its norms follow the sub-layers.
        pools: whether its attention changes width and number of tokens, so that its input belongs to the stage before.
        window: rows and columns of its attention's windows; 0 if it has none, or if not known.
        entrances: for each sub-layer, full name of the module whose input is the stream that it reads; the block if
            there is no such module.
        rest: full names of the module whose input is the stream after the last sub-layer, if the block continues.
        readers: linears and convolutions without padding that read the norm before each sub-layer; none if other
            modules do.
        table: the role table of this block.
    """

    index: int
    path: str
    roles: Mapping[str, tuple[str, ...]]
    group: int = 0
    width: int | None = None
    num_heads: int | None = None
    prefix_tokens: int = 0
    sublayers: tuple[str, ...] = ("attention", "mlp")
    post_norm: bool = False
    pools: bool = False
    window: int = 0
    entrances: Mapping[str, str] = field(default_factory=dict)
    rest: tuple[str, ...] = ()
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    table: Architecture | None = field(default=None, repr=False)

    @property
    def projections(self) -> tuple[str, ...]:
        """Full names of the query, key and value projections of its attention; empty if it has none.

        They include projections whose weight attention reads without calling them. Those have no role, as an adapter
        at such a module would have no effect.
        """
        found = tuple(self.roles[role][0] for role in ("query", "key", "value") if self.roles[role])
        if len(found) == 3:
            return found
        read = self.roles.get("uncalled", ())
        return read * 3 if len(read) == 1 else read

    def modules(self, roles: Sequence[str]) -> list[str]:
        """Full names of the modules in some roles; a module that roles share is listed once."""
        return list(dict.fromkeys(path for role in roles for path in self.roles[role]))


@dataclass(frozen=True)
class VisionBackbone:
    """Everything that a method needs to know about a backbone; only names and numbers, no modules.

    Attributes:
        path: name of the backbone in the model; `""` if it is the model.
        class_name: its class.
        architecture: its role table.
        blocks: the blocks in order.
        depth: number of blocks of the whole backbone that are read, also if `blocks` holds a selection.
        patch_embedding: names of the modules that turn pixels into tokens.
        input_norms: names of the norms before the blocks.
        between: names of the linears and convolutions between lists of blocks.
        between_norms: names of the norms there.
        final_norms: names of the norms after the blocks.
        embeddings: names of the modules that return the first block's input, of all blocks or of each list.
        heads: names of the task heads in the model.
        head_sizes: output and input features of the heads that are linears.
        dense: whether the heads belong to a model with outputs for positions in the image, not for the whole image.
        head_note: a note for users on how the heads were found; empty if not needed.
        headless: class of the model around the backbone in which no head was found; empty if none is missing.
        unread: number of blocks after these that nothing reads.
        patch_features: input values of one patch: channels x height x width.
        image_channels: channels of the images; 0 if the input is not images.
        reads_images: name of the module that reads the images: the patch embedding, or the first convolution of its
            stem; empty if the input is not images.
        grid: rows and columns of patches of an image of the size in the backbone's config; None if the config has no
            size or the tokens of the blocks are not these patches.
        image_size: height and width of the images that it was made for; None if it does not say.
        image_statistics: mean and standard deviation of each channel that normalise its images; None if it does not
            say.
        times: grids in the sequence of a video with the number of frames in the config; 1 for images.
        linears: output and input features of every linear and 1 x 1 convolution of the blocks, by its name.
        stage: index of the stage; None if the backbone has only one.
        width_before: channels of the stage before, among those that a method sees; None if there is none.
        width_after: the same of the stage after.
        tower: `"text"` if this is the text tower of a dual encoder, which has blocks and no patches.
    """

    path: str
    class_name: str
    architecture: Architecture
    blocks: tuple[Block, ...]
    depth: int
    patch_embedding: tuple[str, ...]
    input_norms: tuple[str, ...]
    between: tuple[str, ...]
    between_norms: tuple[str, ...]
    final_norms: tuple[str, ...]
    embeddings: tuple[str, ...]
    heads: tuple[str, ...]
    dense: bool
    patch_features: int
    image_channels: int
    grid: tuple[int, int] | None
    times: int
    linears: Mapping[str, tuple[int, int]]
    head_sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    reads_images: str = ""
    image_size: tuple[int, int] | None = None
    image_statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    head_note: str = ""
    headless: str = ""
    unread: int = 0
    stage: int | None = None
    width_before: int | None = None
    width_after: int | None = None
    tower: Tower = "vision"

    def select(self, layers: Sequence[int] | None) -> VisionBackbone:
        """The backbone for a method that acts on some blocks only: without the modules outside the blocks."""
        if layers is None:
            return self
        blocks = tuple(block for block in self.blocks if block.index in layers)
        return replace(self, blocks=blocks, **_NOTHING_OUTSIDE)

    def modules(self, roles: Sequence[str] = ALL_ROLES) -> list[str]:
        """Full names of the modules of all blocks in some roles; see `Block.modules`."""
        return [path for block in self.blocks for path in block.modules(roles)]

    def stages(self, whole: VisionBackbone) -> tuple[VisionBackbone, ...]:
        """The stages of the backbone: parts whose blocks have the same width and number of heads.

        Modules before the blocks belong to the first stage, modules after them to the last.

        Args:
            whole: the whole backbone, whose stages are counted.
        """
        kinds = [(block.width, block.num_heads) for block in whole.blocks]
        number, stage_of = 0, {}
        for index, kind in enumerate(kinds):
            number += index > 0 and kind != kinds[index - 1]
            stage_of[whole.blocks[index].index] = number
        if number == 0:
            return (self,)
        nothing = replace(self, **_NOTHING_OUTSIDE)
        numbers = sorted({stage_of[block.index] for block in self.blocks})
        stages = [
            replace(nothing, blocks=tuple(b for b in self.blocks if stage_of[b.index] == stage), stage=stage)
            for stage in numbers
        ]
        before = {name: getattr(self, name) for name in _NOTHING_OUTSIDE if name != "final_norms"}
        stages[0] = replace(stages[0], **before)
        stages[-1] = replace(stages[-1], final_norms=self.final_norms)
        widths = [None, *(stage.blocks[0].width for stage in stages), None]
        return tuple(
            replace(stage, width_before=before, width_after=after)
            for stage, before, after in zip(stages, widths[:-2], widths[2:], strict=True)
        )

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms outside the blocks."""
        return self.input_norms + self.between_norms + self.final_norms

    @property
    def outside(self) -> tuple[str, ...]:
        """Names of all linears, convolutions and norms of the backbone outside the blocks."""
        return self.patch_embedding + self.between + self.norms

    @property
    def width(self) -> int:
        """Channels of the token stream; the smallest number if stages differ.

        Raises:
            NoTokensError: there is no token stream.
        """
        widths = [block.width for block in self.blocks if block.width is not None]
        if not widths:
            known = "is a convolutional network without a stream of tokens."
            watched = "has no stream of tokens, or none that could be followed: `hf-visual-peft roles` says why."
            raise NoTokensError(f"{self.class_name} {known if is_own(self.architecture) else watched}")
        return min(widths)

    @property
    def num_heads(self) -> int | None:
        """Attention heads of a block; None if not known or if blocks differ."""
        found = {block.num_heads for block in self.blocks}
        return found.pop() if len(found) == 1 else None

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches, in the last block."""
        return self.blocks[-1].prefix_tokens


_NOTHING_OUTSIDE: dict[str, Any] = dict.fromkeys(
    ("patch_embedding", "input_norms", "between", "between_norms", "final_norms"), ()
)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, without an adapter layer around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) and not stands_in(module) else module


def versions(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules with a name: one module, or one in each of the copies that adapters train of a module around it.

    Args:
        model: with adapters or without.
        path: the module's name without adapters. For copies of the module itself, the wrapper that switches between
            them.
    """
    found = [model]
    for name in path.split(".") if path else ():
        found = [module.get_submodule(name) for around in found for module in entered(around)]
    return found


def entered(module: nn.Module) -> list[nn.Module]:
    """The modules whose parts run where a module stands: itself without layers around it, or each copy of it."""
    if "versions" in vars(type(module)):
        return module.versions  # type: ignore[return-value]
    module = unwrapped(module)
    if not isinstance(module, ModulesToSaveWrapper):
        return [module]
    return [module.original_module, *module.modules_to_save.values()]


def own_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module that are not adapters which stand in it, by name."""
    for name, child in module.named_children():
        if not stands_in(child):
            yield name, child


def base_parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and all in it, by the names that they have without adapters.

    Args:
        module: with layers of adapters in it, or without.
        path: its name.
    """
    module = entered(module)[0]
    yield path, module
    for name, child in own_children(module):
        yield from base_parts(child, f"{path}.{name}" if path else name)


def stands_in(module: nn.Module) -> bool:
    """Whether a module is what adapters have in a block, and not around a module."""
    return isinstance(module, BaseTunerLayer) and "base_layer" not in module._modules


def running(model: nn.Module, path: str) -> nn.Module:
    """The module with a name that a forward pass runs: of copies that adapters train, the active one.

    Args:
        model: with adapters or without.
        path: the module's name without adapters.
    """
    module = _active(unwrapped(model))
    for name in path.split("."):
        module = _active(unwrapped(module.get_submodule(name)))
    return module


def _active(module: nn.Module) -> nn.Module:
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    copies, names = module.modules_to_save, module.active_adapters
    passed = module.disable_adapters or not names or any(name not in copies for name in names)
    return unwrapped(module.original_module if passed else copies[names[0]])


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Output and input features of a linear, a `Conv1D` or a 1 x 1 convolution; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if is_pointwise(module):
        return module.out_channels, module.in_channels  # type: ignore[return-value]
    return None


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that acts on every position like a linear."""
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return False
    return set(module.kernel_size) == set(module.stride) == {1} and set(module.padding) <= {0, "valid"}
