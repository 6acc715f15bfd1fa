"""COCO's average precision per class and size."""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

import numpy as np

from ..coco_evaluation import evaluate_boxes
from .result_set import ResultSet

__all__ = ["AveragePrecision", "average_precision", "nan_mean"]


class AveragePrecision(NamedTuple):
    """In percent, NaN for what is not annotated."""

    classes: dict[str, np.ndarray]  # "AP", "AP50", "AP75", "APs", "APm", "APl" -> (C,)
    overall: dict[str, float]  # the means over classes
    recall: np.ndarray  # (101,), from 0 to 1
    precision: np.ndarray  # (C, 101), at IoU 0.5, from 0 to 1


def average_precision(results: ResultSet, max_dets: int) -> AveragePrecision:
    """``max_dets``: how many detections of a class and an image count, the best ones."""
    data, detections = results.to_coco()
    classes = {i: i for i in range(len(results.class_names))}
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = evaluate_boxes(data, detections, classes, [1, 10, max_dets])
    # Axes: IoU, recall, class, area. What is not annotated is -1 at all of IoU and recall.
    precision = np.where(coco_eval.eval["precision"] < 0, np.nan, coco_eval.eval["precision"])
    precision = precision[..., -1]
    thresholds = np.round(coco_eval.params.iouThrs, 2).tolist()
    parts = {"AP": (slice(None), 0)}
    parts |= {f"AP{round(100 * t)}": ([thresholds.index(t)], 0) for t in (0.5, 0.75)}
    parts |= {
        f"AP{size[0]}": (slice(None), i) for i, size in enumerate(("small", "medium", "large"), 1)
    }
    per_class = {
        name: 100 * precision[ious, :, :, area].mean(axis=(0, 1))
        for name, (ious, area) in parts.items()
    }
    overall = {name: nan_mean(values) for name, values in per_class.items()}
    curves = precision[thresholds.index(0.5), :, :, 0].T
    return AveragePrecision(per_class, overall, np.array(coco_eval.params.recThrs), curves)


def nan_mean(values: np.ndarray) -> float:
    """The mean of what is not NaN; NaN, without a warning, where all is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
