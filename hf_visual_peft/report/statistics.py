"""Figures of a split with their uncertainty over images."""

from __future__ import annotations

import math
from collections.abc import Sequence


Z95 = 1.959963984540054  # of the normal distribution, for 95 %


def wilson(share: float, count: int, z: float = Z95) -> tuple[float, float]:
    """The interval of Wilson for a share of `count` images (E. B. Wilson, 1927), 95 % by default.

    Raises:
        ValueError: there is no image, or the share is not one.
    """
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"share={share}, count={count}: needs a share from 0 to 1 of at least one image.")
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def sign_test(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The exact two-sided p-value that two methods are right equally often, from the images on which they differ.

    Args:
        first: whether the one is right on each image.
        second: the other, on the same images.
    """
    wins = sum(a and not b for a, b in zip(first, second, strict=True))
    losses = sum(b and not a for a, b in zip(first, second, strict=True))
    differ = wins + losses
    tail = sum(math.comb(differ, k) for k in range(min(wins, losses) + 1)) / 2**differ
    return min(1.0, 2 * tail)


def calibration(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[dict[str, float]]:
    """Mean confidence and accuracy of the images in bins of equal width of confidence; empty bins are left out."""
    found = []
    for number in range(bins):
        members = [index for index, value in enumerate(confidence) if min(int(value * bins), bins - 1) == number]
        if members:
            found.append(
                {
                    "confidence": sum(confidence[index] for index in members) / len(members),
                    "accuracy": sum(right[index] for index in members) / len(members),
                    "images": len(members),
                }
            )
    return found


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of points of (cost, gain) to which no other has less or equal cost and more gain, by cost."""
    best, found = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            found.append(index)
    return found
