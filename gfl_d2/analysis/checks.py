"""Boxes and images that may be mistakes: duplicates, outliers, and files that are there twice."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from PIL import Image
from tqdm import tqdm

from ..errors import first_line
from ..modeling import aligned_iou
from .boxes import BoxTable

__all__ = ["Duplicates", "Suspicion", "check_files", "find_duplicates", "find_suspicious"]

# Boxes of a higher IoU are near duplicates.
_NEAR = 0.95
# Sides below this, in pixels at the input, are tiny.
_TINY = 2.0
# Robust standard deviations from the median of the class that make an outlier, and the least that
# one counts for, in logarithms. A class needs some boxes to say what is usual.
_OUTLIER = 4.0
_LEAST_SPREAD = 0.15
_MIN_BOXES = 20
# A box that covers more of its image covers nearly all of it. Where more of a class do, it is
# what the class looks like.
_WHOLE = 0.95
_USUAL = 0.05
# Pixels of the image, and share of its side, by which a box must cross the border.
_CROSSING = (2.0, 0.02)


@dataclass(frozen=True)
class Duplicates:
    """Pairs of boxes of one image with an IoU above 0.95. Shape: P pairs."""

    pairs: np.ndarray  # (P, 2), rows of the table, in order
    is_same_class: np.ndarray  # (P,), bool
    is_exact: np.ndarray  # (P,), bool: all four numbers are equal

    def counts(self) -> dict[str, int]:
        return {
            "exact": int((self.is_exact & self.is_same_class).sum()),
            "near": int((~self.is_exact & self.is_same_class).sum()),
            "other_class": int((~self.is_same_class).sum()),
        }


@dataclass(frozen=True)
class Suspicion:
    """A box that may be wrong."""

    row: int  # of the table
    score: float  # sum of how bad each reason is, from 1
    reasons: tuple[str, ...]


def find_duplicates(table: BoxTable) -> Duplicates:
    """
    Duplicates among the boxes of each image. Of a table without crowds.

    With an IoU above t the one box begins at most (1 / t - 1) of its width after the other. So
    boxes are sorted by image and left side, and each is compared with the few behind it.
    """
    boxes = table.boxes
    left, width = boxes[:, 0], boxes[:, 2] - boxes[:, 0]
    order = np.lexsort((left, table.image))
    # One number that is in the same order: image after image.
    step = (left.max(initial=0) - left.min(initial=0)) + width.max(initial=0) + 1
    key = (table.image * step + (left - left.min(initial=0)))[order]
    last = np.searchsorted(key, key + width[order] * (1 / _NEAR - 1) + 1e-6, side="right")
    number = (last - np.arange(len(key)) - 1).clip(min=0)
    first = np.repeat(np.arange(len(key)), number)
    second = first + 1 + np.arange(len(first)) - np.repeat(number.cumsum() - number, number)
    pairs = np.sort(np.stack([order[first], order[second]], axis=1), axis=1)
    pairs = pairs[table.image[pairs[:, 0]] == table.image[pairs[:, 1]]]
    iou = aligned_iou(*(torch.from_numpy(boxes[side]) for side in pairs.T)).numpy()
    pairs = pairs[iou > _NEAR]
    one, other = pairs.T
    return Duplicates(
        pairs=pairs,
        is_same_class=table.classes[one] == table.classes[other],
        is_exact=(boxes[one] == boxes[other]).all(axis=1),
    )


def find_suspicious(
    table: BoxTable, boxes_at_input: np.ndarray, duplicates: Duplicates
) -> list[Suspicion]:
    """
    Boxes that are unlike the others of their class, or that no annotator would have meant.

    Args:
        table: without crowds.
        boxes_at_input: shape (M, 4), the same boxes at the input size, in pixels.
        duplicates: of the table.

    Returns:
        list[Suspicion]: the worst first.
    """
    found: dict[int, list[tuple[float, str]]] = {}

    def add(rows: np.ndarray, scores: np.ndarray, texts: Sequence[str]) -> None:
        for row, score, text in zip(rows.tolist(), scores.tolist(), texts):
            found.setdefault(row, []).append((score, text))

    side = (boxes_at_input[:, 2:] - boxes_at_input[:, :2]).min(axis=1)
    (rows,) = np.nonzero(side < _TINY)
    tiny = side[rows]
    add(rows, (_TINY / tiny.clip(min=0.2)), [f"{x:.1f} pixels at the input" for x in tiny])

    width, height = (table.boxes[:, 2:] - table.boxes[:, :2]).clip(min=1e-3).T
    size = table.sizes[table.image][:, ::-1]
    inside = table.boxes.clip(0, np.concatenate([size, size], axis=1))
    # The border cuts objects off: that makes boxes smaller, wider or taller.
    is_cut = ((table.boxes[:, :2] < 1) | (table.boxes[:, 2:] > size - 1)).any(axis=1)
    z = _robust_z(np.log(width * height) / 2, table.classes)
    (rows,) = np.nonzero((z > _OUTLIER) | ((z < -_OUTLIER) & ~is_cut))
    texts = [f"much {'larger' if x > 0 else 'smaller'} than its class" for x in z[rows]]
    add(rows, np.abs(z[rows]) / _OUTLIER, texts)
    z = _robust_z(np.log(width / height), table.classes)
    (rows,) = np.nonzero((np.abs(z) > _OUTLIER) & ~is_cut)
    texts = [f"much {'wider' if x > 0 else 'taller'} than its class" for x in z[rows]]
    add(rows, np.abs(z[rows]) / _OUTLIER, texts)

    cover = (inside[:, 2:] - inside[:, :2]).prod(axis=1) / size.prod(axis=1)
    is_whole = cover > _WHOLE
    number = np.bincount(table.classes, minlength=1).clip(min=1)
    usual = np.bincount(table.classes, weights=is_whole, minlength=1) / number > _USUAL
    (rows,) = np.nonzero(is_whole & ~usual[table.classes])
    add(rows, np.full(len(rows), 1.5), ["nearly the whole image"] * len(rows))

    outside = np.abs(table.boxes - inside).max(axis=1)
    share = 1 - (inside[:, 2:] - inside[:, :2]).prod(axis=1) / (width * height)
    (rows,) = np.nonzero((outside > _CROSSING[0]) & (share > _CROSSING[1]))
    add(rows, 1 + 5 * share[rows], [f"{x:.0%} outside of the image" for x in share[rows]])

    first, rows = duplicates.pairs.T
    kind = np.where(duplicates.is_same_class, np.where(duplicates.is_exact, 2.0, 1.5), 1.0)
    add(rows, kind, [f"as another box ({table.class_names[table.classes[x]]})" for x in first])

    suspicions = []
    for row, reasons in found.items():
        texts = tuple(dict.fromkeys(text for _, text in sorted(reasons, reverse=True)))
        suspicions.append(Suspicion(row, sum(score for score, _ in reasons), texts))
    return sorted(suspicions, key=lambda x: (-x.score, x.row))


def check_files(files: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """
    Read images whole, with a progress bar.

    Returns:
        dict: file -> hash of its content, of those that can be read.
        dict: file -> why it cannot be read.
    """
    unique = sorted(set(files))
    hashes, problems = {}, {}
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 2)) as pool:
        results = tqdm(
            pool.map(_check_file, unique),
            total=len(unique),
            desc="files",
            leave=False,
            unit="image",
        )
        for file, (content, problem) in zip(unique, results):
            if problem:
                problems[file] = problem
            else:
                hashes[file] = content
    return hashes, problems


def _check_file(file: str) -> tuple[str, str]:
    """The hash of its content, or why it cannot be read."""
    try:
        with PathManager.open(file, "rb") as stream:
            content = stream.read()
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (8, 8))  # a JPEG is decoded small, which is faster
            image.load()
    except Image.UnidentifiedImageError:
        return "", "it is not an image"
    # Pillow raises SyntaxError for some kinds of damage in PNG files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return "", getattr(error, "strerror", None) or str(error) or first_line(error)
    return hashlib.blake2b(content, digest_size=16).hexdigest(), ""


def _robust_z(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Distance of each value, (M,), from the median of its class, in robust deviations."""
    z = np.zeros(len(values))
    order = np.argsort(classes, kind="stable")
    bounds = np.flatnonzero(np.diff(classes[order])) + 1
    for rows in np.split(order, bounds):
        if len(rows) >= _MIN_BOXES:
            away = values[rows] - np.median(values[rows])
            z[rows] = away / max(1.4826 * np.median(np.abs(away)), _LEAST_SPREAD)
    return z
