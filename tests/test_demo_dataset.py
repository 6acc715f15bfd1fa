import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from scripts import load_script

demo = load_script("demo/make_dataset.py")
WIDTH, HEIGHT = 128, 96


def draw(index: int, width: int = WIDTH, height: int = HEIGHT) -> demo.Scene:
    return demo.draw_scene(np.random.default_rng(index), width, height)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo.make_dataset(str(folder), seed=3, num_train=12, num_val=6, width=WIDTH, height=HEIGHT)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_same_seed_same_files(folder, tmp_path):
    demo.make_dataset(str(tmp_path), seed=3, num_train=12, num_val=6, width=WIDTH, height=HEIGHT)
    assert files(tmp_path) == files(folder)


def test_pictures_do_not_depend_on_their_number(folder, tmp_path):
    demo.make_dataset(str(tmp_path), seed=3, num_train=2, num_val=1, width=WIDTH, height=HEIGHT)
    pictures = {name: data for name, data in files(tmp_path).items() if name.endswith("jpg")}
    assert len(pictures) == 3
    assert pictures.items() <= files(folder).items()


def test_no_picture_twice(folder, tmp_path):
    demo.make_dataset(str(tmp_path), seed=4, num_train=12, num_val=6, width=WIDTH, height=HEIGHT)
    pictures = [
        data
        for place in (folder, tmp_path)
        for name, data in files(place).items()
        if name.endswith("jpg")
    ]
    assert len(pictures) == len(set(pictures)) == 36


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("val", 6)])
def test_valid_coco(folder, split, count):
    coco = COCO(str(folder / f"{split}.json"))
    assert len(coco.imgs) == count
    assert [c["name"] for c in coco.loadCats(sorted(coco.getCatIds()))] == list(demo.CLASSES)
    assert sorted(coco.getAnnIds()) == list(range(1, len(coco.anns) + 1))
    for image in coco.imgs.values():
        picture = cv2.imread(str(folder / split / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3) == (HEIGHT, WIDTH, 3)
    for annotation in coco.anns.values():
        x, y, w, h = annotation["bbox"]
        assert min(x, y) >= 0
        assert min(w, h) > 0
        assert x + w <= WIDTH
        assert y + h <= HEIGHT
        assert 0 < annotation["area"] <= w * h
        assert annotation["image_id"] in coco.imgs


def test_annotations_are_those_of_the_scenes(folder):
    content = json.loads((folder / "val.json").read_text())
    for index, image in enumerate(content["images"]):
        scene = demo.draw_scene(np.random.default_rng((3, 1, index)), WIDTH, HEIGHT)
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert [a["category_id"] - 1 for a in found] == scene.labels
        assert [a["bbox"] for a in found] == [scene.box(i) for i in range(len(scene.labels))]
        assert [a["area"] for a in found] == [scene.area(i) for i in range(len(scene.labels))]


@pytest.mark.parametrize("index", range(5))
def test_boxes_enclose_what_can_be_seen(index):
    scene = draw(index)
    assert scene.image.shape == (HEIGHT, WIDTH, 3)
    for i in range(len(scene.labels)):
        pixels = [(x, y) for y in range(HEIGHT) for x in range(WIDTH) if scene.owner[y, x] == i]
        left, top = min(x for x, _ in pixels), min(y for _, y in pixels)
        right, bottom = max(x for x, _ in pixels), max(y for _, y in pixels)
        assert scene.box(i) == [left, top, right - left + 1, bottom - top + 1]
        assert scene.area(i) == len(pixels)
    assert set(np.unique(scene.owner)) - {-1} == set(range(len(scene.labels)))


def test_later_objects_hide_earlier_ones(monkeypatch):
    """The owner of a pixel is the last object (or none, for a stick) whose mask covers it."""
    drawn = []
    choose_place = demo._choose_place

    def record_place(rng, layer, owner, window):
        place = choose_place(rng, layer, owner, window)
        drawn.append((layer, place, owner.shape, window))
        return place

    monkeypatch.setattr(demo, "_choose_place", record_place)
    monkeypatch.setattr(demo, "_is_visible", lambda owner, full_areas: True)
    monkeypatch.setattr(demo, "_stands_out", lambda canvas, layer: True)
    for index in range(5):
        drawn.clear()
        scene = draw(index)
        expected = np.full(drawn[0][2], -1)
        count = 0
        for layer, (rows, columns), *_ in drawn:
            for y, x in zip(*np.nonzero(layer.alpha >= 0.5)):
                expected[rows.start + y, columns.start + x] = -1 if layer.label is None else count
            count += layer.label is not None
        window = drawn[0][3]
        assert np.array_equal(scene.owner, expected[window])
        assert scene.labels == [layer.label for layer, *_ in drawn if layer.label is not None]


def test_at_least_half_of_an_object_can_be_seen(monkeypatch):
    seen = []
    is_visible = demo._is_visible

    def record(owner, full_areas):
        if is_visible(owner, full_areas):
            seen.append((owner.copy(), list(full_areas)))
            return True
        return False

    monkeypatch.setattr(demo, "_is_visible", record)
    overlaps = 0
    for index in range(10):
        scene = draw(index)
        owner, full_areas = seen[-1]
        assert np.array_equal(owner, scene.owner)
        visible = [int((owner == i).sum()) for i in range(len(full_areas))]
        assert all(v >= 0.5 * full for v, full in zip(visible, full_areas))
        overlaps += sum(v < 0.95 * full for v, full in zip(visible, full_areas))
    assert overlaps >= 5  # occlusion does occur


@pytest.mark.slow
def test_variety():
    boxes, labels = [], []
    for index in range(60):
        scene = draw(index, 256, 192)
        boxes += [scene.box(i) for i in range(len(scene.labels))]
        labels += scene.labels
    sides = np.array(boxes)[:, 2:].max(axis=1)
    low, high = np.percentile(sides, [2, 98])
    assert high / low > 5
    counts = np.bincount(labels, minlength=len(demo.CLASSES))
    assert counts.min() > 0.6 * counts.mean()
