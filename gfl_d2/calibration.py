"""Files of a calibration: per class, a curve from the score of a detection to its expected IoU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, name_some
from .files import atomic_write

__all__ = ["Calibration", "Curve", "load_calibration", "save_calibration"]

_FORMAT, _KIND = 1, "isotonic"
_KEYS = {"format", "kind", "thing_classes", "fitted_on", "curves"}


@dataclasses.dataclass(frozen=True)
class Curve:
    """K knots, K at least 1. Linear between them; beyond the first and the last it is level."""

    scores: np.ndarray  # (K,), float64, in [0, 1], increasing
    calibrated: np.ndarray  # (K,), float64, in [0, 1], not decreasing


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A class without a curve, as one with too few detections to fit one, keeps its scores."""

    thing_classes: list[str]  # of the model, distinct
    fitted_on: str  # name of a dataset
    curves: dict[str, Curve]  # by class name

    def check_classes(self, class_names: Sequence[str], whose: str) -> None:
        """
        Raises:
            InputError: it was fitted with other classes, or others in another order, than those of
                ``whose``, a model or a dataset.
        """
        if list(class_names) != self.thing_classes:
            raise InputError(
                f"The calibration was fitted on '{self.fitted_on}' with the classes "
                f"{name_some(self.thing_classes)}, and {whose} has {name_some(class_names)}: "
                "fit one by tools/analyze_results.py --fit"
            )

    def apply(self, scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """
        Map scores, (D,), of detections of these ``classes``, (D,), indices of ``thing_classes``.

        Returns:
            ndarray: (D,), float64.
        """
        calibrated = np.array(scores, dtype=np.float64)
        for index, name in enumerate(self.thing_classes):
            if name in self.curves:
                curve, is_class = self.curves[name], classes == index
                values = np.interp(calibrated[is_class], curve.scores, curve.calibrated)
                calibrated[is_class] = values
        return calibrated


def save_calibration(path: str | Path, calibration: Calibration) -> None:
    """
    Write a file that :func:`load_calibration` reads, with the same numbers.

    Raises:
        InputError: it cannot be written.
    """
    curves = {
        name: {"scores": curve.scores.tolist(), "calibrated": curve.calibrated.tolist()}
        for name, curve in calibration.curves.items()
    }
    content = {
        "format": _FORMAT,
        "kind": _KIND,
        "thing_classes": calibration.thing_classes,
        "fitted_on": calibration.fitted_on,
        "curves": curves,
    }
    try:
        with atomic_write(path, "w") as file:
            json.dump(content, file, indent=1, allow_nan=False)
    except OSError as error:
        raise InputError(f"Calibration '{path}' cannot be written: {error}") from None


def load_calibration(path: str | Path) -> Calibration:
    """
    Read a calibration.

    Raises:
        InputError: the file cannot be read, or is no calibration of this format.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"Calibration '{path}' cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise InputError(f"'{path}' is no calibration: that has the keys {sorted(_KEYS)}")
    if (content["format"], content["kind"]) != (_FORMAT, _KIND):
        found = f"{str(content['format'])[:40]} and {str(content['kind'])[:40]}"
        raise InputError(
            f"Calibration '{path}' has the format and kind {found}; what is known is {_FORMAT} "
            f"and {_KIND}: fit one by tools/analyze_results.py --fit"
        )
    names, curves = content["thing_classes"], content["curves"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"Calibration '{path}': thing_classes must be a list of texts")
    if len(set(names)) < len(names):
        raise InputError(f"Calibration '{path}': thing_classes names a class twice")
    if not isinstance(curves, dict) or not isinstance(content["fitted_on"], str):
        raise InputError(f"Calibration '{path}': curves must be an object, fitted_on a text")
    unknown = [name for name in curves if name not in names]
    if unknown:
        raise InputError(
            f"Calibration '{path}' has a curve of {name_some(unknown)}, not in its thing_classes"
        )
    read = {name: _read_curve(path, name, curve) for name, curve in curves.items()}
    return Calibration(names, content["fitted_on"], read)


def _read_curve(path: str | Path, name: str, curve: Any) -> Curve:
    lists = [curve.get(key) for key in ("scores", "calibrated")] if isinstance(curve, dict) else []
    is_sound = len(lists) == 2 and all(_are_shares(values) for values in lists)
    if is_sound:
        scores, calibrated = (np.array(values, dtype=np.float64) for values in lists)
        is_sound = len(scores) == len(calibrated)
        is_sound &= bool((np.diff(scores) > 0).all() and (np.diff(calibrated) >= 0).all())
    if not is_sound:
        raise InputError(
            f"Calibration '{path}': the curve of {name_some([name])} must have as many scores, "
            "increasing, as calibrated ones, not decreasing, all from 0 to 1"
        )
    return Curve(scores, calibrated)


def _are_shares(values: Any) -> bool:
    """A list, not empty, of numbers from 0 to 1; NaN is none."""
    if not isinstance(values, list) or not values:
        return False
    return all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
