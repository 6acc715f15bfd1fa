"""Boxes with labels on a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.utils.visualizer import VisImage, Visualizer

__all__ = ["class_color", "draw_boxes", "set_fonts"]

# Small images are enlarged until their shorter side has this many pixels, so that labels fit, but
# not beyond the longest side; larger ones are reduced to it.
_MIN_SIDE, _MAX_SIDE = 400, 4000
_WHITE = 255
_TITLE_HEIGHT = 28


def draw_boxes(
    image_rgb: np.ndarray,
    title: str,
    boxes: Sequence,
    labels: list[str],
    colors: list[tuple[float, float, float]],
    families: list[str],
) -> np.ndarray:
    """
    The image, at a size at which labels can be read, with boxes (x0, y0, x1, y1), and a title above
    it. ``families`` are those of the fonts.
    """
    height, width = image_rgb.shape[:2]
    scale = min(max(1.0, _MIN_SIDE / min(height, width)), _MAX_SIDE / max(height, width))
    size = [max(1, round(scale * side)) for side in (width, height)]
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    visualizer = Visualizer(cv2.resize(image_rgb, size, interpolation=interpolation))
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    # A label beside the image would not be seen.
    boxes = boxes.clip(0, [*size, *size])
    visualizer.overlay_instances(boxes=boxes, labels=labels, assigned_colors=colors)
    bar = VisImage(np.full((_TITLE_HEIGHT, size[0], 3), _WHITE, dtype=np.uint8))
    bar.ax.text(6, 20, title, size=10)
    pictures = []
    for part in (bar, visualizer.output):
        set_fonts(part, families)
        pictures.append(part.get_image())
    return np.concatenate(pictures)


def set_fonts(picture: VisImage, families: list[str]) -> None:
    for text in picture.ax.texts:
        text.set_fontfamily(families)
        text.set_parse_math(False)  # a $ is a dollar
        text.set_usetex(False)


def class_color(index: int) -> tuple[float, float, float]:
    """RGB in [0, 1], always bright; neighbouring indices are far apart in hue."""
    golden_ratio = 0.618034
    return colorsys.hsv_to_rgb((index * golden_ratio) % 1, 0.75, 1.0)
