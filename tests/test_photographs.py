"""Training and evaluation on real photographs, where there are some."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from gfl_d2 import load_config
from gfl_d2.data import GFLDatasetMapper
from scripts import ROOT

PUBLISHED = sorted(json.loads((ROOT / "tests" / "complexity.json").read_text()))


@pytest.fixture(scope="module")
def coco(real_data):
    """Images of the COCO sample by id."""
    folder = real_data / "coco_sample"
    json_file = folder / "annotations" / "instances_val2017.json"
    records = load_coco_json(str(json_file), str(folder / "val2017"), "coco_sample_val")
    return {record["image_id"]: record for record in records}


def load(name, *opts):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts]
    return load_config(str(ROOT / "configs" / f"{name}.yaml"), opts)


def test_training_step_at_full_size(coco):
    """One image without any annotation and one with a crowd."""
    crowds = [i for i, r in coco.items() if any(a["iscrowd"] for a in r["annotations"])]
    cfg = load("gfl_R_50_FPN_1x")
    mapper = GFLDatasetMapper(cfg, is_train=True)
    batch = [mapper(coco[58636]), mapper(coco[crowds[0]])]
    assert len(batch[0]["instances"]) == 0
    num_boxes = sum(not a["iscrowd"] for a in coco[crowds[0]]["annotations"])
    assert len(batch[1]["instances"]) == num_boxes > 0
    assert all(min(x["image"].shape[1:]) == 800 for x in batch)

    model = build_model(cfg).train()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name


@torch.no_grad()
@pytest.mark.parametrize("name", PUBLISHED)
def test_detection(coco, name):
    """Untrained, all scores are near the prior: with a low threshold everything is decoded."""
    cfg = load(name, "INPUT.MIN_SIZE_TEST", 320, "MODEL.GFL.SCORE_THRESH_TEST", 0.005)
    record = next(iter(coco.values()))
    model = build_model(cfg).eval()
    (output,) = model([GFLDatasetMapper(cfg, is_train=False)(record)])
    detections = output["instances"]
    assert detections.image_size == (record["height"], record["width"])
    assert len(detections) > 0
    assert detections.pred_boxes.tensor.isfinite().all()
    assert detections.pred_boxes.nonempty().all()
