"""A picture of detections and the distributions of their sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.structures import Instances
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..lettering import choose_letters
from .detection import SIDES

__all__ = ["draw_distributions"]

_PREDICTED, _TARGET = "tab:red", "limegreen"
_NAME_LENGTH = 40
_MARGIN = 0.35  # shown around a box, in sides of it
_COLUMNS = 2  # of detections


def draw_distributions(
    image_rgb: np.ndarray,
    detections: Instances,
    class_names: Sequence[str],
    chosen: Sequence[int],
    targets: Tensor | None = None,
    gt_boxes: Tensor | None = None,
) -> np.ndarray:
    """
    Draw all detections, and below them those that are chosen, each with the distributions of its
    sides along the axes: left and right above it, top and bottom beside it. A side is drawn as wide
    as it is unsure: from one standard deviation before it to one behind it.

    Args:
        image_rgb: shape (H, W, 3), uint8.
        detections: of :func:`gfl_d2.distributions.detect_with_distributions`.
        class_names: of the C classes.
        chosen: indices of detections.
        targets: shape (D, 4), the box that a detection should have been, NaN where there is none.
        gt_boxes: shape (M, 4), all boxes of the ground truth.

    Returns:
        ndarray: RGB, uint8, shape (H', W', 3).
    """
    families, letters = choose_letters(map(str, class_names), _NAME_LENGTH)
    height, width = image_rgb.shape[:2]
    rows = -(-len(chosen) // _COLUMNS)
    overview = min(max(12 * height / width, 3), 12)
    figure = Figure(figsize=(12, overview + 6 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    parts = np.ravel(figure.subfigures(1 + rows, 1, height_ratios=[overview, *[6] * rows]))
    axes = parts[0].subplots()
    axes.imshow(image_rgb, extent=(0, width, height, 0))
    for box in () if gt_boxes is None else gt_boxes.tolist():
        _draw_box(axes, box, color=_TARGET, linestyle=":")
    for i in range(len(detections)):
        box, std = (
            field[i].tolist() for field in (detections.pred_boxes.tensor, detections.box_std)
        )
        _draw_bands(axes, box, std)
        _draw_box(axes, box, color=_PREDICTED)
        if i in chosen:
            style = {"color": "white", "backgroundcolor": _PREDICTED, "clip_on": True}
            axes.text(box[0], box[1], str(i), fontsize=9, va="top", **style)
    axes.set(xlim=(0, width), ylim=(height, 0))
    truth = "" if gt_boxes is None else "; green, the ground truth"
    axes.set_title(f"red, {len(detections)} detections: sides as wide as ± one std{truth}")
    for part, first in zip(parts[1:], range(0, len(chosen), _COLUMNS)):
        columns = part.subfigures(1, _COLUMNS, squeeze=False)[0]
        for column, i in zip(columns, chosen[first : first + _COLUMNS]):
            name = letters[str(class_names[int(detections.pred_classes[i])])]
            target = None if targets is None or targets[i].isnan().any() else targets[i].tolist()
            _draw_detection(column, image_rgb, detections[i], target, f"{i}: {name}", families)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_detection(
    part: Figure,
    image_rgb: np.ndarray,
    detection: Instances,
    target: list[float] | None,
    title: str,
    families: list[str],
) -> None:
    """One detection, with x shared by what is above it, y by what is beside it."""
    axes = part.subplots(2, 2, width_ratios=(3, 1), height_ratios=(1, 3))
    main, above, beside, notes = axes[1, 0], axes[0, 0], axes[1, 1], axes[0, 1]
    box, std = detection.pred_boxes.tensor[0].tolist(), detection.box_std[0].tolist()
    height, width = image_rgb.shape[:2]
    main.imshow(image_rgb, extent=(0, width, height, 0), aspect="auto")
    _draw_bands(main, box, std)
    _draw_box(main, box, color=_PREDICTED)
    if target is not None:
        _draw_box(main, target, color=_TARGET, linestyle="--")
    for side, axis in enumerate((above, beside, above, beside)):
        _draw_side(axis, detection, side, None if target is None else target[side])
    seen = [box] if target is None else [box, target]
    low, high = np.min(seen, axis=0)[:2], np.max(seen, axis=0)[2:]
    half = max((0.5 + _MARGIN) * (high - low).max(), (high - low).max() / 2 + 2 * max(std))
    (left, top), (right, bottom) = (low + high) / 2 - half, (low + high) / 2 + half
    main.set(xlim=(left, right), ylim=(bottom, top))
    above.set(xlim=(left, right), ylabel="probability")
    beside.set(ylim=(bottom, top), xlabel="probability")
    above.tick_params(labelbottom=False)
    beside.tick_params(labelleft=False)
    notes.set_axis_off()
    columns = "side ± std, entropy" if target is None else "side ± std, entropy, error"
    lines = [f"{title}, {detection.scores[0]:.2f}", columns]
    for side, name in enumerate(SIDES):
        error = "" if target is None else f", {box[side] - target[side]:+.1f} px"
        entropy = detection.box_entropy[0, side]
        lines.append(f"{name} ± {std[side]:.1f} px, {entropy:.1f} nat{error}")
    style = {"family": families, "parse_math": False, "va": "top", "fontsize": 8}
    notes.text(-0.35, 1.0, "\n".join(lines), transform=notes.transAxes, **style)


def _draw_side(axes: Axes, detection: Instances, side: int, target: float | None) -> None:
    """The distribution of a side: bars at the places of its bins, in pixels."""
    places, probs = detection.side_places[0, side], detection.side_probs[0, side]
    is_vertical = side % 2 == 0  # the side is: its places are along x
    step = float((places[1] - places[0]).abs())
    draw, line = (axes.bar, axes.axvline) if is_vertical else (axes.barh, axes.axhline)
    draw(places.tolist(), probs.tolist(), 0.8 * step, color="tab:blue", alpha=0.6)
    line(float(detection.pred_boxes.tensor[0, side]), color=_PREDICTED)
    if target is not None:
        line(target, color=_TARGET, linestyle="--")


def _draw_bands(axes: Axes, box: list[float], std: list[float]) -> None:
    """Each side as a band of its position ± its standard deviation."""
    x0, y0, x1, y1 = box
    for side, (place, deviation) in enumerate(zip(box, std)):
        start = place - deviation
        if side % 2 == 0:
            band = Rectangle((start, y0), 2 * deviation, y1 - y0)
        else:
            band = Rectangle((x0, start), x1 - x0, 2 * deviation)
        band.set(facecolor=_PREDICTED, alpha=0.45, linewidth=0)
        axes.add_patch(band)


def _draw_box(axes: Axes, box: list[float], **style) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, linewidth=1.2, **style))
