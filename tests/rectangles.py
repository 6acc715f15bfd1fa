"""Images with rectangles of one colour each, which are found again in pixels."""

from __future__ import annotations

import cv2
import numpy as np
from detectron2.structures import BoxMode
from PIL import Image

WIDTH, HEIGHT = 96, 64
# Boxes of an image; those of different images differ by a shift.
BOXES = ((6, 8, 30, 20), (40, 4, 62, 26), (10, 34, 26, 58), (60, 36, 92, 60))


def write_images(folder, count: int = 40, crowd: int | None = None) -> list[dict]:
    """
    Records in Detectron2's dataset format: each image has four boxes of four classes, 4 * i to
    4 * i + 3 for image i, and the colour (class + 1, 0, 0). ``crowd``: which of the four is one.
    """
    records = []
    for i in range(count):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        annotations = []
        for k, (x0, y0, x1, y1) in enumerate(np.array(BOXES) + [i % 4, i % 3, i % 4, i % 3]):
            pixels[y0:y1, x0:x1, 0] = 4 * i + k + 1
            annotations.append({
                "bbox": [x0, y0, x1 - x0, y1 - y0], "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 4 * i + k, "iscrowd": int(k == crowd),
            })  # fmt: skip
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        records.append({
            "file_name": str(path), "height": HEIGHT, "width": WIDTH, "image_id": i,
            "annotations": annotations,
        })  # fmt: skip
    return records


def area_of_class(index: int) -> int:
    x0, y0, x1, y1 = BOXES[index % 4]
    return (x1 - x0) * (y1 - y0)


def find_rectangles(image: np.ndarray, least: float) -> list[tuple]:
    """
    (class, x0, y0, x1, y1) of all rectangles of which this share is left, sorted, as the pixels of
    an image (H, W, 3) show them.
    """
    found = []
    for value in set(np.unique(image[:, :, 0]).tolist()) - {0}:
        mask = (image[:, :, 0] == value).astype(np.uint8)
        stats = cv2.connectedComponentsWithStats(mask, connectivity=4)[2][1:]
        for x, y, w, h, area in stats.tolist():
            if area >= least * area_of_class(value - 1):
                found.append((value - 1, x, y, x + w, y + h))
    return sorted(found)


def to_rectangles(sample: dict) -> list[tuple]:
    """The same, as the instances of a mapper's output say."""
    boxes = sample["instances"].gt_boxes.tensor.tolist()
    return sorted((c, *box) for c, box in zip(sample["instances"].gt_classes.tolist(), boxes))
