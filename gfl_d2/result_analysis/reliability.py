"""Whether scores are the IoU that detections have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .average_precision import nan_mean
from .matching import Matches
from .result_set import ResultSet

__all__ = ["NUM_BINS", "Reliability", "reliability"]

NUM_BINS = 25  # of equal width; their upper ends belong to them


class Reliability(NamedTuple):
    """
    Localization-aware calibration errors without an IoU threshold (Kuzucu et al., ECCV 2024, arXiv
    2405.20459), in percent. NaN for a class without a threshold. The bins hold all classes.
    """

    laece: np.ndarray  # (C,), LaECE_0: in each bin of scores, mean IoU against mean score
    laace: np.ndarray  # (C,), LaACE_0: of each detection, IoU against score
    mean_laece: float  # over classes
    mean_laace: float
    counts: np.ndarray  # (NUM_BINS,), detections
    mean_scores: np.ndarray  # (NUM_BINS,), NaN in an empty bin
    mean_ious: np.ndarray  # (NUM_BINS,), likewise


def reliability(results: ResultSet, matches: Matches, thresholds: Sequence[float]) -> Reliability:
    """
    Args:
        matches: those at an IoU of 0. A detection that has not found an object has an IoU of 0.
        thresholds: (C,), of the score. Detections below that of their class do not count; none of
            a class where it is NaN.
    """
    is_used = (results.scores >= np.asarray(thresholds)[results.classes]) & ~matches.is_ignored
    scores, ious, classes = results.scores[is_used], matches.iou[is_used], results.classes[is_used]
    laece, laace = np.full((2, len(thresholds)), np.nan)
    for index in np.unique(classes):
        one, other = scores[classes == index], ious[classes == index]
        counts, mean_scores, mean_ious = _bins(one, other)
        is_full = counts > 0
        gaps = np.abs(mean_scores - mean_ious)[is_full]
        laece[index] = 100 * np.average(gaps, weights=counts[is_full])
        laace[index] = 100 * np.abs(one - other).mean()
    means = nan_mean(laece), nan_mean(laace)
    return Reliability(laece, laace, *means, *_bins(scores, ious))


def _bins(scores: np.ndarray, ious: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    bins = (np.ceil(scores * NUM_BINS) - 1).clip(0, NUM_BINS - 1).astype(np.int64)
    counts, sums, iou_sums = (
        np.bincount(bins, weights=weights, minlength=NUM_BINS) for weights in (None, scores, ious)
    )
    with np.errstate(invalid="ignore"):
        return counts, sums / counts, iou_sums / counts
