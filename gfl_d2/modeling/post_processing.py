"""From predictions to detections. No shape depends on a value until NMS."""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .box_ops import distance_to_bbox
from .box_representation import BoxRepresentation
from .precision import full_precision
from .quality import Quality
from .structures import Levels, Predictions, take_places

__all__ = ["Candidates", "Sides", "select_candidates", "suppress"]


class Candidates(NamedTuple):
    """What may be detected, in no order. Score 0 marks entries that may not."""

    boxes: Tensor  # (N, K, 4), XYXY in pixels, clipped to the image
    scores: Tensor  # (N, K)
    classes: Tensor  # (N, K), int64 in [0, C)


class Sides(NamedTuple):
    """What is predicted of the sides of candidates: J locations, of which each has several."""

    values: Tensor  # (N, J, 4 * V), of the box representation
    centers: Tensor  # (N, J, 2), x and y in pixels
    strides: Tensor  # (N, J, 1), in pixels
    location: Tensor  # (N, K), int64 in [0, J), of each candidate


def select_candidates(
    predictions: Predictions,
    levels: Levels,
    image_sizes: Tensor,
    *,
    quality: Quality,
    box: BoxRepresentation,
    score_thresh: float,
    topk: int,
) -> tuple[Candidates, Sides]:
    """
    The best (location, class) pairs of each level, and what their boxes are decoded from.

    Args:
        predictions: of the head.
        levels: where they are. Locations in the padding are never candidates.
        image_sizes: shape (N, 2), height and width in pixels.
        quality, box: those of the head.
        score_thresh: pairs that score no higher have a score of 0.
        topk: how many pairs of a level there are at most.
    """
    quality_logits = predictions.quality_logits or [None] * len(levels.shapes)
    locations, pairs, num_before = [], [], 0
    for i, maps in enumerate(zip(predictions.class_logits, predictions.box_values, quality_logits)):
        num_images, num_classes, _, width = maps[0].shape
        # The topk best pairs are at the topk locations whose best class is best.
        best = quality.score_logits(maps[0].amax(dim=1, keepdim=True), maps[2])
        best = full_precision(best).masked_fill(~levels.valid_mask(i), -torch.inf).flatten(1)
        num_locations = best.shape[1]
        best, location = best.topk(_at_most(topk, num_locations), dim=1, sorted=False)  # (N, k)
        first = torch.arange(num_images, device=best.device)[:, None] * num_locations
        class_logits, values, q = (
            None if x is None else take_places(x, location + first) for x in maps
        )
        row = location.div(width, rounding_mode="floor")
        cells = torch.stack((location - row * width, row), dim=-1)
        centers = cells * levels.strides[i] + levels.first[i]
        locations.append((values, centers, levels.strides[i].expand(*location.shape, 1)))

        scores = full_precision(quality.score_logits(class_logits, q))  # (N, k, C), logits
        # -inf in the padding. Elsewhere no class is better than the best.
        scores = scores.minimum(best[..., None]).flatten(1)
        scores, pair = scores.topk(_at_most(topk, scores.shape[1]), dim=1, sorted=False)  # (N, K)
        number = pair.div(num_classes, rounding_mode="floor")  # in [0, k), of the location
        pairs.append((scores.sigmoid(), pair - number * num_classes, number + num_before))
        num_before = num_before + best.shape[1]
    values, centers, strides = (torch.cat(part, dim=1) for part in zip(*locations))
    scores, classes, number = (torch.cat(part, dim=1) for part in zip(*pairs))
    sides = Sides(values, centers, strides, number)
    boxes = distance_to_bbox(centers, box.decode(values) * strides)
    boxes = boxes.gather(1, number[..., None].expand(-1, -1, 4))
    limits = image_sizes.flip(1).repeat(1, 2)[:, None].to(boxes)
    boxes = boxes.clamp(min=0).minimum(limits)
    # Boxes that lay in the padding have no area left.
    has_area = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    scores = torch.where(has_area & (scores > score_thresh), scores, 0)
    return Candidates(boxes, scores, classes), sides


def suppress(
    candidates: Candidates,
    image_sizes: list[tuple[int, int]],
    *,
    nms_thresh: float,
    max_detections: int,
    class_agnostic: bool = False,
    sides: Sides | None = None,
) -> list[Instances]:
    """
    NMS of each class, or of all together.

    Args:
        candidates: of N images.
        image_sizes: N times (height, width).
        nms_thresh: IoU above which the lower of two boxes of a class is dropped.
        max_detections: the best that are kept of each image.
        class_agnostic: also drop it if the two are of different classes.
        sides: of the candidates, for the fields ``box_values`` (D, 4 * V), ``box_centers`` (D, 2)
            and ``box_strides`` (D, 1) of D detections.

    Returns:
        list[Instances]: per image ``pred_boxes``, ``scores`` and ``pred_classes``, by descending
        score.
    """
    results = []
    for i, (size, boxes, scores, classes) in enumerate(zip(image_sizes, *candidates)):
        (found,) = scores.nonzero(as_tuple=True)
        boxes, scores, classes = boxes[found], scores[found], classes[found]
        groups = torch.zeros_like(classes) if class_agnostic else classes
        kept = batched_nms(boxes, scores, groups, nms_thresh)[:max_detections]
        result = Instances(
            size,
            pred_boxes=Boxes(boxes[kept]),
            scores=scores[kept],
            pred_classes=classes[kept],
        )
        if sides is not None:
            location = sides.location[i][found[kept]]
            result.box_values = sides.values[i][location]
            result.box_centers = sides.centers[i][location]
            result.box_strides = sides.strides[i][location]
        results.append(result)
    return results


def _at_most(limit: int, size: int | Tensor) -> int | Tensor:
    """The smaller of the two. Tracing has tensors for sizes, export has symbols."""
    if isinstance(size, Tensor):
        return size.clamp(max=limit)
    return torch.sym_min(limit, size)
