"""Pictures of an analysis of results."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from ..lettering import choose_letters
from .analysis import ResultAnalysis
from .reliability import NUM_BINS

__all__ = ["CHARTS", "draw_chart"]

_LINES = 10  # classes that have a line of their own colour
_NUMBERS = 15  # classes of a matrix with numbers in its cells
_NAME_LENGTH = 24


def draw_chart(name: str, analysis: ResultAnalysis) -> bytes:
    """A PNG file; ``name`` is a key of CHARTS. Class names are drawn whatever their script."""
    families, letters = choose_letters(analysis.results.class_names, _NAME_LENGTH)
    names = [letters[name] for name in analysis.results.class_names]
    file = io.BytesIO()
    with matplotlib.rc_context({"font.family": families, "text.parse_math": False}):
        CHARTS[name](analysis, names).savefig(file, format="png", dpi=100)
    return file.getvalue()


def _draw_precision(analysis: ResultAnalysis, names: list[str]) -> Figure:
    """At IoU 0.5. Of many classes the most frequent ones have names."""
    found, results = analysis.precision, analysis.results
    ap = found.classes["AP50"]
    number = np.bincount(results.gt_classes[~results.is_crowd], minlength=len(ap))
    order = np.argsort(-number, kind="stable")[: np.count_nonzero(number)].tolist()
    named = order[:_LINES]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for i in order[_LINES:]:
        axes.plot(found.recall, found.precision[i], color="0.85", linewidth=1)
    for place, i in enumerate(named):
        label, color = f"{names[i]}: {ap[i]:.1f}", f"C{place}"
        axes.plot(found.recall, found.precision[i], color=color, label=label)
    mean = np.nanmean(found.precision, axis=0)
    label = f"mean of {len(order)} classes: {found.overall['AP50']:.1f}"
    axes.plot(found.recall, mean, color="black", linewidth=3, label=label)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.005), ylim=(0, 1.01))
    axes.set_title("Precision and recall at IoU 0.5")
    title = "AP50" if len(named) == len(order) else f"AP50, {_LINES} most frequent classes"
    axes.legend(title=title, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes.grid(alpha=0.3)
    return figure


def _draw_confusion(analysis: ResultAnalysis, names: list[str]) -> Figure:
    """Of classes that are there. Colours are shares of a row."""
    matrix = analysis.confusion
    is_there = (matrix.sum(axis=0) + matrix.sum(axis=1)) > 0
    is_there[-1] = True
    shown = matrix[is_there][:, is_there]
    kept = [name for name, there in zip(names, is_there) if there]
    share = shown / np.maximum(shown.sum(axis=1, keepdims=True), 1)
    count = len(shown)
    side = 3.5 + (0.75 if count <= _NUMBERS else 0.22) * count
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    figure.colorbar(image, ax=axes, label="share of the row", shrink=min(0.7, 4 / side))
    size = 10 if count <= _NUMBERS else 8
    axes.set_xticks(range(count), [*kept, "not found"], rotation=90, fontsize=size)
    axes.set_yticks(range(count), [*kept, "no object"], fontsize=size)
    axes.set(xlabel="class of the detection", ylabel="class of the object")
    axes.axhline(count - 1.5, color="0.5", linewidth=1)
    axes.axvline(count - 1.5, color="0.5", linewidth=1)
    if count <= _NUMBERS:
        for (i, j), number in np.ndenumerate(shown):
            if number:
                color = "white" if share[i, j] > 0.4 else "black"
                axes.text(j, i, number, ha="center", va="center", color=color, fontsize=9)
    where = f"scores ≥ {analysis.score_thresh:g}, IoU ≥ {analysis.tp_iou_thresh:g}"
    axes.set_title(f"Confusion matrix ({where})")
    return figure


def _draw_errors(analysis: ResultAnalysis, names: list[str]) -> Figure:
    rows = analysis.errors()[::-1]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    costs = [row["cost"] for row in rows]
    colors = ["0.6" if row["error"].startswith("all") else "tab:red" for row in rows]
    bars = axes.barh([row["error"] for row in rows], costs, color=colors)
    labels = [f"{row['cost']:.1f}  ({row['number']})" for row in rows]
    axes.bar_label(bars, labels, padding=4)
    axes.set_xlim(0, 1.25 * max(*costs, 1))
    axes.set_xlabel("AP50 that mending all of them would bring (in brackets: how many there are)")
    axes.set_title(f"Kinds of errors; AP50 is {analysis.tide.ap:.1f}")
    return figure


def _draw_reliability(analysis: ResultAnalysis, names: list[str]) -> Figure:
    """Of all classes together, above, and how many detections are in a bin, below."""
    found = analysis.reliability
    centres = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    width = 0.9 / NUM_BINS
    axes.bar(centres, np.nan_to_num(found.mean_ious), width, color="tab:blue", label="mean IoU")
    axes.plot([0, 1], [0, 1], color="0.4", linestyle=":", label="score = IoU")
    is_full = found.counts > 0
    style = {"color": "tab:red", "markersize": 4, "label": "mean score"}
    axes.plot(centres[is_full], found.mean_scores[is_full], "o", **style)
    axes.set(ylabel="IoU with the object found, 0 without", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(
        f"Is the score the IoU?  LaECE₀ {found.mean_laece:.1f} %, LaACE₀ {found.mean_laace:.1f} %"
        " (means of classes)",
        fontsize=11,
    )
    axes.legend(loc="upper left")
    below.bar(centres, found.counts, width, color="0.6")
    below.set(xlabel="score", ylabel="detections")
    return figure


CHARTS: dict[str, Callable[[ResultAnalysis, list[str]], Figure]] = {
    "precision_recall": _draw_precision,
    "errors": _draw_errors,
    "confusion_matrix": _draw_confusion,
    "reliability": _draw_reliability,
}
