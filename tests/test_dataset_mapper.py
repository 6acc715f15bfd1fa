"""What the mapper makes of images and boxes, and what it says of files that are not sound."""

import os
import pickle
import signal

import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    MapDataset,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from PIL import Image

from gfl_d2.data import (
    GFLDatasetMapper,
    naming_images_of_dead_workers,
    register_coco_format,
)
from gfl_d2.data.images import cache_folder
from gfl_d2.errors import InputError
from small_dataset import HEIGHT, Data, make_cfg

pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(tmp_path / "data")


def test_mapper_names_a_missing_image(data):
    data.register()
    record = DatasetCatalog.get("pets")[0]
    os.remove(record["file_name"])
    with pytest.raises(InputError, match=r"image .*1\.png: no such file"):
        GFLDatasetMapper(make_cfg(), is_train=True)(record)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("is_train", [True, False])
def test_mapper_names_a_truncated_image(data, suffix, is_train):
    data.register()
    record = DatasetCatalog.get("pets")[0]
    record["file_name"] = str(data.image_root / f"cut.{suffix}")
    Image.open(data.image_root / "1.png").save(record["file_name"])
    with open(record["file_name"], "r+b") as file:
        file.truncate(os.path.getsize(record["file_name"]) // 2)
    with pytest.raises(InputError) as error:
        GFLDatasetMapper(make_cfg(), is_train)(record)
    assert str(error.value).startswith(f"Cannot read image {record['file_name']}: ")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("content", [b"", b"this is no image"])
def test_a_file_that_is_no_image(data, content):
    data.register()
    record = DatasetCatalog.get("pets")[0]
    (data.image_root / "1.png").write_bytes(content)
    with pytest.raises(InputError, match=r"1\.png: it is not an image$"):
        GFLDatasetMapper(make_cfg(), is_train=True)(record)
    with pytest.raises(
        InputError, match=r"1 of the 2 images .* 1\.png \(it is not an image\)\. Replace"
    ):
        register_coco_format("again", data.json_file, data.image_root)


def test_mapper_names_an_image_of_another_size(data):
    data.register()
    Image.new("RGB", (12, 34)).save(data.image_root / "1.png")
    with pytest.raises(InputError, match=r"1\.png, got \(12, 34\), expect \(40, 30\)"):
        GFLDatasetMapper(make_cfg(), is_train=True)(DatasetCatalog.get("pets")[0])


def test_message_survives_a_worker_process(data):
    data.register()
    records = DatasetCatalog.get("pets")
    for record in records:
        os.remove(record["file_name"])
    cfg = make_cfg()
    cfg.DATALOADER.NUM_WORKERS = 1
    cfg.SOLVER.IMS_PER_BATCH = 1
    mapper = GFLDatasetMapper(cfg, is_train=True)
    loader = build_detection_train_loader(cfg, mapper=mapper, dataset=records)
    with pytest.raises(InputError) as error:
        next(iter(loader))
    message = str(error.value)
    assert message.startswith("Cannot read image ")
    assert message.endswith("no such file")


class DyingMapper(GFLDatasetMapper):
    """Killed at the second image, as when the memory is full."""

    def __call__(self, record):
        super().__call__(record)
        if record["file_name"].endswith("2.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return record


@pytest.mark.slow
def test_a_worker_that_dies_names_its_image(data):
    data.register()
    loader = torch.utils.data.DataLoader(
        MapDataset(DatasetCatalog.get("pets"), DyingMapper(make_cfg(), is_train=False)),
        batch_size=None,
        num_workers=1,
    )
    message = r"DataLoader worker .* It was at \S+2\.png: is that"
    with pytest.raises(InputError, match=message), naming_images_of_dead_workers():
        list(loader)
    assert os.listdir(cache_folder("workers")) == []
    with pytest.raises(RuntimeError, match=r"^other$"), naming_images_of_dead_workers():
        raise RuntimeError("other")


def test_messages_are_one_line():
    error = InputError("A: b\nc\0\ud800")
    assert str(error) == r"A: b\nc\x00\ud800"
    assert str(InputError(error)) == str(pickle.loads(pickle.dumps(error))) == str(error)
    assert len(str(InputError("x" * 10**5 + "remedy"))) < 1500
    assert str(InputError("x" * 10**5 + "remedy")).endswith("remedy")


class CornerPixel:
    """Which corner the one bright pixel of an image is in, after the mapper's augmentations."""

    def __init__(self, cfg):
        self.augmentations = GFLDatasetMapper(cfg, is_train=True).augmentations

    def __call__(self) -> tuple[int, int]:
        image = np.zeros((40, 60, 3), dtype=np.uint8)
        image[0, 0] = 255
        augmented = T.AugInput(image)
        self.augmentations(augmented)
        y, x = np.argwhere(augmented.image[:, :, 0])[0]
        return int(y > 0), int(x > 0)


@pytest.mark.parametrize(
    ("flip", "corners"),
    [
        ("both", {(0, 0), (0, 1), (1, 0), (1, 1)}),
        ("horizontal", {(0, 0), (0, 1)}),
        ("vertical", {(0, 0), (1, 0)}),
        ("none", {(0, 0)}),
    ],
)
def test_flips(flip, corners):
    cfg = make_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (40,), flip
    cfg.freeze()
    np.random.seed(0)
    find_corner = CornerPixel(cfg)
    counts = {}
    for _ in range(400):
        corner = find_corner()
        counts[corner] = counts.get(corner, 0) + 1
    assert set(counts) == corners
    # Each equally likely: 400 / 4 with standard deviation 9, 400 / 2 with 10.
    assert all(abs(n - 400 / len(corners)) < 40 for n in counts.values())
    assert flip == cfg.INPUT.RANDOM_FLIP


def test_flips_move_boxes_with_the_image(data):
    data.register()
    cfg = make_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (HEIGHT,), "both"
    mapper = GFLDatasetMapper(cfg, is_train=True)
    record = DatasetCatalog.get("pets")[0]
    pixels = np.asarray(Image.open(record["file_name"]))[:, :, ::-1]  # cfg's default is BGR
    x, y, w, h = map(int, record["annotations"][0]["bbox"])
    inside = {tuple(p) for p in pixels[y : y + h, x : x + w].reshape(-1, 3).tolist()}
    for _ in range(20):
        sample = mapper(record)
        x0, y0, x1, y1 = sample["instances"].gt_boxes.tensor[0].int().tolist()
        crop = sample["image"][:, y0:y1, x0:x1].permute(1, 2, 0).reshape(-1, 3)
        assert {tuple(p) for p in crop.tolist()} == inside


def test_no_augmentation_at_test_time():
    cfg = make_cfg()
    cfg.INPUT.RANDOM_FLIP = "both"
    augmentations = GFLDatasetMapper(cfg, is_train=False).augmentations.augs
    assert not any(isinstance(augmentation, T.RandomFlip) for augmentation in augmentations)
