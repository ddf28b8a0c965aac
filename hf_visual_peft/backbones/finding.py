"""Find the vision backbone of a model and the modules in its roles."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .architectures import TOWERS, Architecture, Tower, is_own
from .backbone import (
    BLOCK_ROLES,
    OPTIONAL_BLOCK_ROLES,
    SUBLAYER_ROLES,
    WIDTH_ROLES,
    BackboneError,
    Block,
    VisionBackbone,
    linear_sizes,
    unwrapped,
)
from .choosing import REMEDY, choose, no_text_tower
from .found import find_unlisted, look_at
from .images import image_size, image_statistics
from .operations import is_operation, is_projection
from .paths import existing, join, original
from .probing import probe
from .task_heads import TaskHeads, heads_around, twins


_SINGLE_ROLES = tuple(role for role in BLOCK_ROLES if role != "fc1")  # a gated MLP has two linears at its entrance


def find_backbone(
    model: nn.Module, backbone: str | None = None, *, example_inputs: Any = None, tower: Tower = "vision"
) -> VisionBackbone:
    """Find the vision backbone in a model, or the text tower of a dual encoder.

    If no role table names its parts, a copy of it runs once on a small input, and its parts are found by what they do
    there. The result is kept as long as the model exists.

    Args:
        model: a backbone, or a model that holds one.
        backbone: path of the backbone in the model, or of a module that holds it. Needed if there are several.
        example_inputs: arguments of the backbone's forward for this run, a tensor, tuple or mapping. Needed if the
            size of its images is not known, or if it takes other inputs.
        tower: `"text"` for the text tower, which must have a role table.

    Raises:
        BackboneError: none or several found, none at this path, or a role of the table has no module. The message
            names the class, the paths to choose from, and the remedy.
    """
    if tower not in TOWERS:
        raise BackboneError(f"tower is {tower!r}: must be one of {', '.join(map(repr, TOWERS))}.")
    choice = choose(model, backbone, tower)
    if tower == "text":
        if choice is None:
            raise BackboneError(no_text_tower(model, backbone))
        return _Resolver(model, *choice, tower).resolve()
    if choice is None:
        return _Resolver(model, *find_unlisted(model, backbone, example_inputs)).resolve()
    try:
        return _Resolver(model, *choice).resolve()
    except BackboneError:
        path, module, table = choice
        if not is_own(table) or table.remedy:
            raise
        # a class for several architectures, of which the table knows one
        try:
            return _Resolver(model, path, module, look_at(model, path, example_inputs).table).resolve()
        except BackboneError:
            pass
        raise


class _Resolver:
    """Finds the modules of one backbone by its role table.

    Args:
        model: the whole model.
        path: name of the backbone in it.
        backbone: the backbone.
        architecture: its table.
        tower: which of both it is.
    """

    def __init__(
        self, model: nn.Module, path: str, backbone: nn.Module, architecture: Architecture, tower: Tower = "vision"
    ) -> None:
        self.model, self.path, self.backbone, self.table = model, path, backbone, architecture
        self.tower: Tower = tower
        self.class_name = type(backbone).__name__

    def resolve(self) -> VisionBackbone:
        """The whole backbone."""
        table = self.table
        lists = self._lists()
        embeddings = self._required(self.path, (table.embeddings,), "embeddings")
        blocks: list[Block] = []
        for group, (list_path, names) in enumerate(lists):
            start = embeddings[group] if len(embeddings) == len(lists) else embeddings[0]
            prefix_tokens = _count_prefix_tokens(self.backbone, self._module(start), table)
            for name in names:
                blocks.append(self._block(len(blocks), join(list_path, name), group, prefix_tokens))
        found = heads_around(self.model, self.path, table)
        heads = found.paths
        outside: dict[str, Any] = {
            "patch_embedding": self._patch_embedding(),
            "input_norms": self._norms(table.input_norms),
            "final_norms": self._norms(table.norms + (() if heads else table.pooled_norms))
            + (self._existing(self._parent(), table.outer_norms) if self.path else ()),
        }
        used = {path for paths in outside.values() for path in paths} | {block.path for block in blocks} | set(heads)
        used |= set(self._existing(self.path, table.pooled_norms)) if heads else set()
        if table.between == "all":
            between = self._operations(self.path, used)
        else:
            between = tuple(path for path in self._real(table.between) if path not in used)
        between, between_norms = self._apart(between)
        outside |= {"between": between, "between_norms": between_norms}
        unread, heads = self._read(found, blocks, [path for paths in outside.values() for path in paths])
        blocks, depth = [block for block in blocks if block.path not in unread], len(blocks)
        outside = {role: tuple(path for path in paths if path not in unread) for role, paths in outside.items()}
        embedding = outside["patch_embedding"]
        reads_images, image_channels, patch_features = self._patches(embedding[0], blocks) if embedding else ("", 0, 0)
        return VisionBackbone(
            tower=self.tower,
            path=self.path,
            class_name=self.class_name,
            architecture=table,
            blocks=tuple(blocks),
            depth=len(blocks),
            unread=depth - len(blocks),
            embeddings=embeddings,
            heads=heads,
            head_sizes={
                path: (head.out_features, head.in_features)
                for path in heads
                if isinstance(head := original(self._module(path)), nn.Linear)
            },
            dense=found.dense,
            head_note=found.note,
            headless=found.missing_in,
            patch_features=patch_features,
            image_channels=image_channels,
            reads_images=reads_images,
            image_size=image_size(self.backbone),
            image_statistics=image_statistics(self.backbone),
            grid=_native_grid(getattr(self.backbone, "config", None)) if table.grid == "full" else None,
            times=_native_times(getattr(self.backbone, "config", None)) if table.video else 1,
            linears={
                name: sizes
                for block in blocks
                for name in block.modules(BLOCK_ROLES)
                if (sizes := linear_sizes(self._module(name))) is not None
            },
            **outside,
        )

    def _read(
        self, heads: TaskHeads, blocks: Sequence[Block], outside: Sequence[str]
    ) -> tuple[set[str], tuple[str, ...]]:
        """Names of the last blocks and of modules outside the blocks that the model does not use; and the heads.

        There is no search if the whole backbone gives one output for the image: in classes of transformers for image
        classification, and in a backbone without a model around it that selects no maps.
        """
        maps = hasattr(getattr(self.backbone, "config", None), "out_features") and hasattr(self.backbone, "channels")
        if self.tower == "text":  # its state after the last block is pooled
            return set(), heads.paths
        whole = heads.known and not heads.dense and (heads.of_library or not self.path)
        if whole and (heads.paths or not self.path) and not maps:
            return set(), heads.paths
        names = [block.path for block in blocks]
        others = {} if heads.known else twins(self.model, heads.paths)
        further = [path for head, paths in others.items() for path in (head, *paths)]
        seen = probe(self.model, [*names, *outside, *further], self.path)
        if seen is None:
            told = _last_told(self.model, len(blocks))
            # the state of a block is read then, without the final norm
            last = self._norms((*self.table.norms, *self.table.pooled_norms))
            return set() if told is None else {*names[told:], *last}, heads.paths
        paths = heads.paths
        if seen.whole:
            called = (
                next((path for path in (head, *others.get(head, ())) if path in seen.called), head) for head in paths
            )
            paths = tuple(dict.fromkeys(called))
        count = max((index + 1 for index, name in enumerate(names) if name in seen.read), default=0)
        if not count:  # a model that reads no block, or runs its backbone without gradients: only its config may tell
            return set() if _last_told(self.model, len(blocks)) != 0 else set(names), paths
        return {*names[count:], *(path for path in outside if path not in seen.read)}, paths

    def _patch_embedding(self) -> tuple[str, ...]:
        """The first existing one of those that the table names; none if it names none.

        If that is a stem of several modules, its last convolution or linear.
        """
        names = self.table.patch_embedding
        names = (names,) if isinstance(names, str) else names
        if not names:
            return ()
        named = self._required(self.path, names, "patch_embedding")
        for path in named:
            inside = [each for each in self._operations(path, ()) if is_projection(self._module(each))]
            if inside:
                return (inside[-1],)
            if isinstance(self._module(path), nn.Identity):
                around = self._operations(path.rpartition(".")[0], ())
                before = [each for each in around if is_projection(self._module(each))]
                if before:
                    return (before[-1],)
        raise BackboneError(
            f"{self.class_name} does not fit its role table: {named[0]!r}, its patch_embedding, is a "
            f"{type(self._module(named[0])).__name__} without a convolution or linear. {REMEDY}"
        )

    def _patches(self, embedding: str, blocks: Sequence[Block]) -> tuple[str, int, int]:
        """The module that reads the images, their channels, and the number of input values of one patch.

        The patch embedding may be the last convolution of a stem. Those before it are found backwards: each has as
        many output channels as the next one has input channels.

        Args:
            embedding: name of the patch embedding.
            blocks: of the backbone, which contain no stem.
        """
        convolutions = {
            path: module
            for path in self._operations(self.path, {block.path for block in blocks})
            if isinstance(module := self._module(path), nn.Conv2d | nn.Conv3d)
        }
        if embedding not in convolutions:
            return "", 0, math.prod(_weight(self.model, embedding).shape[1:])
        paths = list(convolutions)
        stem = [embedding]
        for path in reversed(paths[: paths.index(embedding)]):
            if convolutions[path].out_channels == convolutions[stem[0]].in_channels:
                stem.insert(0, path)
        first = convolutions[stem[0]]
        if len(stem) == 1:
            return embedding, first.in_channels, first.in_channels * math.prod(first.kernel_size)
        return (
            stem[0],
            first.in_channels,
            first.in_channels * math.prod(n for p in stem for n in convolutions[p].stride),
        )

    def _lists(self) -> list[tuple[str, list[str]]]:
        """Names of the lists of blocks and of the blocks in each."""
        found = []
        lists = (self.table.blocks,) if isinstance(self.table.blocks, str) else self.table.blocks
        several = len(lists) > 1 or "*" in lists[0] or not lists[0]
        for path in self._required(self.path, lists, "blocks"):
            stack = self._module(path)
            if not several and (not isinstance(stack, nn.ModuleList | nn.Sequential) or len(stack) == 0):
                raise BackboneError(
                    f"{self.class_name} does not fit its role table: {path!r} is a {type(stack).__name__} and not a "
                    f"non-empty nn.ModuleList of blocks. {REMEDY}"
                )
            skipped = self.table.skipped_blocks
            names = [
                name
                for name, block in stack.named_children()
                if type(unwrapped(block)).__name__ not in skipped
                and join(path, name).removeprefix(f"{self.path}.") not in skipped
            ]
            if names:
                found.append((path, names))
        if not found:
            raise BackboneError(f"{self.class_name} does not fit its role table: it has no blocks. {REMEDY}")
        return found

    def _block(self, index: int, path: str, group: int, prefix_tokens: int) -> Block:
        block = self._module(path)
        table = self.table.of_block(type(block).__name__, path.removeprefix(f"{self.path}.") if self.path else path)
        roles = {role: self._existing(path, getattr(table, role)) for role in (*BLOCK_ROLES, *OPTIONAL_BLOCK_ROLES)}
        sublayers = table.sublayers
        if table.halves:
            sublayers = tuple(part for part in sublayers if any(roles[role] for role in SUBLAYER_ROLES[part]))
            wanted = [role for part in sublayers for role in SUBLAYER_ROLES[part]] or BLOCK_ROLES
        else:
            wanted = BLOCK_ROLES
        for role in wanted:
            if getattr(table, role):
                self._required(path, getattr(table, role), role)
        for role in _SINGLE_ROLES:
            if len(roles[role]) > 1:
                raise BackboneError(
                    f"{self.class_name} does not fit its role table: {path!r} has several modules for role {role!r}: "
                    f"{', '.join(roles[role])}. {REMEDY}"
                )
        if roles["query"] and getattr(self._module(roles["query"][0].rpartition(".")[0]), "q_bias", None) is not None:
            raise BackboneError(
                f"{self.class_name}: the attention of {path!r} has its own biases and reads the weight of its "
                "projection without calling the module, so an adapter at the module would have no effect."
            )
        post_norm = getattr(block, table.post_norm) if isinstance(table.post_norm, str) else table.post_norm
        post_norm = post_norm or type(block).__name__ in table.post_norm_blocks
        widths = {role: self._out_features(roles[role]) for role in WIDTH_ROLES}
        if table.operations == "all":
            roles["operations"] = self._operations(path, {p for paths in roles.values() for p in paths})
        else:
            roles["operations"] = tuple(
                name for name in self._existing(path, table.operations) if is_operation(self._module(name))
            )
        num_heads = self._num_heads(roles["query"] or roles["uncalled"])
        # an attention that changes the width also pools tokens: it leads from one stage to the next
        pools = table.pools or bool(widths["norm1"] and widths["norm2"] and widths["norm1"] != widths["norm2"])
        if pools and (roles["query"] or roles["uncalled"] or "attention" in sublayers):
            pooling = [path for role in SUBLAYER_ROLES["attention"] for path in roles[role]]
            roles |= dict.fromkeys((*SUBLAYER_ROLES["attention"], "uncalled"), ())
            roles["operations"] = tuple(dict.fromkeys((*pooling, *roles["operations"])))
            sublayers = tuple(part for part in sublayers if part != "attention")
        roles["operations"], roles["further_norms"] = self._apart(roles["operations"])
        return Block(
            index=index,
            path=path,
            roles=roles,
            group=group,
            width=table.width or next((widths[role] for role in WIDTH_ROLES if widths[role]), None),
            num_heads=num_heads,
            prefix_tokens=table.prefix_tokens if isinstance(table.prefix_tokens, int) else prefix_tokens,
            sublayers=sublayers,
            post_norm=bool(post_norm),
            pools=pools,
            window=getattr(block, table.window, 0) if table.window else 0,
            entrances=self._entrances(table, path, roles, sublayers, bool(post_norm)),
            rest=self._existing(path, table.reads_result),
            readers={
                "attention": self._norm1_readers(table, path, roles),
                "mlp": roles["fc1"] if table.norm2_readers is None else self._existing(path, table.norm2_readers),
            },
            table=table,
        )

    def _entrances(
        self,
        table: Architecture,
        path: str,
        roles: Mapping[str, tuple[str, ...]],
        sublayers: Sequence[str],
        post_norm: bool,
    ) -> dict[str, str]:
        given = {"attention": table.reads_attention, "mlp": table.reads_mlp}
        found = {}
        for sublayer in sublayers:
            norm = roles[SUBLAYER_ROLES[sublayer][0]]
            name = given[sublayer]
            if name is not None:
                found[sublayer] = join(path, name)
            elif norm and not post_norm:
                found[sublayer] = norm[0]
            else:
                found[sublayer] = path if sublayer == "attention" else roles["fc1"][0]
        return found

    def _norm1_readers(self, table: Architecture, path: str, roles: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        if table.norm1_readers is not None:
            return self._existing(path, table.norm1_readers)
        reduction = self._existing(path, table.reduction)
        return tuple(dict.fromkeys((*roles["query"], *(reduction or (*roles["key"], *roles["value"])))))

    def _parent(self) -> str:
        return self.path.rpartition(".")[0]

    def _module(self, path: str) -> nn.Module:
        return original(unwrapped(self.model.get_submodule(path)))

    def _existing(self, prefix: str, names: Sequence[str]) -> tuple[str, ...]:
        return existing(self.model, prefix, names)

    def _required(self, prefix: str, names: Sequence[str], role: str) -> tuple[str, ...]:
        paths = self._existing(prefix, names)
        if not paths:
            remedy = (self.table.remedy if role in BLOCK_ROLES else "") or REMEDY
            raise BackboneError(
                f"{self.class_name} does not fit its role table: {prefix or 'the model'!r} has no {role!r} "
                f"(looked for {', '.join(names)}). {remedy}"
            )
        return paths

    def _norms(self, names: Sequence[str]) -> tuple[str, ...]:
        """The modules that are norms: options may put convolutions or activations in their place."""
        return tuple(
            path
            for path in self._real(names)
            if is_operation(self._module(path)) and _weight(self.model, path).ndim == 1
        )

    def _real(self, names: Sequence[str]) -> tuple[str, ...]:
        """The modules that are not `nn.Identity`, by which options replace omitted modules."""
        paths = self._existing(self.path, names)
        return tuple(path for path in paths if not isinstance(self._module(path), nn.Identity))

    def _operations(self, path: str, used: Collection[str]) -> tuple[str, ...]:
        """Linears, convolutions and norms below a module, except those below used modules."""
        if path in used:
            return ()
        module = self._module(path)
        children = dict(module.named_children())
        if not children:
            return (path,) if is_operation(module) else ()
        return tuple(name for child in children for name in self._operations(join(path, child), used))

    def _apart(self, paths: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Linears and convolutions, and norms."""
        norms = tuple(path for path in paths if _weight(self.model, path).ndim == 1)
        return tuple(path for path in paths if path not in norms), norms

    def _out_features(self, paths: tuple[str, ...]) -> int | None:
        if not paths:
            return None
        sizes = linear_sizes(self._module(paths[0]))
        return sizes[0] if sizes else _weight(self.model, paths[0]).shape[0]

    def _num_heads(self, query: tuple[str, ...]) -> int | None:
        names = ("num_attention_heads", "num_heads")
        owners = [getattr(self.backbone, "config", None)]
        if query:
            owners = [self._module(query[0].rpartition(".")[0]), *owners]
        found = (getattr(owner, name, None) for owner in owners for name in names)
        return next((number for number in found if isinstance(number, int)), None)


def _last_told(model: nn.Module, depth: int) -> int | None:
    """The number of blocks that a multimodal model reads according to its config; None if not given."""
    configs = (getattr(module, "config", None) for module in model.modules())
    told = (getattr(config, "vision_feature_layer", None) for config in configs)
    layers = next((layers for layers in told if layers is not None), None)
    if layers is None:
        return None
    states = range(depth + 1)  # before the first block and after each block
    chosen = [layers] if isinstance(layers, int) else list(layers)
    if not all(-len(states) <= layer < len(states) for layer in chosen):
        raise BackboneError(
            f"{type(model).__name__}: vision_feature_layer is {layers}, but the backbone has {depth} blocks: must be "
            f"from {-len(states)} to {depth}."
        )
    return max(states[layer] for layer in chosen)


def _weight(model: nn.Module, path: str) -> Tensor:
    weight = unwrapped(model.get_submodule(path)).weight
    assert isinstance(weight, Tensor)
    return weight


def _count_prefix_tokens(backbone: nn.Module, embeddings: nn.Module, architecture: Architecture) -> int:
    if isinstance(architecture.prefix_tokens, int):
        return architecture.prefix_tokens
    told = getattr(backbone, "num_prefix_tokens", None)  # timm's models
    if isinstance(told, int):
        return told
    parameters = (getattr(embeddings, name, None) for name in architecture.prefix_tokens)
    return sum(1 if p.ndim == 1 else p.shape[-2] for p in parameters if p is not None)


def _native_grid(config: object) -> tuple[int, int] | None:
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    tubelet = getattr(config, "tubelet_size", None)
    if patch is None and isinstance(tubelet, tuple | list):
        patch = tubelet[1:]
    if image is None or patch is None:
        return None
    height, width = image if isinstance(image, tuple | list) else (image, image)
    rows, columns = patch if isinstance(patch, tuple | list) else (patch, patch)
    return height // rows, width // columns


def _native_times(config: object) -> int:
    tubelet = getattr(config, "tubelet_size", 1)
    return (getattr(config, "num_frames", None) or 1) // (tubelet[0] if isinstance(tubelet, tuple | list) else tubelet)
