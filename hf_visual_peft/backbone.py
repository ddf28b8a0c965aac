"""Find the vision backbone of a model and the parts its blocks are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .architectures import Architecture, architecture_of, known_backbones


BLOCK_ROLES = ("norm1", "query", "key", "value", "output", "norm2", "fc1", "fc2")
LINEAR_ROLES = ("query", "key", "value", "output", "fc1", "fc2")
OPTIONAL_BLOCK_ROLES = ("drop_path", "position_bias")


class BackboneError(ValueError):
    """The model has no vision backbone that a role table describes."""


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        index: position in the backbone, from 0.
        path: its name in the model.
        roles: full names of the modules in each role.
    """

    index: int
    path: str
    roles: Mapping[str, tuple[str, ...]]

    def modules(self, roles: Sequence[str]) -> list[str]:
        """Full names of the modules in some roles, each once where roles share a module."""
        return list(dict.fromkeys(path for role in roles for path in self.roles[role]))


@dataclass(frozen=True)
class VisionBackbone:
    """What a method needs to know of a backbone; names and numbers only, no modules.

    Attributes:
        path: name of the backbone in the model, `""` if it is the model.
        class_name: its class.
        architecture: the role table that fits.
        blocks: the transformer blocks in order.
        depth: number of blocks of the whole backbone, also where `blocks` holds a selection.
        patch_embedding: names of the modules that turn pixels into tokens.
        input_norms: names of the norms before the blocks.
        final_norms: names of the norms behind the blocks.
        embeddings: name of the module that returns the first block's input.
        heads: names of the task heads in the model.
        width: channels of the token stream.
        patch_features: numbers that one patch has before it is embedded: channels x height x width.
        prefix_tokens: tokens before the patches.
        grid: rows and columns of patches of an image of the size in the backbone's config, None where it has none.
        num_heads: attention heads of a block, None where the backbone's config does not tell.
        linears: output and input features of every linear of the blocks, by its name.
    """

    path: str
    class_name: str
    architecture: Architecture
    blocks: tuple[Block, ...]
    depth: int
    patch_embedding: tuple[str, ...]
    input_norms: tuple[str, ...]
    final_norms: tuple[str, ...]
    embeddings: str
    heads: tuple[str, ...]
    width: int
    patch_features: int
    prefix_tokens: int
    grid: tuple[int, int] | None
    num_heads: int | None
    linears: Mapping[str, tuple[int, int]]

    def select(self, layers: Sequence[int] | None) -> VisionBackbone:
        """The backbone as a method sees it that acts on some blocks only: nothing outside them, either."""
        if layers is None:
            return self
        blocks = tuple(block for block in self.blocks if block.index in layers)
        return replace(self, blocks=blocks, patch_embedding=(), input_norms=(), final_norms=())

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms outside the blocks."""
        return self.input_norms + self.final_norms


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where an adapter layer has been put around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def find_backbone(model: nn.Module) -> VisionBackbone:
    """Find the one vision backbone in a model.

    Args:
        model: a backbone, or a model that holds one.

    Raises:
        BackboneError: none or several found, or a role of the table has no module; the message names the class, what
            was looked for and the remedy.
    """
    found: list[tuple[str, nn.Module, Architecture]] = []
    for path, module in model.named_modules():
        architecture = architecture_of(type(module))
        inside = any(path.startswith(f"{outer}.") or not outer for outer, _, _ in found)
        if architecture is not None and not inside:
            found.append((path, module, architecture))
    if not found:
        raise BackboneError(
            f"{type(model).__name__} holds no vision backbone that hf_visual_peft knows. Looked for a module of class "
            f"{', '.join(known_backbones())}. {_REMEDY}"
        )
    if len(found) > 1:
        names = ", ".join(f"{path!r} ({type(module).__name__})" for path, module, _ in found)
        raise BackboneError(
            f"{type(model).__name__} holds several vision backbones: {names}. Apply the method to one of them."
        )
    return _resolve(model, *found[0])


_REMEDY = (
    "For another architecture, register a role table before get_peft_model: "
    "hf_visual_peft.register_architecture(hf_visual_peft.Architecture(backbones=('MyViT',), blocks='blocks', "
    "patch_embedding='patch_embed', ...))."
)


def _resolve(model: nn.Module, path: str, backbone: nn.Module, architecture: Architecture) -> VisionBackbone:
    class_name = type(backbone).__name__

    def full(*names: str) -> str:
        return ".".join(name for name in names if name)

    def existing(prefix: str, names: Sequence[str]) -> tuple[str, ...]:
        paths = (full(prefix, name) for name in names)
        return tuple(p for p in paths if isinstance(_lookup(model, p), nn.Module))

    def required(prefix: str, names: Sequence[str], role: str) -> tuple[str, ...]:
        paths = existing(prefix, names)
        if not paths:
            raise BackboneError(
                f"{class_name} does not fit its role table: {prefix or 'the model'!r} has no {role!r} "
                f"(looked for {', '.join(names)}). {_REMEDY}"
            )
        return paths

    (blocks_path,) = required(path, (architecture.blocks,), "blocks")
    stack = model.get_submodule(blocks_path)
    if not isinstance(stack, nn.ModuleList | nn.Sequential) or len(stack) == 0:
        raise BackboneError(
            f"{class_name} does not fit its role table: {blocks_path!r} is a {type(stack).__name__} and not a "
            f"non-empty nn.ModuleList of blocks. {_REMEDY}"
        )
    blocks = []
    for index in range(len(stack)):
        block_path = full(blocks_path, str(index))
        roles = {role: required(block_path, getattr(architecture, role), role) for role in BLOCK_ROLES}
        roles |= {role: existing(block_path, getattr(architecture, role)) for role in OPTIONAL_BLOCK_ROLES}
        blocks.append(Block(index, block_path, roles))

    patch_embedding = required(path, (architecture.patch_embedding,), "patch_embedding")
    (embeddings,) = required(path, (architecture.embeddings,), "embeddings")
    # a head belongs to the model around the backbone, which need not be the outermost one
    outer = path.rpartition(".")[0]
    heads = existing(outer, architecture.heads) if path else ()
    heads = tuple(p for p in heads if any(True for _ in model.get_submodule(p).parameters()))

    def real(names: Sequence[str]) -> tuple[str, ...]:
        paths = existing(path, names)
        return tuple(p for p in paths if not isinstance(unwrapped(model.get_submodule(p)), nn.Identity))

    return VisionBackbone(
        path=path,
        class_name=class_name,
        architecture=architecture,
        blocks=tuple(blocks),
        depth=len(blocks),
        patch_embedding=patch_embedding,
        input_norms=real(architecture.input_norms),
        final_norms=real(architecture.norms + (() if heads else architecture.pooled_norms)),
        embeddings=embeddings,
        heads=heads,
        width=_weight(model, blocks[0].roles["norm1"][0]).shape[-1],
        patch_features=_weight(model, patch_embedding[0])[0].numel(),
        prefix_tokens=_count_prefix_tokens(model.get_submodule(embeddings), architecture),
        grid=_native_grid(getattr(backbone, "config", None)),
        num_heads=getattr(getattr(backbone, "config", None), "num_attention_heads", None),
        linears={
            name: (module.out_features, module.in_features)
            for block in blocks
            for role in BLOCK_ROLES
            for name in block.roles[role]
            if isinstance(module := unwrapped(model.get_submodule(name)), nn.Linear)
        },
    )


def _lookup(model: nn.Module, path: str) -> object:
    target: object = model
    for name in path.split(".") if path else ():
        target = getattr(target, name, None)
    return target


def _weight(model: nn.Module, path: str) -> Tensor:
    weight = unwrapped(model.get_submodule(path)).weight
    assert isinstance(weight, Tensor)
    return weight


def _count_prefix_tokens(embeddings: nn.Module, architecture: Architecture) -> int:
    parameters = (getattr(embeddings, name, None) for name in architecture.prefix_tokens)
    return sum(1 if p.ndim == 1 else p.shape[-2] for p in parameters if p is not None)


def _native_grid(config: object) -> tuple[int, int] | None:
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image is None or patch is None:
        return None
    height, width = image if isinstance(image, tuple | list) else (image, image)
    rows, columns = patch if isinstance(patch, tuple | list) else (patch, patch)
    return height // rows, width // columns
