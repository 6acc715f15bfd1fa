"""Augmentations that mix images: mosaic, and copy-paste of boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from detectron2.config import CfgNode

__all__ = ["Mixing", "Sample", "area", "cut", "is_visible", "make_mosaic", "paste_boxes"]

# Where the four images of a mosaic meet, in shares of its height and width.
_CENTER = (0.25, 0.75)
_TRIES = 10  # to find a free place for a box
# Boxes of which this share, or more, lies in a pasted box come along with it.
_COMPANION = 0.5


class Sample(NamedTuple):
    """
    An image, (H, W, C), and its annotations: dicts as of Detectron2's dataset format, crowds among
    them, with "bbox" (x0, y0, x1, y1) inside of the image, in pixels, and "whole_area", that of the
    whole box in square pixels, also of what was cut off.
    """

    image: np.ndarray
    annotations: list[dict]


class Mixing:
    """
    Mixes a sample with others, as ``INPUT.MOSAIC``, ``COPY_PASTE`` and ``CLOSE_MIXING`` say. It
    draws from NumPy's random numbers, as Detectron2's augmentations do.
    """

    def __init__(
        self,
        *,
        mosaic_prob: float,
        copy_paste_prob: float,
        fill: Sequence[float],
        size: tuple[int, int] | None,
        end_iter: int,
    ):
        """
        Args:
            fill: colour of what no image of a mosaic covers, (C,).
            size: height and width of mosaics; None for those of the sample.
            end_iter: from this iteration on nothing is mixed.
        """
        self.mosaic_prob, self.copy_paste_prob = mosaic_prob, copy_paste_prob
        self.fill, self.size = np.asarray(fill), size
        self.end_iter = end_iter

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Mixing | None:
        """None if neither mosaic nor copy-paste is on."""
        inputs, iterations = cfg.INPUT, cfg.SOLVER.MAX_ITER
        if not inputs.MOSAIC.PROB and not inputs.COPY_PASTE.PROB:
            return None
        return cls(
            mosaic_prob=inputs.MOSAIC.PROB,
            copy_paste_prob=inputs.COPY_PASTE.PROB,
            # After normalization 0, which is what batches are padded with.
            fill=np.rint(cfg.MODEL.PIXEL_MEAN),
            size=tuple(inputs.LSJ.SIZE) if inputs.LSJ.ENABLED else None,
            end_iter=iterations - round(inputs.CLOSE_MIXING * iterations),
        )

    def __call__(self, sample: Sample, draw: Callable[[], Sample], iteration: int) -> Sample:
        """
        Args:
            sample: is not changed.
            draw: gives another sample, at random, which is not changed.
            iteration: of the training, for which the sample is.
        """
        if iteration >= self.end_iter:
            return sample
        if np.random.uniform() < self.mosaic_prob:
            size = self.size or sample.image.shape[:2]
            center = [int(side * np.random.uniform(*_CENTER)) for side in size]
            sample = make_mosaic([sample, draw(), draw(), draw()], size, center, self.fill)
        if np.random.uniform() < self.copy_paste_prob:
            sample = paste_boxes(sample, draw())
        return sample


def cut(annotations: Sequence[dict], window: Sequence, place: Sequence = (0, 0)) -> list[dict]:
    """
    The annotations of a part of an image that is put into another one. What is not in it is left
    out. Classes, crowds and whole areas stay.

    Args:
        window: the part, (x0, y0, x1, y1).
        place: x and y of its corner in the other image.
    """
    low, high = np.tile(window[:2], 2), np.tile(window[2:], 2)
    ret = []
    for annotation in annotations:
        box = np.clip(annotation["bbox"], low, high)
        if area(box) > 0:
            ret.append({**annotation, "bbox": box - low + np.tile(place, 2)})
    return ret


def make_mosaic(
    samples: Sequence[Sample], size: Sequence[int], center: Sequence[int], fill: np.ndarray
) -> Sample:
    """
    An image whose quarters show parts of four images, taken at random places at their own scale.
    Images that are smaller than their quarter touch the center.

    Args:
        samples: for the quarters top left, top right, bottom left and bottom right.
        size, center: height and width, y and x, in pixels.
        fill: colour of what no image covers, (C,).
    """
    (height, width), (y, x) = size, center
    canvas = np.empty((height, width, len(fill)), samples[0].image.dtype)
    canvas[:] = fill
    annotations = []
    quarters = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    for (image, boxes), (x0, y0, x1, y1) in zip(samples, quarters):
        h, w = min(y1 - y0, image.shape[0]), min(x1 - x0, image.shape[1])
        top = np.random.randint(image.shape[0] - h + 1)
        left = np.random.randint(image.shape[1] - w + 1)
        place = (x if x0 == x else x1 - w, y if y0 == y else y1 - h)
        canvas[place[1] : place[1] + h, place[0] : place[0] + w] = image[
            top : top + h, left : left + w
        ]
        annotations += cut(boxes, (left, top, left + w, top + h), place)
    return Sample(canvas, annotations)


def paste_boxes(target: Sample, source: Sample) -> Sample:
    """
    Paste each box of the source, with probability 0.5, into the target, at a random place where it
    covers no box. If none is found, or it is larger than the target, it is left out. Crowds are not
    pasted by themselves, and may be covered. With a box come the annotations, crowds too, of which
    half or more lies in it.
    """
    image, annotations = target.image.copy(), list(target.annotations)
    boxes = [a["bbox"] for a in source.annotations if not a.get("iscrowd", 0)]
    for box in boxes:
        if np.random.uniform() < 0.5:
            continue
        x0, y0 = np.floor(box[:2]).astype(int)
        x1, y1 = np.ceil(box[2:]).astype(int)
        place = _find_place(image.shape, annotations, (y1 - y0, x1 - x0))
        if place is not None:
            x, y = place
            image[y : y + y1 - y0, x : x + x1 - x0] = source.image[y0:y1, x0:x1]
            for annotation in source.annotations:
                inside = cut([annotation], (x0, y0, x1, y1), place)
                least = _COMPANION * area(annotation["bbox"])
                annotations += [a for a in inside if area(a["bbox"]) >= least]
    return Sample(image, annotations)


def _find_place(
    shape: tuple[int, ...], annotations: Sequence[dict], size: tuple[int, int]
) -> tuple[int, int] | None:
    """x and y of where a rectangle of this height and width covers no box, or None."""
    height, width = shape[0] - size[0], shape[1] - size[1]
    if height < 0 or width < 0:
        return None
    boxes = np.array([a["bbox"] for a in annotations if not a.get("iscrowd", 0)]).reshape(-1, 4)
    for _ in range(_TRIES):
        y, x = np.random.randint(height + 1), np.random.randint(width + 1)
        apart = (boxes[:, :2] >= (x + size[1], y + size[0])) | (boxes[:, 2:] <= (x, y))
        if apart.any(axis=1).all():
            return x, y
    return None


def area(box: np.ndarray) -> float:
    """Of a box (x0, y0, x1, y1)."""
    return float(np.prod(np.clip(box[2:] - box[:2], 0, None)))


def is_visible(annotation: dict, share: float) -> bool:
    """Whether this share of the whole box, or more, is left."""
    # Boxes that are not cut differ by rounding.
    return area(annotation["bbox"]) >= (1 - 1e-6) * share * annotation["whole_area"]
