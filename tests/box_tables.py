"""Tables of boxes without images, for tests of the analysis."""

from __future__ import annotations

import numpy as np

from gfl_d2 import load_config
from gfl_d2.analysis.boxes import BoxTable
from scripts import ROOT

CONFIG = str(ROOT / "configs" / "gfl_R_18_FPN_demo.yaml")


def make_table(boxes, image=None, classes=None, sizes=((512, 512),)) -> BoxTable:
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    zeros = np.zeros(len(boxes), dtype=np.int64)
    classes = zeros if classes is None else np.array(classes)
    return BoxTable(
        names=("set",),
        class_names=[f"class {i}" for i in range(classes.max(initial=0) + 1)],
        files=[f"{i}.png" for i in range(len(sizes))],
        sizes=np.array(sizes),
        boxes=boxes,
        classes=classes,
        image=zeros if image is None else np.array(image),
        is_crowd=zeros.astype(bool),
    )


def make_config(*opts: object):
    return load_config(CONFIG, ["MODEL.DEVICE", "cpu", *map(str, opts)])


def random_boxes(rng, number: int, side: float, largest: float) -> np.ndarray:
    size = np.exp(rng.uniform(np.log(3), np.log(largest), (number, 2)))
    corner = rng.uniform(0, 1, (number, 2)) * (side - size)
    return np.concatenate([corner, corner + size], axis=1)
