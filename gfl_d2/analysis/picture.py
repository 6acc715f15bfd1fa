"""One picture of an analysis."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from ..data import read_image
from ..errors import InputError
from ..lettering import choose_letters
from .advice import SMALL_CLASS
from .analysis import Analysis
from .boxes import box_sizes

__all__ = ["save_picture"]

_CLASSES = 16  # in a panel, at most
_ROWS, _COLUMNS = 2, 10  # of crops
_COLORS = {"train": "tab:blue", "test": "tab:orange"}
_ALARM = "tab:red"
_LEVELS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")  # without red


def save_picture(path: Path, analysis: Analysis) -> None:
    """Draw the figures of an analysis, and the worst twenty of the suspicious boxes."""
    worst = analysis.facts["suspicious"][: _ROWS * _COLUMNS]
    titles = [[x["class"], Path(x["file"]).name, *x["reasons"][:2]] for x in worst]
    texts = [*analysis.parts["train"].class_names, *itertools.chain(*titles)]
    families, letters = choose_letters(texts, 30)
    rows = -(-len(worst) // _COLUMNS)
    heights = [8.5, 2.6 * rows] if rows else [8.5]
    with matplotlib.rc_context({"font.family": families, "text.parse_math": False}):
        figure = Figure(figsize=(18, sum(heights)), layout="constrained")
        panels, *crops = np.ravel(figure.subfigures(len(heights), 1, height_ratios=heights))
        axes = panels.subplots(2, 3)
        _draw_classes(axes[0, 0], analysis, letters)
        _draw_sizes(axes[0, 1], analysis)
        _draw_aspects(axes[0, 2], analysis)
        _draw_targets(axes[1, 0], analysis)
        _draw_class_sizes(axes[1, 1], analysis, letters)
        _draw_crowds(axes[1, 2], analysis)
        if rows:
            crops[0].suptitle(f"The worst of {analysis.facts['suspicious_boxes']} suspicious boxes")
            all_axes = np.ravel(crops[0].subplots(rows, _COLUMNS))
            for one in all_axes:
                one.set_axis_off()
            for one, box, title in zip(all_axes, worst, titles):
                one.set_title("\n".join(letters[text] for text in title), fontsize=7)
                _draw_crop(one, box)
        figure.savefig(path, dpi=90)


def _draw_classes(axes: Axes, analysis: Analysis, letters: Mapping[str, str]) -> None:
    rows = analysis.facts["classes"]
    title = "boxes of each class"
    if len(rows) > _CLASSES:
        title = f"boxes of the {_CLASSES // 2} most and least frequent of {len(rows)} classes"
        rows = [*rows[: _CLASSES // 2], *rows[-_CLASSES // 2 :]]
    places = np.arange(len(rows))[::-1]
    for part, shift in zip(analysis.parts, (0.2, -0.2)):
        boxes = [row[f"{part}_boxes"] for row in rows]
        axes.barh(places + shift, boxes, 0.4, color=_COLORS[part], label=part)
    axes.set_yticks(places, [letters[row["class"]] for row in rows], fontsize=8)
    axes.set_xscale("symlog", linthresh=10)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_title(title)
    axes.legend(loc="lower right")


def _draw_sizes(axes: Axes, analysis: Analysis) -> None:
    """Boxes by their size at the input; the colour says where most of their anchors are."""
    roots, main = box_sizes(analysis.assignment.boxes), analysis.assignment.main_level()
    names = [*analysis.assignment.level_names, "no anchor"]
    groups = [*(roots[main == i] for i in range(len(names) - 1)), roots[main < 0]]
    bins = np.geomspace(max(roots.min(), 1), max(roots.max(), 2) * 1.01, 50)
    labels = [f"{name}: {len(group)}" for name, group in zip(names, groups)]
    colors = [*(_LEVELS[i % len(_LEVELS)] for i in range(len(names) - 1)), _ALARM]
    axes.hist(groups, bins, stacked=True, label=labels, color=colors)
    _log_axis(axes, "root of the area, in pixels of the input")
    axes.set_title("size of boxes, and the level with most of their anchors")
    axes.legend(fontsize=8)


def _draw_aspects(axes: Axes, analysis: Analysis) -> None:
    bins = np.geomspace(1 / 8, 8, 49)
    for part, table in analysis.parts.items():
        width, height = (table.boxes[:, 2:] - table.boxes[:, :2]).clip(min=1e-3).T
        _draw_shares(axes, (width / height).clip(bins[0], bins[-1]), bins, part)
    _log_axis(axes, "width / height (beyond 8: in the last bar)")
    axes.xaxis.set_major_locator(FixedLocator([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]))
    axes.set(title="aspect ratio of boxes", ylabel="% of the boxes")
    axes.legend()


def _draw_targets(axes: Axes, analysis: Analysis) -> None:
    """The share of sides that are longer, by their length."""
    assignment, reg_max = analysis.assignment, analysis.facts["reg_max"]
    longest = int(np.ceil(assignment.longest_target.max())) + 1
    for i, (name, counts) in enumerate(zip(assignment.level_names, assignment.targets)):
        if counts.any():
            percent = 100 * (1 - counts.cumsum() / counts.sum()).clip(min=1e-9)[: longest + 1]
            color = _LEVELS[i % len(_LEVELS)]
            axes.plot(percent, label=name, color=color, drawstyle="steps-post")
    axes.axvline(reg_max, color=_ALARM, label=f"REG_MAX {reg_max}")
    axes.axhline(0.1, color="gray", linestyle=":", label="99.9 % covered")
    axes.set(yscale="log", ylim=(0.005, 100), xlim=(0, max(longest, reg_max) + 1))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set(title="targets of box sides", xlabel="bins", ylabel="% of the sides that are longer")
    axes.legend(fontsize=8)


def _draw_class_sizes(axes: Axes, analysis: Analysis, letters: Mapping[str, str]) -> None:
    """Median, and from 5 to 95 %, of the smallest classes."""
    roots, classes = box_sizes(analysis.assignment.boxes), analysis.assignment.classes
    names = analysis.parts["train"].class_names
    groups = [(names[i], roots[classes == i]) for i in np.unique(classes)]
    bars = [(*np.percentile(group, (50, 5, 95)), letters[name]) for name, group in groups]
    bars = sorted(bars)[:_CLASSES][::-1]
    for place, (median, low, high, _) in enumerate(bars):
        axes.plot([low, high], [place, place], color="tab:blue", linewidth=4, alpha=0.4)
        axes.plot(median, place, "o", color="tab:blue")
    label = f"{SMALL_CLASS} strides of the finest level"
    limit = SMALL_CLASS * analysis.assignment.strides[0]
    axes.axvline(limit, color="gray", linestyle=":", label=label)
    axes.set_yticks(range(len(bars)), [bar[-1] for bar in bars], fontsize=8)
    axes.set_ylim(-0.8, len(bars) - 0.2)
    _log_axis(axes, "root of the area, in pixels of the input: median, 5 to 95 %")
    axes.set_title("size of the boxes of the smallest classes")
    axes.legend(loc="lower right")


def _draw_crowds(axes: Axes, analysis: Analysis) -> None:
    limit, most = analysis.facts["detections_per_image"], 0
    for part, table in analysis.parts.items():
        number = table.boxes_per_image()
        most = max(most, int(number.max()))
        step = max(1, -(-int(number.max()) // 50))
        _draw_shares(axes, number, np.arange(0, number.max() + step + 1, step) - 0.5, part)
    if most > limit / 3:
        axes.axvline(limit, color=_ALARM, label=f"DETECTIONS_PER_IMAGE {limit}")
    axes.set(title="boxes in an image", xlabel="boxes", ylabel="% of the images")
    axes.legend()


def _draw_crop(axes: Axes, box: dict) -> None:
    """A box with what is around it."""
    try:
        image = Image.fromarray(read_image(box["file"], format="RGB"))
    except InputError:  # the file has been counted and named already
        axes.text(0.5, 0.5, "cannot be read", ha="center", va="center")
        return
    x, y, width, height = box["bbox"]
    # A box may be far larger than its image, or beyond it.
    half = min(max(0.9 * max(width, height), 24), max(image.size))
    centre_x, centre_y = np.clip((x + width / 2, y + height / 2), 0, image.size)
    left, top, side = int(centre_x - half), int(centre_y - half), int(2 * half) + 1
    crop = image.crop((left, top, left + side, top + side))  # black beyond the image
    crop.thumbnail((400, 400))  # the picture has no room for more
    axes.imshow(crop, extent=(left, left + side, top + side, top))
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="yellow", linewidth=1.5))


def _draw_shares(axes: Axes, values: np.ndarray, bins: np.ndarray, part: str) -> None:
    """A histogram in percent of one part of the data."""
    weights = np.full(len(values), 100 / max(len(values), 1))
    axes.hist(values, bins, weights=weights, label=part, color=_COLORS[part], histtype="step")


def _log_axis(axes: Axes, label: str) -> None:
    axes.set(xscale="log", xlabel=label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
