"""Our detectors in SAHI."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from gfl_d2.checkpoint import describe_model
from gfl_d2.deploy import Predictor
from models import small_config

pytest.importorskip("sahi")

from sahi.predict import get_prediction, get_sliced_prediction

from gfl_d2.deploy.sahi import GFLDetectionModel

NAMES = ["red", "white", "platelet"]
OPTS = ("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 128, "MODEL.GFL.SCORE_THRESH_TEST", 0.001)


@pytest.fixture(params=["BGR", "RGB"])
def checkpoint(tmp_path, request):
    cfg = small_config("joint", "general", "atss", *OPTS, "INPUT.FORMAT", request.param)
    torch.manual_seed(0)
    model = build_model(cfg)
    path = tmp_path / "model_final.pth"
    torch.save({**describe_model(cfg, NAMES), "model": model.state_dict()}, path)
    return str(path)


def make_image(height=96, width=128):
    """RGB. Channels differ, so that it matters which is which."""
    rng = np.random.default_rng(0)
    return (rng.random((height, width, 3)) * (250, 120, 40)).astype(np.uint8)


def test_same_detections_as_those_of_a_predictor(checkpoint):
    """Those above the threshold, with the names of the checkpoint's classes."""
    image = make_image()
    expected = Predictor(checkpoint)(image[:, :, ::-1])["instances"]
    threshold = float(expected.scores[: len(expected) // 2 + 1].min())
    model = GFLDetectionModel(model_path=checkpoint, confidence_threshold=threshold, device="cpu")
    actual = get_prediction(image, model).object_prediction_list
    expected = expected[expected.scores >= threshold]
    assert len(actual) == len(expected) > 0
    for found, box, score, number in zip(
        actual, expected.pred_boxes, expected.scores, expected.pred_classes
    ):
        assert found.bbox.to_xyxy() == pytest.approx(box.tolist(), abs=1e-3)
        assert found.score.value == pytest.approx(float(score))
        assert found.category.name == NAMES[number]


def test_config_file_size_and_a_predictor_of_ones_own(checkpoint, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(Predictor(checkpoint).cfg.dump())
    model = GFLDetectionModel(
        model_path=checkpoint, config_path=str(config), image_size=64, device="cpu"
    )
    cfg = model.model.cfg
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (64, 64)
    predictor = Predictor(checkpoint)
    assert GFLDetectionModel(model=predictor, device="cpu").model is predictor


def test_sliced_prediction(checkpoint):
    """What is in a slice is what is in that part of the image, at its place."""
    image = make_image(192, 256)
    model = GFLDetectionModel(model_path=checkpoint, confidence_threshold=0, device="cpu")
    options = {"overlap_height_ratio": 0, "overlap_width_ratio": 0, "verbose": 0}
    keep_all = {"postprocess_match_metric": "IOU", "postprocess_match_threshold": 1.0}
    options.update(keep_all, postprocess_type="NMS", perform_standard_pred=False)
    sliced = get_sliced_prediction(image, model, 96, 128, **options)
    part = get_prediction(np.ascontiguousarray(image[96:, 128:]), model).object_prediction_list
    shifted = [np.add(found.bbox.to_xyxy(), (128, 96, 128, 96)) for found in part]
    boxes = [found.bbox.to_xyxy() for found in sliced.object_prediction_list]
    assert len(shifted) > 0
    assert all(np.abs(np.subtract(boxes, box)).max(axis=1).min() < 1 for box in shifted)
