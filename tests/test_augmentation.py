"""Augmentations of single images, and the filter that resizes them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from gfl_d2.config import check_training_config
from gfl_d2.data import GFLDatasetMapper
from gfl_d2.data.augmentation import OpenCVResizeTransform
from gfl_d2.deploy.export.check import resize_pictures
from gfl_d2.errors import InputError
from models import small_config
from rectangles import HEIGHT, WIDTH, find_rectangles, to_rectangles, write_images

# In RGB, without a flip and in its own size.
PLAIN = (
    *("INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (0,)),
    *("INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice", "INPUT.MIN_SIZE_TEST", 0),
)
CROP = ("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", (0.5, 0.5))
ALL_ON = (
    *("INPUT.LSJ.ENABLED", True, "INPUT.LSJ.SIZE", (64, 96), "INPUT.LSJ.MIN_SCALE", 0.5),
    *("INPUT.COLOR.BRIGHTNESS", 0.2, "INPUT.COLOR.CONTRAST", 0.2, "INPUT.COLOR.SATURATION", 0.2),
    *("INPUT.COLOR.LIGHTING", 0.1, "INPUT.RESIZE_FILTER", "opencv"),
)


def config(*opts):
    cfg = small_config("joint", "general", "atss", *opts)
    check_training_config(cfg)
    return cfg


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 6, crowd=3)


def photograph(height=90, width=120, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


# Switched off.


@pytest.mark.parametrize(
    "opts",
    [
        ("INPUT.MIN_SIZE_TRAIN", (40, 90), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
        (*CROP, "INPUT.MIN_VISIBILITY", 0.0),
        ("INPUT.MIN_VISIBILITY", 1.0, "INPUT.CLOSE_MIXING", 0.5),
    ],
    ids=["sizes", "crop", "keys without effect"],
)
@pytest.mark.parametrize("is_train", [True, False])
def test_switched_off_is_detectron2s_mapper(records, opts, is_train):
    cfg = config(*opts)
    mappers = DatasetMapper(cfg, is_train), GFLDatasetMapper(cfg, is_train)
    for seed, record in enumerate(records):
        expected, actual = [np.random.seed(seed) or mapper(record) for mapper in mappers]
        assert torch.equal(actual["image"], expected["image"])
        assert ("instances" in actual) == is_train
        if is_train:
            for name in ("gt_boxes", "gt_classes"):
                a, b = (sample["instances"].get(name) for sample in (actual, expected))
                assert torch.equal(getattr(a, "tensor", a), getattr(b, "tensor", b))


def test_nothing_but_the_filter_in_evaluation(records):
    plain = GFLDatasetMapper(
        config("INPUT.MIN_SIZE_TEST", 40, "INPUT.RESIZE_FILTER", "opencv"), False
    )
    mapper = GFLDatasetMapper(config("INPUT.MIN_SIZE_TEST", 40, *ALL_ON, *CROP), False)
    assert torch.equal(mapper(records[0])["image"], plain(records[0])["image"])


# Boxes.


@pytest.mark.parametrize("least", [0.1, 0.6])
@pytest.mark.parametrize(
    "opts",
    [
        CROP,
        # At its own size, so that pixels stay what they are: only the crop is left.
        ("INPUT.LSJ.ENABLED", True, "INPUT.LSJ.SIZE", (40, 60), "INPUT.LSJ.MIN_SCALE", 1.6,
         "INPUT.LSJ.MAX_SCALE", 1.6),
    ],
    ids=["crop", "jitter"],
)  # fmt: skip
def test_boxes_of_what_is_left(records, opts, least):
    mapper = GFLDatasetMapper(config(*PLAIN, *opts, "INPUT.MIN_VISIBILITY", least), True)
    np.random.seed(0)
    number = 0
    for record in records * 5:
        sample = mapper(record)
        image = sample["image"].permute(1, 2, 0).numpy()
        assert image.shape[:2] in ((HEIGHT // 2, WIDTH // 2), (40, 60))
        crowd = record["annotations"][3]["category_id"]
        expected = [r for r in find_rectangles(image, least) if r[0] != crowd]
        assert to_rectangles(sample) == expected
        number += len(expected)
    assert 10 < number < 80  # of 90


def test_large_scale_jitter(tmp_path):
    """At any scale, to a pixel of what interpolation blurs."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[10:40, 20:70] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    box = {"bbox": [20, 10, 50, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "a.png"), "annotations": [box]}
    sizes = ("INPUT.LSJ.SIZE", (64, 96), "INPUT.LSJ.MIN_SCALE", 0.5, "INPUT.LSJ.MAX_SCALE", 3.0)
    opts = (*sizes, "INPUT.LSJ.ENABLED", True, "INPUT.MIN_VISIBILITY", 0.0)
    mapper = GFLDatasetMapper(config(*PLAIN, *opts), True)
    np.random.seed(0)
    heights, cut = [], 0
    for _ in range(40):
        sample = mapper(record)
        heights.append(sample["image"].shape[1])
        rows, columns = np.nonzero(sample["image"][0].numpy() > 127)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        (found,) = sample["instances"].gt_boxes.tensor.numpy()
        np.testing.assert_allclose(found, seen, atol=1.01)
        cut += seen[2] - seen[0] < 1.6 * (seen[3] - seen[1])
    assert (min(heights) < 45, max(heights)) == (True, 64)
    assert cut > 5


def test_a_box_beyond_its_image_is_whole_inside(records):
    """The part outside is no part that was cut off."""
    record = {**records[0], "annotations": [{**records[0]["annotations"][0]}]}
    record["annotations"][0]["bbox"] = [-900, 10, 910, 20]
    all_of_it = ("INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", (1.0, 1.0))
    mapper = GFLDatasetMapper(config(*PLAIN, *all_of_it, "INPUT.MIN_VISIBILITY", 1.0), True)
    assert mapper(record)["instances"].gt_boxes.tensor.tolist() == [[0, 10, 10, 30]]


# Colours.


def augment(image, *opts, seed=0):
    np.random.seed(seed)
    cfg = config(*PLAIN, *opts)
    aug_input = T.AugInput(image)
    GFLDatasetMapper(cfg, True).augmentations(aug_input)
    return aug_input.image


@pytest.mark.parametrize("name", ["BRIGHTNESS", "CONTRAST", "SATURATION", "LIGHTING"])
def test_the_order_of_channels_makes_no_difference(name):
    image, key = photograph(), (f"INPUT.COLOR.{name}", 0.8)
    changed = augment(image, *key, "INPUT.FORMAT", "RGB")
    of_bgr = augment(image[:, :, ::-1].copy(), *key, "INPUT.FORMAT", "BGR")
    assert np.abs(changed.astype(int) - image).max() > 5
    np.testing.assert_array_equal(of_bgr[:, :, ::-1], changed)


@pytest.mark.slow
def test_factors():
    """Those of PIL's ImageEnhance; brightness and contrast of grey images too."""
    grey = np.full((2, 2, 1), 100, np.uint8)
    grey[0] = 60
    opts = ("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [0.0], "MODEL.PIXEL_STD", [1.0])
    bright = [augment(grey, "INPUT.COLOR.BRIGHTNESS", 0.5, *opts, seed=i) for i in range(200)]
    assert {image.shape for image in bright} == {(2, 2, 1)}
    factors = np.array([image[1, 0, 0] / 100 for image in bright])
    assert 0.5 <= factors.min() < 0.53 and 1.47 < factors.max() <= 1.5
    contrast = [augment(grey, "INPUT.COLOR.CONTRAST", 0.5, *opts, seed=i) for i in range(200)]
    spans = [int(image[1, 0, 0]) - int(image[0, 0, 0]) for image in contrast]
    assert 19 <= min(spans) < 22 and 58 < max(spans) <= 61


@pytest.mark.slow
def test_lighting_is_alexnets():
    """Standard deviations of its sums over eigenvectors, of images in [0, 1]."""
    image = np.full((1, 1, 3), 128, np.uint8)
    shifts = [augment(image, "INPUT.COLOR.LIGHTING", 0.1, seed=i)[0, 0] for i in range(400)]
    vectors = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    expected = 25.5 * np.sqrt((np.array(vectors) * [0.2175, 0.0188, 0.0045]) ** 2 @ np.ones(3))
    np.testing.assert_allclose(np.std(shifts, axis=0), expected, rtol=0.15)


# The filter of resizing.


def four_pixels(image, height, width):
    """Bilinear interpolation with pixel centres at halves, in float64."""
    y = ((np.arange(height) + 0.5) * image.shape[0] / height - 0.5).clip(0, image.shape[0] - 1)
    x = ((np.arange(width) + 0.5) * image.shape[1] / width - 0.5).clip(0, image.shape[1] - 1)
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    y1, x1 = (y0 + 1).clip(max=image.shape[0] - 1), (x0 + 1).clip(max=image.shape[1] - 1)
    v, u = (y - y0)[:, None, None], (x - x0)[None, :, None]
    image = image.astype(np.float64)
    top = image[y0][:, x0] * (1 - u) + image[y0][:, x1] * u
    bottom = image[y1][:, x0] * (1 - u) + image[y1][:, x1] * u
    return top * (1 - v) + bottom * v


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(30, 40), (45, 61), (200, 240)])
def test_opencv_takes_four_pixels(size, channels):
    image = photograph(channels=channels)
    resized = OpenCVResizeTransform(90, 120, *size).apply_image(image)
    assert resized.shape == (*size, channels)
    assert resized.dtype == np.uint8
    np.testing.assert_allclose(resized, four_pixels(image, *size), atol=1.01)
    boxes = OpenCVResizeTransform(90, 120, *size).apply_box([[0.0, 0, 120, 45]])
    np.testing.assert_allclose(boxes, [[0, 0, size[1], size[0] / 2]])


def resized_by(name, image, path):
    """By the mapper, in training and evaluation."""
    sizes = ("INPUT.MIN_SIZE_TRAIN", (30,), "INPUT.MIN_SIZE_TEST", 30, "INPUT.RANDOM_FLIP", "none")
    cfg = config(*sizes, *(("INPUT.RESIZE_FILTER", name) if name else ()))
    Image.fromarray(image).save(path)
    record = {"file_name": str(path), "annotations": []}
    inputs = [GFLDatasetMapper(cfg, is_train)(record)["image"] for is_train in (True, False)]
    assert torch.equal(*inputs)
    return inputs[0].permute(1, 2, 0).numpy()


def test_both_filters(tmp_path):
    image = photograph()
    pillow = np.asarray(Image.fromarray(image).resize((40, 30), Image.Resampling.BILINEAR))
    opencv = cv2.resize(image, (40, 30), interpolation=cv2.INTER_LINEAR)
    assert np.abs(pillow.astype(int) - opencv).mean() > 10
    for name, expected in ((None, pillow), ("pillow", pillow), ("opencv", opencv)):
        np.testing.assert_array_equal(resized_by(name, image, tmp_path / "a.png"), expected)
        # What an exported file is checked and evaluated with.
        info = {"size": (30, 40), **({"resize_filter": name} if name else {})}
        np.testing.assert_array_equal(resize_pictures([image], info)[0], expected)


# Configs.


@pytest.mark.parametrize(
    ("key", "value", "others"),
    [
        ("INPUT.RESIZE_FILTER", "area", ()),
        ("INPUT.MOSAIC.PROB", 1.5, ()),
        ("INPUT.COPY_PASTE.PROB", -0.1, ()),
        ("INPUT.CLOSE_MIXING", 200.0, ()),
        ("INPUT.MIN_VISIBILITY", 2.0, ()),
        ("INPUT.COLOR.BRIGHTNESS", 1.2, ()),
        ("INPUT.COLOR.LIGHTING", -1.0, ()),
        ("INPUT.FORMAT", "L", ("INPUT.COLOR.SATURATION", 0.1)),
        ("INPUT.FORMAT", "RGBA", ("INPUT.COLOR.BRIGHTNESS", 0.1)),
        ("INPUT.LSJ.SIZE", [640], ("INPUT.LSJ.ENABLED", True)),
        ("INPUT.LSJ.SIZE", [640, 0], ("INPUT.LSJ.ENABLED", True)),
        ("INPUT.LSJ.MIN_SCALE", 3.0, ("INPUT.LSJ.ENABLED", True)),
        ("INPUT.LSJ.MIN_SCALE", 0.001, ("INPUT.LSJ.ENABLED", True)),
        ("INPUT.CROP.TYPE", "random", ("INPUT.CROP.ENABLED", True)),
        ("INPUT.CROP.SIZE", [1.5, 0.5], ("INPUT.CROP.ENABLED", True)),
        ("INPUT.CROP.SIZE", [0.5, 0.5],
         ("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute")),
        ("INPUT.CROP.SIZE", [90, 60],
         ("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute_range")),
        ("TEST.PRECISE_BN.ENABLED", True, ("INPUT.MOSAIC.PROB", 0.5)),
    ],
)  # fmt: skip
def test_bad_values_name_their_key(key, value, others):
    of_format = {"L": 1, "RGBA": 4}.get(value, 3) if isinstance(value, str) else 3
    channels = ("MODEL.PIXEL_MEAN", [1.0] * of_format, "MODEL.PIXEL_STD", [1.0] * of_format)
    with pytest.raises(InputError, match=key):
        config(key, value, *others, *channels)
