"""Features of frozen backbones, computed once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ..backbones.modes import in_eval_mode
from .calls import CallPoint, Forward, replaced
from .dataset import FEATURES, CachedFeatures
from .filling import Filler, is_whole
from .finding import ROWS, BorderFinder
from .fingerprint import describe, digest, key_of
from .looking import look_at, views_of
from .replay import Border, leaves_of, recomputing
from .storage import DTYPES, Layout, Shards, check_space, open_folder, size


# tolerance for features on disk, which were computed in batches of another size and maybe on another device
_TOLERANCE = 1e-2
_HALF_TOLERANCE = 1e-1


class FeatureCache:
    """The features of the frozen part of a model, computed once and read from disk in all later epochs.

        cache = FeatureCache(model, "features")  # after get_peft_model
        train = cache.cached(train_images)
        loader = DataLoader(train, batch_size=32, shuffle=True, collate_fn=train.collate)
        for batch in loader:
            loss = model(**batch).loss

    Batches hold `cached_features` in place of `pixel_values`; the model takes either. The cache stores the tensors at
    the border between the frozen and the trained part, which it finds by running the model with hooks: for a linear
    probe the input of the head, for side networks the token stream after each block that they read, for a method on
    the last blocks the input of the first of these. Everything after the border runs as usual, so that gradients, loss
    and accuracy are those of training on images. (The frozen part runs in eval mode, without dropout and stochastic
    depth. Its `hidden_states` and attentions are NaN in a run from features.) Its weights must not change while
    features of them are in use.

    Each cache has its own folder below `folder`, named by a fingerprint of everything its features depend on: frozen
    weights, model, images and their transform, views, dtype, versions of the libraries. Runs that differ only in other
    things, such as learning rate, seed or width of the side network, share it. The files are checked against their
    checksums once, when the cache is opened; damaged files are computed again. The features and targets of the first
    samples are compared with those on disk, in case a key is incomplete.

    Args:
        model: as it will be trained, on the device where features are to be computed. It still takes images.
        folder: where all caches are kept.
        dtype: of the features on disk, `"float32"`, `"float16"` or `"bfloat16"`; the model gets them in its own dtype.
        targets: names of the entries of a sample that are kept unchanged beside the features.
        arguments: extra arguments of the model, such as `{"interpolate_pos_encoding": True}`.
        batch_size: images per batch while filling.
        num_workers: processes that read images while filling.
        read_only: whether an incomplete or damaged cache is an error.
        progress: whether to show a bar while filling.

    Raises:
        ValueError: an argument has an invalid value.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path,
        *,
        dtype: str = "float32",
        targets: Sequence[str] = ("labels",),
        arguments: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        read_only: bool = False,
        progress: bool = True,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}.")
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}: must be an integer of at least 1.")
        self.model, self.dtype = model, dtype
        self.folder = Path(folder).expanduser().absolute()  # files are opened later, maybe from another folder
        self.targets, self.arguments = tuple(targets), dict(arguments or {})
        self.batch_size, self.num_workers = batch_size, num_workers
        self.read_only, self.progress = read_only, progress
        self._border: Border | None = None
        self._active: Any = None
        self._running = ExitStack()
        self._recomputing: list[Any] = []
        self._frozen_parameters: list[nn.Parameter] = []
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        get_base: Any = getattr(model, "get_base_model", None)
        base = model if get_base is None else get_base()
        # models that do not know `pixel_values` by name get images first
        self._by_name = set(inspect.signature(base.forward).parameters)

    def close(self) -> None:
        """Remove the hooks from the model, which then takes images, or features of another cache."""
        self._running.close()
        for handle in self._handles:
            handle.remove()

    def cached(
        self, data: Dataset[Any] | Sequence[Dataset[Any]], *, name: str = "features", key: Any = None
    ) -> CachedFeatures:
        """The features of a data set, read from disk or else computed now.

        Args:
            data: a map-style data set whose samples are mappings with the model's inputs (channels, height, width) and
                targets; or several such data sets of the same length, views of every image with different
                augmentation. Epoch `e` then sees view `e` modulo their number.
            name: prefix of the cache's folder, such as `"train"`.
            key: identifies these images, their transform and their targets: numbers, strings, arrays, and lists and
                mappings of them. A `datasets.Dataset` needs no key: its fingerprint covers rows, format and transform.
                But it covers a function from an imported module only by name; give a key if you may change such a
                function.

        Returns:
            A data set with `cached_features` and the targets.

        Raises:
            ValueError: the data are invalid or random, a key is missing, the model has no border or a different one
                than before, or the folder does not hold a cache of these features.
            OSError: the disk is too small or full, or the folder cannot be written.
        """
        self._running.close()
        self._check_unchanged()
        views = views_of(data)
        key = [key_of(view) for view in views] if key is None else key
        looked = [look_at(view, self.targets) for view in views]
        inputs, others = self._parted(looked[0])
        with self._frozen():
            if self._border is None:
                self._border = self._find(inputs)
            self._check_inputs(self._border, inputs)
            layout = self._layout(self._border, key, len(views), len(views[0]), others)
            folder = self.folder / f"{name}-{layout.fingerprint[:16]}"
            shards, missing = self._open(folder, layout)
            if missing:
                rows = sum(len(shards.layout.rows_of(shard)) for shard in missing)
                text = f"Caching {name} features, {size(layout.row_bytes)} an image, {size(rows * layout.row_bytes)}"
                compute = partial(self._compute, self._border)
                filler = Filler(shards, views, compute, self.batch_size, self.num_workers, self.progress)
                filler.fill(missing, text)
            found = CachedFeatures(shards)
            for view, samples in enumerate(looked):
                self._compare(self._border, found, view, samples)
        return found

    def _parted(self, samples: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, tuple[str, list[int]]]]:
        """Some samples as a batch of inputs, and their other entries."""
        batch = default_collate([samples[index % len(samples)] for index in range(ROWS[0])])
        others = {
            name: (str(batch[name].dtype).removeprefix("torch."), list(batch[name].shape[1:]))
            for name in sorted(batch)
            if name in self.targets
        }
        return {name: value for name, value in batch.items() if name not in self.targets}, others

    def _find(self, inputs: Mapping[str, Tensor]) -> Border:
        device = self._device
        finder = BorderFinder(self.model, self._run, device)
        border = finder.find({name: value.to(device) for name, value in inputs.items()})
        self._recomputing = recomputing(self.model, border)
        self._frozen_parameters = [parameter for point in border.cuts for parameter in point.parameters]
        self._active = getattr(self.model, "active_adapters", None)
        return border

    def _check_unchanged(self) -> None:
        """Raise an error if the border that was found is no longer that of the model."""
        if self._border is None:
            return
        if getattr(self.model, "active_adapters", None) != self._active:
            raise ValueError(
                f"{FEATURES} belong to the active adapters {self._active}: make a FeatureCache for each choice, "
                "and close() those of the others."
            )
        if any(parameter.requires_grad for parameter in self._frozen_parameters):
            raise ValueError(
                "A parameter trains now that was frozen when the features were computed: use images, or make a new "
                "FeatureCache."
            )

    def _check_inputs(self, border: Border, inputs: Mapping[str, Tensor]) -> None:
        found = {name: tuple(value.shape[1:]) for name, value in inputs.items()}
        known = {name: leaf.sample for name, leaf in border.inputs.items()}
        if found != known:
            raise ValueError(f"data: samples have {found}, but earlier ones had {known}. A cache takes one kind.")

    def _layout(
        self, border: Border, key: Any, views: int, images: int, others: dict[str, tuple[str, list[int]]]
    ) -> Layout:
        parts = describe(
            self.model,
            border,
            key=key,
            dtype=DTYPES[self.dtype],
            views=views,
            arguments=self.arguments,
            device=self._device,
        )
        shapes = {name: list(shape) for name, shape in border.shapes.items()}
        return Layout(digest(parts), parts, views * images, views, self.dtype, shapes, others)

    def _open(self, folder: Path, layout: Layout) -> tuple[Shards, list[int]]:
        """The files, and the indices of the missing ones."""
        if not (folder / "manifest.json").exists() and not self.read_only:
            check_space(folder, layout.rows, layout)  # before anything is written
        shards = open_folder(folder, layout, self.read_only)
        missing = [shard for shard in range(shards.layout.shards) if not is_whole(shards, shard, self.read_only)]
        if missing and self.read_only:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {shards.layout.shards} files of features, and read_only is set."
            )
        check_space(folder, sum(len(shards.layout.rows_of(shard)) for shard in missing), shards.layout)
        return shards, missing

    def _compare(self, border: Border, cached: CachedFeatures, view: int, samples: Sequence[Any]) -> None:
        """Raise an error unless the first samples of a view match those on disk: the key may be incomplete."""
        batch = default_collate(list(samples))
        kept = cached.of_view(view, range(len(samples)))
        where = f"in {cached.shards.folder}" + (f" (view {view})" if cached.shards.layout.views > 1 else "")
        way_out = "The key must identify images, transform and targets: give another key, or delete the folder."
        for name, others in kept.others.items():
            if not torch.equal(others, batch[name]):
                raise ValueError(f"{name} of the first samples are {batch[name]}, but {others} {where}. {way_out}")
        rows = slice(0, ROWS[0])  # as many as the model has run with before
        found = self._compute(border, {name: value[rows] for name, value in batch.items()})
        half = self.dtype != "float32" or torch.is_autocast_enabled(self._device.type)
        half = half or any(leaf.is_floating_point() and leaf.itemsize < 4 for leaf in self._frozen_parameters)
        for name, one in zip(border.shapes, found, strict=True):
            other = kept.features[name][rows].flatten(1).float()
            off = (one.cpu().float() - other).norm() / other.norm().clamp(min=1e-12)
            if not off <= (_HALF_TOLERANCE if half else _TOLERANCE):
                raise ValueError(
                    f"The features on disk are not those of this model and these data: {name} of the first samples "
                    f"is off by {float(off):.1%} {where}. {way_out}"
                )

    def _compute(self, border: Border, batch: Mapping[str, Any]) -> list[Tensor]:
        """The features of a batch of samples, (batch, features) each."""
        found: dict[str, Tensor] = {}
        inputs = {name: value.to(self._device) for name, value in batch.items() if name in border.inputs}
        calls: dict[CallPoint, int] = {}

        def watched(point: CallPoint, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            if point in border.readers:
                found[str(border.readers[point].key)] = args[0]
                return forward(*args, **kwargs)
            output = forward(*args, **kwargs)
            number = calls.get(point, 0)
            calls[point] = number + 1
            for leaf, value in zip(border.cuts[point][number].leaves, leaves_of(point.seen(output))[0], strict=True):
                if getattr(leaf, "key", None) in border.shapes:
                    found[leaf.key] = value
            return output

        points = (*border.cuts, *border.readers)
        with torch.no_grad(), replaced({point: partial(watched, point, point.forward) for point in points}):
            self._run(inputs)
        found |= {name: value for name, value in inputs.items() if name in border.shapes}
        dtype = DTYPES[self.dtype]
        for name, shape in border.shapes.items():
            if tuple(found[name].shape[1:]) != shape:
                raise ValueError(f"{name} has the shape {tuple(found[name].shape[1:])}, but had {shape} before.")
        return [found[name].to(dtype).flatten(1) for name in border.shapes]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _run(self, inputs: Mapping[str, Tensor]) -> Any:
        args, kwargs = self._as_called(inputs)
        return self.model(*args, **kwargs, **self.arguments)

    def _as_called(self, inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        known = any(name in self._by_name for name in inputs)
        return ((), dict(inputs)) if known else (tuple(inputs.values()), {})

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Keep the model in eval mode inside the context, and restore the state of the random generators after it."""
        devices = [self._device] if self._device.type == "cuda" else []
        with in_eval_mode(self.model), torch.random.fork_rng(devices=devices):
            yield

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """The hook that makes the model take features."""
        self._running.close()  # left by an interrupted call: torch runs no hooks after KeyboardInterrupt
        features = kwargs.get(FEATURES)
        border = self._border
        if features is None or (border is None and self._another_has_features):
            return None
        if border is None or set(features) != set(border.shapes):
            known = "none yet: call cached()" if border is None else ", ".join(border.shapes)
            raise ValueError(
                f"{FEATURES} has {', '.join(features)}; this model's are {known}. If they are those of another "
                "FeatureCache of this model, close() this one."
            )
        self._check_unchanged()
        if any(layer.gradient_checkpointing and layer.training for layer in self._recomputing):
            raise ValueError("Switch gradient checkpointing off: it would run the model again without the features.")
        device, rows = self._device, len(next(iter(features.values())))
        features = {name: value.to(device) for name, value in features.items()}
        arguments = border.arguments(features, rows, device)
        self._running.enter_context(border.replay(features, arguments, rows, device))
        called, named = self._as_called(arguments)
        others = {name: value for name, value in kwargs.items() if name != FEATURES}
        return (*called, *args), {**others, **named}

    @property
    def _another_has_features(self) -> bool:
        """Whether another cache has its hooks on the model and takes its features."""
        others = [getattr(hook, "__self__", None) for hook in self.model._forward_pre_hooks.values()]
        return any(isinstance(other, FeatureCache) and other._border is not None for other in others)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The hook that removes the features again, also after an error."""
        self._running.close()
