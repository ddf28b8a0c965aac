"""The state that the adapter layers of one model share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..backbones.architectures import Tower
from ..backbones.backbone import VisionBackbone, versions
from .grid import Grid, TokenLayout
from .heads import HeadHooks, HeadPart, HeadUse
from .losses import Left
from .mixed import MixedBatch


@dataclass
class Exchange:
    """One object that all adapter layers of a model hold; it is not a module, so it owns no parameters.

    Attributes:
        tower: of a dual encoder, in which the layers stand.
        grid: of the current images; None before the first forward.
        handed_on: tokens, or the state of a side network, that pass from block to block, by adapter.
        layouts: of the tokens of these states.
        pixels: the current images, if an adapter reads them.
        patches: what the patch embedding made of them, without positions, if an adapter reads that.
        reads_patches: whether one does.
        collected: final states of side networks, by adapter; None outside `collecting`.
        for_heads: current results of adapters for the task heads, by head and adapter.
        shared: modules that several layers use, by name and adapter; one of these layers registers it.
        images: number of current images, if they belong to videos.
        frames: number of images that form a video; None for single images.
        mixed: adapters of the current samples; None if the active adapters act on all.
        handles: the hooks that update `grid`.
        frame_handles: the hooks that update `frames`.
        pixel_handles: the hook that updates `pixels`.
        image_handles: the hooks that refuse a pass in which adapters at the images did not act.
        head_handles: the hooks at the heads.
        stages: modules that gradient checkpointing could recompute as a whole, with their blocks; names in the
            backbone.
        stage_handles: the hook that prevents that.
        crossing: adapters that train copies of modules before or in the blocks, so that gradients cross the blocks.
        blocks: what adapters have in blocks, by the number of the block.
        left: what equations have left for auxiliary losses in this pass; None where nothing asks for them.
        losses: of the adapters, see `hf_visual_peft.core.auxiliary`; None if no adapter has any.
        instead: maps the input of a block to what the block returns instead of its output, in an extra pass for an
            auxiliary loss; None in all others.
        outside: what adapters have at the backbone's images and at the model's heads.
    """

    tower: Tower = "vision"
    grid: Grid | None = None
    handed_on: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, TokenLayout] = field(default_factory=dict)
    pixels: Tensor | None = None
    patches: Tensor | None = None
    reads_patches: bool = False
    collected: dict[str, Tensor] | None = None
    for_heads: dict[str, dict[str, HeadPart]] = field(default_factory=dict)
    shared: dict[tuple[str | None, str], nn.Module] = field(default_factory=dict)
    images: int = 0
    frames: int | None = None
    mixed: MixedBatch | None = None
    handles: list[Any] = field(default_factory=list)
    frame_handles: list[Any] = field(default_factory=list)
    pixel_handles: list[Any] = field(default_factory=list)
    image_handles: list[Any] = field(default_factory=list)
    head_handles: list[Any] = field(default_factory=list)
    stages: dict[str, list[str]] = field(default_factory=dict)
    stage_handles: list[Any] = field(default_factory=list)
    crossing: set[str] = field(default_factory=set)
    blocks: dict[int, Any] = field(default_factory=dict)
    left: list[Left] | None = None
    losses: Any = None
    instead: Callable[[int, Tensor], Tensor] | None = None
    outside: Any = None

    def record_grid(self, model: nn.Module, backbone: VisionBackbone) -> None:
        """Record the grid at the embeddings in every forward from now on."""
        if self.handles:
            return
        embeddings = versions(model, backbone.embeddings[0])
        if backbone.architecture.grid == "spatial_shapes":
            hook: Any = self._from_spatial_shapes
            self.handles += [module.register_forward_hook(hook, with_kwargs=True) for module in embeddings]
            return
        for module in versions(model, backbone.patch_embedding[0]):
            self.handles.append(module.register_forward_hook(self._from_patch_embedding))
        if backbone.architecture.grid == "masked":
            hook = _RestoreIds(self, backbone.prefix_tokens)
            self.handles += [module.register_forward_hook(hook) for module in embeddings]

    def record_pixels(self, model: nn.Module, backbone: VisionBackbone) -> None:
        """Record the backbone's input images from now on, (batch, channels, height, width)."""
        if not self.pixel_handles:
            for module in versions(model, backbone.reads_images):
                self.pixel_handles.append(module.register_forward_pre_hook(self._from_pixels))

    def guard_images(self, model: nn.Module, backbone: VisionBackbone) -> None:
        """Refuse passes from now on in which images reach the backbone without the adapters at the images."""
        if not self.image_handles and backbone.reads_images:
            for module in versions(model, backbone.reads_images):
                self.image_handles.append(module.register_forward_pre_hook(self._require_entered))

    def _require_entered(self, module: nn.Module, args: tuple) -> None:
        outside = self.outside
        if outside is None or outside.entered or torch.compiler.is_compiling() or recomputes():
            return
        if not outside.acts_at("images") or outside.disable_adapters or outside.merged:
            return
        raise ValueError(
            f"Images reach {type(module).__name__} past the adapter that acts on the images of "
            f"{type(outside.get_base_layer()).__name__}. Call that model as a whole, or one of its methods that take "
            "images, or switch the adapter off (disable_adapter())."
        )

    @contextmanager
    def without_hooks(self, model: nn.Module, backbone: VisionBackbone | None) -> Iterator[None]:
        """Remove the hooks at the embeddings inside the context, then set them again, also at new copies of these.

        Args:
            model: with the adapters.
            backbone: in the model; None if it has no such hooks.
        """
        again = []
        for handles, watch in (
            (self.handles, self.record_grid),
            (self.pixel_handles, self.record_pixels),
            (self.image_handles, self.guard_images),
        ):
            if handles and backbone is not None:
                _remove(handles)
                again.append(watch)
        yield
        for watch in again:
            assert backbone is not None
            watch(model, backbone)

    def checkpoint_blocks(self, model: nn.Module, backbone: VisionBackbone) -> None:
        """Make gradient checkpointing recompute single blocks from now on, and not stages of several blocks.

        Values that pass from block to block are gone in the backward pass.
        """
        if self.stage_handles:
            return
        whole = model.get_submodule(backbone.path)
        for path in (block.path.removeprefix(f"{backbone.path}.") for block in backbone.blocks):
            for count in range(1, path.count(".") + 1):
                around = path.rsplit(".", count)[0]
                if isinstance(whole.get_submodule(around), GradientCheckpointingLayer):
                    self.stages.setdefault(around, []).append(path)
        self.stage_handles.append(whole.register_forward_pre_hook(self._keep_stages))

    def _keep_stages(self, module: nn.Module, args: tuple) -> None:
        # at every pass: `gradient_checkpointing_enable` may come at any time
        for name, blocks in self.stages.items():
            stage: Any = module.get_submodule(name)
            if not stage.gradient_checkpointing:
                continue
            stage.gradient_checkpointing = False
            for path in blocks:
                block: Any = module.get_submodule(path)
                block.gradient_checkpointing = True
                block._gradient_checkpointing_func = stage._gradient_checkpointing_func

    def hook_heads(self, model: nn.Module, heads: Sequence[str]) -> None:
        """Let side networks add to the output of heads from now on.

        Args:
            model: with the heads and the copies that adapters train of them.
            heads: their names.
        """
        for path in heads:
            head, watch = model.get_submodule(path), HeadHooks(self, path)
            self.head_handles.append(head.register_forward_pre_hook(watch.before))
            self.head_handles.append(head.register_forward_hook(watch.after))

    def unhook_heads(self) -> None:
        """Undo it."""
        _remove(self.head_handles)

    def leave_to_heads(self, adapter: str, owner: str, state: Tensor, use: HeadUse) -> None:
        """Store the logits of an adapter for the heads.

        Args:
            adapter: its name.
            owner: the same with its method.
            state: the logits.
            use: of them.
        """
        sizes = [size for _, size in use.outputs]
        for (path, _), logits in zip(use.outputs, state.split(sizes, dim=1), strict=True):
            self.for_heads.setdefault(path, {})[owner] = HeadPart(logits, use.normalised, adapter)

    @contextmanager
    def collecting(self) -> Iterator[dict[str, Tensor]]:
        """Collect the final states of side networks inside the context, by adapter."""
        self.collected = {}
        try:
            yield self.collected
        finally:
            self.collected = None

    def split_videos(self, model: nn.Module, backbone: VisionBackbone, before_norms: bool) -> None:
        """Make the model take videos from now on: their frames go through it as images, and the head reads their mean.

        Args:
            model: gets `pixel_values` of (batch, frames, channels, height, width).
            backbone: in the model. Without a head its output is that of single frames, (batch x frames, ...).
            before_norms: whether to average before the norms after the blocks, if there are such.
        """
        if self.frame_handles:
            return
        self.frame_handles.append(model.register_forward_pre_hook(self._split_frames, with_kwargs=True))
        self.frame_handles.append(model.register_forward_hook(self._forget_frames, always_call=True))
        norms = backbone.final_norms if before_norms and backbone.heads else ()
        for module in (module for path in (*norms, *backbone.heads) for module in versions(model, path)):
            self.frame_handles.append(module.register_forward_pre_hook(_FrameMean(self)))

    @contextmanager
    def mixing(self, names: Sequence[str]) -> Iterator[None]:
        """Send each sample through its own adapter inside the context.

        Args:
            names: of the adapters, one for each sample.
        """
        before, self.mixed = self.mixed, MixedBatch(tuple(names))
        try:
            yield
        finally:
            self.mixed = before

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and files: nothing of a pass, neither images nor tensors with a graph."""
        return vars(self) | {name: value for name, value in vars(Exchange()).items() if name in _OF_A_PASS}

    def remove_hooks(self) -> None:
        """Remove all hooks, and forget the last pass."""
        hooks = (self.handles, self.frame_handles, self.pixel_handles, self.image_handles, self.stage_handles)
        for handles in hooks:
            _remove(handles)
        self.unhook_heads()
        if self.losses is not None:
            self.losses.remove()
        vars(self).update(self.__getstate__())

    def _split_frames(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        if pixels.ndim != 5:
            raise ValueError(
                f"pixel_values has shape {tuple(pixels.shape)}: a method for videos is active, which needs (batch, "
                "frames, channels, height, width)."
            )
        self.images, self.frames = pixels.shape[0] * pixels.shape[1], pixels.shape[1]
        if "pixel_values" in kwargs:
            return args, {**kwargs, "pixel_values": pixels.flatten(0, 1)}
        return (pixels.flatten(0, 1), *args[1:]), kwargs

    def _forget_frames(self, module: nn.Module, args: tuple, output: Any) -> None:
        # images that a part of the model gets later are not frames of these videos
        self.images, self.frames = 0, None

    def _from_pixels(self, module: nn.Module, args: tuple) -> None:
        self.pixels = args[0]

    def _from_patch_embedding(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        times = output.shape[2] if output.ndim == 5 else 1
        self.patches = output if self.reads_patches else None
        self.grid = Grid(output.shape[-2], output.shape[-1], times=times)

    def _from_spatial_shapes(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        shapes = inspect.signature(module.forward).bind(*args, **kwargs).arguments["spatial_shapes"]
        shapes = torch.as_tensor(shapes, device=output.device)
        height, width = (int(size) for size in shapes.amax(dim=0))
        rows, columns = shapes[:, :1], shapes[:, 1:]
        token = torch.arange(output.shape[1], device=output.device)
        cells = torch.where(token < rows * columns, token // columns * width + token % columns, height * width)
        self.grid = Grid(height, width, cells)


def recomputes() -> bool:
    """Whether gradient checkpointing computes something again in the backward pass, as torch's own code asks."""
    return torch._C._current_graph_task_id() != -1


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


_OF_A_PASS = {
    "grid",
    "handed_on",
    "layouts",
    "pixels",
    "patches",
    "collected",
    "for_heads",
    "images",
    "frames",
    "left",
    "instead",
}


@dataclass
class _RestoreIds:
    """The hook that records which patches the embeddings have kept, and in which order.

    Attributes:
        exchange: to be updated.
        prefix_tokens: tokens before the patches.
    """

    exchange: Exchange
    prefix_tokens: int

    def __call__(self, module: nn.Module, args: tuple, output: tuple) -> None:
        tokens, _, ids_restore = output
        grid = self.exchange.grid
        assert grid is not None  # the patch embedding ran inside the embeddings
        kept = tokens.shape[1] - self.prefix_tokens
        self.exchange.grid = Grid(grid.height, grid.width, ids_restore.argsort(dim=1)[:, :kept])


@dataclass
class _FrameMean:
    """The hook that averages a module's input over the frames of each video, unless an earlier hook has done so.

    Attributes:
        exchange: of the model that the module belongs to.
    """

    exchange: Exchange

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        if len(args[0]) != self.exchange.images:
            return args
        return (args[0].unflatten(0, (-1, self.exchange.frames)).mean(dim=1), *args[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> _FrameMean:
        # peft copies a head to train it: the copy belongs to the same model. A copy of the whole model copies the
        # exchange before the head, because the model's own hook holds it.
        return _FrameMean(memo.get(id(self.exchange), self.exchange))
