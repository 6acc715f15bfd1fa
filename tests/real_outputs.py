"""
Detections from what a real detector predicts for the photographs of the COCO sample.

It is NanoDet-m, trained elsewhere on COCO with QFL and DFL, on photographs of 416x416 pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor

from gfl_d2.data import register_coco_format
from gfl_d2.modeling import GFL, GeneralDistribution, LocationGrid
from gfl_d2.modeling.uncertainty import scale_uncertainty
from models import gfl_on_features

__all__ = ["CLASSES", "detect_real_outputs", "register_real_outputs"]

SIZE, STRIDES, CLASSES, REG_MAX = 416, (8, 16, 32), 80, 7
# The dataset's name -> its folder, and what the file calls it.
SPLITS = {"real_val": ("val2017", "val"), "real_train": ("train2017", "tra")}


def register_real_outputs(real_data: Path, name: str) -> list[dict]:
    """Register "real_val" or "real_train", the photographs' annotations; returns its records."""
    folder, (split, _) = real_data / "coco_sample", SPLITS[name]
    json_file = folder / "annotations" / f"instances_{split}.json"
    register_coco_format(name, json_file, folder / split)
    return DatasetCatalog.get(name)


@torch.no_grad()
def detect_real_outputs(real_data: Path, name: str, **options: object) -> dict[int, Instances]:
    """
    Args:
        real_data: the fixture. The file is in the folder ``reference`` beside it: the test is
            skipped where it is not.
        name: of a dataset of :func:`register_real_outputs`, which is registered.
        options: of :class:`GFL`'s post-processing, such as ``test_uncertainty``.

    Returns:
        dict: image id -> detections, as of a model, in pixels of the photograph.
    """
    path = real_data.parent / "reference" / "real_outputs.npz"
    if not path.is_file():
        pytest.skip(f"no {path} to test with")
    with np.load(path, allow_pickle=False) as file:
        is_here = file["split"] == SPLITS[name][1]
        arrays = {key: file[key][is_here] for key in file.files}
    shapes = [(SIZE // stride, SIZE // stride) for stride in STRIDES]
    model = _build_model(shapes, options)
    found = {}
    for record in register_real_outputs(real_data, name):
        of_image = arrays["image_id"] == record["image_id"]
        predictions = _to_maps({key: a[of_image] for key, a in arrays.items()}, shapes)
        images = ImageList(torch.zeros(1, 3, SIZE, SIZE), [(SIZE, SIZE)])
        (result,) = model.forward_inference(images, [], predictions)
        result = detector_postprocess(result, record["height"], record["width"])
        if model.test_uncertainty:
            scale_uncertainty(result)
        found[record["image_id"]] = result
    return found


def _build_model(shapes: list[tuple[int, int]], options: dict) -> GFL:
    features = [torch.zeros(1, 64, *shape) for shape in shapes]
    box = GeneralDistribution(reg_max=REG_MAX)
    model = gfl_on_features(features, num_classes=CLASSES, num_convs=0, box=box, **options)
    model.grid = LocationGrid(STRIDES, offset=0.5)
    return model.eval()


def _to_maps(
    arrays: dict[str, np.ndarray], shapes: list[tuple[int, int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Class logits and box values of one image; locations that are not in the file score 0."""
    class_logits, box_values = [], []
    for level, shape in enumerate(shapes):
        here = arrays["level"] == level
        row, column = (torch.from_numpy(arrays[k][here]).long() for k in ("row", "column"))
        for maps, key, empty in (
            (class_logits, "class_logits", -20.0), (box_values, "box_logits", 0.0)
        ):  # fmt: skip
            values = torch.from_numpy(arrays[key][here]).float()  # (P, channels)
            maps.append(torch.full((1, values.shape[1], *shape), empty))
            maps[-1][0][:, row, column] = values.T
    return class_logits, box_values
