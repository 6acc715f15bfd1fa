import json
import os

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from gfl_d2.data import register_coco_format
from gfl_d2.errors import InputError
from gfl_d2.results import DATASET_FILE, find_results
from gfl_d2.visualization import (
    check_picture_path,
    draw_comparison,
    draw_detections,
    draw_results,
    read_images,
    save_picture,
)
from scripts import load_script

visualize_results = load_script("tools/visualize_results.py")

NAMES = Metadata(name="pets", thing_classes=["cat", "dog"])


def grey(height=420, width=500):
    return np.full((height, width, 3), 90, dtype=np.uint8)


def truth(boxes, classes):
    return {
        "annotations": [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": c}
            for box, c in zip(boxes, classes)
        ]
    }


def detections(image, boxes, scores, classes):
    return Instances(
        image.shape[:2],
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )


def halves(picture):
    """The left and the right half, between which there is a gap."""
    width = picture.shape[1]
    return picture[:, : width // 2 - 5], picture[:, width // 2 + 5 :]


def is_colored(picture):
    """(H, W), bool: pixels that are neither grey, black nor white."""
    return np.ptp(picture.astype(int), axis=2) > 40


def test_each_side_shows_its_own_boxes():
    image = grey()
    boxes = [[100, 100, 300, 300]]
    empty = draw_comparison(image, truth([], []), detections(image, [], [], []), NAMES)
    assert not is_colored(empty).any()

    left, right = halves(
        draw_comparison(image, truth(boxes, [0]), detections(image, [], [], []), NAMES)
    )
    assert is_colored(left).any()
    assert not is_colored(right).any()

    left, right = halves(
        draw_comparison(image, truth([], []), detections(image, boxes, [0.9], [0]), NAMES)
    )
    assert not is_colored(left).any()
    assert is_colored(right).any()


def test_boxes_are_where_they_belong():
    image = grey()
    picture = draw_comparison(
        image, truth([[100, 120, 300, 320]], [1]), detections(image, [], [], []), NAMES
    )
    ys, xs = np.nonzero(is_colored(halves(picture)[0]))
    title = picture.shape[0] - image.shape[0]
    found = np.array([xs.min(), ys.min() - title, xs.max(), ys.max() - title])
    assert np.abs(found - [100, 120, 300, 320]).max() <= 3  # half the width of a line


def test_score_threshold():
    image = grey()
    boxes = [[50, 50, 150, 150], [250, 250, 350, 350]]
    drawn = [
        is_colored(
            draw_comparison(
                image,
                truth([], []),
                detections(image, boxes, [0.9, 0.4], [0, 0]),
                NAMES,
                score_thresh=thresh,
            )
        ).sum()
        for thresh in (0.3, 0.4, 0.5, 0.95)
    ]
    assert drawn[0] == drawn[1] > drawn[2] > drawn[3] == 0


def test_a_class_has_one_colour_and_classes_differ():
    image = grey()
    box = [[100, 100, 300, 300]]

    def hue(classes):
        picture = draw_comparison(
            image, truth(box, classes), detections(image, box, [0.9], classes), NAMES
        )
        hues = []
        for half in halves(picture):
            hsv = cv2.cvtColor(half, cv2.COLOR_RGB2HSV)
            hues.append(float(np.median(hsv[is_colored(half)][:, 0])))
        return hues

    cat, dog = hue([0]), hue([1])
    assert cat[0] == pytest.approx(cat[1], abs=2)
    assert dog[0] == pytest.approx(dog[1], abs=2)
    assert abs(cat[0] - dog[0]) > 20


def test_box_modes_and_crowds():
    image = grey()
    none = detections(image, [], [], [])
    expected = draw_comparison(image, truth([[100, 120, 300, 300]], [1]), none, NAMES)
    record = truth([[100, 120, 200, 180]], [1])
    record["annotations"][0]["bbox_mode"] = BoxMode.XYWH_ABS
    assert np.array_equal(draw_comparison(image, record, none, NAMES), expected)
    record["annotations"][0]["iscrowd"] = 1
    assert not np.array_equal(draw_comparison(image, record, none, NAMES), expected)


def test_picture_without_annotations_or_class_names():
    image = grey()
    picture = draw_comparison(
        image, {}, detections(image, [[9, 9, 99, 99]], [0.8], [3]), Metadata(name="x")
    )
    assert is_colored(halves(picture)[1]).any()


def test_small_pictures_are_enlarged_and_large_ones_kept():
    for (height, width), expected in (((48, 64), (400, 533)), ((700, 500), (700, 500))):
        image = grey(height, width)
        picture = draw_comparison(image, {}, detections(image, [], [], []), NAMES)
        assert picture.dtype == np.uint8
        left = picture.shape[1] // 2 - 4
        assert (picture.shape[0] - 28, left) == expected


def test_long_and_thin_pictures_are_reduced():
    for (height, width), expected in (((1, 9000), (1, 4000)), ((5000, 100), (4000, 80))):
        image = grey(height, width)
        boxes = [[10, 0, 90, 1]]
        found = detections(image, boxes, [0.9], [0])
        picture = draw_comparison(image, truth(boxes, [0]), found, NAMES)
        assert (picture.shape[0] - 28, picture.shape[1] // 2 - 4) == expected


def test_boxes_move_with_an_enlarged_picture():
    image = grey(50, 80)
    picture = draw_comparison(
        image, truth([[10, 20, 30, 40]], [0]), detections(image, [], [], []), NAMES
    )
    ys, xs = np.nonzero(is_colored(halves(picture)[0]))
    # Enlarged eightfold, below a title of 28 pixels.
    found = np.array([xs.min(), ys.min() - 28, xs.max(), ys.max() - 28])
    assert np.abs(found - [80, 160, 240, 320]).max() <= 3


RESULT = {"image_id": 5, "category_id": 9, "bbox": [50.0, 60.0, 200.0, 150.0], "score": 0.75}


class TestResults:
    """Results of a dataset of two pictures, ids 3 and 5, and of the categories 7 and 9."""

    @pytest.fixture
    def dataset(self, tmp_path):
        images = [
            {"id": 3, "file_name": "3.png", "height": 400, "width": 500},
            {"id": 5, "file_name": "5.png", "height": 420, "width": 450},
        ]
        for image in images:
            cv2.imwrite(str(tmp_path / image["file_name"]), grey(image["height"], image["width"]))
        box = {"id": 1, "image_id": 3, "category_id": 7, "bbox": [50, 60, 70, 80], "iscrowd": 0}
        coco = {"images": images, "annotations": [{**box, "area": 5600}]}
        coco["categories"] = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]
        (tmp_path / "pets.json").write_text(json.dumps(coco))
        register_coco_format("pets", tmp_path / "pets.json", tmp_path)
        yield "pets"
        DatasetCatalog.remove("pets")
        MetadataCatalog.remove("pets")

    @staticmethod
    def write(folder, *results):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "coco_instances_results.json"
        path.write_text(json.dumps(results))
        return path

    def test_every_picture_has_its_own_boxes(self, dataset, tmp_path):
        picture = draw_results(dataset, self.write(tmp_path, RESULT))
        assert picture.shape == (28 + 400 + 8 + 28 + 420, 500 + 8 + 500, 3)
        first, second = picture[:428], picture[436:, : 450 + 8 + 450]
        assert [is_colored(half).any() for half in halves(first)] == [True, False]
        assert [is_colored(half).any() for half in halves(second)] == [False, True]
        ys, xs = np.nonzero(is_colored(second))
        found = np.array([xs.min(), ys.min(), xs.max(), ys.max()])
        expected = [458 + 50, 28 + 60, 458 + 250, 28 + 210]
        assert np.abs(found - expected).max() <= 3
        assert (picture[436:, 450 + 8 + 450 :] == 255).all()  # the second is narrower

    def test_pictures_that_cannot_be_read_are_left_out(self, dataset, tmp_path, caplog):
        path = self.write(tmp_path, RESULT)
        first, second = DatasetCatalog.get(dataset)
        expected = draw_results(dataset, path, skip=1)
        for damage in (b"", b"text", (tmp_path / "5.png").read_bytes()):  # the last: another size
            (tmp_path / "3.png").write_bytes(damage)
            caplog.clear()
            assert np.array_equal(draw_results(dataset, path), expected)
            assert np.array_equal(draw_results(dataset, path, num_images=1), expected)
            assert "Left out: 1 of 2 images cannot be read" in caplog.text
            assert first["file_name"] in caplog.text
            assert second["file_name"] not in caplog.text
        (tmp_path / "5.png").unlink()
        with pytest.raises(InputError, match="2 of 2 images cannot be read"):
            draw_results(dataset, path)

    def test_only_as_many_pictures_as_needed_are_read(self, dataset, tmp_path):
        (tmp_path / "5.png").unlink()
        ((record, image),) = read_images(DatasetCatalog.get(dataset), 1)
        assert (record["image_id"], image.shape) == (3, (400, 500, 3))

    @pytest.mark.parametrize(
        "options", [{"num_images": 0}, {"skip": -1}, {"score_thresh": float("nan")}]
    )
    def test_numbers_that_make_no_sense(self, dataset, tmp_path, options):
        (number,) = options.values()
        with pytest.raises(InputError, match=f"must be 1 or more.*not .*{number}"):
            draw_results(dataset, self.write(tmp_path), **options)

    @pytest.mark.parametrize(
        "change",
        [
            {"bbox": [1, 2, 3, float("nan")]},
            {"bbox": [1, 2, 3, 10**400]},
            {"bbox": [1, 2, 3, None]},
            {"bbox": [1, 2, 3]},
            {"bbox": None},
            {"bbox": "1234"},
            {"score": None},
            {"score": "0.5"},
            {"score": float("inf")},
            {"image_id": [3]},
            {"category_id": {}},
        ],
    )
    def test_detections_that_are_none(self, dataset, tmp_path, change):
        path = self.write(tmp_path, RESULT, {**RESULT, **change})
        with pytest.raises(InputError, match=r"results\.json: item 1 is not a detection"):
            draw_results(dataset, path)

    def test_choice_of_pictures(self, dataset, tmp_path):
        path = self.write(tmp_path)
        for options, height in (
            ({"num_images": 1}, 400),
            ({"skip": 1}, 420),
            ({"min_boxes": 1}, 400),
        ):
            assert draw_results(dataset, path, **options).shape[0] == 28 + height
        with pytest.raises(InputError, match="Nothing to draw: 'pets' has 2 images"):
            draw_results(dataset, path, skip=2)

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"image_id": 4}, "image_id 4"), ({"category_id": 1}, "category_id 1")],
    )
    def test_results_of_another_dataset(self, dataset, tmp_path, change, message):
        path = self.write(tmp_path, RESULT, {**RESULT, **change})
        with pytest.raises(InputError, match=f"{message}, which dataset 'pets' does not have"):
            draw_results(dataset, path)

    @pytest.mark.parametrize("text", ["{}", "[1]", '[{"image_id": 3}]', "[", "\x80"])
    def test_file_that_has_no_results(self, dataset, tmp_path, text):
        (tmp_path / "file.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=r"file\.json"):
            draw_results(dataset, tmp_path / "file.json")

    def test_results_of_one_dataset_are_found(self, dataset, tmp_path):
        path = self.write(tmp_path / "inference")
        for place in (tmp_path, tmp_path / "inference", path):
            assert find_results(place, dataset) == path

    def test_results_of_several_datasets_are_told_apart(self, dataset, tmp_path):
        self.write(tmp_path / "inference")  # of an earlier evaluation
        other = self.write(tmp_path / "inference" / "demo_val")
        path = self.write(tmp_path / "inference" / "pets")
        for place in (tmp_path, tmp_path / "inference", path):
            assert find_results(place, dataset) == path
        with pytest.raises(InputError, match="has the results of 'pets', not of 'demo_val'"):
            find_results(path, "demo_val")
        assert find_results(tmp_path, "demo_val") == other

    def test_results_whose_dataset_is_noted(self, dataset, tmp_path):
        flat = self.write(tmp_path / "inference")
        (flat.parent / DATASET_FILE).write_text("demo_val")
        with pytest.raises(InputError, match="no results of dataset 'pets'"):
            find_results(tmp_path, dataset)
        with pytest.raises(InputError, match="has the results of 'demo_val', not of 'pets'"):
            find_results(flat, dataset)
        own = self.write(tmp_path / "inference" / "pets")
        assert find_results(tmp_path, dataset) == own
        (flat.parent / DATASET_FILE).write_text("pets")
        for newer, older in ((own, flat), (flat, own)):
            os.utime(older, (0, 0))
            os.utime(newer, (1, 1))
            assert find_results(tmp_path, dataset) == newer

    def test_no_results(self, dataset, tmp_path):
        with pytest.raises(InputError, match=r"no results of dataset 'pets'.*nothing"):
            find_results(tmp_path, dataset)
        other = self.write(tmp_path / "inference" / "demo_val")
        with pytest.raises(InputError, match=f"What is there: {other}"):
            find_results(tmp_path, dataset)
        with pytest.raises(InputError, match=r"absent.* does not exist"):
            find_results(tmp_path / "absent", dataset)

    def run_tool(self, monkeypatch, tmp_path, output, *opts):
        config = tmp_path / "config.yaml"
        entry = ["pets", str(tmp_path / "pets.json"), str(tmp_path)]
        config.write_text(json.dumps({"DATASETS": {"REGISTER": [entry], "TEST": ["pets"]}}))
        arguments = ["--config-file", str(config), "--results", str(tmp_path), *opts]
        arguments += ["--output", output]
        monkeypatch.setattr("sys.argv", ["visualize_results", *arguments])
        visualize_results.main()

    def test_tool(self, dataset, monkeypatch, tmp_path):
        path = self.write(tmp_path / "inference" / "pets", RESULT)
        output = str(tmp_path / "made" / "picture.png")
        self.run_tool(monkeypatch, tmp_path, output)
        expected = draw_results(dataset, path)
        assert np.array_equal(cv2.imread(output)[:, :, ::-1], expected)

    def test_tool_says_what_is_wrong(self, dataset, monkeypatch, tmp_path):
        self.write(tmp_path / "inference" / "pets", {**RESULT, "image_id": 4})
        with pytest.raises(SystemExit, match=r"Error: .*of another dataset"):
            self.run_tool(monkeypatch, tmp_path, str(tmp_path / "picture.png"))
        with pytest.raises(SystemExit, match=r"Error: DATASETS\.TEST names no dataset"):
            self.run_tool(monkeypatch, tmp_path, str(tmp_path / "a.png"), "DATASETS.TEST", "()")
        absent = ("DATASETS.TEST", "('absent',)")
        with pytest.raises(SystemExit, match=r"Error: Dataset 'absent' is not registered.*pets"):
            self.run_tool(monkeypatch, tmp_path, str(tmp_path / "a.png"), *absent)

    def test_tool_looks_at_the_output_first(self, monkeypatch, tmp_path):
        with pytest.raises(SystemExit, match=r"Error: Picture '.*a\.unknown': its ending"):
            self.run_tool(monkeypatch, tmp_path, str(tmp_path / "a.unknown"))


@pytest.mark.parametrize("name", ["picture.unknown", "picture", "file/picture.png", "folder.png"])
def test_picture_that_cannot_be_written(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for function in (check_picture_path, lambda path: save_picture(path, grey())):
        with pytest.raises(InputError, match=f"{name}': "):
            function(tmp_path / name)


def test_picture_too_large_for_its_format(tmp_path):
    with pytest.raises(InputError, match=r"a\.jpg', 1 x 70000 pixels: "):
        save_picture(tmp_path / "a.jpg", grey(70000, 1))


def test_detections_on_their_image(tmp_path):
    """A blue picture, however it is given; boxes are where they belong, and named."""
    image = np.zeros((230, 321, 3), np.uint8)
    image[..., 0] = 200
    found = detections(image, [[100, 60, 220, 190]], [0.9], [1])
    picture = draw_detections(image, found, NAMES)
    assert (picture.mode, picture.size) == ("RGB", (321, 230))
    ys, xs = np.nonzero((np.asarray(picture) != (0, 0, 200)).any(axis=2))
    # The label stands on the upper side.
    assert np.abs(np.array([xs.min(), xs.max(), ys.max()]) - [100, 220, 190]).max() <= 3
    assert 30 < ys.min() < 60
    cv2.imwrite(str(tmp_path / "blue.png"), image)
    for same in (tmp_path / "blue.png", Image.fromarray(image[..., ::-1])):
        assert draw_detections(same, found, NAMES) == picture
    unnamed = Metadata(name="unnamed")
    assert draw_detections(image, found, unnamed) != picture
    nothing = draw_detections(image, found[found.scores > 0.95], NAMES)
    assert (np.asarray(nothing) == (0, 0, 200)).all()


def test_detections_of_another_image():
    with pytest.raises(InputError, match=r"\(420, 500\), not \(420, 499\)"):
        draw_detections(grey(width=499), detections(grey(), [], [], []), NAMES)
