"""A tiny dataset and the options of a training on it that takes a second."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from scripts import ROOT

CONFIG = str(ROOT / "configs" / "gfl_R_18_FPN_bccd_reference.yaml")


def write_dataset(folder: Path) -> None:
    """Six images of 64x96 with two boxes each, but for an empty one and one with a crowd."""
    images, annotations = [], []
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(1, 7):
        pixels = generator.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "images" / f"{i}.png"), pixels)
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 96})
        for k in range(0 if i == 1 else 2):
            x, y, w, h = generator.uniform([0, 0, 8, 8], [40, 20, 50, 40]).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": k + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(i == 2 and k == 1),
                }
            )
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(data))


def options(folder: Path, *opts) -> list[str]:
    """KEY VALUE pairs: a small model, three iterations, ``opts`` after them."""
    entries = [
        [name, str(folder / "instances.json"), str(folder / "images")]
        for name in ("toy_train", "toy_val")
    ]
    return [
        *("DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "('toy_train',)"),
        *("DATASETS.TEST", "('toy_val',)", "MODEL.GFL.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu"),
        *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.GFL.CONV_DIM", "64", "MODEL.GFL.NUM_CONVS", "1"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False", "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()"),
        *("SOLVER.WARMUP_ITERS", "1", "TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "2"),
        # Untrained scores are low, and without detections there is no AP.
        *("MODEL.GFL.SCORE_THRESH_TEST", "0.0"),
        *("OUTPUT_DIR", str(folder / "output"), *map(str, opts)),
    ]
