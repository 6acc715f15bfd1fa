#!/usr/bin/env python3
"""
Time and peak memory of reading a COCO-format file, beside pycocotools and Detectron2, each in a
process of its own. The file is generated: boxes with polygons, as large as COCO's by default.

    python benchmarks/benchmark_data.py --images 120000 --boxes 900000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
from benchmarking import read_status
from detectron2.data.datasets import load_coco_json
from pycocotools.coco import COCO
from tabulate import tabulate

from gfl_d2.data.coco_format import read_annotations

NUM_CLASSES = 80
SUBJECTS = {
    "pycocotools": COCO,
    "Detectron2": lambda path: load_coco_json(path, ""),
    "gfl_d2": lambda path: read_annotations(path).to_records(),
}


def write_file(path: Path, num_images: int, num_boxes: int) -> None:
    """Boxes in images of 640x480, with polygons of 12 points, about as long as COCO's."""
    rng = np.random.default_rng(0)
    starts, sides = rng.uniform(0, [480, 320], (num_boxes, 2)), rng.uniform(8, 160, (num_boxes, 2))
    boxes = np.concatenate([starts, sides], axis=1).round(2)
    corners = np.concatenate([starts, starts + sides], axis=1)[:, [0, 1, 2, 1, 2, 3, 0, 3] * 3]
    polygons = (corners + rng.uniform(-1, 1, corners.shape)).round(2)
    of_image, of_class = (rng.integers(1, n + 1, num_boxes) for n in (num_images, NUM_CLASSES))
    columns = zip(boxes.tolist(), polygons.tolist(), of_image.tolist(), of_class.tolist())
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3] / 2,
            "iscrowd": 0,
            "segmentation": [polygon],
        }
        for number, (box, polygon, image, category) in enumerate(columns, start=1)
    ]
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480}
        for i in range(1, num_images + 1)
    ]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, NUM_CLASSES + 1)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(data), encoding="utf-8")


def measure(name: str, path: str, results: multiprocessing.Queue) -> None:
    """Put the processor time in seconds and the added peak memory in MiB."""
    memory = read_status("VmHWM")
    start = time.process_time()
    data = SUBJECTS[name](path)
    seconds = time.process_time() - start
    assert data is not None  # it is in memory until here
    results.put((seconds, (read_status("VmHWM") - memory) / 2**10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--images", type=int, default=120_000)
    parser.add_argument("--boxes", type=int, default=900_000)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    rows = {name: [] for name in SUBJECTS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        write_file(path, args.images, args.boxes)
        for name in list(SUBJECTS) * args.repeats:
            results = context.Queue()
            process = context.Process(target=measure, args=(name, str(path), results))
            process.start()
            rows[name].append(results.get())
            process.join()
    medians = {name: np.median(values, axis=0) for name, values in rows.items()}
    seconds, mebibytes = sum(medians[name] for name in ("pycocotools", "Detectron2"))
    table = [
        [name, f"{s:.1f}", f"{s / seconds:.2f}", f"{m:.0f}", f"{2 * m / mebibytes:.2f}"]
        for name, (s, m) in medians.items()
    ]
    headers = ["", "s", "of the first two together", "MiB", "of their mean"]
    print(tabulate(table, headers, tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
