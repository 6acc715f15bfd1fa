"""Training and evaluation on real photographs, where there are some."""

from __future__ import annotations

import collections
import json

import cv2
import pytest
import torch
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gfl_d2 import load_config
from gfl_d2.checkpoint import GFLCheckpointer
from gfl_d2.conversion import from_mmdet, read_checkpoint, write_checkpoint
from gfl_d2.data import GFLDatasetMapper
from reference_data import checkpoint_file
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@torch.no_grad()
def test_imported_detector_detects_as_the_reference(real_data, tmp_path):
    """
    A detector trained by the reference implementation, on all validation images of BCCD: the same
    detections, given the same resized images. (OpenCV's; Detectron2 resizes by another filter.)
    """
    weights = read_checkpoint(checkpoint_file("mmdet_gfl_r18_bccd.pth"))
    write_checkpoint(from_mmdet(weights).content, tmp_path / "model.pth")
    model = build_model(load("gfl_R_18_FPN_bccd_reference")).eval()
    GFLCheckpointer(model, complete=True).load(str(tmp_path / "model.pth"))

    bccd = COCO(str(real_data / "bccd" / "instances_val.json"))
    expected = checkpoint_file("mmdet_gfl_r18_bccd_val_detections.json").read_text()
    expected_by_image = collections.defaultdict(list)
    for detection in json.loads(expected):
        expected_by_image[detection["image_id"]].append(detection)
    categories = sorted(bccd.getCatIds())
    results = []
    for record in bccd.loadImgs(bccd.getImgIds()):
        image = cv2.imread(str(real_data / "bccd" / "images" / record["file_name"]))
        image = cv2.resize(image, (320, 240), interpolation=cv2.INTER_LINEAR)[:, :, ::-1]
        size = {"height": record["height"], "width": record["width"]}
        (output,) = model([{"image": torch.as_tensor(image.transpose(2, 0, 1).copy()), **size}])
        detections = output["instances"]
        boxes = detections.pred_boxes.tensor
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)

        reference = expected_by_image[record["id"]]
        labels = [categories[i] for i in detections.pred_classes]
        scores = torch.tensor([detection["score"] for detection in reference])
        assert labels == [detection["category_id"] for detection in reference]
        torch.testing.assert_close(detections.scores, scores, rtol=0, atol=1e-4)
        reference_boxes = torch.tensor([detection["bbox"] for detection in reference])
        torch.testing.assert_close(boxes, reference_boxes, rtol=0, atol=0.05)
        results += [
            {"image_id": record["id"], "category_id": label, "bbox": box, "score": score}
            for label, box, score in zip(labels, boxes.tolist(), detections.scores.tolist())
        ]

    assert average_precision(bccd, results) == pytest.approx(
        average_precision(bccd, json.loads(expected)), abs=0.05
    )


def average_precision(dataset, results):
    """In percent."""
    evaluation = COCOeval(dataset, dataset.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * evaluation.stats[0]
