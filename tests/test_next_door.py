"""The code of docs/next_door.md, run as it stands there."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from test_docs import code_blocks

DETECT, PICTURE, VIDEO, BROWSE = code_blocks("docs/next_door.md", "python")
HEIGHT, WIDTH = 96, 160
COLOURS = [(40, 40, 220), (220, 120, 40)]  # of the classes, BGR


class ColourPredictor:
    """Finds the rectangles that are drawn in the colours, with GFL's usual scores."""

    metadata = SimpleNamespace(thing_classes=["red", "blue"])

    def __init__(self, weights):
        assert weights == "output/model_final.pth"

    def __call__(self, image):
        boxes, classes = [], []
        for k, colour in enumerate(COLOURS):
            mask = (np.abs(image.astype(int) - colour).max(axis=2) < 60).astype(np.uint8)
            for x, y, w, h, area in cv2.connectedComponentsWithStats(mask)[2][1:].tolist():
                if area > 50:
                    boxes.append([x, y, x + w, y + h])
                    classes.append(k)
        found = Instances(image.shape[:2], pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
        found.scores = torch.full((len(boxes),), 0.45)
        found.pred_classes = torch.tensor(classes, dtype=torch.int64)
        return {"instances": found}


def draw(*rectangles):
    """Grey, with rectangles: class, and the left upper corner."""
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    for k, x, y in rectangles:
        cv2.rectangle(image, (x, y), (x + 20, y + 14), COLOURS[k], -1)
    return image


@pytest.fixture
def scope(tmp_path, monkeypatch):
    pytest.importorskip("supervision", minversion="0.31.2", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gfl_d2.deploy.Predictor", ColourPredictor)
    names = {}
    exec(DETECT, names)
    return names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_picture(scope):
    image = draw((0, 10, 40), (1, 90, 40))
    cv2.imwrite("image.jpg", image)
    exec(PICTURE, scope)
    assert sorted(scope["texts"]) == ["blue 0.45", "red 0.45"]
    drawn = cv2.imread("annotated.jpg").astype(int)
    # The sides of both boxes are drawn, and what lies within is as before.
    for x in (10, 90):
        assert np.abs(drawn[48:53, x - 1 : x + 2] - image[48, 5]).max() > 60
        assert np.abs(drawn[45:50, x + 6 : x + 14] - image[47, x + 10]).max() < 40


def write_film(frames):
    video = cv2.VideoWriter("film.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 20, (WIDTH, HEIGHT))
    for frame in frames:
        video.write(frame)
    video.release()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_video(scope, capsys):
    """Two objects cross the middle, one each way, and one stays on the left. At first none."""
    pytest.importorskip("trackers", exc_type=ImportError)
    moving = [draw((0, 20 + 4 * i, 10), (1, 120 - 4 * i, 40), (0, 20, 75)) for i in range(25)]
    write_film([draw()] * 2 + moving)
    exec(VIDEO, scope)
    assert "Crossed the line: 1 one way, 1 the other" in capsys.readouterr().out
    assert len(scope["number_in_zone"]) == 27
    assert scope["number_in_zone"][0] == 0
    assert {scope["number_in_zone"][i] for i in (6, -1)} == {2}  # another one at the end
    assert len(set(scope["tracked"].tracker_id)) == 3
    video = cv2.VideoCapture("tracked.mp4")
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == 27
    video.release()


def test_browsing(tmp_path, monkeypatch):
    """
    FiftyOne's reader of COCO files, which is what the code calls for the annotations, and its
    conversion of results. Its database, MongoDB, is not part of the test.
    """
    coco = pytest.importorskip("fiftyone.utils.coco")
    monkeypatch.chdir(tmp_path)
    for folder in ("bccd/images", "output/inference"):
        (tmp_path / folder).mkdir(parents=True)
    cv2.imwrite("bccd/images/a.jpg", draw((0, 10, 40)))
    box = {"image_id": 7, "category_id": 3, "bbox": [10, 40, 20, 14]}
    images = [{"id": 7, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}]
    truth = [{**box, "id": 1, "iscrowd": 0, "area": 280}]
    data = {"images": images, "annotations": truth, "categories": [{"id": 3, "name": "red"}]}
    (tmp_path / "bccd/instances_val.json").write_text(json.dumps(data))
    results = tmp_path / "output/inference/coco_instances_results.json"
    results.write_text(json.dumps([{**box, "score": 0.45}]))

    dataset = StandInDataset(coco)
    dataset_class = SimpleNamespace(from_dir=dataset.from_dir)
    monkeypatch.setattr("fiftyone.Dataset", dataset_class)
    exec(BROWSE, {})
    for name, score in (("detections", None), ("predictions", 0.45)):
        (found,) = dataset.fields[name].detections
        assert (found.label, found.confidence) == ("red", score)
        assert found.bounding_box == pytest.approx([1 / 16, 40 / 96, 1 / 8, 14 / 96])


class StandInDataset:
    """Of one image; what FiftyOne's dataset does by its database."""

    def __init__(self, coco):
        self.coco, self.fields = coco, {}

    def from_dir(self, dataset_type, **options):
        assert dataset_type.__name__ == "COCODetectionDataset"
        importer = self.coco.COCODetectionDatasetImporter(**options)
        with importer:
            ((_, self.metadata, labels),) = importer
        self.fields = labels if isinstance(labels, dict) else {"detections": labels}
        return self

    def values(self, names):
        of = {"coco_id": [self.fields["coco_id"]], "id": ["1"]}
        of |= {"metadata.width": [self.metadata.width], "metadata.height": [self.metadata.height]}
        return [of[name] for name in names]

    def select(self, ids, ordered):
        assert ids == ["1"]
        return self

    def compute_metadata(self):
        pass

    def set_values(self, name, values):
        (self.fields[name],) = values

    def evaluate_detections(self, predictions, gt_field, eval_key, compute_mAP):
        assert {predictions, gt_field} <= self.fields.keys()
