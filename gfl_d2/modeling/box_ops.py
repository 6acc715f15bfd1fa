"""
Arithmetic of boxes: from distributions to distances, from distances to boxes, IoU, centerness.

Shapes: "..." is any leading dimensions. Distances, (..., 4), go from a location to the left, top,
right and bottom side of a box. Boxes, (..., 4), are XYXY. Centers, (..., 2), are x and y of
locations. Units are free, but the same in all arguments.
"""

import torch
from torch import Tensor

from .precision import full_precision

__all__ = [
    "MIN_AREA", "aligned_iou", "bbox_to_distance", "box_area", "centerness", "distance_to_bbox",
    "integral", "iou_and_union",
]  # fmt: skip

# Lower bound of the areas that IoUs are divided by, as in the reference implementation.
MIN_AREA = 1e-6


def integral(logits: Tensor, reg_max: int) -> Tensor:
    """
    Expected distances, in bins, of box distributions: sum_i S_i * i with S the softmax of the
    logits (GFL paper, section 3). Computed in float32 or better.

    Args:
        logits: shape (..., 4 * (n + 1)): the n + 1 bins of left come first.
        reg_max: n.
    """
    probs = full_precision(logits).unflatten(-1, (4, reg_max + 1)).softmax(dim=-1)
    bins = torch.arange(reg_max + 1, dtype=probs.dtype, device=probs.device)
    # Not a matrix product: autocast and TF32 would round it.
    return (probs * bins).sum(dim=-1)


def distance_to_bbox(centers: Tensor, distances: Tensor) -> Tensor:
    """The boxes with these distances from these centers to their sides."""
    return torch.cat((centers - distances[..., :2], centers + distances[..., 2:]), dim=-1)


def bbox_to_distance(centers: Tensor, boxes: Tensor) -> Tensor:
    """The distances from centers to sides of boxes; negative where a center is outside."""
    return torch.cat((centers - boxes[..., :2], boxes[..., 2:] - centers), dim=-1)


def centerness(distances: Tensor) -> Tensor:
    """
    How central a location is in a box (FCOS, Tian et al., ICCV 2019, eq. 3). Shape (...): 1 in the
    center, 0 on the border and outside.
    """
    distances = distances.clamp(min=0)
    near = torch.minimum(distances[..., :2], distances[..., 2:])
    far = torch.maximum(distances[..., :2], distances[..., 2:])
    return (near / far.clamp(min=torch.finfo(far.dtype).tiny)).prod(dim=-1).sqrt()


def aligned_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of boxes paired by position, shape (...), in [0, 1]; 0 where both have no area."""
    return iou_and_union(full_precision(boxes1), full_precision(boxes2))[0]


def iou_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and area of the union, at least ``MIN_AREA``, of boxes as in :func:`aligned_iou`."""
    left_top = torch.max(boxes1[..., :2], boxes2[..., :2])
    right_bottom = torch.min(boxes1[..., 2:], boxes2[..., 2:])
    intersection = box_area(left_top, right_bottom)
    area1, area2 = (box_area(boxes[..., :2], boxes[..., 2:]) for boxes in (boxes1, boxes2))
    union = (area1 + area2 - intersection).clamp(min=MIN_AREA)
    return intersection / union, union


def box_area(left_top: Tensor, right_bottom: Tensor) -> Tensor:
    """Areas from corners of shape (..., 2) each; 0 where they are not in order."""
    width, height = (right_bottom - left_top).clamp(min=0).unbind(dim=-1)
    return width * height
