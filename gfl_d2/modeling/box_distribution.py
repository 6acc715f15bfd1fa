"""
Box sides as discrete distributions, and the distances that they stand for.

Shapes: R locations, n = ``reg_max``, n + 1 bins y_i = i. Distances are those from a location to
the (left, top, right, bottom) side of a box, in that order.
"""

import torch
from torch import Tensor

__all__ = ["bbox_to_distance", "distance_to_bbox", "full_precision", "integral"]


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors in float32; others, float64 included, as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def integral(logits: Tensor, reg_max: int) -> Tensor:
    """
    Expected distance of the box distributions: sum_i S_i * y_i with S the softmax of the logits
    (GFL paper, section 3). Computed in float32 or better.

    Args:
        logits: shape (..., 4 * (n + 1)): the n + 1 bins of left come first, then top, right,
            bottom.
        reg_max: n.

    Returns:
        Tensor: shape (..., 4), in bins, within [0, n].
    """
    probs = full_precision(logits).unflatten(-1, (4, reg_max + 1)).softmax(dim=-1)
    bins = torch.arange(reg_max + 1, dtype=probs.dtype, device=probs.device)
    # Not a matrix product: autocast and TF32 would round it.
    return (probs * bins).sum(dim=-1)


def distance_to_bbox(centers: Tensor, distances: Tensor) -> Tensor:
    """
    Args:
        centers: shape (..., 2), x and y of the locations.
        distances: shape (..., 4), in the unit of ``centers``.

    Returns:
        Tensor: shape (..., 4), boxes in XYXY.
    """
    return torch.cat((centers - distances[..., :2], centers + distances[..., 2:]), dim=-1)


def bbox_to_distance(centers: Tensor, boxes: Tensor) -> Tensor:
    """
    The inverse of :func:`distance_to_bbox`. A distance is negative where the centre is outside.

    Args:
        centers: shape (..., 2), x and y of the locations.
        boxes: shape (..., 4), XYXY, in the unit of ``centers``.

    Returns:
        Tensor: shape (..., 4).
    """
    return torch.cat((centers - boxes[..., :2], boxes[..., 2:] - centers), dim=-1)
