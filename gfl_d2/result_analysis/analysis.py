"""All measures of one file of detections."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .average_precision import AveragePrecision, average_precision, nan_mean
from .confusion import confusion_matrix
from .images import ImageErrors, rank_images
from .matching import find_overlaps, match
from .reliability import Reliability, reliability
from .result_set import ResultSet
from .thresholds import Threshold, best_thresholds
from .tide import MIN_IOU, Tide, tide

__all__ = ["ResultAnalysis", "analyze_results"]


@dataclasses.dataclass(frozen=True)
class ResultAnalysis:
    """What :func:`analyze_results` finds. C classes; matches are at an IoU of 0.5."""

    results: ResultSet
    precision: AveragePrecision
    thresholds: list[tuple[Threshold, Threshold] | None]  # (C,), by F1 and by LRP error
    tide: Tide
    reliability: Reliability
    confusion: np.ndarray  # (C + 1, C + 1), see confusion_matrix
    score_thresh: float  # of the confusion matrix
    tp_iou_thresh: float
    images: list[ImageErrors]  # from the worst to the best

    @property
    def lrp_thresholds(self) -> list[float]:
        """(C,), of the score, of the lowest LRP error; NaN for a class without."""
        return [best[1].score if best else math.nan for best in self.thresholds]

    def overall(self) -> dict[str, float]:
        """Means over classes; errors and AP in percent."""
        best = [pair for pair in self.thresholds if pair]
        by_f1, by_lrp = zip(*best)
        return {
            **self.precision.overall,
            "oLRP": 100 * float(np.mean([x.lrp for x in by_lrp])),
            "LaECE0": self.reliability.mean_laece,
            "LaACE0": self.reliability.mean_laace,
            "threshold_lrp": nan_mean(np.array([x.score for x in by_lrp])),
            "threshold_f1": nan_mean(np.array([x.score for x in by_f1])),
        }

    def classes(self) -> list[dict[str, Any]]:
        """Of each class that is annotated or detected; errors and AP in percent."""
        results, rows = self.results, []
        objects = np.bincount(results.gt_classes[~results.is_crowd], minlength=len(self.thresholds))
        detections = np.bincount(results.classes, minlength=len(self.thresholds))
        for i in np.nonzero(objects + detections)[0].tolist():
            row: dict[str, Any] = {
                "class": results.class_names[i],
                "objects": int(objects[i]),
                "detections": int(detections[i]),
            }
            row |= {name: float(values[i]) for name, values in self.precision.classes.items()}
            if self.thresholds[i]:
                f1, lrp = self.thresholds[i]
                row |= {"threshold_f1": f1.score, "F1": 100 * f1.f1}
                row |= {"precision": 100 * f1.precision, "recall": 100 * f1.recall}
                row |= {"threshold_lrp": lrp.score, "oLRP": 100 * lrp.lrp}
                has_any = not math.isnan(lrp.score)
                row["oLRP_loc"] = 100 * (1 - lrp.mean_iou)
                row["oLRP_FP"] = 100 * (1 - lrp.precision) if has_any else math.nan
                row["oLRP_FN"] = 100 * (1 - lrp.recall)
                row["LaECE0"] = float(self.reliability.laece[i])
                row["LaACE0"] = float(self.reliability.laace[i])
            rows.append(row)
        return rows

    def confused(self) -> list[dict[str, Any]]:
        """Pairs of classes that are taken for each other, the most frequent first."""
        matrix = self.confusion[:-1, :-1].copy()
        np.fill_diagonal(matrix, 0)
        names = self.results.class_names
        order = np.argsort(-matrix, axis=None, kind="stable")[: np.count_nonzero(matrix)]
        return [
            {"object": names[i], "detected_as": names[j], "number": int(matrix[i, j])}
            for i, j in zip(*np.unravel_index(order, matrix.shape))
        ]

    def errors(self) -> list[dict[str, Any]]:
        """By kind: how many, and how much AP at IoU 0.5 would rise without them."""
        found = self.tide
        rows = [(kind, found.counts[kind], found.costs[kind]) for kind in found.costs]
        rows.append(("all false detections", found.num_false, found.cost_of_false))
        rows.append(("all objects not found", found.num_not_found, found.cost_of_not_found))
        return [dict(zip(("error", "number", "cost"), row)) for row in rows]


def analyze_results(
    results: ResultSet, max_dets: int, score_thresh: float = 0.3, tp_iou_thresh: float = 0.5
) -> ResultAnalysis:
    """
    Args:
        max_dets: detections of an image that count, the best ones: of each class in AP, as COCO
            has it, of all classes in all else.
        score_thresh, tp_iou_thresh: of the confusion matrix.
    """
    precision = average_precision(results, max_dets)
    results = results.limit(max_dets)
    overlaps, count = find_overlaps(results), len(results.scores)
    matches = match(overlaps, count, MIN_IOU)
    thresholds = best_thresholds(results, matches, MIN_IOU)
    by_lrp = [best[1].score if best else math.nan for best in thresholds]
    return ResultAnalysis(
        results=results,
        precision=precision,
        thresholds=thresholds,
        tide=tide(results, overlaps, matches),
        reliability=reliability(results, match(overlaps, count, 0), by_lrp),
        confusion=confusion_matrix(results, overlaps, score_thresh, tp_iou_thresh),
        score_thresh=score_thresh,
        tp_iou_thresh=tp_iou_thresh,
        images=rank_images(results, matches, MIN_IOU, by_lrp),
    )
