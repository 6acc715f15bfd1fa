"""One picture of an analysis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, StrMethodFormatter

from ..data import read_image
from ..errors import InputError
from .advice import SMALL_CLASS
from .analysis import Analysis
from .boxes import BoxTable, box_roots
from .checks import Suspicion

__all__ = ["save_picture"]

_CLASSES = 16  # in a panel, at most
_ROWS, _COLUMNS = 2, 10  # of crops
_TRAIN, _TEST, _ALARM = "tab:blue", "tab:orange", "tab:red"
_LEVELS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")  # without red


def save_picture(path: Path, analysis: Analysis) -> None:
    """
    Draw the figures of an analysis, and the worst twenty of the suspicious boxes.

    Raises:
        InputError: the picture cannot be written.
    """
    worst = analysis.suspicious[: _ROWS * _COLUMNS]
    rows = -(-len(worst) // _COLUMNS)
    heights = [8.5, 2.6 * rows] if rows else [8.5]
    figure = Figure(figsize=(18, sum(heights)), layout="constrained")
    parts = np.ravel(figure.subfigures(len(heights), 1, height_ratios=heights))
    axes = parts[0].subplots(2, 3)
    _draw_classes(axes[0, 0], analysis)
    _draw_sizes(axes[0, 1], analysis)
    _draw_aspects(axes[0, 2], analysis)
    _draw_targets(axes[1, 0], analysis)
    _draw_class_sizes(axes[1, 1], analysis)
    _draw_crowds(axes[1, 2], analysis)
    if rows:
        parts[1].suptitle(f"The worst of {len(analysis.suspicious)} suspicious boxes")
        all_axes = np.ravel(parts[1].subplots(rows, _COLUMNS))
        for one in all_axes:
            one.set_axis_off()
        for one, (_, table, suspicion) in zip(all_axes, worst):
            _draw_crop(one, table, suspicion)
    try:
        figure.savefig(path, dpi=90)
    except OSError as error:
        raise InputError(f"Picture '{path}': {error}") from None


def _draw_classes(axes: Axes, analysis: Analysis) -> None:
    train = analysis.facts["train"]["classes"]
    names = sorted(train, key=lambda name: train[name]["boxes"])
    title = "boxes of each class"
    if len(names) > _CLASSES:
        names = names[: _CLASSES // 2] + names[-_CLASSES // 2 :]
        title = f"boxes of the {_CLASSES // 2} most and least frequent of {len(train)} classes"
    places = np.arange(len(names))
    axes.barh(places + 0.2, [train[n]["boxes"] for n in names], 0.4, color=_TRAIN, label="train")
    if analysis.test is not None:
        test = analysis.facts["test"]["classes"]
        boxes = [test[name]["boxes"] if name in test else 0 for name in names]
        axes.barh(places - 0.2, boxes, 0.4, color=_TEST, label="test")
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.set_xscale("symlog", linthresh=10)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_title(title)
    axes.legend(loc="lower right")


def _draw_sizes(axes: Axes, analysis: Analysis) -> None:
    """Boxes by their size at the input; the colour says where most of their anchors are."""
    assignment, levels = analysis.assignment, list(analysis.facts["levels"])
    roots = box_roots(assignment.boxes)
    has_anchor = assignment.reason == 0
    main = assignment.positives.argmax(axis=1)
    groups = [roots[has_anchor & (main == i)] for i in range(len(levels))]
    names = [f"{name}: {len(x)}" for name, x in zip(levels, groups)]
    bins = np.geomspace(max(roots.min(), 1), max(roots.max(), 2) * 1.01, 50)
    colors = [_LEVELS[i % len(_LEVELS)] for i in range(len(levels))]
    axes.hist(
        [*groups, roots[~has_anchor]],
        bins,
        stacked=True,
        label=[*names, f"no anchor: {len(roots) - int(has_anchor.sum())}"],
        color=[*colors, _ALARM],
    )
    _log_axis(axes, "root of the area, in pixels of the input")
    axes.set_title("size of boxes, and the level with most of their anchors")
    axes.legend(fontsize=8)


def _draw_aspects(axes: Axes, analysis: Analysis) -> None:
    bins = np.geomspace(1 / 8, 8, 49)
    for name, table, color in _splits(analysis):
        width, height = (table.boxes[:, 2:] - table.boxes[:, :2]).clip(min=1e-3).T
        if len(width):
            weights = np.full(len(width), 100 / len(width))
            aspect = (width / height).clip(bins[0], bins[-1])
            axes.hist(aspect, bins, weights=weights, label=name, color=color, histtype="step")
    _log_axis(axes, "width / height (beyond 8: in the last bar)")
    axes.xaxis.set_major_locator(FixedLocator([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]))
    axes.set(title="aspect ratio of boxes", ylabel="% of the boxes")
    axes.legend()


def _draw_targets(axes: Axes, analysis: Analysis) -> None:
    """The share of sides that are longer, by their length."""
    assignment = analysis.assignment
    longest = int(np.ceil(assignment.longest_target.max())) + 1
    for i, (name, counts) in enumerate(zip(analysis.facts["levels"], assignment.targets)):
        if counts.sum():
            percent = 100 * (1 - counts.cumsum() / counts.sum()).clip(min=1e-9)[: longest + 1]
            color = _LEVELS[i % len(_LEVELS)]
            axes.plot(percent, label=name, color=color, drawstyle="steps-post")
    reg_max = analysis.facts["reg_max"]
    axes.axvline(reg_max, color=_ALARM, label=f"REG_MAX {reg_max}")
    axes.axhline(0.1, color="gray", linestyle=":", label="99.9 % covered")
    axes.set(yscale="log", ylim=(0.005, 100), xlim=(0, max(longest, reg_max) + 1))
    axes.set(title="targets of box sides", xlabel="bins", ylabel="% of the sides that are longer")
    axes.legend(fontsize=8)


def _draw_class_sizes(axes: Axes, analysis: Analysis) -> None:
    """Median, and from 5 to 95 %, of the smallest classes."""
    assignment, table = analysis.assignment, analysis.learned
    roots, classes = box_roots(assignment.boxes), table.classes[assignment.box]
    order = np.argsort(classes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(classes[order])) + 1)
    bars = [
        (table.class_names[classes[x[0]]], *np.percentile(roots[x], (5, 50, 95))) for x in groups
    ]
    bars = sorted(bars, key=lambda bar: bar[2])[:_CLASSES][::-1]
    for place, (_, low, median, high) in enumerate(bars):
        axes.plot([low, high], [place, place], color=_TRAIN, linewidth=4, alpha=0.4)
        axes.plot(median, place, "o", color=_TRAIN)
    stride = next(iter(analysis.facts["levels"].values()))["stride"]
    label = f"{SMALL_CLASS} strides of the finest level"
    axes.axvline(SMALL_CLASS * stride, color="gray", linestyle=":", label=label)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=8, parse_math=False)
    axes.set_ylim(-0.8, len(bars) - 0.2)
    _log_axis(axes, "root of the area, in pixels of the input: median, 5 to 95 %")
    axes.set_title("size of the boxes of the smallest classes")
    axes.legend(loc="lower right")


def _draw_crowds(axes: Axes, analysis: Analysis) -> None:
    limit, most = analysis.facts["detections_per_image"], 0
    for name, table, color in _splits(analysis):
        number = np.bincount(table.image, minlength=len(table.files))
        most = max(most, int(number.max()))
        step = max(1, -(-int(number.max()) // 50))
        bins = np.arange(0, number.max() + step + 1, step) - 0.5
        weights = np.full(len(number), 100 / len(number))
        axes.hist(number, bins, weights=weights, label=name, color=color, histtype="step")
    if most > limit / 3:
        axes.axvline(limit, color=_ALARM, label=f"DETECTIONS_PER_IMAGE {limit}")
    axes.set(title="boxes in an image", xlabel="boxes", ylabel="% of the images")
    axes.legend()


def _draw_crop(axes: Axes, table: BoxTable, suspicion: Suspicion) -> None:
    """A box with what is around it."""
    x0, y0, x1, y1 = table.boxes[suspicion.row]
    file = table.files[table.image[suspicion.row]]
    name = table.class_names[table.classes[suspicion.row]]
    title = [_shorten(name), _shorten(Path(file).name), *map(_shorten, suspicion.reasons[:2])]
    axes.set_title("\n".join(title), fontsize=7, parse_math=False)
    try:
        image = read_image(file, format="RGB")
    except InputError:  # the file has been counted and named already
        axes.text(0.5, 0.5, "cannot be read", ha="center", va="center")
        return
    half = max(0.9 * max(x1 - x0, y1 - y0), 24)
    center_x, center_y = (x0 + x1) / 2, (y0 + y1) / 2
    top, left = int(max(center_y - half, 0)), int(max(center_x - half, 0))
    crop = image[top : int(center_y + half) + 1, left : int(center_x + half) + 1]
    if crop.size:
        height, width = crop.shape[:2]
        step = max(1, max(height, width) // 400)  # the picture has no room for more
        axes.imshow(crop[::step, ::step], extent=(left, left + width, top + height, top))
    frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="yellow", linewidth=1.5)
    axes.add_patch(frame)
    axes.set(xlim=(center_x - half, center_x + half), ylim=(center_y + half, center_y - half))


def _splits(analysis: Analysis) -> list[tuple[str, BoxTable, str]]:
    tables = (("train", analysis.train, _TRAIN), ("test", analysis.test, _TEST))
    return [(name, x.take(~x.is_crowd), color) for name, x, color in tables if x is not None]


def _log_axis(axes: Axes, label: str) -> None:
    axes.set(xscale="log", xlabel=label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _shorten(text: str, length: int = 30) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
