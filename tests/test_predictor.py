"""Predictor: images of any kind, one or several, as evaluation reads them."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from torch.testing import assert_close

from gfl_d2.checkpoint import describe_model
from gfl_d2.data import GFLDatasetMapper
from gfl_d2.deploy import Predictor
from gfl_d2.errors import InputError
from models import WITH_RESNET, small_config

CHANNELS = {"BGR": 3, "RGB": 3, "L": 1, "RGBA": 4}
SIZES = [(60, 80), (80, 60), (60, 80), (60, 70), (80, 60), (60, 80), (60, 80)]


def make_predictor(folder: Path, image_format: str = "BGR", *opts) -> Predictor:
    number = CHANNELS[image_format]
    cfg = small_config(
        *("joint", "general", "atss", *WITH_RESNET, "MODEL.RESNETS.DEPTH", 18),
        *("INPUT.FORMAT", image_format, "INPUT.MIN_SIZE_TEST", 64, "MODEL.WEIGHTS", ""),
        *("MODEL.PIXEL_MEAN", [100.0] * number, "MODEL.PIXEL_STD", [50.0] * number),
        *("MODEL.GFL.SCORE_THRESH_TEST", 0.001, "TEST.DETECTIONS_PER_IMAGE", 20, *opts),
    )
    torch.manual_seed(0)
    path = folder / f"{image_format}.pth"
    torch.save({"model": build_model(cfg).state_dict(), **describe_model(cfg)}, path)
    return Predictor(path)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return make_predictor(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@pytest.fixture
def batches(predictor):
    """The sizes of the images in each batch that the model was given."""
    seen = []
    hook = predictor.model.register_forward_pre_hook(
        lambda _, inputs: seen.append([(x["height"], x["width"]) for x in inputs[0]])
    )
    yield seen
    hook.remove()


def assert_equal(result, expected):
    a, b = result["instances"], expected["instances"]
    assert len(a) > 0
    assert a.image_size == b.image_size
    assert torch.equal(a.scores, b.scores)
    assert torch.equal(a.pred_classes, b.pred_classes)
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def given_image(predictor, image) -> torch.Tensor:
    """What the model is given."""
    seen = []
    hook = predictor.model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    predictor(image)
    hook.remove()
    return seen[0]["image"]


@pytest.mark.parametrize("image_format", CHANNELS)
def test_any_kind_of_image_is_read_as_in_evaluation(tmp_path, image_format):
    predictor = make_predictor(tmp_path, image_format)
    path = str(tmp_path / "noise.png")
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 4), np.uint8)
    Image.fromarray(noise if image_format == "RGBA" else noise[..., :3].copy()).save(path)
    mapped = GFLDatasetMapper(predictor.cfg, is_train=False)({"file_name": path})
    with torch.no_grad():
        (expected,) = predictor.model([{**mapped, "height": 90, "width": 70}])
    for image in (path, Path(path), Image.open(path), cv2.imread(path, cv2.IMREAD_UNCHANGED)):
        assert torch.equal(given_image(predictor, image), mapped["image"])
        assert_equal(predictor(image), expected)


@pytest.mark.parametrize(
    ("image_format", "values"),
    # Grey: 0.299 red + 0.587 green + 0.114 blue.
    [("BGR", [50, 100, 200]), ("RGB", [200, 100, 50]), ("L", [124]), ("RGBA", [200, 100, 50, 30])],
)
def test_order_of_channels(tmp_path, image_format, values):
    predictor = make_predictor(tmp_path, image_format)
    rgba = np.full((64, 64, 4), (200, 100, 50, 30), np.uint8)
    bgra = rgba[..., [2, 1, 0, 3]]
    images = [bgra, Image.fromarray(rgba)]
    if image_format != "RGBA":
        images += [bgra[..., :3], Image.fromarray(rgba[..., :3].copy())]
    for image in images:
        given = given_image(predictor, image)
        assert given[:, 32, 32].tolist() == pytest.approx(values, abs=3 * (image_format == "RGBA"))
        assert predictor.input_format == image_format


def test_grey_images(predictor):
    """For a model of colour images, and of 16 bits: the upper eight count."""
    grey = np.random.default_rng(0).integers(0, 65536, (64, 80), np.uint16)
    expected = torch.from_numpy((grey >> 8).astype(np.uint8)).expand(3, 64, 80)
    for image in (grey, grey[..., None], (grey >> 8).astype(np.uint8), Image.fromarray(grey)):
        assert torch.equal(given_image(predictor, image), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_several_images(predictor, images, batches, batch_size):
    """In order, whatever their sizes; equal to those of single images."""
    expected = [predictor(image) for image in images]
    batches.clear()
    results = predictor(images, batch_size=batch_size)
    assert isinstance(results, list)
    assert all(len(set(sizes)) == 1 for sizes in batches)
    assert sum(map(len, batches)) == len(images)
    if batch_size > 1:
        assert max(map(len, batches)) == min(batch_size, 4)
    for result, alone, size in zip(results, expected, SIZES):
        assert result["instances"].image_size == size
        if batch_size == 1:
            assert_equal(result, alone)
        else:  # up to rounding
            a, b = result["instances"], alone["instances"]
            assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-6)
    for result, same in zip(predictor(iter(images), batch_size=batch_size), results):
        assert_equal(result, same)


def test_endless_iterator(predictor, images):
    taken = []

    def camera():
        for image in itertools.cycle(images):
            taken.append(image)
            yield image

    results = predictor(camera(), batch_size=2)
    assert not taken
    for number, (image, result) in enumerate(zip(images * 3, results)):
        assert result["instances"].image_size == image.shape[:2]
        assert len(taken) <= number + 8
    results.close()


def test_nothing_to_do(predictor):
    assert predictor([]) == []
    assert list(predictor(iter([]))) == []


def test_an_image_that_cannot_be_read(predictor, images, tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    paths = [images[0], tmp_path / "broken.jpg", images[0]]
    for given in (paths[1], paths):
        with pytest.raises(
            InputError, match=r"Cannot read image .*broken\.jpg: it is not an image"
        ):
            predictor(given)
    results = predictor(iter(paths))
    next(results)
    with pytest.raises(InputError, match=r"broken\.jpg"):
        next(results)
    first, problem, last = predictor(paths, batch_size=2, errors="return")
    assert_equal(first, last)
    assert isinstance(problem, InputError)
    assert isinstance(predictor(paths[1], errors="return"), InputError)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((9, 9, 3), np.float32), r"uint8 or uint16, .* not float32 of shape \(9, 9, 3\)"),
        (np.zeros((2, 9, 9, 3), np.uint8), r"not uint8 of shape \(2, 9, 9, 3\)"),
        (np.zeros((3, 9, 9), np.uint8), r"not uint8 of shape \(3, 9, 9\)"),
        (np.zeros((0, 9, 3), np.uint8), r"not uint8 of shape \(0, 9, 3\)"),
        (Image.new("F", (9, 9)), "Cannot read a PIL image: it has 32 bits per pixel"),
        ([torch.zeros(9, 9, 3)], "a path, a PIL image or an array, not Tensor"),
        (torch.zeros(9, 9, 3), "a path, a PIL image or an array, not Tensor"),
        ({"image": 1}, "a path, a PIL image or an array, not dict"),
        (None, "a path, a PIL image or an array, not NoneType"),
        (np.zeros((2, 9000, 3), np.uint8), "An image of 9000x2 pixels cannot be resized"),
    ],
)
def test_what_is_no_image(predictor, image, message):
    with pytest.raises(InputError, match=message):
        predictor(image)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"errors": "skip"}])
def test_bad_arguments(predictor, images, arguments):
    with pytest.raises(InputError, match=r"batch_size must be 1 or more and errors 'raise' or"):
        predictor(iter(images), **arguments)
