"""Ground truth and detections of the same images, in arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json

from ..data import loading
from ..errors import InputError
from ..results import load_results

__all__ = ["HALVES", "ResultSet", "load_result_set"]

HALVES = ("first", "second")


@dataclasses.dataclass(frozen=True)
class ResultSet:
    """
    N images in order of their ids, C classes, M boxes of ground truth and D detections.

    Boxes are (x, y, width, height) in pixels, float64. Classes and images are indices. Detections
    are in order of their images, and of falling scores within an image.
    """

    dataset: str
    image_ids: list  # N
    class_names: list[str]  # C
    gt_images: np.ndarray  # (M,), int64
    gt_classes: np.ndarray  # (M,), int64
    gt_boxes: np.ndarray  # (M, 4)
    gt_areas: np.ndarray  # (M,), float64
    is_crowd: np.ndarray  # (M,), bool
    images: np.ndarray  # (D,), int64
    classes: np.ndarray  # (D,), int64
    boxes: np.ndarray  # (D, 4)
    scores: np.ndarray  # (D,), float64

    def take_half(self, half: str) -> ResultSet:
        """
        The images of one of the HALVES, with their boxes and detections. The hash of an image's id
        says in which it is, whatever else is in the dataset.

        Raises:
            InputError: nothing is annotated or detected there.
        """
        digests = (
            hashlib.blake2b(str(id).encode(), digest_size=1).digest() for id in self.image_ids
        )
        is_taken = np.array([digest[0] % 2 for digest in digests]) == HALVES.index(half)
        new_indices = np.cumsum(is_taken) - 1
        taken = dataclasses.replace(
            self.take_ground_truth(is_taken[self.gt_images]).take(is_taken[self.images]),
            image_ids=[id for id, taken in zip(self.image_ids, is_taken) if taken],
        )
        taken = dataclasses.replace(
            taken, gt_images=new_indices[taken.gt_images], images=new_indices[taken.images]
        )
        if not len(taken.images) or taken.is_crowd.all():
            raise InputError(
                f"The {half} half of '{self.dataset}', {len(taken.image_ids)} images, has "
                f"{len(taken.gt_images)} annotated boxes and {len(taken.images)} detections: "
                "nothing to compare"
            )
        return taken

    def take_ground_truth(self, is_taken: np.ndarray) -> ResultSet:
        """The annotated boxes of a mask (M,), and all detections."""
        names = ("gt_images", "gt_classes", "gt_boxes", "gt_areas", "is_crowd")
        return dataclasses.replace(self, **{name: getattr(self, name)[is_taken] for name in names})

    def take(self, is_taken: np.ndarray) -> ResultSet:
        """The detections of a mask (D,), and all of the ground truth."""
        names = ("images", "classes", "boxes", "scores")
        return dataclasses.replace(self, **{name: getattr(self, name)[is_taken] for name in names})

    def limit(self, per_image: int) -> ResultSet:
        """The best detections of each image."""
        first = np.searchsorted(self.images, np.arange(len(self.image_ids)))
        rank = np.arange(len(self.images)) - first[self.images]
        return self.take(rank < per_image)

    def replace_scores(self, scores: np.ndarray) -> ResultSet:
        """Other scores, (D,); of equal ones, what came first stays first."""
        order = np.lexsort((-scores, self.images))
        return dataclasses.replace(self, scores=scores).take(order)

    def count(self) -> dict[str, int]:
        """How many images, objects, crowds and detections there are."""
        crowds = int(self.is_crowd.sum())
        objects, detections = len(self.is_crowd) - crowds, len(self.scores)
        images = len(self.image_ids)
        return dict(images=images, objects=objects, crowds=crowds, detections=detections)

    def to_coco(self) -> tuple[dict, list[dict]]:
        """Ground truth and detections in COCO's formats, with indices as ids."""
        columns = (self.gt_images, self.gt_classes, self.gt_boxes, self.gt_areas, self.is_crowd)
        keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
        rows = zip(*(column.tolist() for column in columns))
        truth = [{**dict(zip(keys, row)), "iscrowd": int(row[-1])} for row in rows]
        data = {"images": [{"id": i} for i in range(len(self.image_ids))], "annotations": truth}
        columns = (self.images, self.classes, self.boxes, self.scores)
        keys = ("image_id", "category_id", "bbox", "score")
        return data, [dict(zip(keys, row)) for row in zip(*(c.tolist() for c in columns))]


def load_result_set(dataset: str, path: str | Path) -> ResultSet:
    """
    Read a file of detections, and the ground truth of their dataset, which is registered.

    Raises:
        InputError: the file or the dataset cannot be read, the detections are of another dataset,
            or nothing is annotated or detected.
    """
    with loading([dataset]):
        DatasetCatalog.get(dataset)  # sets the metadata of Detectron2's own datasets
        data = _load_ground_truth(dataset)
    categories = {category["id"]: str(category["name"]) for category in data["categories"]}
    metadata = MetadataCatalog.get(dataset)
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    ids = ids or {id: index for index, id in enumerate(sorted(categories))}
    default_names = [categories[id] for id in sorted(ids, key=ids.get)]
    image_ids = sorted((x["id"] for x in data["images"]), key=lambda i: (type(i).__name__, i))
    images = {id: index for index, id in enumerate(image_ids)}

    annotations = [
        a
        for a in data.get("annotations", [])
        if a["image_id"] in images and a["category_id"] in ids
    ]
    crowds = [bool(a.get("iscrowd", 0)) for a in annotations]
    if all(crowds):
        raise InputError(f"'{dataset}' has no annotated boxes to compare detections with")
    by_image = load_results(path, dataset, images, ids)
    results = [x for id in image_ids for x in sorted(by_image[id], key=lambda r: -r["score"])]
    if not results:
        raise InputError(f"{path} has no detections: nothing to analyze")

    def take(rows: list[dict], key: str) -> np.ndarray:
        known: Any = {"image_id": images, "category_id": ids}.get(key)
        return np.array([known[row[key]] if known else row[key] for row in rows])

    try:
        boxes = take(annotations, "bbox").astype(np.float64).reshape(-1, 4)
        areas = [a.get("area", w * h) for a, (w, h) in zip(annotations, boxes[:, 2:].tolist())]
        areas = np.array(areas, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"'{dataset}' has a bbox or area that is no number: {error}") from None
    return ResultSet(
        dataset=dataset,
        image_ids=image_ids,
        class_names=[str(name) for name in metadata.get("thing_classes", default_names)],
        gt_images=take(annotations, "image_id"),
        gt_classes=take(annotations, "category_id"),
        gt_boxes=boxes,
        gt_areas=areas,
        is_crowd=np.array(crowds),
        images=take(results, "image_id"),
        classes=take(results, "category_id"),
        boxes=take(results, "bbox").astype(np.float64),
        scores=take(results, "score").astype(np.float64),
    )


def _load_ground_truth(dataset: str) -> dict:
    """What COCO's evaluation takes: the dataset's JSON file, or else what its function returns."""
    json_file = MetadataCatalog.get(dataset).get("json_file")
    with tempfile.TemporaryDirectory() as folder:
        if not json_file:
            json_file = os.path.join(folder, "ground_truth.json")
            with contextlib.redirect_stdout(io.StringIO()):
                convert_to_coco_json(dataset, json_file, allow_cached=False)
        with open(json_file, encoding="utf-8-sig") as file:
            return json.load(file)
