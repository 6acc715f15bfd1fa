"""The best score threshold of each class."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .matching import Matches
from .result_set import ResultSet

__all__ = ["Threshold", "best_thresholds"]


class Threshold(NamedTuple):
    """
    What detections of one class that score ``score`` or more are worth. Without any, ``score`` and
    ``mean_iou`` are NaN, and nothing is found.
    """

    score: float
    f1: float
    precision: float
    recall: float
    # Localization recall precision error (Oksuz et al., TPAMI 2021, arXiv 2011.10772), from 0 to 1:
    # (sum over found objects of (1 - IoU) / (1 - 0.5) + false detections + objects not found) /
    # (found objects + false detections + objects not found). Lower is better.
    lrp: float
    mean_iou: float  # of found objects


_NOTHING = Threshold(float("nan"), 0.0, 0.0, 0.0, 1.0, float("nan"))


def best_thresholds(
    results: ResultSet, matches: Matches, min_iou: float
) -> list[tuple[Threshold, Threshold] | None]:
    """
    Of each class, that of the highest F1, and that of the lowest LRP error, among all its scores;
    of equal ones the highest. None where nothing is annotated. ``matches`` are at ``min_iou``.
    """
    objects = results.gt_classes[~results.is_crowd]
    number = np.bincount(objects, minlength=len(results.class_names)).tolist()
    best = []
    for index, count in enumerate(number):
        is_class = (results.classes == index) & ~matches.is_ignored
        columns = (results.scores, matches.is_true, matches.iou)
        best.append(_best(*(c[is_class] for c in columns), count, min_iou) if count else None)
    return best


def _best(
    scores: np.ndarray, is_true: np.ndarray, iou: np.ndarray, count: int, min_iou: float
) -> tuple[Threshold, Threshold]:
    order = np.argsort(-scores, kind="stable")
    scores, is_true, iou = scores[order], is_true[order], iou[order]
    # Detections of equal scores pass a threshold together.
    ends = np.nonzero(np.diff(scores, append=-np.inf))[0]
    found, kept = np.cumsum(is_true)[ends], ends + 1
    losses = np.cumsum(is_true * (1 - iou))[ends]
    total = kept + count - found  # found objects, false detections and objects not found
    lrp = (losses / (1 - min_iou) + total - found) / total
    f1 = 2 * found / (kept + count)

    def at(i: int) -> Threshold:
        mean_iou = 1 - float(losses[i] / found[i])
        shares = (f1[i], found[i] / kept[i], found[i] / count, lrp[i])
        return Threshold(float(scores[ends[i]]), *map(float, shares), mean_iou)

    if not is_true.any():
        return _NOTHING, _NOTHING
    by_f1, by_lrp = at(int(f1.argmax())), at(int(lrp.argmin()))
    # Without detections the error is 1.
    return by_f1, by_lrp if by_lrp.lrp < 1 else _NOTHING
