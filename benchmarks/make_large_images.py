#!/usr/bin/env python3
"""
Large pictures with small objects, to measure TEST.TILES with: the objects of a dataset in COCO
format, cut out and pasted on an even background, as a dataset of one folder.

    python benchmarks/make_large_images.py bccd/instances_val.json bccd/images output/large
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

MARGIN = 1.15  # sides of what is cut out, in sides of the box
TRIES = 100


def cut_out(content: dict, image_root: Path, scale: float) -> list[tuple[np.ndarray, dict]]:
    """Boxes of the dataset that are whole in their picture, with a margin, resized by ``scale``."""
    files = {image["id"]: image["file_name"] for image in content["images"]}
    objects = []
    for box in content["annotations"]:
        image = cv2.imread(str(image_root / files[box["image_id"]]))
        x, y, w, h = box["bbox"]
        left, top = int(x + w / 2 - MARGIN * w / 2), int(y + h / 2 - MARGIN * h / 2)
        right, bottom = int(left + MARGIN * w), int(top + MARGIN * h)
        if min(left, top) >= 0 and right <= image.shape[1] and bottom <= image.shape[0]:
            part = image[top:bottom, left:right]
            size = (max(4, round((right - left) * scale)), max(4, round((bottom - top) * scale)))
            objects.append((cv2.resize(part, size, interpolation=cv2.INTER_AREA), box))
    return objects


def paste(
    canvas: np.ndarray, taken: np.ndarray, part: np.ndarray, rng: np.random.Generator
) -> tuple[int, int] | None:
    """Paste an ellipse with a soft edge where there is none yet; returns where, or None."""
    h, w = part.shape[:2]
    for _ in range(TRIES):
        x, y = rng.integers(canvas.shape[1] - w), rng.integers(canvas.shape[0] - h)
        place = (slice(y, y + h), slice(x, x + w))
        if not taken[place].any():
            taken[place] = True
            rows, columns = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
            alpha = np.clip((1 - np.hypot(rows, columns)) * 6, 0, 1)[..., None]
            canvas[place] = alpha * part + (1 - alpha) * canvas[place]
            return int(x), int(y)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("annotations", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("folder", type=Path, help="to write valid/ into")
    parser.add_argument("--number", type=int, default=4, help="of pictures")
    parser.add_argument("--objects", type=int, default=300, help="in each picture")
    parser.add_argument("--size", type=int, nargs=2, default=(4000, 3000), help="width, height")
    parser.add_argument("--scale", type=float, default=0.5, help="of the objects")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    content = json.loads(args.annotations.read_text(encoding="utf-8"))
    objects = cut_out(content, args.images, args.scale)
    # The margins show the background.
    color = np.median([part[0].mean(axis=0) for part, _ in objects], axis=0)
    folder = args.folder / "valid"
    folder.mkdir(parents=True, exist_ok=True)
    width, height = args.size
    images, annotations = [], []
    for index in range(args.number):
        canvas = color + rng.normal(scale=3, size=(height, width, 3))
        taken = np.zeros((height, width), dtype=bool)
        for number in rng.integers(len(objects), size=args.objects):
            part, box = objects[number]
            place = paste(canvas, taken, part, rng)
            if place is None:
                continue
            (h, w), (x, y) = part.shape[:2], place
            w_box, h_box = w / MARGIN, h / MARGIN
            corner = [x + (w - w_box) / 2, y + (h - h_box) / 2]
            annotation = {"id": len(annotations) + 1, "image_id": index, "iscrowd": 0}
            annotation.update(bbox=[*corner, w_box, h_box], area=w_box * h_box)
            annotations.append({**annotation, "category_id": box["category_id"]})
        name = f"{index}.jpg"
        cv2.imwrite(str(folder / name), canvas.clip(0, 255).astype(np.uint8))
        images.append({"id": index, "file_name": name, "width": width, "height": height})
    coco = {"images": images, "annotations": annotations, "categories": content["categories"]}
    (folder / "_annotations.coco.json").write_text(json.dumps(coco), encoding="utf-8")


if __name__ == "__main__":
    main()
