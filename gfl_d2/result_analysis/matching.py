"""Which detection found which object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask

from .result_set import ResultSet

__all__ = ["Matches", "Overlaps", "find_overlaps", "greedy_pairs", "match"]

# A detection that found nothing is ignored if this share of it lies in a crowd of its class.
_IN_CROWD = 0.5


class Overlaps(NamedTuple):
    """
    The d detections of an image, as a slice of all, its g objects and k crowds, as indices, and
    their boxes' IoU. That with a crowd is the share of the detection inside of it, as COCO has it.
    """

    detections: slice
    objects: np.ndarray  # (g,), int64
    iou: np.ndarray  # (d, g)
    is_same_class: np.ndarray  # (d, g), bool
    in_crowd: np.ndarray  # (d,), the largest share in a crowd of its class; 0 without


class Matches(NamedTuple):
    """An object is found by one detection at most: the best one of its class that overlaps it."""

    objects: np.ndarray  # (D,), int64, the index of the object that was found, or -1
    iou: np.ndarray  # (D,), with that object, or 0
    is_ignored: np.ndarray  # (D,), bool: neither right nor wrong, since it lies in a crowd

    @property
    def is_true(self) -> np.ndarray:
        return self.objects >= 0


def find_overlaps(results: ResultSet) -> list[Overlaps]:
    """Of each image."""
    starts = np.searchsorted(results.images, np.arange(len(results.image_ids) + 1)).tolist()
    order = np.argsort(results.gt_images, kind="stable")
    gt_starts = np.searchsorted(results.gt_images[order], np.arange(len(results.image_ids) + 1))
    overlaps = []
    for i, (start, stop) in enumerate(zip(starts, starts[1:])):
        rows, truth = slice(start, stop), order[gt_starts[i] : gt_starts[i + 1]]
        boxes, classes = results.boxes[rows], results.classes[rows]
        is_crowd = results.is_crowd[truth]
        iou = _iou(boxes, results.gt_boxes[truth], is_crowd)
        is_same = classes[:, None] == results.gt_classes[truth]
        in_crowd = (iou * is_same)[:, is_crowd].max(axis=1, initial=0)
        is_object = ~is_crowd
        overlaps.append(
            Overlaps(rows, truth[is_object], iou[:, is_object], is_same[:, is_object], in_crowd)
        )
    return overlaps


def match(overlaps: Sequence[Overlaps], num_detections: int, min_iou: float) -> Matches:
    """
    Match as COCO does: in order of their scores, each detection finds the object of its class that
    it overlaps most, of those that are not found yet.

    Args:
        min_iou: needed for that. At 0, any overlap is enough.
    """
    objects = np.full(num_detections, -1, dtype=np.int64)
    ious, in_crowd = np.zeros(num_detections), np.zeros(num_detections)
    for image in overlaps:
        in_crowd[image.detections] = image.in_crowd
        iou = image.iou * image.is_same_class
        rows, columns = greedy_pairs(iou, min_iou)
        objects[image.detections][rows] = image.objects[columns]
        ious[image.detections][rows] = iou[rows, columns]
    return Matches(objects, ious, (objects < 0) & (in_crowd >= (min_iou or _IN_CROWD)))


def greedy_pairs(iou: np.ndarray, min_iou: float) -> tuple[list[int], list[int]]:
    """
    Each row of (d, g), in turn, takes the column of its highest value that is left, if that is
    ``min_iou`` or more, and above 0.
    """
    left, rows, columns = iou.copy(), [], []
    if not iou.size:
        return rows, columns
    for row in np.nonzero((iou >= min_iou).any(axis=1) & (iou > 0).any(axis=1))[0].tolist():
        column = int(left[row].argmax())
        if left[row, column] >= min_iou and left[row, column] > 0:
            left[:, column] = 0
            rows.append(row)
            columns.append(column)
    return rows, columns


def _iou(boxes: np.ndarray, truth: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    if not len(boxes) or not len(truth):
        return np.zeros((len(boxes), len(truth)))
    return mask.iou(boxes, truth, is_crowd.astype(np.uint8).tolist())
