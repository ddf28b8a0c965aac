"""The layout of the tokens of a sequence in the image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backbones.architectures import Stream


def to_tokens(x: Tensor, stream: Stream) -> Tensor:
    """A token stream as (batch, tokens, channels), from any memory layout; with three dimensions it is unchanged.

    The tokens of all images in one row, (tokens, channels), are a batch of one sequence.
    """
    if x.ndim == 3:
        return x
    if x.ndim == 2:
        return x.unsqueeze(0)
    return x.flatten(2).transpose(1, 2) if stream == "channels_first" else x.flatten(1, 2)


def from_tokens(tokens: Tensor, like: Tensor, stream: Stream) -> Tensor:
    """The inverse of `to_tokens`: (batch, tokens, channels) in the layout of the original tensor."""
    if like.ndim == 3:
        return tokens
    if like.ndim == 2:
        return tokens.squeeze(0)
    if stream == "channels_first":
        return tokens.transpose(1, 2).unflatten(2, like.shape[2:])
    return tokens.unflatten(1, like.shape[1:3])


@dataclass(frozen=True)
class Grid:
    """The positions of the patch tokens.

    Attributes:
        height: rows of patches.
        width: patches in a row.
        cells: (batch, patches), the cell of each token, counted row by row, or None if tokens fill the grid in that
            order. Padding has the cell height x width.
        times: number of grids in one sequence, such as the frames of a video.
        frames_last: whether the grids alternate token by token; else they follow each other.
    """

    height: int
    width: int
    cells: Tensor | None = None
    times: int = 1
    frames_last: bool = False

    @property
    def area(self) -> int:
        """Tokens of one grid."""
        return self.height * self.width

    def of_samples(self, index: Tensor) -> Grid:
        """The grid of some samples of the batch."""
        return self if self.cells is None else replace(self, cells=self.cells[index])

    def halved_to(self, tokens: int) -> Grid:
        """The grid of this many tokens that results from halving rows and columns, rounding up.

        Raises:
            ValueError: there is none.
        """
        height, width = self.height, self.width
        while height * width > tokens:
            height, width = -(-height // 2), -(-width // 2)
        if height * width != tokens:
            raise ValueError(f"{tokens} tokens fill no grid that results from halving {self.height} x {self.width}.")
        return Grid(height, width)

    def to_map(self, tokens: Tensor) -> Tensor:
        """(batch, patches, channels) to (batch x times, channels, height, width); cells without a token are zero.

        Raises:
            ValueError: the number of tokens is not that of the cells.
        """
        if self.times > 1:
            if self.frames_last:
                frames = tokens.unflatten(1, (-1, self.times)).transpose(1, 2)
            else:
                frames = tokens.unflatten(1, (self.times, -1))
            return Grid(self.height, self.width).to_map(frames.flatten(0, 1))
        batch, patches, channels = tokens.shape
        if self.cells is None:
            if patches != self.area:
                raise ValueError(f"{patches} patch tokens do not fill a grid of {self.height} x {self.width}.")
            return tokens.transpose(1, 2).reshape(batch, channels, self.height, self.width)
        area = self.area
        index = self.cells.unsqueeze(-1).expand(-1, -1, channels)
        canvas = tokens.new_zeros(batch, area + 1, channels).scatter(1, index, tokens)
        return canvas[:, :area].transpose(1, 2).reshape(batch, channels, self.height, self.width)

    def to_tokens(self, maps: Tensor) -> Tensor:
        """(batch x times, channels, height, width) to (batch, patches, channels); tokens that are padding are zero."""
        tokens = maps.flatten(2).transpose(1, 2)
        if self.times > 1:
            frames = tokens.unflatten(0, (-1, self.times))
            return (frames.transpose(1, 2) if self.frames_last else frames).flatten(1, 2)
        if self.cells is None:
            return tokens
        tokens = torch.cat([tokens, tokens.new_zeros(tokens.shape[0], 1, tokens.shape[2])], dim=1)
        return tokens.gather(1, self.cells.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


@dataclass(frozen=True)
class TokenLayout:
    """The parts of a token sequence.

    Attributes:
        prefix: number of prefix tokens, which come first.
        grid: of the other tokens; None if it is not known.
        frames: number of consecutive images in the batch that form a video; None for single images.
    """

    prefix: int
    grid: Grid | None
    frames: int | None = None

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Split (batch, tokens, channels) into prefix tokens and a map (batch, channels, height, width).

        For a video whose frames are in one sequence the maps are (batch x frames, ...).

        Raises:
            ValueError: the grid is not known, or the tokens do not fill it.
        """
        return tokens[:, : self.prefix], self._known_grid().to_map(tokens[:, self.prefix :])

    def join(self, prefix: Tensor, maps: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([prefix, self._known_grid().to_tokens(maps)], dim=1)

    def _known_grid(self) -> Grid:
        if self.grid is None:
            raise ValueError("The patch grid is not known: call the whole model, not a block of it.")
        return self.grid


def map_grid(x: Tensor, stream: Stream) -> Grid:
    """The grid of tokens in the form of a map."""
    height, width = x.shape[2:] if stream == "channels_first" else x.shape[1:3]
    return Grid(height, width)


def unfolded_grid(grid: Grid, inside: int, tokens: Tensor) -> Grid:
    """The grid of tokens that are ordered by cells of patches, and by patches within each cell."""
    patches, side = grid.halved_to(tokens.shape[1] // inside), math.isqrt(inside)
    token = torch.arange(tokens.shape[1], device=tokens.device)
    cell, patch = token // patches.area, token % patches.area
    row = patch // patches.width * side + cell // side
    column = patch % patches.width * side + cell % side
    width = patches.width * side
    return Grid(patches.height * side, width, (row * width + column).expand(tokens.shape[0], -1))


def unit_grid(holder: Any, group: int, x: Tensor, image: Grid | None) -> Grid:
    """The grid of tokens that are ordered by units, from the module that can arrange them as a map.

    Raises:
        ValueError: the module cannot, for this number of tokens or this shape of the image.
    """
    tokens = torch.arange(x.shape[1], device=x.device).view(1, -1, 1)
    unknown = f"{type(holder).__name__} knows the places of tokens for one image size only."
    try:
        cells = holder.reroll(tokens, stage_idx=group)
    except RuntimeError as error:
        raise ValueError(unknown) from error
    _, height, width, _ = cells.shape
    if image is not None and height * image.width != width * image.height:
        raise ValueError(unknown)  # equally many tokens in another shape: it would arrange them without an error
    return Grid(height, width, cells.flatten().argsort().expand(x.shape[0], -1))
