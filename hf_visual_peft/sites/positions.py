"""The position embeddings of a backbone, into which constant additions to its images fold."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.modes import in_eval_mode


_TOLERANCE = 1e-4  # of the scale of the tokens, in float32


class _Stop(Exception):  # noqa: N818 - not an error
    """The tokens are there."""


class Positions:
    """The parameter with one row for each patch, found by a look at the tokens that the first block reads.

    A patch embedding is linear, so images with an addition give tokens with an addition: `E(x + d) = E(x) + D`. D goes
    into the parameter whose rows are added to the tokens. That is tried: the backbone with the new rows must turn
    images into the same tokens as the backbone with the addition.

    Args:
        layer: what adapters have at the backbone.

    Raises:
        ValueError: no parameter of the backbone is added to the tokens one row a patch, or its stem is not linear.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._owner: nn.Module = layer.get_base_layer()
        backbone = layer.backbone
        path = (*backbone.input_norms, backbone.blocks[0].path)[0]
        self._entrance = self._owner.get_submodule(path.removeprefix(backbone.path).removeprefix("."))
        inside = tuple(block.path.removeprefix(backbone.path).removeprefix(".") + "." for block in backbone.blocks)
        self._outside = {
            name: parameter
            for name, parameter in self._owner.named_parameters()
            if not name.startswith(inside) and parameter.is_floating_point()
        }
        self._prefix = backbone.prefix_tokens
        self._parameter: nn.Parameter | None = None
        self._before: Tensor | None = None

    @torch.no_grad()
    def add(self, addend: Tensor) -> None:
        """Fold an addition to the images into the embeddings as they were at first.

        Args:
            addend: (channels, height, width).

        Raises:
            ValueError: they have no place for it; they are then unchanged.
        """
        if self._before is not None:
            self.restore()
        if self._parameter is None:
            self._parameter = self._find(_images(addend, 0))
        first = _images(addend, 1)[None]
        moved = self._tokens(first + addend) - self._tokens(first)
        shift = _laid_out(_patches(moved, self._prefix), self._parameter)
        assert shift is not None  # it was found by that
        self._before = self._parameter.detach().clone()
        self._parameter.data = (self._before.float() + shift).to(self._before.dtype)

    def _find(self, addend: Tensor) -> nn.Parameter:
        """The parameter into which a strong addition to images folds; a weak one would fold into any.

        Raises:
            ValueError: there is none.
        """
        try:
            first, second = (_images(addend, seed)[None] for seed in (1, 2))
            moved = self._tokens(first + addend) - self._tokens(first)
            expected = self._tokens(second + addend)
        except Exception as error:  # any error of an unknown model, such as one for videos
            raise self._refusal() from error
        for parameter in self._outside.values():
            shift = _laid_out(_patches(moved, self._prefix), parameter) if moved.ndim == 3 else None
            if shift is None:
                continue
            before = parameter.detach().clone()
            parameter.data = (before.float() + shift).to(before.dtype)
            missed = (self._tokens(second) - expected).abs().max().item()
            parameter.data = before
            limit = _TOLERANCE if before.dtype == torch.float32 else 0.05
            if missed <= limit * min(expected.abs().max().item(), moved.abs().max().item()):
                return parameter
        raise self._refusal()

    def _refusal(self) -> ValueError:
        return ValueError(
            f"Cannot merge an adapter at the images of {type(self._owner).__name__}: it adds no position embeddings "
            "to its tokens, one row a patch, after a linear patch embedding. Keep the adapter beside the backbone."
        )

    def restore(self) -> None:
        """Put the embeddings back as they were."""
        if self._parameter is not None and self._before is not None:
            self._parameter.data = self._before.to(self._parameter)  # the model may have been moved since
        self._before = None

    def _tokens(self, images: Tensor) -> Tensor:
        """The tokens that the first block, or the norm before it, reads."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append(next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)))
            raise _Stop

        owner = self._owner
        own = next(iter(self._outside.values()))
        images = images.to(own)
        named = "pixel_values" in inspect.signature(owner.forward).parameters
        handle = self._entrance.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        self._layer._off_now = True
        try:
            with in_eval_mode(owner):
                owner(pixel_values=images) if named else owner(images)
        except _Stop:
            pass
        finally:
            self._layer._off_now = False
            handle.remove()
        return found[0].float()


def _images(like: Tensor, seed: int) -> Tensor:
    """A random image of that size, without a change of the global random state."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like.device)


def _patches(moved: Tensor, prefix: int) -> Tensor:
    """What is added to each patch, (patches, width), from what is added to the tokens of one image."""
    return moved[0, prefix:]


def _laid_out(rows: Tensor, parameter: nn.Parameter) -> Tensor | None:
    """An addition to a parameter, from one for each patch, (patches, width); None if the shapes do not fit."""
    count, width = rows.shape
    if parameter.ndim < 2:
        return None
    if parameter.shape[-1] == width and parameter.numel() // width >= count:
        before = parameter.numel() // width - count  # rows of prefix tokens
        return torch.cat([rows.new_zeros(before, width), rows]).view(parameter.shape)
    if parameter.ndim == 4 and parameter.shape[:2] == (1, width) and parameter[0, 0].numel() == count:
        return rows.T.reshape(parameter.shape)
    return None
