"""Mosaic and copy-paste: their boxes, and when they are switched off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from PIL import Image

from gfl_d2.data import GFLDatasetMapper
from gfl_d2.data.mixing import Sample, cut, make_mosaic, paste_boxes
from gfl_d2.engine import Trainer
from gfl_d2.errors import InputError
from models import small_config
from rectangles import HEIGHT, WIDTH, find_rectangles, to_rectangles, write_images
from test_augmentation import ALL_ON, CROP, PLAIN, config

MOSAIC, PASTE = ("INPUT.MOSAIC.PROB", 1.0), ("INPUT.COPY_PASTE.PROB", 1.0)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), crowd=3)


def annotation(box, **others):
    box = np.array(box, dtype=np.float64)
    area = (box[2] - box[0]) * (box[3] - box[1])
    mode = BoxMode.XYXY_ABS
    return {"bbox": box, "bbox_mode": mode, "category_id": 0, "whole_area": area, **others}


def boxes(annotations):
    return [a["bbox"].tolist() for a in annotations]


# Boxes.


@pytest.mark.parametrize("least", [0.1, 0.7])
@pytest.mark.parametrize(
    "opts",
    [MOSAIC, PASTE, (*MOSAIC, *PASTE), (*MOSAIC, "INPUT.RANDOM_FLIP", "both"), (*PASTE, *CROP)],
    ids=["mosaic", "copy-paste", "both", "flipped", "cropped"],
)
def test_boxes_are_what_the_pixels_show(records, opts, least):
    cfg = config(*PLAIN, *opts, "INPUT.MIN_VISIBILITY", least)
    mapper = GFLDatasetMapper(cfg, True, records=records)
    np.random.seed(0)
    numbers = []
    for record in records:
        sample = mapper(record)
        size = (HEIGHT // 2, WIDTH // 2) if opts[-len(CROP) :] == CROP else (HEIGHT, WIDTH)
        assert sample["image"].shape[1:] == size
        assert sample["image_id"] == record["image_id"]
        # The fourth of each image is a crowd, which is not learned.
        seen = find_rectangles(sample["image"].permute(1, 2, 0).numpy(), least)
        expected = [rectangle for rectangle in seen if rectangle[0] % 4 != 3]
        assert to_rectangles(sample) == expected
        numbers.append(len(expected))
    assert min(numbers) < max(numbers)
    if opts == PASTE:
        assert min(numbers) == 3
        assert np.mean(numbers) > 3.3


def test_a_mosaic_of_two_quarters_that_are_too_large():
    """Images smaller than their quarter touch the centre; the rest has the colour of padding."""
    images = [np.full((h, w, 3), 10 * i, np.uint8) for i, (h, w) in
              enumerate([(9, 9), (2, 3), (30, 30), (30, 2)], start=1)]  # fmt: skip
    samples = [Sample(x, [annotation((0, 0, x.shape[1], x.shape[0]))]) for x in images]
    fill = np.array([7.0, 8.0, 9.0])
    image, found = make_mosaic(samples, (12, 10), (5, 4), fill)
    expected = np.tile(fill, (12, 10, 1))
    expected[:5, :4], expected[3:5, 4:7], expected[5:, :4], expected[5:, 4:6] = 10, 20, 30, 40
    np.testing.assert_array_equal(image, expected)
    assert boxes(found) == [[0, 0, 4, 5], [4, 3, 7, 5], [0, 5, 4, 12], [4, 5, 6, 12]]
    assert [a["whole_area"] for a in found] == [81, 6, 900, 60]


def test_crowds_stay_crowds(records):
    mapper = GFLDatasetMapper(config(*PLAIN, *MOSAIC), True, records=records)
    np.random.seed(0)
    number = 0
    for record in records:
        image, annotations = mapper.augment(record)
        for a in annotations:
            assert a["iscrowd"] == (a["category_id"] % 4 == 3)
            x0, y0, x1, y1 = a["bbox"].astype(int)
            assert (image[y0:y1, x0:x1, 0] == a["category_id"] + 1).all()
            number += a["iscrowd"]
    assert number > 20


def test_cut():
    crowd = annotation((0, 0, 10, 10), iscrowd=1, category_id=5)
    source = [crowd, annotation((8, 8, 30, 30)), annotation((20, 0, 30, 4))]
    found = cut(source, (4, 6, 20, 26), (100, 200))
    assert boxes(found) == [[100, 200, 106, 204], [104, 202, 116, 220]]
    assert (found[0]["iscrowd"], found[0]["category_id"], found[0]["whole_area"]) == (1, 5, 100)
    assert boxes(source)[0] == [0, 0, 10, 10]  # as before


def test_what_is_in_a_pasted_box_comes_along():
    """And neither crowds nor boxes larger than the target are pasted."""
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[10:30, 10:30] = 50
    pixels[15:20, 15:20] = 90
    inner, outer = annotation((15, 15, 20, 20)), annotation((10, 10, 30, 30))
    alone = annotation((40, 40, 50, 50), iscrowd=1)
    source = Sample(pixels, [outer, inner, alone, annotation((0, 0, 60, 60))])
    target = Sample(np.zeros((40, 40, 3), np.uint8), [annotation((0, 0, 12, 12))])
    found_outer = 0
    for seed in range(30):
        np.random.seed(seed)
        image, found = paste_boxes(target, source)
        sizes = [tuple((a["bbox"][2:] - a["bbox"][:2]).tolist()) for a in found[1:]]
        assert set(sizes) <= {(20, 20), (5, 5)}
        for i, size in enumerate(sizes):
            x0, y0, *_ = found[1 + i]["bbox"].astype(int)
            assert image[y0, x0, 0] in (50, 90)
            if size == (20, 20):  # the inner one is next, at its place
                found_outer += 1
                assert boxes(found)[2 + i] == [x0 + 5, y0 + 5, x0 + 10, y0 + 10]
            assert max(x0, y0) >= 12  # it covers no box
    assert found_outer > 3
    assert target.image.max() == 0


def test_a_crowd_may_be_covered():
    target = Sample(np.zeros((20, 20, 3), np.uint8), [annotation((0, 0, 20, 20), iscrowd=1)])
    source = Sample(np.full((20, 20, 3), 9, np.uint8), [annotation((2, 2, 8, 9))])
    np.random.seed(1)
    numbers = {len(paste_boxes(target, source).annotations) for _ in range(20)}
    assert numbers == {1, 2}


def test_large_scale_jitter_and_mosaic(records):
    """The mosaic has the size of the jitter, whatever its images have."""
    lsj = ("INPUT.LSJ.ENABLED", True, "INPUT.LSJ.SIZE", (80, 70), "INPUT.LSJ.MIN_SCALE", 0.5)
    mapper = GFLDatasetMapper(config(*PLAIN, *MOSAIC, *lsj), True, records=records)
    np.random.seed(0)
    shapes = {tuple(mapper(record)["image"].shape) for record in records[:10]}
    assert shapes == {(3, 80, 70)}


def test_probabilities(records):
    mapper = GFLDatasetMapper(config(*PLAIN, "INPUT.MOSAIC.PROB", 0.3), True, records=records)
    plain = [np.asarray(Image.open(record["file_name"])) for record in records]
    np.random.seed(0)
    mixed = [
        not np.array_equal(mapper.augment(record).image, image)
        for record, image in list(zip(records, plain)) * 5
    ]
    assert abs(np.mean(mixed) - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 200)


def test_sizes_that_a_record_lacks(records):
    """Detectron2's mapper adds them, and groups images by them."""
    record = {k: v for k, v in records[0].items() if k not in ("height", "width")}
    sample = GFLDatasetMapper(config(*PLAIN, *MOSAIC), True, records=records)(record)
    assert (sample["height"], sample["width"]) == (HEIGHT, WIDTH)


def test_without_records(records):
    with pytest.raises(InputError, match="records="):
        GFLDatasetMapper(config(*MOSAIC), True)(records[0])


# Switched off at the end, in worker processes too.


@pytest.fixture
def plain_images(tmp_path, clean_catalogs):
    """A dataset of images of one colour each."""
    box = {"bbox": [4, 4, 40, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    records = []
    for i in range(32):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((64, 64, 3), 8 * i, np.uint8)).save(path)
        records.append({"file_name": str(path), "height": 64, "width": 64, "image_id": i,
                        "annotations": [box]})  # fmt: skip
    DatasetCatalog.register("plain_images", lambda: records)
    return records


def is_mixed(inputs: dict) -> bool:
    return len(inputs["image"].flatten(1).unique(dim=1).T) > 1


def loader_config(workers=0, groups=True, *opts):
    return small_config(
        "joint", "general", "atss", *PLAIN, *MOSAIC,
        "DATASETS.TRAIN", ("plain_images",), "DATASETS.TEST", (), "SOLVER.IMS_PER_BATCH", 2,
        "SOLVER.MAX_ITER", 10, "SOLVER.STEPS", (), "INPUT.CLOSE_MIXING", 0.4,
        "DATALOADER.NUM_WORKERS", workers, "DATALOADER.ASPECT_RATIO_GROUPING", groups, *opts,
    )  # fmt: skip


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_last_iterations_are_not_mixed(plain_images, workers, groups, start):
    loader = Trainer.build_train_loader(loader_config(workers, groups))
    loader.start(0, start)
    batches = [batch for batch, _ in zip(loader, range(start, 10))]
    mixed = [[is_mixed(inputs) for inputs in batch] for batch in batches]
    assert mixed == [[True] * 2] * (6 - start) + [[False] * 2] * 4


@pytest.mark.slow
def test_a_resumed_training_switches_at_the_same_iteration(plain_images, tmp_path):
    seen = []

    def train(killed_at=None, resume=False):
        opts = ("SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 0, "OUTPUT_DIR", str(tmp_path))
        trainer = Trainer(loader_config(2, True, *ALL_ON, *PASTE, *opts))
        trainer.resume_or_load(resume)

        def look(_, args):
            if trainer.iter == killed_at:
                raise KeyboardInterrupt
            seen.append((trainer.iter, [is_mixed(inputs) for inputs in args[0]]))

        trainer.model.register_forward_pre_hook(look)
        trainer.train()

    with pytest.raises(KeyboardInterrupt):
        train(killed_at=5)
    train(resume=True)
    iterations, mixed = zip(*seen)
    assert iterations == (0, 1, 2, 3, 4, *range(4, 10))
    assert mixed == ([True] * 2,) * 7 + ([False] * 2,) * 4


def test_random_streams(plain_images):
    """The same for a seed; of two workers, different ones."""
    opts = ("INPUT.COLOR.BRIGHTNESS", 0.5, "INPUT.CLOSE_MIXING", 0.0)

    def read(seed):
        loader = Trainer.build_train_loader(loader_config(2, False, "SEED", seed, *opts))
        return [inputs["image"] for batch, _ in zip(loader, range(4)) for inputs in batch]

    first, again, other = read(1), read(1), read(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))
    assert not any(torch.equal(first[i], first[k]) for i in range(8) for k in range(i))
    # Mosaics of the two workers, in turn, have their centres at different places.
    rows = [(image[0] != image[0, 0, 0]).int().argmax(dim=1)[0].item() for image in first]
    assert rows[:2] != rows[2:4]
