"""Check data in COCO format and register it with Detectron2's catalogs."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Hashable, Iterable
from numbers import Real
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json

from ..errors import InputError, name_some

__all__ = ["register_coco_format"]

logger = logging.getLogger(__name__)

_REQUIRED_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def register_coco_format(
    name: str, json_file: str | os.PathLike, image_root: str | os.PathLike
) -> None:
    """
    Check a dataset in COCO format and register it, so that its ``name`` can be used in
    ``DATASETS.TRAIN`` and ``DATASETS.TEST``. Class names are those of the JSON file, in the order
    of the category ids. Boxes without area inside their image are reported and left out when the
    dataset is loaded. Registering the same again does nothing.

    Args:
        name: to register under; not one of Detectron2's own.
        json_file, image_root: annotations, and the folder that their ``file_name`` is relative to.

    Raises:
        InputError: the file or an image is missing, the file is not sound (the message names the
            item), or ``name`` is taken by other data.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog:
        _check_is_same(metadata, json_file, image_root)
        return
    data = _read_json(json_file)
    categories, images, annotations = (
        _index_by_id(json_file, kind, data) for kind in _REQUIRED_KEYS
    )
    _check_records(json_file, categories, images, annotations)
    _check_image_files(json_file, image_root, images.values())
    with_area = _filter_boxes_with_area(json_file, annotations.values(), images)
    # Set at once, where load_coco_json would set classes only when the data is first loaded.
    metadata.set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=[categories[id]["name"] for id in sorted(categories)],
        thing_dataset_id_to_contiguous_id={id: i for i, id in enumerate(sorted(categories))},
        num_images=len(images),
        # With a box to train on: not a crowd, and with some area inside the image.
        num_images_with_boxes=len({a["image_id"] for a in with_area if not a.get("iscrowd", 0)}),
        # Why the file is unfit for evaluation, "" if it is fit.
        evaluation_problem=_evaluation_problem(json_file, annotations),
    )
    DatasetCatalog.register(name, lambda: _load(name, json_file, image_root))


def _load(name: str, json_file: str, image_root: str) -> list[dict]:
    """The dataset in Detectron2's format, without boxes that have no area in their image."""
    records = load_coco_json(json_file, image_root, name)
    for record in records:
        size = record["width"], record["height"]
        annotations = record["annotations"]
        record["annotations"] = [a for a in annotations if _has_area(a["bbox"], *size)]
    return records


def _check_is_same(metadata: Metadata, json_file: str, image_root: str) -> None:
    name = metadata.name
    if metadata.get("num_images") is None:
        raise InputError(
            f"The name '{name}' belongs to a dataset that is already registered, by Detectron2 or "
            "by other code: choose another"
        )
    if (metadata.json_file, metadata.image_root) != (json_file, image_root):
        raise InputError(
            f"Dataset '{name}' is registered twice, with {metadata.json_file} and "
            f"{metadata.image_root}, then with {json_file} and {image_root}"
        )


def _read_json(json_file: str) -> Any:
    if not os.path.isfile(json_file):
        raise InputError(f"{json_file}: no such file")
    try:
        with open(json_file, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{json_file} cannot be read as JSON: {error}") from None


def _check_records(json_file: str, categories: dict, images: dict, annotations: dict) -> None:
    if not categories:
        raise InputError(f"{json_file} has no categories")
    for id, category in categories.items():
        if not isinstance(category["name"], str) or not category["name"]:
            raise InputError(f"{json_file}: category {id} has no proper name")
    for id, image in images.items():
        if not isinstance(image["file_name"], str) or not image["file_name"]:
            raise InputError(f"{json_file}: image {id} has no proper file_name")
        if not all(_is_number(image[key]) and image[key] > 0 for key in ("width", "height")):
            raise InputError(
                f"{json_file}: image {id} ({image['file_name']}) has width {image['width']!r} and "
                f"height {image['height']!r}, which must be positive numbers"
            )
    for annotation in annotations.values():
        _check_annotation(json_file, annotation, images, categories)
    if 0 in annotations:
        logger.warning(
            f"{json_file}: id 0 in 'annotations', which COCO evaluation takes for 'no match': that "
            "box always counts as missed. Ids should start from 1."
        )


def _index_by_id(json_file: str, kind: str, data: Any) -> dict[Any, dict]:
    """The list under the key ``kind``, by id, if its items have the keys that they need."""
    if not isinstance(data, dict) or not isinstance(data.get(kind), list):
        raise InputError(f"{json_file} is not in COCO format: it has no list '{kind}'")
    for index, record in enumerate(data[kind]):
        if not isinstance(record, dict):
            raise InputError(f"{json_file}: item {index} of '{kind}' is not an object: {record!r}")
        missing = [key for key in _REQUIRED_KEYS[kind] if key not in record]
        if missing:
            which = f", id {record['id']}," if "id" in record else ""
            raise InputError(f"{json_file}: item {index} of '{kind}'{which} lacks {missing}")
    # Text as the id of an image is common, and harmless.
    types = (int, str) if kind == "images" else int
    by_id = {}
    for record in data[kind]:
        if not isinstance(record["id"], types):
            raise InputError(f"{json_file}: id {record['id']!r} in '{kind}' is not an integer")
        if record["id"] in by_id:
            raise InputError(f"{json_file}: id {record['id']} occurs twice in '{kind}'")
        by_id[record["id"]] = record
    return by_id


def _check_annotation(json_file: str, annotation: dict, images: dict, categories: dict) -> None:
    where = f"{json_file}: annotation {annotation['id']}"
    image_id, category_id = annotation["image_id"], annotation["category_id"]
    image = images.get(image_id) if isinstance(image_id, Hashable) else None
    if image is None:
        raise InputError(f"{where} (category {category_id}) is of unknown image {image_id!r}")
    where += f" (image {image_id}, {image['file_name']})"
    if not isinstance(category_id, Hashable) or category_id not in categories:
        raise InputError(
            f"{where} has unknown category {category_id!r}; known: {name_some(categories)}"
        )
    where += f", category {category_id} ({categories[category_id]['name']}),"
    bbox = annotation["bbox"]
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_number, bbox))):
        raise InputError(f"{where} has bbox {bbox!r}, not four finite numbers x, y, width, height")
    if bbox[2] < 0 or bbox[3] < 0:
        raise InputError(f"{where} has bbox {bbox!r}, of negative width or height")
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and not all(isinstance(p, list) for p in segmentation):
        raise InputError(f"{where} has a segmentation that is not a list of polygons")
    if annotation.get("ignore", 0):
        raise InputError(f"{where} has 'ignore' set, which Detectron2 does not support")


def _check_image_files(json_file: str, image_root: str, images: Iterable[dict]) -> None:
    if not os.path.isdir(image_root):
        raise InputError(f"{image_root}, the folder with the images of {json_file}, does not exist")
    paths = [os.path.join(image_root, image["file_name"]) for image in images]
    # One listing per folder: on a network drive much faster than one question per image.
    folders = filter(os.path.isdir, {os.path.dirname(path) for path in paths})
    existing = {os.path.join(folder, file) for folder in folders for file in os.listdir(folder)}
    missing = [path for path in paths if path not in existing and not os.path.isfile(path)]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(paths)} images of {json_file} do not exist: "
            f"{name_some(missing)}"
        )


def _filter_boxes_with_area(json_file: str, annotations: Iterable[dict], images: dict) -> list:
    """The annotations whose box has some area in its image, and one warning for the others."""
    with_area, without_area = [], []
    for annotation in annotations:
        image = images[annotation["image_id"]]
        has_area = _has_area(annotation["bbox"], image["width"], image["height"])
        (with_area if has_area else without_area).append(annotation)
    if without_area:
        names = (f"annotation {a['id']} of image {a['image_id']}" for a in without_area)
        logger.warning(
            f"{len(without_area)} of the {len(with_area) + len(without_area)} boxes in {json_file} "
            f"have no area inside their image and are left out of training: {name_some(names)}. "
            "COCO evaluation reads the file itself and counts them as missed."
        )
    return with_area


def _evaluation_problem(json_file: str, annotations: dict) -> str:
    # Training can do without these keys, but pycocotools' evaluation cannot.
    for key in ("area", "iscrowd"):
        lacking = [id for id, annotation in annotations.items() if key not in annotation]
        if lacking:
            names = name_some(lacking)
            return f"{json_file} has {len(lacking)} annotations without '{key}': {names}"
    return ""


def _has_area(bbox: list, width: float, height: float) -> bool:
    """Whether some of the box [x, y, width, height] lies in an image of this size, in pixels."""
    x, y, w, h = bbox
    return min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
