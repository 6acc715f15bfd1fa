"""Ground truth with detections to analyse, and one that plain thought gives the figures of."""

from __future__ import annotations

import numpy as np

from gfl_d2.result_analysis import ResultSet
from gfl_d2.result_analysis.matching import find_overlaps, match

__all__ = [
    "CAT", "DOG", "make_results", "matched", "num_objects", "plain_matches", "random_results",
    "six_errors",
]  # fmt: skip

CAT, DOG = 0, 1


def make_results(truth: list, detections: list, num_images: int = 1) -> ResultSet:
    """
    Of cats and dogs. ``truth`` has (image, class, box) or (image, class, box, is_crowd),
    ``detections`` (image, class, box, score).
    """
    truth = [(*row, False)[:4] for row in truth]
    detections = sorted(detections, key=lambda row: (row[0], -row[3]))

    def column(rows: list, index: int, dtype: type) -> np.ndarray:
        return np.array([row[index] for row in rows], dtype=dtype)

    gt_boxes = column(truth, 2, float).reshape(-1, 4)
    return ResultSet(
        dataset="pets",
        image_ids=list(range(num_images)),
        class_names=["cat", "dog"],
        gt_images=column(truth, 0, np.int64),
        gt_classes=column(truth, 1, np.int64),
        gt_boxes=gt_boxes,
        gt_areas=gt_boxes[:, 2] * gt_boxes[:, 3],
        is_crowd=column(truth, 3, bool),
        images=column(detections, 0, np.int64),
        classes=column(detections, 1, np.int64),
        boxes=column(detections, 2, float).reshape(-1, 4),
        scores=column(detections, 3, float),
    )


def six_errors() -> ResultSet:
    """One image with an error of each kind."""
    size = (100, 100)
    truth = [(CAT, 0, 0), (CAT, 200, 0), (DOG, 0, 200), (DOG, 200, 200)]
    detections = [
        (CAT, 0, 0, 0.9),  # finds the first cat
        (CAT, 10, 0, 0.8),  # the same again: duplicate
        (CAT, 260, 0, 0.7),  # IoU 0.25 with the other cat: localization
        (CAT, 0, 200, 0.6),  # on a dog: classification
        (DOG, 400, 400, 0.5),  # background
        (DOG, 260, 0, 0.4),  # IoU 0.25 with a cat: both. The last dog is missed.
    ]
    return make_results(
        [(0, c, (x, y, *size)) for c, x, y in truth],
        [(0, c, (x, y, *size), score) for c, x, y, score in detections],
    )


def random_results(seed: int, num_images: int = 25, has_ties: bool = False) -> ResultSet:
    """Crowds, good, bad and double detections, of both classes."""
    rng = np.random.default_rng(seed)
    truth, detections = [], []
    for image in range(num_images):
        for _ in range(rng.integers(0, 8)):
            size = np.exp(rng.uniform(2.5, 5.5, 2))
            box = np.array([*rng.uniform(0, 300, 2), *size])
            animal = int(rng.integers(2))
            truth.append((image, animal, box.tolist(), bool(rng.random() < 0.1)))
            for _ in range(rng.integers(0, 4)):
                noise = rng.normal(0, rng.choice([0.03, 0.15, 0.4]), 4) * np.tile(size, 2)
                kind = animal if rng.random() < 0.8 else 1 - animal
                detections.append((image, kind, np.abs(box + noise).tolist(), rng.random()))
        for _ in range(rng.integers(0, 4)):
            box = rng.uniform(5, 200, 4).tolist()
            detections.append((image, int(rng.integers(2)), box, rng.random() / 2))
    if has_ties:
        detections = [(*row[:3], round(row[3], 1)) for row in detections]
    return make_results(truth, detections, num_images)


def matched(results: ResultSet, min_iou: float = 0.5) -> tuple:
    """Overlaps and matches."""
    overlaps = find_overlaps(results)
    return overlaps, match(overlaps, len(results.scores), min_iou)


def plain_iou(one, other, is_crowd: bool = False) -> float:
    width, height = (
        min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)
    )
    shared = max(width, 0) * max(height, 0)
    area = one[2] * one[3]
    return shared / (area if is_crowd else area + other[2] * other[3] - shared)


def plain_matches(results: ResultSet, animal: int, min_iou: float) -> list[tuple]:
    """(score, IoU with the object found or None) of all detections that are not in crowds."""
    rows = []
    for image in range(len(results.image_ids)):
        here = np.nonzero((results.gt_images == image) & (results.gt_classes == animal))[0]
        free = [g for g in here if not results.is_crowd[g]]
        crowds = [results.gt_boxes[g] for g in here if results.is_crowd[g]]
        mine = np.nonzero((results.images == image) & (results.classes == animal))[0].tolist()
        for d in sorted(mine, key=lambda d: -results.scores[d]):
            box = results.boxes[d]
            ious = {g: plain_iou(box, results.gt_boxes[g]) for g in free}
            best = max(ious, key=ious.get, default=None)
            if best is not None and ious[best] >= min_iou and ious[best] > 0:
                free.remove(best)
                rows.append((results.scores[d], ious[best]))
            elif not any(plain_iou(box, c, is_crowd=True) >= 0.5 for c in crowds):
                rows.append((results.scores[d], None))
    return rows


def num_objects(results: ResultSet, animal: int) -> int:
    return int(((results.gt_classes == animal) & ~results.is_crowd).sum())
