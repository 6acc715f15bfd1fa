"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .matching import Overlaps, greedy_pairs, match
from .result_set import ResultSet

__all__ = ["confusion_matrix"]


def confusion_matrix(
    results: ResultSet, overlaps: Sequence[Overlaps], score_thresh: float, min_iou: float
) -> np.ndarray:
    """
    Detections that score lower are left out. First each finds an object of its class, as in COCO's
    evaluation; then the others, in order of their scores, are paired with objects of any class that
    are left, by an IoU of ``min_iou`` or more. A detection in a crowd of its class that is paired
    with nothing does not count.

    Returns:
        ndarray: shape (C + 1, C + 1), int64. Rows: class of the object, the last for detections of
        nothing. Columns: class of the detection, the last for objects that were not found.
    """
    background = len(results.class_names)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    is_kept = results.scores >= score_thresh
    # Scores fall within an image: what is left out comes last, and takes no object from others.
    matches = match(overlaps, len(results.scores), min_iou)
    for image in overlaps:
        kept = is_kept[image.detections]
        classes = results.classes[image.detections][kept]
        gt_classes = results.gt_classes[image.objects]
        iou = image.iou[kept]
        rows, columns = greedy_pairs(iou * image.is_same_class[kept], min_iou)
        left = iou.copy()
        left[rows], left[:, columns] = 0, 0
        more_rows, more_columns = greedy_pairs(left, min_iou)
        rows, columns = rows + more_rows, columns + more_columns
        np.add.at(matrix, (gt_classes[columns], classes[rows]), 1)
        is_false = ~matches.is_ignored[image.detections][kept]
        is_false[rows] = False
        np.add.at(matrix, (background, classes[is_false]), 1)
        np.add.at(matrix, (np.delete(gt_classes, columns), background), 1)
    return matrix
