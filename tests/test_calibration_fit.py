"""Curves from scores to IoUs, fitted to detections."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from gfl_d2.errors import InputError
from gfl_d2.result_analysis import fit_calibration
from result_sets import CAT, DOG, make_results, plain_matches, random_results, six_errors


def test_by_hand():
    """Ten cats with IoUs that rise but for one pair, which gets its mean."""
    pytest.importorskip("sklearn")
    ious = [0.1, 0.2, 0.3, 0.5, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0]
    truth = [(i, CAT, (0, 0, 100, 100)) for i in range(10)]
    boxes = [(0, 0, round(100 * iou), 100) for iou in ious]
    detections = [(i, CAT, box, (i + 1) / 20) for i, box in enumerate(boxes)]
    detections += [(0, DOG, (0, 0, 9, 9), 0.5)] * 20
    results = make_results(truth, detections, num_images=10)
    calibration = fit_calibration(results, 100, "pets")
    assert list(calibration.curves) == ["cat"]  # no dog is found
    scores = np.arange(1, 11) / 20
    fitted = calibration.apply(scores, np.zeros(10, dtype=int))
    np.testing.assert_allclose(fitted, [0.1, 0.2, 0.3, 0.45, 0.45, 0.6, 0.7, 0.8, 0.9, 1.0])


def test_the_fit_is_monotone_and_right_in_the_mean():
    pytest.importorskip("sklearn")
    results = random_results(0)
    calibration = fit_calibration(results, 100, "pets")
    for animal, name in enumerate(results.class_names):
        assert (np.diff(calibration.curves[name].calibrated) >= 0).all()
        rows = plain_matches(results, animal, 0)
        scores, ious = np.array([s for s, _ in rows]), np.array([i or 0 for _, i in rows])
        fitted = calibration.apply(scores, np.full(len(scores), animal))
        assert fitted.mean() == pytest.approx(ious.mean())
        # No other monotone function is nearer to the IoUs; the score itself is one.
        assert ((fitted - ious) ** 2).sum() < ((scores - ious) ** 2).sum()


def test_refusals():
    pytest.importorskip("sklearn")
    with pytest.raises(InputError, match="No class of cat, dog has 10 detections that found"):
        fit_calibration(six_errors(), 100, "pets")
    results = six_errors()
    with pytest.raises(InputError, match="scores from 0 to 1"):
        fit_calibration(results.replace_scores(results.scores * 2), 100, "pets")


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        fit_calibration(six_errors(), 100, "pets")
