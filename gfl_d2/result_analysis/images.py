"""Which images go worst and best."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from ..errors import InputError
from ..visualization import draw_comparison, read_images, stack_rows
from .matching import Matches
from .result_set import ResultSet

__all__ = ["ImageErrors", "draw_images", "rank_images"]

logger = logging.getLogger(__name__)

_WIDTH = 1400  # of a picture, in pixels


class ImageErrors(NamedTuple):
    """What the detections of an image are worth that reach the threshold of their class."""

    image: int
    lrp: float  # LRP error of the image, from 0 to 1, see Threshold
    found: int
    false: int
    not_found: int
    mean_iou: float  # of found objects, NaN without


def rank_images(
    results: ResultSet, matches: Matches, min_iou: float, thresholds: Sequence[float]
) -> list[ImageErrors]:
    """
    From the worst to the best LRP error; of equal ones, that with more errors is worse. Images
    without objects and detections are left out.

    Args:
        matches: those at ``min_iou``.
        thresholds: (C,), of the score; NaN for a class of which no detection counts.
    """
    is_used = (results.scores >= np.asarray(thresholds)[results.classes]) & ~matches.is_ignored
    is_true = matches.is_true & is_used
    count = len(results.image_ids)

    def total(images: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(images, weights=weights, minlength=count)

    objects = total(results.gt_images[~results.is_crowd])
    found = total(results.images[is_true])
    false = total(results.images[is_used & ~matches.is_true])
    ious = total(results.images[is_true], matches.iou[is_true])
    ranked = []
    for i in np.nonzero(objects + false)[0].tolist():
        not_found = objects[i] - found[i]
        cost = (found[i] - ious[i]) / (1 - min_iou) + false[i] + not_found
        numbers = (int(found[i]), int(false[i]), int(not_found))
        mean_iou = float(ious[i] / found[i]) if found[i] else float("nan")
        ranked.append(ImageErrors(i, float(cost / (objects[i] + false[i])), *numbers, mean_iou))
    return sorted(ranked, key=lambda x: (-x.lrp, -x.false - x.not_found, x.image))


def draw_images(
    results: ResultSet, ranked: Sequence[ImageErrors], thresholds: Sequence[float], number: int
) -> np.ndarray | None:
    """
    Draw the first images, below each other: ground truth beside the detections that reach the
    threshold of their class. Those that cannot be read are left out, with a warning.

    Returns:
        ndarray: RGB, uint8, shape (H, W, 3). None if no image can be read.
    """
    metadata = MetadataCatalog.get(results.dataset)
    records = {record["image_id"]: record for record in DatasetCatalog.get(results.dataset)}
    errors = {results.image_ids[x.image]: x for x in ranked}
    rows = []
    try:
        for record, image in read_images([records[id] for id in errors], number):
            x = errors[record["image_id"]]
            detections = _detections(results, x.image, thresholds, image.shape[:2])
            title = (
                f"LRP error {x.lrp:.2f}: {x.found} found, {x.false} false, {x.not_found} not found"
            )
            picture = draw_comparison(image, record, detections, metadata, 0, title)
            height = round(picture.shape[0] * _WIDTH / picture.shape[1])
            if picture.shape[1] > _WIDTH:
                picture = cv2.resize(picture, (_WIDTH, height), interpolation=cv2.INTER_AREA)
            rows.append(picture)
    except InputError as error:
        logger.warning(f"No picture of images of '{results.dataset}': {error}")
        return None
    return stack_rows(rows) if rows else None


def _detections(
    results: ResultSet, image: int, thresholds: Sequence[float], size: tuple[int, int]
) -> Instances:
    taken = results.take(
        (results.images == image) & (results.scores >= np.asarray(thresholds)[results.classes])
    )
    boxes = torch.from_numpy(taken.boxes).float()
    boxes[:, 2:] += boxes[:, :2]
    scores, classes = torch.from_numpy(taken.scores), torch.from_numpy(taken.classes)
    return Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
