"""What the spread of a side says of its error: correlation, calibration and ranking."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from ..errors import InputError
from .detection import match_ground_truth

__all__ = ["SideErrors", "collect_errors", "plot_errors", "rank_correlation", "summarize"]

_BINS = 10


@dataclass(frozen=True)
class SideErrors:
    """Of D detections, M of them matched. Lengths are in pixels."""

    score: np.ndarray  # (D,)
    iou: np.ndarray  # (D,), with the nearest box of the class, 0 without any
    relative_std: np.ndarray  # (D,), mean over the sides of std / width or height
    entropy: np.ndarray  # (D,), mean over the sides
    is_matched: np.ndarray  # (D,), bool
    std: np.ndarray  # (M, 4)
    error: np.ndarray  # (M, 4), absolute
    size: np.ndarray  # (M, 4), width or height, for left and right or top and bottom


def collect_errors(pairs: Iterable[tuple[Instances, Tensor, Tensor]]) -> SideErrors:
    """
    Args:
        pairs: of each image the detections, on the CPU, with ``box_std`` and ``box_entropy``, and
            the boxes, (M, 4), and classes, (M,), of its ground truth.

    Raises:
        InputError: fewer than 20 detections match a box (IoU >= 0.5).
    """
    all_, matched = [], []
    for found, gt_boxes, gt_classes in pairs:
        boxes = found.pred_boxes.tensor
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        iou = torch.zeros(len(found))
        if len(gt_boxes) and len(found):
            same = found.pred_classes[:, None] == gt_classes
            iou = (pairwise_iou(found.pred_boxes, Boxes(gt_boxes)) * same).amax(dim=1)
        spread = (found.box_std / size).mean(dim=1)
        match = match_ground_truth(found, gt_boxes, gt_classes)
        has = match >= 0
        columns = (found.scores, iou, spread, found.box_entropy.mean(dim=1), has)
        all_.append(torch.stack(columns, dim=1))
        error = (boxes[has] - gt_boxes[match[has]]).abs()
        matched.append(torch.stack((found.box_std[has], error, size[has])))
    if sum(x.shape[1] for x in matched) < 2 * _BINS:
        raise InputError("Fewer than 20 detections match a box: there is nothing to measure")
    *columns, is_matched = torch.cat(all_).numpy().T
    return SideErrors(*columns, is_matched == 1, *torch.cat(matched, dim=1).numpy())


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks, where equal values have their mean rank."""
    ranks = []
    for values in (x, y):
        _, group, count = np.unique(values.ravel(), return_inverse=True, return_counts=True)
        ranks.append((count.cumsum() - (count - 1) / 2)[group.ravel()])
    return float(np.corrcoef(*ranks)[0, 1])


def summarize(errors: SideErrors) -> dict[str, float]:
    """The figures of docs/uncertainty.md, by name."""
    figures = {
        "detections": len(errors.iou),
        "matched": len(errors.std),
        "correlation of std and error": rank_correlation(errors.std, errors.error),
        "correlation of both relative to the box": rank_correlation(
            errors.std / errors.size, errors.error / errors.size
        ),
        "mean std": float(errors.std.mean()),
        "mean error": float(errors.error.mean()),
        "root mean square error": float(np.sqrt((errors.error**2).mean())),
        "share of errors within one std": float((errors.error <= errors.std).mean()),
    }
    for what, keep in _groups(errors).items():
        for name, confidence in _confidences(errors).items():
            area = _risks(confidence[keep], 1 - errors.iou[keep]).mean()
            figures[f"{what}: area by {name}"] = float(area)
        figures[f"{what}: area by chance"] = float((1 - errors.iou[keep]).mean())
    return figures


def plot_errors(errors: SideErrors, title: str) -> Figure:
    """Error against std, in ten bins of as many sides each, and the risk-coverage curves."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    order = errors.std.ravel().argsort(kind="stable")
    std, error = (x.ravel()[order] for x in (errors.std, errors.error))
    parts = np.array_split(np.arange(len(std)), _BINS)
    x = [std[part].mean() for part in parts]
    left.plot(x, [np.sqrt((error[p] ** 2).mean()) for p in parts], "o-", label="root mean square")
    left.plot(x, [error[part].mean() for part in parts], "s-", label="mean")
    left.plot(x, [np.median(error[part]) for part in parts], "^-", label="median")
    left.axline((x[0], x[0]), slope=1, color="gray", linestyle=":", label="error = std")
    left.set(xlabel="predicted std of a side, pixels", ylabel="error of the side, pixels")
    left.set(xscale="log", yscale="log", title=f"{title}: error against std")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    left.legend()
    for axes, (what, keep) in zip((middle, right), _groups(errors).items()):
        risk = 1 - errors.iou[keep]
        for name, confidence in _confidences(errors).items():
            risks = _risks(confidence[keep], risk)
            axes.plot(np.arange(1, len(risks) + 1) / len(risks), risks, label=name)
        axes.axhline(risk.mean(), color="gray", linestyle=":", label="chance")
        axes.set(xlabel="coverage: share kept, the surest first", ylabel="risk: mean 1 - IoU")
        axes.set(title=f"{what}: {len(risk)}", xlim=(0, 1), ylim=(0, None))
        axes.legend()
    return figure


def _groups(errors: SideErrors) -> dict[str, np.ndarray]:
    return {"all detections": np.ones_like(errors.is_matched), "matched ones": errors.is_matched}


def _confidences(errors: SideErrors) -> dict[str, np.ndarray]:
    """What detections can be ranked by; IoU, which nobody knows, gives the best order."""
    return {
        "score": errors.score,
        "-std / size": -errors.relative_std,
        "-entropy": -errors.entropy,
        "score / std": errors.score / errors.relative_std,
        "IoU": errors.iou,
    }


def _risks(confidence: np.ndarray, risk: np.ndarray) -> np.ndarray:
    """The mean risk of the 1, 2, ... D detections of the highest confidence."""
    ordered = risk[(-confidence).argsort(kind="stable")]
    return ordered.cumsum() / np.arange(1, len(ordered) + 1)
