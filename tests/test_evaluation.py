"""Evaluators: their numbers, ids, limits and data without annotations."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2 import evaluation
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter

from gfl_d2 import load_config
from gfl_d2.data import register_datasets
from gfl_d2.engine import BoxEvaluator, Trainer, build_evaluator, check_evaluators, read_metrics
from gfl_d2.errors import InputError
from toy_training import CONFIG, options, write_dataset

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 7, "name": "eel"}]


def make_data(num_images=20, num_boxes=12, seed=0) -> dict:
    """Boxes of all areas in images of 640x480; some are crowds. Nothing is of the last class."""
    rng = np.random.default_rng(seed)
    images = [
        {"id": 3 * i + 1, "file_name": f"{i}.jpg", "width": 640, "height": 480}
        for i in range(num_images)
    ]
    annotations = []
    for image in images[1:]:  # the first image is empty
        for _ in range(num_boxes):
            w, h = np.exp(rng.uniform(1.5, 5.5, 2))
            x, y = rng.uniform(0, [640 - w, 480 - h])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": CATEGORIES[rng.integers(2)]["id"],
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(w * h * 0.7),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def classes_of(data: dict) -> dict:
    return {category["id"]: i for i, category in enumerate(data["categories"])}


@pytest.fixture
def register(tmp_path, clean_catalogs):
    """Registers data in COCO format as 'toy', as Detectron2 does it."""

    def register_data(data: dict) -> None:
        (tmp_path / "instances.json").write_text(json.dumps(data))
        register_coco_instances("toy", {}, str(tmp_path / "instances.json"), str(tmp_path))
        MetadataCatalog.get("toy").set(
            thing_classes=[category["name"] for category in data["categories"]],
            thing_dataset_id_to_contiguous_id=classes_of(data),
        )

    return register_data


def detect(data: dict, noise: float = 0.0, extra: int = 0) -> dict:
    """Detections by image id: the boxes with noise, and others in random places; scores of ties."""
    rng = np.random.default_rng(1)
    classes, detections = classes_of(data), {}
    for image in data["images"]:
        of_image = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        boxes = np.array([a["bbox"] for a in of_image]).reshape(-1, 4)
        boxes = boxes + noise * rng.normal(size=boxes.shape) * boxes[:, [2, 3, 2, 3]]
        boxes = np.concatenate([boxes, rng.uniform(1, 200, (extra, 4))])
        labels = [classes[a["category_id"]] for a in of_image]
        labels += rng.integers(0, len(classes), extra).tolist()
        detections[image["id"]] = Instances(
            (image["height"], image["width"]),
            pred_boxes=Boxes(BoxMode.convert(torch.tensor(boxes).float(), 1, 0)),
            scores=torch.tensor(rng.uniform(0, 1, len(boxes)).round(1)).float(),
            pred_classes=torch.tensor(labels, dtype=torch.int64),
        )
    return detections


def evaluate(evaluator: evaluation.COCOEvaluator, detections: dict, **kwargs) -> dict:
    evaluator.reset()
    for image_id, instances in detections.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate(**kwargs)


# Numbers


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 150])
def test_numbers_are_those_of_pycocotools(tmp_path, register, limit):
    data = make_data(num_boxes=12 if limit == 100 else 230)
    register(data)
    detections = detect(data, noise=0.05, extra=20)
    keywords = {"output_dir": str(tmp_path / "a"), "max_dets_per_image": limit}
    official = evaluation.COCOEvaluator("toy", use_fast_impl=False, **keywords)
    ours = build_evaluator("toy", str(tmp_path / "b"), limit)
    for some in ({}, {"img_ids": [4, 7, 10]}):
        expected = evaluate(official, detections, **some)
        found = evaluate(ours, detections, **some)
        assert list(found["bbox"]) == list(expected["bbox"])
        assert 20 < found["bbox"]["AP"] < 80
        # pycocotools divides by a number of detections that is 2e-16 too large.
        assert found["bbox"] == pytest.approx(expected["bbox"], rel=1e-14, nan_ok=True)
    name = "coco_instances_results.json"
    assert (tmp_path / "b" / name).read_text() == (tmp_path / "a" / name).read_text()


def test_nothing_is_detected(tmp_path, register):
    data = make_data()
    register(data)
    nothing = detect({**data, "annotations": []})
    found = evaluate(build_evaluator("toy", str(tmp_path)), nothing)["bbox"]
    assert all(math.isnan(value) for value in found.values())
    assert len(found) == 6


def as_text(i):
    return f"image {i}"


def of_any_type(i):
    return [i, f"{i}", i + 0.5][i % 3]


def large(i):
    return 2**60 + i  # as a float, all are one


@pytest.mark.parametrize("change", [int, as_text, of_any_type, large])
def test_ids_of_any_type(tmp_path, register, change):
    data = make_data()
    for image in data["images"]:
        image["id"] = change(image["id"])
    for i, annotation in enumerate(data["annotations"]):
        annotation.update(id=i, image_id=change(annotation["image_id"]))  # ids from 0
    register(data)
    found = evaluate(build_evaluator("toy", str(tmp_path)), detect(data))["bbox"]
    assert found["AP"] == pytest.approx(100) == found["AP-cat"] == found["AP-dog"]
    assert math.isnan(found["AP-eel"])
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [r["image_id"] for r in results] == [a["image_id"] for a in data["annotations"]]


def test_names_in_another_order_than_category_ids(tmp_path, register):
    data = make_data()
    data["categories"] = [CATEGORIES[i] for i in (2, 0, 1)]
    register(data)
    found = evaluate(build_evaluator("toy", str(tmp_path)), detect(data))["bbox"]
    assert found["AP-cat"] == pytest.approx(100) == found["AP-dog"]
    assert math.isnan(found["AP-eel"])


def test_limit_follows_the_model(tmp_path, real_data, clean_catalogs):
    folder = real_data / "coco_variants" / "many_objects"
    if not folder.is_dir():
        pytest.skip("no image with many objects")
    register_coco_instances("many", {}, str(folder / "a.json"), str(folder / "images"))
    DatasetCatalog.get("many")  # sets the classes
    detections = detect(json.loads((folder / "a.json").read_text()))
    ap = [
        evaluate(build_evaluator("many", str(tmp_path), limit), detections)["bbox"]["AP"]
        for limit in (10, 100, 149, 150, 300)
    ]
    assert ap[0] == ap[1] < ap[2] < 100
    assert ap[3:] == pytest.approx([100, 100])


def test_limit_of_the_trainer(tmp_path, register):
    register(make_data())
    cfg = load_config(CONFIG, options(tmp_path, "TEST.DETECTIONS_PER_IMAGE", 300))
    assert Trainer.build_evaluator(cfg, "toy")._max_dets_per_image == [1, 10, 300]


# Data


def test_data_of_a_function_are_read_anew(tmp_path, clean_catalogs):
    """A notebook: the function gives other boxes the next time, in the same process or not."""
    data = make_data()
    path = str(tmp_path / "instances.json")
    DatasetCatalog.register("toy", lambda: load_coco_json(path, "", "toy"))
    for _ in range(2):
        for annotation in data["annotations"]:
            annotation["bbox"][0] += 200
        Path(path).write_text(json.dumps(data))
        DatasetCatalog.get("toy")  # sets the classes
        found = evaluate(build_evaluator("toy", str(tmp_path / "output")), detect(data))
        assert found["bbox"]["AP"] == pytest.approx(100)
        assert not MetadataCatalog.get("toy").get("json_file")


def without_annotations(folder) -> None:
    data = json.loads((folder / "instances.json").read_text())
    del data["annotations"]
    (folder / "unlabelled.json").write_text(json.dumps(data))
    json_file = str(folder / "unlabelled.json")
    register_coco_instances("unlabelled", {}, json_file, str(folder / "images"))


@pytest.mark.slow
@pytest.mark.parametrize("tested", [("unlabelled",), ("toy_val", "unlabelled")])
def test_training_with_a_test_set_without_annotations(tmp_path, clean_catalogs, caplog, tested):
    write_dataset(tmp_path)
    without_annotations(tmp_path)
    key = "bbox/AP" if len(tested) == 1 else "toy_val/bbox/AP"
    more = ("DATASETS.TEST", str(tested), "TEST.BEST_CHECKPOINT_METRIC", key)
    cfg = load_config(CONFIG, options(tmp_path, *more))
    register_datasets(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    with caplog.at_level(logging.INFO, logger="gfl_d2"):
        trainer.train()
    output = tmp_path / "output"
    folder = output / "inference" / ("" if len(tested) == 1 else "unlabelled")
    assert len(json.loads((folder / "coco_instances_results.json").read_text())) > 6
    # Evaluated after the second and after the last iteration.
    assert caplog.text.count(f"'unlabelled' has no annotations: predictions are in {folder}") == 2
    has_ap = len(tested) > 1
    assert (output / "model_best.pth").exists() == has_ap
    assert ("No evaluation gave TEST.BEST_CHECKPOINT_METRIC" in caplog.text) != has_ap
    assert len(read_metrics(output, key)) == (2 if has_ap else 0)


@pytest.mark.parametrize("name", ["a/b", "", "__", "cat__dog", "\u732b", "x" * 300, "a-b", "%s {}"])
def test_class_names_of_any_kind(tmp_path, register, name):
    data = make_data()
    data["categories"] = [{"id": 3, "name": name}, *CATEGORIES[1:]]
    register(data)
    found = evaluate(build_evaluator("toy", str(tmp_path)), detect(data))
    evaluation.print_csv_format(found)
    with EventStorage() as storage:
        # As Detectron2's EvalHook logs them.
        storage.put_scalars(**{f"bbox/{key}": value for key, value in found["bbox"].items()})
        for writer in (JSONWriter(str(tmp_path / "metrics.json")), TensorboardXWriter(tmp_path)):
            writer.write()
            writer.close()
    (record,) = read_metrics(tmp_path).values()
    assert record[f"bbox/AP-{name}"] == pytest.approx(100)


# Kinds of evaluators


@pytest.fixture
def lvis(monkeypatch):
    """The package with LVIS' API, as far as it is asked for when an evaluator is made."""
    module = ModuleType("lvis")
    module.__spec__ = importlib.machinery.ModuleSpec("lvis", None)
    module.LVIS = lambda json_file: SimpleNamespace(get_ann_ids=list)
    monkeypatch.setitem(sys.modules, "lvis", module)


@pytest.mark.parametrize(
    ("kind", "evaluator"),
    [
        (None, BoxEvaluator),
        ("coco", BoxEvaluator),
        ("lvis", evaluation.LVISEvaluator),
        ("pascal_voc", evaluation.PascalVOCDetectionEvaluator),
    ],
)
def test_evaluator_by_the_type_of_a_dataset(tmp_path, clean_catalogs, lvis, kind, evaluator):
    empty = {"images": [], "annotations": [], "categories": []}
    (tmp_path / "annotations.json").write_text(json.dumps(empty))
    of_voc = {"dirname": str(tmp_path), "split": "val", "year": 2012}
    metadata = MetadataCatalog.get("toy").set(
        json_file=str(tmp_path / "annotations.json"), thing_classes=["cat"], **of_voc
    )
    if kind:
        metadata.evaluator_type = kind
    assert type(build_evaluator("toy", str(tmp_path))) is evaluator


@pytest.mark.parametrize("kind", ["sem_seg", "cityscapes_instance"])
def test_unknown_evaluator_type(clean_catalogs, kind):
    MetadataCatalog.get("toy").evaluator_type = kind
    with pytest.raises(InputError, match=f"'toy' has the evaluator_type '{kind}'"):
        check_evaluators(["toy"])


def test_lvis_needs_its_api(clean_catalogs, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    MetadataCatalog.get("toy").evaluator_type = "lvis"
    with pytest.raises(InputError, match=r"'toy' needs .*pip install lvis"):
        check_evaluators(["toy"])
