"""Scores of detections as the IoU that they came to on other images: ``TEST.CALIBRATION``."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor, nn

from ..calibration import Calibration
from ..config_checks import read_calibration

__all__ = ["ScoreCalibration", "build_calibration"]


class ScoreCalibration(nn.Module):
    """
    Maps the scores of detections by a curve of their class, as :meth:`Calibration.apply` does.

    Its buffers come from a file of their own, and are in no checkpoint. Shapes: C classes, K knots
    a curve.
    """

    def __init__(self, calibration: Calibration):
        super().__init__()
        scores, calibrated = [], []
        for name in calibration.thing_classes:
            x, y = [0.0, 1.0], [0.0, 1.0]  # the scores as they are
            if name in calibration.curves:
                curve = calibration.curves[name]
                x, y = curve.scores.tolist(), curve.calibrated.tolist()
            # A knot before all scores and one behind: so each score is between two.
            scores.append([-1.0, *x, 2.0])
            calibrated.append([y[0], *y, y[-1]])
        self.register_buffer("scores", _to_table(scores), persistent=False)  # (C, K)
        self.register_buffer("calibrated", _to_table(calibrated), persistent=False)  # (C, K)

    def forward(self, scores: Tensor, classes: Tensor) -> Tensor:
        """
        Args:
            scores: shape (...), in [0, 1].
            classes: likewise, int64 in [0, C).

        Returns:
            Tensor: likewise, the calibrated scores.
        """
        knots = self.scores[classes]  # (..., K)
        # The first knot that is not below the score. One of the two is strictly below.
        after = (knots < scores[..., None]).sum(dim=-1, keepdim=True)
        x0, x1 = (knots.gather(-1, i)[..., 0] for i in (after - 1, after))
        values = self.calibrated[classes]
        y0, y1 = (values.gather(-1, i)[..., 0] for i in (after - 1, after))
        weight = (scores - x0) / (x1 - x0)
        return torch.lerp(y0.to(weight), y1.to(weight), weight)

    def calibrate(self, detections: Instances) -> Instances:
        """
        The same detections, by descending calibrated score, and those of equal ones in the order in
        which they were. ``raw_scores`` are the scores before.
        """
        raw = detections.scores
        detections.scores, detections.raw_scores = self(raw, detections.pred_classes), raw
        return detections[detections.scores.argsort(descending=True, stable=True)]


def build_calibration(cfg: CfgNode) -> ScoreCalibration | None:
    """What ``TEST.CALIBRATION`` asks for, if anything."""
    calibration = read_calibration(cfg)
    return None if calibration is None else ScoreCalibration(calibration)


def _to_table(rows: list[list[float]]) -> Tensor:
    """Rows that repeat their last value until all have the same length."""
    length = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (length - len(row)) for row in rows])
