"""Boxes and images that may be mistakes: duplicates, outliers, and files that are there twice."""

from __future__ import annotations

import collections
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from PIL import Image
from torchvision.ops import box_iou
from tqdm import tqdm

from ..data.images import READ_ERRORS, refuse_programs, why_unreadable
from .boxes import BoxTable, InputSize, group_rows

__all__ = ["DUPLICATES", "MAX_LISTED", "check_files", "find_duplicates", "find_suspicious"]

# Items of a list in the JSON file.
MAX_LISTED = 1000

# Kinds of duplicates, and how bad they are. Near ones are those of a higher IoU; those of other
# classes may be exact too.
DUPLICATES = ("exact", "near", "other_class")
_BADNESS = np.array([2.0, 1.5, 1.0])
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


def find_duplicates(table: BoxTable) -> tuple[np.ndarray, np.ndarray]:
    """
    Duplicates among the boxes of each image. Of a table without crowds.

    Returns:
        ndarray: shape (P, 2), pairs of rows of the table with an IoU above 0.95.
        ndarray: shape (P,), the kind of each, an index of DUPLICATES.
    """
    boxes, pairs = torch.from_numpy(table.boxes), [np.zeros((0, 2), dtype=np.int64)]
    for rows in group_rows(table.image):
        for start in range(0, len(rows), 1000):  # an image may have very many
            iou = box_iou(boxes[rows[start : start + 1000]], boxes[rows[start:]])
            is_near = iou.triu(diagonal=1) > _NEAR
            pairs.append(rows[start:][is_near.nonzero().numpy()])
    pairs = np.concatenate(pairs)
    one, other = pairs.T
    is_exact = (table.boxes[one] == table.boxes[other]).all(axis=1)
    is_same_class = table.classes[one] == table.classes[other]
    return pairs, np.where(is_same_class, np.where(is_exact, 0, 1), 2)


def find_suspicious(table: BoxTable, size: InputSize) -> tuple[list[dict], dict[str, int]]:
    """
    Boxes that are unlike the others of their class, or that no annotator would have meant. Of a
    table without crowds.

    Returns:
        list[dict]: the worst first, each with its "reasons", and their sum as "score".
        dict: how many duplicates of each kind there are.
    """
    boxes, classes = table.boxes, table.classes
    at_input = table.boxes_at(size.shapes(table.sizes))
    tiny = (at_input[:, 2:] - at_input[:, :2]).min(axis=1)
    width, height = (boxes[:, 2:] - boxes[:, :2]).clip(min=1e-3).T
    image = table.sizes[table.image][:, ::-1]
    inside = boxes.clip(0, np.concatenate([image, image], axis=1))
    area = (inside[:, 2:] - inside[:, :2]).prod(axis=1)
    outside = 1 - area / (width * height)
    is_crossing = (np.abs(boxes - inside).max(axis=1) > _CROSSING[0]) & (outside > _CROSSING[1])
    is_whole = area / image.prod(axis=1) > _WHOLE
    count, whole = (np.bincount(classes, weights, minlength=1) for weights in (None, is_whole))
    is_whole &= (whole <= _USUAL * count)[classes]
    # The border cuts objects off: that makes boxes smaller, wider or taller.
    is_uncut = ((boxes[:, :2] >= 1) & (boxes[:, 2:] <= image - 1)).all(axis=1)
    larger = _robust_z(np.log(width * height) / 2, classes) / _OUTLIER
    wider = _robust_z(np.log(width / height), classes) / _OUTLIER
    pairs, kinds = find_duplicates(table)
    twin = np.zeros(len(boxes), dtype=np.int64)
    twin[pairs[:, 1]] = pairs[:, 0]
    repeats = np.bincount(pairs[:, 1], _BADNESS[kinds], minlength=len(boxes))

    # Where each holds, how bad that is, from 1, and what to say of box i.
    reasons = [
        (tiny < _TINY, _TINY / tiny.clip(0.2), lambda i: f"{tiny[i]:.1f} pixels at the input"),
        (larger > 1, larger, lambda i: "much larger than its class"),
        ((larger < -1) & is_uncut, -larger, lambda i: "much smaller than its class"),
        ((wider > 1) & is_uncut, wider, lambda i: "much wider than its class"),
        ((wider < -1) & is_uncut, -wider, lambda i: "much taller than its class"),
        (is_whole, 1.5, lambda i: "nearly the whole image"),
        (is_crossing, 1 + 5 * outside, lambda i: f"{outside[i]:.0%} outside of the image"),
        (repeats > 0, repeats, lambda i: f"as another box ({table.class_names[classes[twin[i]]]})"),
    ]
    scores = np.array([np.where(holds, score, 0) for holds, score, _ in reasons])
    total, found = scores.sum(axis=0), []
    for row in np.argsort(-total, kind="stable")[: np.count_nonzero(total)].tolist():
        worst_first = np.argsort(-scores[:, row], kind="stable")
        x0, y0, x1, y1 = boxes[row].tolist()
        found.append({
            "file": table.files[table.image[row]],
            "class": table.class_names[classes[row]],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(total[row]),
            "reasons": [reasons[k][2](row) for k in worst_first if scores[k, row]],
        })  # fmt: skip
    return found, dict(zip(DUPLICATES, np.bincount(kinds, minlength=3).tolist()))


def check_files(parts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """
    Read the images of "train" and perhaps "test" whole, with a progress bar. Returns those that
    cannot be read, with the reason, and those of the same content.
    """
    files = sorted({file for part in parts.values() for file in part})
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 2)) as pool:
        results = pool.map(_check_file, files)
        found = dict(zip(files, tqdm(results, "files", len(files), leave=False, unit="image")))
    same = collections.defaultdict(lambda: {"train": [], "test": []})
    for part, names in parts.items():
        for name in names:
            if found[name][0]:
                same[found[name][0]][part].append(name)
    in_both = [x for x in same.values() if x["train"] and x["test"]]
    in_train = [x["train"] for x in same.values() if len(x["train"]) > 1]
    return {
        "unreadable": {file: problem for file, (_, problem) in found.items() if problem},
        "in_train_and_test": len(in_both),
        "in_train_and_test_files": in_both[:MAX_LISTED],
        "several_times_in_train": len(in_train),
        "several_times_in_train_files": in_train[:MAX_LISTED],
    }


def _check_file(file: str) -> tuple[str, str]:
    """The hash of its content, or why it cannot be read."""
    try:
        with PathManager.open(file, "rb") as stream:
            content = stream.read()
        with Image.open(io.BytesIO(content)) as image:
            refuse_programs(image)
            image.draft("RGB", (8, 8))  # a JPEG is decoded small, which is faster
            image.load()
    except READ_ERRORS as error:
        return "", why_unreadable(error, file)
    return hashlib.blake2b(content, digest_size=16).hexdigest(), ""


def _robust_z(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Distance of each value, (M,), from the median of its class, in robust deviations."""
    z = np.zeros(len(values))
    for rows in group_rows(classes):
        if len(rows) >= _MIN_BOXES:
            away = values[rows] - np.median(values[rows])
            z[rows] = away / max(1.4826 * np.median(np.abs(away)), _LEAST_SPREAD)
    return z
