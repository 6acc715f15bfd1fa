"""Which anchors the boxes of a dataset get at the input size, which get none, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch import Tensor
from tqdm import tqdm

from ..modeling import ATSSAssigner, GroundTruth, LocationGrid, bbox_to_distance
from ..modeling.head import head_input_shapes
from .boxes import BoxTable, InputSize, group_rows

__all__ = ["REASONS", "Assignment", "assign_boxes"]

# Why a box has no anchor: Assignment.reason counts from 1, and is 0 where it has one.
REASONS = ("no candidate's centre inside", "IoUs below the threshold", "lost to other boxes")
_BATCH = 16
# Targets are counted in whole bins, up to this many.
_MAX_BINS = 2048


@dataclass(frozen=True)
class Assignment:
    """What boxes get. Shapes: K boxes, each at each input size; L levels; B bins."""

    size: InputSize
    level_names: list[str]  # L
    strides: list[int]  # L
    classes: np.ndarray  # (K,), int64
    boxes: np.ndarray  # (K, 4), XYXY at the input size, in pixels
    positives: np.ndarray  # (K, L), int64, anchors of each level
    reason: np.ndarray  # (K,), int64, of REASONS
    # Sides of positives' targets by their length: [level, i] counts those in (i - 1, i] bins.
    targets: np.ndarray  # (L, B), int64
    longest_target: np.ndarray  # (L,), in bins

    @property
    def share_without(self) -> float:
        """The share of boxes that have no anchor."""
        return float((self.reason > 0).mean())

    def main_level(self) -> np.ndarray:
        """(K,): the level that has most anchors of a box, -1 for a box without any."""
        return np.where(self.reason == 0, self.positives.argmax(axis=1), -1)


def assign_boxes(
    cfg: CfgNode, table: BoxTable, images: np.ndarray, is_train: bool = True, label: str = ""
) -> Assignment:
    """
    Assign anchors to the boxes of some images, as training with this config does, at its input
    sizes. Boxes without area there, and crowds, which do not take part in training, must not be in
    the table. "dynamic_atss" and "sapd" need a trained model: what is found is of "atss".

    Args:
        images: rows of the table's images; each has a box.
        is_train: at the input sizes of training, else of the test.
        label: of the progress bar; none without.

    Raises:
        InputError: the backbone does not fit ``MODEL.GFL.IN_FEATURES``.
    """
    size = InputSize.from_config(cfg, is_train)
    with torch.device("meta"):  # only its shapes are needed
        backbone = build_backbone(cfg)
    strides = [shape.stride for shape in head_input_shapes(cfg, backbone)]
    match = functools.partial(
        _match,
        LocationGrid.from_config(cfg, strides),
        ATSSAssigner.from_config(cfg),
        max(backbone.size_divisibility, 1),
    )
    rows_of = dict(zip(np.unique(table.image).tolist(), group_rows(table.image)))
    parts = []
    total = len(images) * len(size.short)
    with tqdm(total=total, desc=label, unit="image", disable=not label, leave=False) as progress:
        for short in size.short:
            shapes = size.shapes(table.sizes, short)
            boxes = table.boxes_at(shapes)
            # Images of like shape together: a batch has the shape of its largest.
            ordered = images[np.lexsort(shapes[images].T)]
            for start in range(0, len(ordered), _BATCH):
                batch = ordered[start : start + _BATCH]
                rows = [rows_of[i] for i in batch.tolist()]
                image = np.repeat(np.arange(len(batch)), [len(x) for x in rows])
                rows = np.concatenate(rows)
                found = _assign_batch(
                    match, boxes[rows], image, shapes[batch], cfg.MODEL.GFL.BIN_WIDTH
                )
                parts.append((table.classes[rows], boxes[rows], *found))
                progress.update(len(batch))
    *by_box, targets, longest = zip(*parts)
    levels = (list(cfg.MODEL.GFL.IN_FEATURES), strides)
    by_box = map(np.concatenate, by_box)
    return Assignment(size, *levels, *by_box, sum(targets), np.max(longest, axis=0))


def _assign_batch(
    match: Callable, boxes: np.ndarray, image: np.ndarray, shapes: np.ndarray, bin_width: float
) -> tuple[np.ndarray, ...]:
    """
    Assign anchors to boxes, (K, 4), that lie in these of the images of one batch, of shapes (N, 2).

    Returns:
        The fields of :class:`Assignment` from ``positives`` to ``longest_target``.
    """
    gt = GroundTruth(
        torch.as_tensor(boxes, dtype=torch.float32),
        torch.zeros(len(boxes), dtype=torch.int64),
        torch.as_tensor(image),
    )
    sizes = torch.as_tensor(shapes)
    is_positive, distances = match(gt, sizes)
    positives = is_positive.sum(dim=-1)
    reason = torch.zeros(len(boxes), dtype=torch.int64)
    lost = (positives.sum(dim=-1) == 0).nonzero().flatten()
    for some in lost.split(_BATCH) if len(lost) else ():
        # Each alone in an image of its own: would it get an anchor?
        alone = GroundTruth(gt.boxes[some], gt.classes[some], torch.arange(len(some)))
        would_be_positive, alone_distances = match(alone, sizes[gt.image[some]])
        has_centre = (alone_distances.amin(dim=-1) > 0).flatten(1).any(dim=1)
        has_anchor = would_be_positive.flatten(1).any(dim=1)
        reason[some] = torch.where(has_anchor, 3, torch.where(has_centre, 2, 1))

    bins = distances / bin_width
    longest = torch.where(is_positive[..., None], bins, 0).amax(dim=(0, 2, 3))
    whole = bins[is_positive].ceil().long().clamp(max=_MAX_BINS - 1)
    index = is_positive.nonzero()[:, 1:2] * _MAX_BINS + whole
    targets = index.flatten().bincount(minlength=len(longest) * _MAX_BINS).view(-1, _MAX_BINS)
    return tuple(x.numpy() for x in (positives, reason, targets, longest))


def _match(
    grid: LocationGrid, assigner: ATSSAssigner, divisibility: int, gt: GroundTruth, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Returns:
        Tensor: shape (M, L, k), bool, which candidates are positive.
        Tensor: shape (M, L, k, 4), in strides, from candidates to the sides of their box. Where a
        level has fewer than k cells, all are candidates, and the first is there again.
    """
    height, width = (-(-sizes.amax(dim=0) // divisibility) * divisibility).tolist()
    shapes = [(-(-height // stride), -(-width // stride)) for stride in grid.strides.tolist()]
    levels = grid(shapes, sizes, divisibility)
    matches = assigner(levels, gt)
    centers = levels.centers(matches.row, matches.column)
    distances = bbox_to_distance(centers, gt.boxes[:, None, None])
    return matches.is_positive, distances / levels.strides[:, None, None]
