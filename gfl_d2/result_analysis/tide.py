"""
Kinds of errors, and what each costs: TIDE (Bolya et al., ECCV 2020, arXiv 2008.08115).

As its authors' package tidecv computes it. What differs: a class without ground truth has no AP and
does not count in the mean, as in COCO's evaluation, where tidecv counts it as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .matching import Matches, Overlaps
from .result_set import ResultSet

__all__ = ["KINDS", "MIN_IOU", "Tide", "find_errors", "tide"]

KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
_CLS, _LOC, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED = range(len(KINDS))

# IoU from which on a detection is right, and below which it shows background.
MIN_IOU, _BACKGROUND_IOU = 0.5, 0.1


class Errors(NamedTuple):
    kinds: np.ndarray  # (D,), int64, an index of KINDS, or -1 for a right detection
    # (D,), the object that a detection would have found with the right class or place: the best
    # detection of those of an object that no other has found. Else -1.
    could_find: np.ndarray
    is_missed: np.ndarray  # (M,), bool: not found, and no detection could find it by that


class Tide(NamedTuple):
    """
    AP is at IoU 0.5 and in percent. The costs are how much it would rise if all errors of one kind
    were mended: they do not sum up to what is missing to 100.
    """

    ap: float
    counts: dict[str, int]  # by KINDS; detections in crowds are not counted
    costs: dict[str, float]  # by KINDS
    num_false: int  # all false detections
    cost_of_false: float  # if each scored lower than all right ones
    num_not_found: int  # all objects that were not found
    cost_of_not_found: float  # if they did not exist


def tide(results: ResultSet, overlaps: Sequence[Overlaps], matches: Matches) -> Tide:
    """``matches`` are those at an IoU of MIN_IOU."""
    errors = find_errors(results, overlaps, matches)
    is_true, classes = matches.is_true, results.classes
    is_counted = ~matches.is_ignored
    is_object = ~results.is_crowd
    number = np.bincount(results.gt_classes[is_object], minlength=len(results.class_names))
    is_found = np.zeros(len(results.gt_classes), dtype=bool)
    is_found[matches.objects[is_true]] = True

    def without(is_left_out: np.ndarray) -> np.ndarray:
        lost = results.gt_classes[is_object & is_left_out]
        return number - np.bincount(lost, minlength=len(number))

    def mean_ap(scores, classes, is_true, is_taken, number_left) -> float:
        taken = [x[is_taken] for x in (scores, classes, is_true)]
        return _mean_ap(*taken, number_left, number > 0)

    everything = (results.scores, classes, is_true, is_counted)
    ap = mean_ap(*everything, number)
    # In the order in which tidecv sorts equal scores: first what was wrong.
    order = np.argsort(is_true, kind="stable")
    costs = {}
    for index, kind in enumerate(KINDS):
        is_kind = errors.kinds == index
        is_mended = is_kind & (errors.could_find >= 0)
        new_classes = np.where(is_mended, results.gt_classes[errors.could_find], classes)
        is_taken = (is_counted & ~is_kind) | is_mended
        left = without(errors.is_missed) if index == _MISSED else number
        columns = (results.scores, new_classes, is_true | is_mended, is_taken)
        costs[kind] = mean_ap(*(column[order] for column in columns), left) - ap
    counts = np.bincount(errors.kinds[is_counted & ~is_true], minlength=len(KINDS)).tolist()
    counts[_MISSED] = int(errors.is_missed.sum())
    right_first = mean_ap(is_true.astype(np.float64), *everything[1:], number)
    return Tide(
        ap=ap,
        counts=dict(zip(KINDS, counts)),
        costs={kind: max(cost, 0.0) for kind, cost in costs.items()},
        num_false=int((is_counted & ~is_true).sum()),
        cost_of_false=right_first - ap,
        num_not_found=int((is_object & ~is_found).sum()),
        cost_of_not_found=mean_ap(*(c[order] for c in everything), without(~is_found)) - ap,
    )


def find_errors(results: ResultSet, overlaps: Sequence[Overlaps], matches: Matches) -> Errors:
    """
    The kind of each detection that has not found an object, by its largest IoU with objects. The
    first that holds: with its class from 0.1 to 0.5, localization; with another class at least 0.5,
    classification; with its class at least 0.5, duplicate; with any at most 0.1, background; else
    both.
    """
    kinds = np.full(len(results.scores), -1)
    could_find = np.full(len(results.scores), -1)
    is_found = np.zeros(len(results.gt_classes), dtype=bool)
    is_found[matches.objects[matches.is_true]] = True
    is_missed = ~is_found & ~results.is_crowd
    for image in overlaps:
        rows = np.arange(image.detections.start, image.detections.stop)
        is_wrong = ~matches.is_true[rows]
        rows, iou = rows[is_wrong], image.iou[is_wrong]
        if not iou.size:
            kinds[rows] = _BACKGROUND
            continue
        is_same = image.is_same_class[is_wrong]
        same, other = iou * is_same, iou * ~is_same
        highest = same.max(axis=1)
        conditions = [
            (highest >= _BACKGROUND_IOU) & (highest <= MIN_IOU),
            other.max(axis=1) >= MIN_IOU,
            (same * is_found[image.objects]).max(axis=1) >= MIN_IOU,
            iou.max(axis=1) <= _BACKGROUND_IOU,
        ]
        of_image = np.select(conditions, [_LOC, _CLS, _DUPLICATE, _BACKGROUND], _BOTH)
        kinds[rows] = of_image
        nearest = np.where(of_image == _LOC, same.argmax(axis=1), other.argmax(axis=1))
        nearest = image.objects[nearest]
        can_be_mended = np.isin(of_image, (_LOC, _CLS)) & ~is_found[nearest]
        # In order of scores: the first detection of an object is the best.
        found, first = np.unique(nearest[can_be_mended], return_index=True)
        could_find[rows[can_be_mended][first]] = found
        is_missed[found] = False
    return Errors(kinds, could_find, is_missed)


def _mean_ap(
    scores: np.ndarray,
    classes: np.ndarray,
    is_true: np.ndarray,
    number: np.ndarray,
    is_annotated: np.ndarray,
) -> float:
    """
    The mean of the APs of annotated classes, (C,), in percent. ``number``, (C,), has how many
    objects are left of each. A class of which nothing is left, objects nor detections, has none.
    """
    order = np.argsort(-scores, kind="stable")
    classes, is_true = classes[order], is_true[order]
    by_class = np.argsort(classes, kind="stable")
    starts = np.searchsorted(classes[by_class], np.arange(len(number) + 1))
    aps = []
    for index in np.nonzero(is_annotated)[0].tolist():
        rows = by_class[starts[index] : starts[index + 1]]
        if len(rows) or number[index]:
            aps.append(_ap(is_true[rows], int(number[index])))
    return float(np.mean(aps)) if aps else 0.0


def _ap(is_true: np.ndarray, number: int) -> float:
    """Of one class, in percent: the mean of the precision at 101 values of the recall."""
    if not number or not len(is_true):
        return 0.0
    true = np.cumsum(is_true)
    precision = true / np.arange(1, len(is_true) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(true / number, np.arange(101) / 100)
    return 100 * float(np.append(precision, 0)[places].mean())
