"""Checks of what is read of a variant of the sound set, and of the evaluation with it."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

import variants_of_annotations  # noqa: F401
import variants_of_files  # noqa: F401
from coco_set import BOXES, HEIGHT, IMAGES, SOUND_BOXES, VARIANTS, WIDTH, CocoSet, Reads, Refused
from gfl_d2.data import GFLDatasetMapper, register_coco_format
from gfl_d2.errors import InputError

COUNTER = itertools.count()


def read(json_file: Path, image_root: Path) -> tuple[str, list[dict], list[np.ndarray]]:
    """Name of the dataset, its records and its decoded images."""
    name = f"variant_{next(COUNTER)}"
    before = json_file.read_bytes()
    register_coco_format(name, json_file, image_root)
    assert json_file.read_bytes() == before
    records = DatasetCatalog.get(name)
    mapper = GFLDatasetMapper(False, augmentations=[], image_format="BGR")
    return name, records, [mapper(record)["image"].numpy() for record in records]


def evaluate(name: str, records: list[dict], folder: Path, max_detections: int | None) -> dict:
    """Results of the ground truth as detections."""
    evaluator = COCOEvaluator(
        name, output_dir=str(folder), max_dets_per_image=max_detections, use_fast_impl=False
    )
    evaluator.reset()
    for record in records:
        boxes = [a for a in record["annotations"] if not a["iscrowd"]]
        xywh = torch.tensor([a["bbox"] for a in boxes], dtype=torch.float64).reshape(-1, 4)
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
        instances.scores = torch.ones(len(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] for a in boxes], dtype=torch.int64)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


def check_evaluation(name: str, records: list[dict], folder: Path) -> None:
    metadata = MetadataCatalog.get(name)
    annotations = [a for record in records for a in record["annotations"]]
    sound = json.loads(Path(metadata.json_file).read_text(encoding="utf-8"))
    assert ("annotations" in sound) == bool(annotations)
    learned = [a for a in annotations if not a["iscrowd"]]
    if not annotations:
        return
    for a in sound["annotations"]:
        assert 0 < a["area"] <= (a["bbox"][2] + 1) * (a["bbox"][3] + 1)
    results = evaluate(name, records, folder, max_detections=150 if len(learned) > 100 else None)
    if not learned:
        assert math.isnan(results["AP"])
        return
    assert results["AP"] == pytest.approx(100)
    present = {a["category_id"] for a in learned}
    classes = metadata.thing_classes
    # Of a single class Detectron2 gives no AP beside that of all.
    for index, class_name in enumerate(classes if len(classes) > 1 else ()):
        ap = results[f"AP-{class_name}"]
        assert ap == pytest.approx(100) if index in present else math.isnan(ap)


def table_in(messages: list[str]) -> list[tuple[int, str]]:
    """The lines of the summary: how many, and the rest."""
    rows = re.findall(r"^\| *(\d+) \|(.*)\|$", "\n".join(messages), flags=re.MULTILINE)
    return [(int(number), text) for number, text in rows]


def check_notes(notes: dict | None, messages: list[str], is_exact: bool = True) -> None:
    if notes is None:
        return
    rows = table_in(messages)
    for word, number in notes.items():
        # Numbers may differ where changes meet.
        assert any(word in text and (n == number or not is_exact) for n, text in rows), (word, rows)
    assert not is_exact or len(rows) == len(notes), rows


def expected_objects(outcomes: list[Reads]) -> list[tuple]:
    """(image, class, x, y, w, h, iscrowd) of each object of the sound set after changes."""
    left_out, crowds = (
        {i for outcome in outcomes for i in getattr(outcome, key)} for key in ("left_out", "crowds")
    )
    boxes = dict(enumerate(SOUND_BOXES))
    for outcome in outcomes:
        boxes.update(outcome.boxes)
    # Those of many objects are cats on the first image.
    place = {i: divmod(i, 2) if len(boxes) == len(BOXES) else (0, 0) for i in boxes}
    files = next((o.files for o in outcomes if o.files != tuple(IMAGES)), tuple(IMAGES))
    names = next((o.names for o in outcomes if o.names != ("cat", "dog")), ("cat", "dog"))
    return sorted(
        (files[place[i][0]], names[place[i][1]], *map(float, box), int(i in crowds))
        for i, box in boxes.items()
        if i not in left_out
        for _ in range(outcomes[0].copies)
    )


def check_records(outcomes: list[Reads], name: str, records: list[dict]) -> None:
    classes = MetadataCatalog.get(name).thing_classes
    changed = [o.classes for o in outcomes if o.classes != ("cat", "dog")]
    assert len(set(classes)) == len(classes)
    assert tuple(classes) == (changed[0] if changed else ("cat", "dog"))
    assert len({record["image_id"] for record in records}) == len(records) == len(IMAGES)
    assert {(r["width"], r["height"]) for r in records} == {(WIDTH, HEIGHT)}
    objects = []
    for record in records:
        image = int(re.search(r"(\d)\.\w+$", record["file_name"])[1]) - 1
        for a in record["annotations"]:
            objects.append((image, classes[a["category_id"]], *a["bbox"], a["iscrowd"]))
    assert sorted(objects) == expected_objects(outcomes)


@contextlib.contextmanager
def collect_messages() -> Iterator[list[str]]:
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("gfl_d2")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def check_read(outcomes: list[Reads], json_file: Path, image_root: Path, results: Path) -> None:
    """Check what is read of a set that has the changes of these outcomes."""
    with collect_messages() as messages:
        dataset, records, images = read(json_file, image_root)
    check_records(outcomes, dataset, records)
    for image in images:
        assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == np.uint8
        assert image.min() < image.max()  # neither all black nor all white
    for outcome in outcomes:
        check_notes(outcome.notes, messages, is_exact=len(outcomes) == 1)
        assert not outcome.warning or any(re.search(outcome.warning, m) for m in messages)
    if not any(outcome.warning for outcome in outcomes):
        assert not any("leave their image" in m for m in messages)
    check_evaluation(dataset, records, results)


def write(names: Iterable[str], folder: Path) -> CocoSet:
    """The sound set with the changes of these variants."""
    data = CocoSet(folder)
    for name in names:
        VARIANTS[name].change(data)
    data.write()
    return data


def check_refused(outcome: Refused, json_file: Path, image_root: Path) -> None:
    if outcome.decoding:
        register_coco_format("decoded", json_file, image_root)
    with pytest.raises(InputError) as error:
        if outcome.decoding:
            read(json_file, image_root)
        else:
            register_coco_format("refused", json_file, image_root)
    message = str(error.value)
    assert re.search(outcome.pattern, message), message
    assert "\n" not in message and len(message) < 1000
    assert str(json_file if not outcome.decoding else image_root) in message
    assert "refused" not in DatasetCatalog
