"""Fits what the scores of a class mean: the IoU to be expected of its detections."""

from __future__ import annotations

import importlib.util

import numpy as np

from ..calibration import Calibration, Curve
from ..errors import InputError, name_some
from .matching import find_overlaps, match
from .result_set import ResultSet

__all__ = ["MIN_FOUND", "check_fitting", "fit_calibration"]

# A class with fewer detections that found an object has no curve. Where all are false by chance,
# it would give a score of 0 to every detection.
MIN_FOUND = 10


def check_fitting() -> None:
    """Raise InputError where scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise InputError("--fit needs scikit-learn: pip install scikit-learn")


def fit_calibration(results: ResultSet, max_dets: int, fitted_on: str) -> Calibration:
    """
    Isotonic regression, per class, from the score to the IoU with the object that a detection has
    found, however little it overlaps it; 0 without one. Detections in crowds are left out.

    Args:
        max_dets: detections of an image that count, the best ones.
        fitted_on: names the data.

    Raises:
        InputError: scikit-learn is not installed, scores are not in [0, 1], or no class has
            MIN_FOUND detections that found an object.
    """
    check_fitting()
    from sklearn.isotonic import IsotonicRegression

    results = results.limit(max_dets)
    if results.scores.min() < 0 or results.scores.max() > 1:
        raise InputError("A calibration is fitted to scores from 0 to 1, and there are others")
    matches = match(find_overlaps(results), len(results.scores), 0)
    curves = {}
    for index, name in enumerate(results.class_names):
        is_class = (results.classes == index) & ~matches.is_ignored
        if (matches.is_true & is_class).sum() >= MIN_FOUND:
            model = IsotonicRegression(y_min=0, y_max=1)
            model.fit(results.scores[is_class], matches.iou[is_class])
            # Rounded sums may leave the range by a bit.
            curves[name] = Curve(
                model.X_thresholds_, np.maximum.accumulate(model.y_thresholds_.clip(0, 1))
            )
    if not curves:
        raise InputError(
            f"No class of {name_some(results.class_names)} has {MIN_FOUND} detections that found "
            "an object: too few to fit a calibration"
        )
    return Calibration(list(results.class_names), fitted_on, curves)
