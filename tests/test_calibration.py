"""TEST.CALIBRATION: scores of detections as the IoU that they came to on other images."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.export import TracingAdapter
from torch import nn
from torch.testing import assert_close

from gfl_d2.calibration import Calibration, Curve, save_calibration
from gfl_d2.checkpoint import describe_model, load_checkpoint_config
from gfl_d2.data import check_datasets
from gfl_d2.deploy import DenseDetectorWithTTA, Predictor, input_config, prepare_for_inference
from gfl_d2.distributions import detect_with_distributions
from gfl_d2.errors import InputError
from gfl_d2.modeling.calibration import ScoreCalibration
from models import QUALITIES, build_gfl, make_input, small_config

NAMES = ["cat", "dog", "eel"]
STEPS = Curve(np.array([0.0, 0.3, 0.4, 1.0]), np.array([0.0, 0.1, 0.1, 0.9]))  # level in between
POINT = Curve(np.array([0.5]), np.array([0.25]))
MANY = ("MODEL.GFL.NMS_THRESH_TEST", 0.95)
PLAIN, SURE = ("TEST.CALIBRATION", ""), ("TEST.UNCERTAINTY", True)
CALIBRATION = Calibration(NAMES, "cells_val", {"cat": STEPS, "eel": POINT})


@pytest.fixture
def path(tmp_path):
    save_calibration(tmp_path / "calibration.json", CALIBRATION)
    return str(tmp_path / "calibration.json")


def build(quality="joint", *opts):
    """In eval mode, with many detections whose scores are not all alike."""
    model = build_gfl(quality, "general", "atss", *MANY, *opts)
    nn.init.normal_(model.head.cls_score.weight, std=0.05)
    nn.init.constant_(model.head.cls_score.bias, 0.5)
    nn.init.normal_(model.head.bbox_pred.weight, std=0.2)
    return model.eval()


@torch.no_grad()
def detect(model, *inputs):
    return [output["instances"] for output in model(list(inputs))]


def random_curve(seed, number):
    rng = np.random.default_rng(seed)
    scores = np.sort(rng.random(number).astype(np.float32).astype(np.float64))
    return Curve(scores, np.sort(rng.random(number)))


@pytest.mark.parametrize("shape", [(500,), (5, 100), (0,)])
def test_curves(shape):
    """Against np.interp in float64, at random scores, at the knots and at both ends."""
    curves = {str(i): random_curve(i, number) for i, number in enumerate((1, 2, 7, 300))}
    calibration = Calibration([*curves, "none"], "x", curves)
    rng = np.random.default_rng(0)
    scores = rng.random(shape).astype(np.float32)
    special = np.concatenate([c.scores for c in curves.values()] + [[0, 1]])[: scores.size]
    scores.flat[: len(special)] = special
    classes = rng.integers(0, 5, shape)
    actual = ScoreCalibration(calibration)(torch.tensor(scores), torch.tensor(classes))
    expected = calibration.apply(scores.ravel(), classes.ravel()).reshape(shape)
    assert actual.dtype == torch.float32
    # Next to each other, knots of float32 are 6e-8 apart.
    assert_close(actual, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-5)
    assert torch.equal(actual[classes == 4], torch.tensor(scores[classes == 4]))


def test_knots_that_are_one_in_float32():
    curve = Curve(np.array([0.2, 0.5, 0.5 + 1e-12, 0.8]), np.array([0.1, 0.3, 0.6, 0.7]))
    module = ScoreCalibration(Calibration(["a"], "x", {"a": curve}))
    actual = module(torch.tensor([0.5, 0.65]), torch.zeros(2, dtype=torch.int64))
    assert_close(actual, torch.tensor([0.3, 0.65]))


@pytest.mark.parametrize("quality", QUALITIES)
def test_detections(path, quality):
    """Those of the model without it, in another order; nothing of it is in a checkpoint."""
    plain, model = build(quality), build(quality, "TEST.CALIBRATION", path)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    inputs = (make_input(), make_input(size=(96, 64)))
    for actual, expected in zip(detect(model, *inputs), detect(plain, *inputs)):
        raw, classes = expected.scores.numpy(), expected.pred_classes.numpy()
        scores = CALIBRATION.apply(raw, classes).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        assert len(actual) == len(expected) > 20
        assert len(set(classes)) > 1
        assert_close(actual.scores.numpy(), scores[order], rtol=0, atol=1e-6)
        assert (actual.scores.diff() <= 0).all()
        # Between classes rounding may decide.
        for c in range(3):
            own = expected[(expected.pred_classes == c).numpy()]
            of_class = actual[actual.pred_classes == c]
            assert torch.equal(of_class.raw_scores, own.scores)
            assert torch.equal(of_class.pred_boxes.tensor, own.pred_boxes.tensor)


def test_off_is_bit_equal(path):
    (off,), (never,) = (detect(build("joint", *o), make_input()) for o in (PLAIN, ()))
    assert off.get_fields().keys() == never.get_fields().keys()
    assert torch.equal(off.scores, never.scores)
    assert torch.equal(off.pred_boxes.tensor, never.pred_boxes.tensor)


def test_all_fields_are_sorted_alike(path):
    """Those of TEST.UNCERTAINTY too, by box; and in the drawings of distributions."""
    model = build("joint", "TEST.CALIBRATION", path, "TEST.UNCERTAINTY", True)
    (actual,), (expected,) = (detect(m, make_input()) for m in (model, build("joint", *SURE)))
    order = [(actual.pred_boxes.tensor == box).all(dim=1) for box in expected.pred_boxes.tensor]
    order = torch.stack(order) & (actual.pred_classes == expected.pred_classes[:, None])
    assert (order.sum(dim=1) == 1).all()
    order = order.int().argmax(dim=1)
    for name in ("box_std", "box_entropy"):
        assert torch.equal(actual.get(name)[order], expected.get(name))
    drawn = detect_with_distributions(model, {**make_input(), "height": 64, "width": 96})
    assert torch.equal(drawn.scores, actual.scores)
    assert torch.equal(drawn.box_std, actual.box_std)


def test_no_detections(path):
    model = build("joint", "TEST.CALIBRATION", path)
    model.test_score_thresh = 1.0
    (found,) = detect(model, make_input())
    assert found.scores.shape == found.raw_scores.shape == (0,)


def test_copies_and_traces(path):
    model = build("joint", "TEST.CALIBRATION", path)
    (expected,) = detect(model, make_input())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(detect(copied, make_input())[0].scores, expected.scores)
    adapter = TracingAdapter(
        model,
        [{"image": make_input(size=(128, 192))["image"]}],
        inference_func=lambda model, inputs: [x["instances"] for x in model(inputs)],
    )
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    for size in (128, 192), (64, 96):
        image = make_input(size=size)["image"]
        assert_close(traced(image), adapter(image), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_export():
    module = ScoreCalibration(CALIBRATION)
    number = torch.export.Dim("number")
    arguments = torch.rand(50), torch.arange(50) % 3
    exported = torch.export.export(module, arguments, dynamic_shapes=({0: number}, {0: number}))
    arguments = torch.rand(20), torch.arange(20) % 3
    assert_close(exported.module()(*arguments), module(*arguments))


VIEWS = {
    "flip": ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.MAX_SIZE", 128),
    "tiles": ("TEST.TILES.SIZE", 64, "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128),
}


@pytest.mark.parametrize("merge", ["nms", "vote"])
@pytest.mark.parametrize("views", VIEWS)
def test_views_are_merged_by_their_raw_scores(path, views, merge):
    results = []
    for key in (PLAIN, ("TEST.CALIBRATION", path)):
        opts = ("TEST.AUG.MERGE", merge, *VIEWS[views], *key)
        cfg = small_config("joint", "general", "atss", *MANY, *opts)
        model = prepare_for_inference(cfg, build("joint", *opts))
        assert isinstance(model, DenseDetectorWithTTA)
        assert input_config(cfg).INPUT.MIN_SIZE_TEST == 0
        results += detect(model, make_input())
    plain, calibrated = results
    raw, order = calibrated.raw_scores.sort(descending=True, stable=True)
    assert torch.equal(raw, plain.scores)
    expected = CALIBRATION.apply(plain.scores.numpy(), plain.pred_classes.numpy())
    assert_close(calibrated.scores[order].double().numpy(), expected, rtol=0, atol=1e-6)
    assert (calibrated.scores.diff() <= 0).all()
    assert torch.equal(calibrated.pred_boxes.tensor[order], plain.pred_boxes.tensor)


def save_model(folder, names, *opts):
    cfg = small_config("joint", "general", "atss", *MANY, *opts)
    model = build("joint", *opts)
    weights = folder / "model.pth"
    torch.save({"model": model.state_dict(), **describe_model(cfg, names)}, weights)
    return weights


def test_a_checkpoint_keeps_the_path_as_it_was_written(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    weights = save_model(tmp_path, NAMES, "TEST.CALIBRATION", "calibration.json")
    predictor = Predictor(weights)
    assert predictor.cfg.TEST.CALIBRATION == "calibration.json"
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    assert predictor(image)["instances"].has("raw_scores")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    message = r"TEST\.CALIBRATION: .*calibration\.json' cannot be read .* does without it"
    with pytest.raises(InputError, match=message):
        Predictor(weights)
    cfg = load_checkpoint_config(weights, ["TEST.CALIBRATION", "''"])
    assert not Predictor(cfg)(image)["instances"].has("raw_scores")


@pytest.mark.parametrize("names", [["cat", "eel", "dog"], ["a", "b", "c"]])
def test_classes_of_the_model(path, tmp_path, names):
    weights = save_model(tmp_path, names, "TEST.CALIBRATION", path)
    message = r"^TEST\.CALIBRATION .*calibration\.json: .* cat, dog, eel, and the model has "
    with pytest.raises(InputError, match=message + ", ".join(names)):
        Predictor(weights)


def test_names_that_are_not_known(path, tmp_path):
    assert Predictor(save_model(tmp_path, None, "TEST.CALIBRATION", path)).metadata


@pytest.mark.usefixtures("clean_catalogs")
def test_classes_of_a_dataset(path):
    DatasetCatalog.register("fish", list)
    MetadataCatalog.get("fish").set(thing_classes=["eel", "dog", "cat"])
    opts = ("TEST.CALIBRATION", path, "DATASETS.TEST", ("fish",))
    cfg = small_config("joint", "general", "atss", *MANY, *opts)
    with pytest.raises(InputError, match=r"cat, dog, eel, and dataset 'fish' has eel, dog, cat"):
        check_datasets(cfg, eval_only=True)


def test_bad_values_name_their_key(path, tmp_path):
    def config(*opts):
        return small_config("joint", "general", "atss", *MANY, *opts)

    with pytest.raises(InputError, match=r"TEST\.CALIBRATION must be of 4 classes.* and has 3, "):
        config("TEST.CALIBRATION", path, "MODEL.GFL.NUM_CLASSES", 4)
    assert config("TEST.CALIBRATION", path, "MODEL.GFL.NUM_CLASSES", 0)  # the data's
    with pytest.raises(InputError, match=r"TEST\.CALIBRATION must be '' for .*'RetinaNet'"):
        config("TEST.CALIBRATION", path, "MODEL.META_ARCHITECTURE", "RetinaNet")
    (tmp_path / "other.json").write_text(json.dumps({"curves": {}}))
    with pytest.raises(InputError, match=r"TEST\.CALIBRATION: .*other\.json' is no calibration"):
        config("TEST.CALIBRATION", str(tmp_path / "other.json"))
