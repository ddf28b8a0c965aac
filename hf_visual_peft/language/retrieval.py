"""Retrieval between images and texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def recall_at_k(similarity: Tensor, pairs: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The fraction of queries that find one of their partners among the best k, in both directions.

    Args:
        similarity: of images and texts, (images, texts), such as `encode_images(x) @ encode_texts(t).T`.
        pairs: (images, texts) of True where they belong together; by default image i to text i.
        ks: the numbers of best results.

    Returns:
        `image_to_text_recall@k` and `text_to_image_recall@k` for every k.

    Raises:
        ValueError: a shape or k does not fit, or an image or text belongs to none.
    """
    if similarity.ndim != 2:
        raise ValueError(f"similarity has shape {tuple(similarity.shape)}: must be (images, texts).")
    if pairs is None:
        if similarity.shape[0] != similarity.shape[1]:
            raise ValueError(
                f"similarity has shape {tuple(similarity.shape)}: with other numbers of images than texts, `pairs` "
                "must tell which belong together."
            )
        pairs = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    if pairs.shape != similarity.shape or pairs.dtype != torch.bool:
        raise ValueError(f"pairs must be bool of shape {tuple(similarity.shape)}, like similarity.")
    found = {}
    for name, scores, right in (("image_to_text", similarity, pairs), ("text_to_image", similarity.T, pairs.T)):
        if not right.any(1).all():
            raise ValueError(f"pairs: {name.partition('_')[0]} {int(right.any(1).int().argmin())} belongs to none.")
        for k in ks:
            if type(k) is not int or not 1 <= k <= scores.shape[1]:
                raise ValueError(f"ks has {k!r}: must be integers from 1 to {scores.shape[1]}.")
            best = scores.topk(k, dim=1).indices
            found[f"{name}_recall@{k}"] = right.gather(1, best).any(1).float().mean().item()
    return found
