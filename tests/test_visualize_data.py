"""tools/visualize_data.py: what is drawn is what the model gets."""

from __future__ import annotations

import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog

from gfl_d2.data import GFLDatasetMapper
from gfl_d2.errors import InputError
from models import small_config
from rectangles import write_images
from scripts import load_script
from toy_training import CONFIG, options, write_dataset

visualize_data = load_script("tools/visualize_data.py")


@pytest.fixture
def cfg(tmp_path, clean_catalogs):
    records = write_images(tmp_path, 6, crowd=3)
    DatasetCatalog.register("rectangles", lambda: records)
    return small_config(
        "joint", "general", "atss", "DATASETS.TRAIN", ("rectangles",), "INPUT.MOSAIC.PROB", 0.5,
        "INPUT.COPY_PASTE.PROB", 0.5, "INPUT.COLOR.BRIGHTNESS", 0.3, "INPUT.FORMAT", "BGR",
    )  # fmt: skip


def test_what_is_drawn(cfg, monkeypatch):
    drawn = []

    def draw(image, annotations, metadata, title, file=""):
        drawn.append((image, annotations, title, file))
        return np.zeros((10, 10 * len(drawn), 3), np.uint8)

    monkeypatch.setattr(visualize_data, "draw_annotations", draw)
    np.random.seed(0)
    picture = visualize_data.draw_data(cfg, num_images=2, skip=1, samples=2)
    assert picture.shape[0] == 28

    records = DatasetCatalog.get("rectangles")
    mapper = GFLDatasetMapper(cfg, True, records=records)
    np.random.seed(0)
    for i, record in enumerate(records[1:3]):
        (image, annotations, title, file), *samples = drawn[3 * i : 3 * i + 3]
        assert (title, file) == ("annotated", f"{i + 1}.png")
        np.testing.assert_array_equal(image[:, :, ::-1], cv2.imread(record["file_name"]))
        assert len(annotations) == 4
        for image, annotations, title, _ in samples:
            inputs = mapper(record)
            bgr = inputs["image"].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(image, bgr[:, :, ::-1])
            learned = [a for a in annotations if not a["iscrowd"]]
            boxes = torch.tensor(np.array([a["bbox"] for a in learned]), dtype=torch.float32)
            assert torch.equal(boxes.reshape(-1, 4), inputs["instances"].gt_boxes.tensor)
            classes = [a["category_id"] for a in learned]
            assert classes == inputs["instances"].gt_classes.tolist()
            assert title.endswith(f"{len(learned)} boxes")


def test_nothing_to_draw(cfg):
    with pytest.raises(InputError, match="has 6 images"):
        visualize_data.draw_data(cfg, num_images=2, skip=6, samples=1)


def run(monkeypatch, folder, *arguments):
    line = ["visualize_data.py", "--config-file", CONFIG, "--output", str(folder / "a.png")]
    monkeypatch.setattr(sys, "argv", [*line, *map(str, arguments)])
    visualize_data.main()


def test_script(tmp_path, monkeypatch, clean_catalogs):
    write_dataset(tmp_path)
    opts = options(tmp_path, "INPUT.MOSAIC.PROB", 0.5, "SEED", 1)
    pictures = []
    for _ in range(2):
        run(monkeypatch, tmp_path, "--num-images", 2, "--samples", 1, *opts)
        pictures.append(cv2.imread(str(tmp_path / "a.png")))
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", 0], "--samples must be 1 or more"),
        (["INPUT.MOSAIC.PROB", 2.0], r"INPUT\.MOSAIC\.PROB must be in \[0, 1\]"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN names no dataset"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=f"^Error: .*{message}"):
        run(monkeypatch, tmp_path, *arguments)
