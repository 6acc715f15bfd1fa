"""A small dataset on disk, and configs for it."""

import copy
import json

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from PIL import Image

from gfl_d2 import add_gfl_config
from gfl_d2.data import register_coco_format
from gfl_d2.errors import InputError

WIDTH, HEIGHT = 40, 30
# Category ids as in the wild: neither in order nor without gaps.
COCO = {
    "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    "images": [
        {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)
    ],
    "annotations": [
        {
            "id": 10 + i,
            "image_id": i,
            "category_id": category,
            "bbox": [2, 3, 10, 8],
            "area": 80,
            "iscrowd": 0,
        }
        for i, category in ((1, 7), (2, 3))
    ],
}


class Data:
    """A small dataset on disk, whose annotations a test can spoil."""

    def __init__(self, folder):
        self.folder = folder
        self.coco = copy.deepcopy(COCO)
        self.json_file = folder / "annotations.json"
        self.image_root = folder / "images"
        self.image_root.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for image in self.coco["images"]:
            pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.image_root / image["file_name"])

    def write(self):
        self.json_file.write_text(json.dumps(self.coco))

    def register(self, name="pets"):
        self.write()
        register_coco_format(name, self.json_file, self.image_root)

    def error(self) -> str:
        with pytest.raises(InputError) as error:
            self.register()
        assert "pets" not in DatasetCatalog
        assert str(self.json_file) in str(error.value)
        return str(error.value)


def make_cfg(train=("pets",), test=("pets",), num_classes=2, register=()):
    cfg = get_cfg()
    add_gfl_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GFL"
    cfg.MODEL.GFL.NUM_CLASSES = num_classes
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.DATASETS.REGISTER = [[str(item) for item in entry] for entry in register]
    return cfg


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("gfl_d2")]


def boxes_of(name) -> list[list[int]]:
    """The classes of the boxes of each image of a registered dataset."""
    return [[a["category_id"] for a in r["annotations"]] for r in DatasetCatalog.get(name)]
