"""Test-time augmentation, and tiles of large images."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.testing import assert_close

from gfl_d2.deploy import DenseDetectorWithTTA, Predictor, input_config, prepare_for_inference
from gfl_d2.deploy.merging import merge_detections
from gfl_d2.errors import InputError
from models import small_config

SCALES = ("TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.MAX_SIZE", 128)
AUG = ("TEST.AUG.ENABLED", True, *SCALES)
PLAIN_SIZE = ("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128)


def config(*opts):
    many = ("MODEL.GFL.SCORE_THRESH_TEST", 0.0001, "MODEL.GFL.NMS_THRESH_TEST", 0.95)
    return small_config("joint", "general", "atss", *PLAIN_SIZE, *many, *opts)


def make_image(height=90, width=130, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def predictor(tmp_path, *opts):
    cfg = config("MODEL.WEIGHTS", str(tmp_path / "weights.pth"), *opts)
    torch.manual_seed(0)
    torch.save({"model": build_model(config()).state_dict()}, cfg.MODEL.WEIGHTS)
    return Predictor(cfg)


class DarkSquares(DenseDetector):
    """Finds the one dark rectangle of a white image; the smaller, the higher the score."""

    def __init__(self, max_detections=10):
        nn.Module.__init__(self)
        self.test_nms_thresh, self.max_detections_per_image = 0.6, max_detections
        self.batches = []

    def forward(self, batched_inputs):
        self.batches.append([tuple(inputs["image"].shape[-2:]) for inputs in batched_inputs])
        return [{"instances": self._find(inputs["image"])} for inputs in batched_inputs]

    def _find(self, image):
        rows, columns = (image.float().mean(dim=0) < 128).nonzero(as_tuple=True)
        found = Instances(tuple(image.shape[-2:]))
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else []
        found.pred_boxes = Boxes(torch.tensor(box, dtype=torch.float32).reshape(-1, 4))
        found.scores = torch.full((len(box) // 4,), 1 / (1 + len(rows)))
        found.pred_classes = torch.ones(len(box) // 4, dtype=torch.int64)
        return found


def white_with(*boxes, height=200, width=300):
    image = torch.full((3, height, width), 255, dtype=torch.uint8)
    for left, top, right, bottom in boxes:
        image[:, top:bottom, left:right] = 0
    return image


def detect(image, *opts, detector=None, **kwargs):
    wrapper = DenseDetectorWithTTA(config(*opts), detector or DarkSquares(), **kwargs)
    return wrapper([{"image": image}])[0]["instances"]


# Switched off, and with a single view.


def test_switched_off_is_the_model_itself(tmp_path):
    cfg = config(*SCALES, "TEST.AUG.MERGE", "vote", "TEST.TILES.OVERLAP", 0.4)
    model = build_model(cfg)
    assert prepare_for_inference(cfg, model) is model
    assert input_config(cfg) is cfg
    assert type(predictor(tmp_path, *SCALES).model) is type(model)


@pytest.mark.parametrize(
    ("merge", "resize_filter"), [("nms", "pillow"), ("vote", "pillow"), ("nms", "opencv")]
)
@pytest.mark.parametrize(
    "opts",
    [
        ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.MAX_SIZE", 128,
         "TEST.AUG.FLIP", False),
        ("TEST.TILES.SIZE", 130),
    ],
    ids=["one size", "no larger than a tile"],
)  # fmt: skip
def test_one_view_is_plain_inference(tmp_path, opts, merge, resize_filter):
    """The whole way from an array, resized by the predictor here and by the wrapper there."""
    opts = (*opts, "TEST.AUG.MERGE", merge)
    key = ("INPUT.RESIZE_FILTER", resize_filter)
    expected = predictor(tmp_path, *key)(make_image())["instances"]
    actual = predictor(tmp_path, *key, *opts)(make_image())["instances"]
    assert len(actual) == len(expected) > 20
    assert actual.image_size == expected.image_size
    assert_close(actual.scores, expected.scores)
    assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
    assert torch.equal(actual.pred_classes, expected.pred_classes)


def test_the_filter_makes_a_difference(tmp_path):
    found = [
        predictor(tmp_path, "INPUT.RESIZE_FILTER", name)(make_image())["instances"]
        for name in ("pillow", "opencv")
    ]
    assert not torch.equal(found[0].scores, found[1].scores)


# Boxes of all views are found in the image.


@pytest.mark.parametrize("merge", ["nms", "vote"])
def test_views_are_mapped_back(merge):
    box = (30, 60, 90, 150)
    opts = (
        "TEST.AUG.ENABLED",
        True,
        "TEST.AUG.MIN_SIZES",
        (100, 200, 350),
        "TEST.AUG.MERGE",
        merge,
    )
    detector = DarkSquares()
    found = detect(white_with(box), *opts, detector=detector)
    assert detector.batches == [[(h, w)] * 2 for h, w in ((100, 150), (200, 300), (350, 525))]
    assert_close(found.pred_boxes.tensor, torch.tensor([box]).float(), rtol=0, atol=2)
    assert found.pred_classes.tolist() == [1]


@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_output_has_the_size_that_was_asked_for(kind):
    image = white_with((30, 60, 90, 150)).to(getattr(torch, kind))
    wrapper = DenseDetectorWithTTA(config("TEST.TILES.SIZE", 120, *AUG), DarkSquares())
    found = wrapper([{"image": image, "height": 400, "width": 600}])[0]["instances"]
    assert found.image_size == (400, 600)
    # The size of a view is that of training at the most, so a pixel of it is several here.
    assert_close(found.pred_boxes.tensor[0], torch.tensor([60.0, 120, 180, 300]), rtol=0, atol=10)


def test_an_image_without_objects():
    assert len(detect(white_with(), *AUG, "TEST.TILES.SIZE", 64, "TEST.AUG.MERGE", "vote")) == 0


# Tiles.


def tiles(height, width, *opts):
    wrapper = DenseDetectorWithTTA(config(*opts), DarkSquares())
    return [(t.x0, t.y0, t.w, t.h) for t in wrapper._tiles(height, width)]


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (65, 64), (300, 64), (50, 200), (500, 777)]
)
def test_tiles_cover_the_image(height, width, overlap):
    """They are all of one size, inside, and neighbours share what they should."""
    whole, *rest = tiles(height, width, "TEST.TILES.SIZE", 64, "TEST.TILES.OVERLAP", overlap)
    assert whole == (0, 0, width, height)
    assert bool(rest) == (max(height, width) > 64)
    for axis, length in ((0, width), (1, height)) if rest else ():
        size = min(64, length)
        assert {tile[2 + axis] for tile in rest} == {size}
        starts = sorted({tile[axis] for tile in rest})
        assert (starts[0], starts[-1]) == (0, length - size)
        assert all(b - a <= size * (1 - overlap) for a, b in zip(starts, starts[1:]))
    assert len(set(rest)) == len(rest)


def test_a_part_never_wins_over_the_whole():
    """In each tile that cuts it, the part that is seen has a higher score than the whole."""
    box = (50, 40, 90, 80)  # tiles of 64 begin at 0, 48, 96, ... and 0, 46, 91, 136
    opts = ("TEST.TILES.SIZE", 64, "TEST.TILES.OVERLAP", 0.25)
    found = detect(white_with(box), *opts)
    assert_close(found.pred_boxes.tensor, torch.tensor([box]).float(), rtol=0, atol=3)


def test_an_object_at_the_border_of_the_image_is_kept():
    box = (270, 0, 300, 30)
    found = detect(white_with(box), "TEST.TILES.SIZE", 64)
    assert_close(found.pred_boxes.tensor[0], torch.tensor(box).float(), rtol=0, atol=3)


def test_small_objects_are_found_in_tiles_alone():
    """Resized to 64 pixels the spot is too pale."""
    image = white_with((151, 101, 153, 103), height=600, width=800)
    assert len(detect(image)) == 0
    found = detect(image, "TEST.TILES.SIZE", 64)
    assert found.pred_boxes.tensor.tolist() == [[151, 101, 153, 103]]


def test_memory_is_bounded_by_a_batch():
    """A view is made when the one before has been detected; none is padded."""
    detector = DarkSquares()
    opts = ("TEST.TILES.SIZE", 64, "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,))
    wrapper = DenseDetectorWithTTA(config(*opts), detector, batch_size=3)
    made = []
    resize = wrapper.resizes[0].get_transform
    wrapper.resizes[0].get_transform = lambda image: (
        made.append(len(detector.batches)) or resize(image)
    )
    wrapper([{"image": white_with()}])
    sizes = [len(batch) for batch in detector.batches]
    assert sizes[0] == 2  # the whole image, flipped or not
    assert set(sizes[1:-1]) == {3}
    assert all(len(set(batch)) == 1 for batch in detector.batches)
    assert made == sorted(made)
    assert made[-1] >= len(detector.batches) - 2


# Merging.


def detections(*rows, size=(100, 100)):
    """Rows of left, top, right, bottom, score, class."""
    rows = torch.tensor(rows).reshape(-1, 6)
    classes = rows[:, 5].long()
    return Instances(size, pred_boxes=Boxes(rows[:, :4]), scores=rows[:, 4], pred_classes=classes)


ROWS = (
    (10.0, 10.0, 50.0, 50.0, 0.6, 0),
    (10.0, 10.0, 50.0, 54.0, 0.3, 0),  # IoU 40 / 44 with the first
    (10.0, 10.0, 50.0, 54.0, 0.9, 1),
    (10.0, 30.0, 50.0, 70.0, 0.2, 0),  # IoU 20 / 60
)


@pytest.mark.parametrize(("how", "bottom"), [("nms", 50), ("vote", (0.6 * 50 + 0.3 * 54) / 0.9)])
def test_merging(how, bottom):
    merged = merge_detections(detections(*ROWS), how=how, nms_thresh=0.6, max_detections=10)
    assert_close(merged.scores, torch.tensor([0.9, 0.6, 0.2]))
    assert merged.pred_classes.tolist() == [1, 0, 0]
    expected = [[10, 10, 50, 54], [10, 10, 50, bottom], [10, 30, 50, 70]]
    assert_close(merged.pred_boxes.tensor, torch.tensor(expected, dtype=torch.float32))
    best = merge_detections(detections(*ROWS), how=how, nms_thresh=0.6, max_detections=1)
    assert best.scores.tolist() == [pytest.approx(0.9)]


@pytest.mark.parametrize(
    ("cut", "is_kept"),
    [
        ((10.0, 10.0, 50.0, 30.0, 0.9, 0), False),
        ((10.0, 10.0, 50.0, 30.0, 0.9, 1), True),  # of another class
        ((10.0, 35.0, 50.0, 75.0, 0.9, 0), True),  # 15 / 40 of it are covered
    ],
)
def test_a_cut_box_yields_to_the_whole(cut, is_kept):
    found = detections((10.0, 10.0, 50.0, 50.0, 0.1, 0), cut)
    found.is_cut = torch.tensor([False, True])
    merged = merge_detections(found, how="nms", nms_thresh=0.6, max_detections=10)
    assert merged.scores.tolist() == pytest.approx([0.9, 0.1] if is_kept else [0.1])
    assert not merged.has("is_cut")
    found.is_cut = torch.tensor([True, True])  # no view has the whole
    assert len(merge_detections(found, how="nms", nms_thresh=0.6, max_detections=10)) == 2


def test_as_many_detections_as_in_single_inference():
    cfg = config("TEST.DETECTIONS_PER_IMAGE", 7, *AUG)
    torch.manual_seed(0)
    model = prepare_for_inference(cfg, build_model(cfg))
    image = torch.as_tensor(make_image()).permute(2, 0, 1)
    assert len(model([{"image": image}])[0]["instances"]) == 7


# What users do with a plain module, and mistakes.


def test_plain_module():
    cfg = config(*AUG, "TEST.TILES.SIZE", 64)
    torch.manual_seed(0)
    model = prepare_for_inference(cfg, build_model(cfg))
    inputs = [{"image": torch.as_tensor(make_image()).permute(2, 0, 1)}]
    expected = model(inputs)[0]["instances"]
    assert not expected.scores.requires_grad
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(inputs)[0]["instances"].scores, expected.scores)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TEST.AUG.MERGE", "wbf"),
        ("TEST.AUG.MIN_SIZES", ()),
        ("TEST.AUG.MIN_SIZES", (0,)),
        ("TEST.AUG.MIN_SIZES", (64.5,)),
        ("TEST.AUG.MAX_SIZE", 0),
        ("TEST.TILES.SIZE", 16),
        ("TEST.TILES.SIZE", -1),
        ("TEST.TILES.OVERLAP", 0.6),
        ("TEST.TILES.OVERLAP", -0.1),
    ],
)
def test_bad_values_name_their_key(key, value):
    with pytest.raises(InputError, match=f"^{key} must be"):
        config(key, value)


def test_only_dense_detectors():
    with pytest.raises(InputError, match=r"TEST\.AUG\.ENABLED.* dense detector.*'Linear'"):
        DenseDetectorWithTTA(config(*AUG), nn.Linear(1, 1))
