"""Annotations in COCO format, as people have them, read into sound ones of boxes alone."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from detectron2.structures import BoxMode

from ..errors import InputError, name_some

__all__ = ["CocoData", "read_annotations", "read_bytes"]

# What is read as 0 or 1. Hashing takes true and 1.0 for 1.
_FLAGS = {0: 0, 1: 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_REMEDY = "correct or delete that annotation"


@dataclasses.dataclass
class CocoData:
    """
    A sound dataset of boxes: N images in order of their ids, C classes and M boxes.

    ``sizes`` are (width, height) in pixels, 0 where the file does not say. ``boxes`` are (x, y,
    width, height) in pixels. ``changes`` tells what was read otherwise than it is written: how
    many, of what, and as what. With any, the file itself is not fit for pycocotools.
    """

    json_file: str
    image_ids: list  # N integers, or N texts
    file_names: list[str]  # N
    sizes: np.ndarray  # (N, 2), int64
    category_ids: list[int]  # C
    class_names: list[str]  # C, distinct
    image_indices: np.ndarray  # (M,), int64
    class_indices: np.ndarray  # (M,), int64
    boxes: np.ndarray  # (M, 4), float64
    areas: np.ndarray  # (M,), float64
    is_crowd: np.ndarray  # (M,), bool
    changes: list[tuple[int, str, str]]

    def take_boxes(self, is_taken: np.ndarray) -> None:
        """Keep the boxes of a mask (M,), in place."""
        for name in ("image_indices", "class_indices", "boxes", "areas", "is_crowd"):
            setattr(self, name, getattr(self, name)[is_taken])

    def take_classes(self, names: Sequence[str]) -> None:
        """
        Keep the classes of these names, in this order, in place.

        Raises:
            InputError: the file has no such class.
        """
        unknown = [name for name in names if name not in self.class_names]
        if unknown:
            raise InputError(
                f"DATASETS.CLASSES names {unknown[0]!r}, which {self.json_file} does not have; its "
                f"classes: {name_some(self.class_names, 20)}"
            )
        if list(names) == self.class_names:
            return
        old = [self.class_names.index(name) for name in names]
        new_indices = np.full(len(self.class_names), -1)
        new_indices[old] = np.arange(len(old))
        self.class_indices = new_indices[self.class_indices]
        is_taken = self.class_indices >= 0
        rest = f"left out, with {int((~is_taken).sum())} boxes"
        self.changes.append(
            (len(self.class_names) - len(old), "classes not in DATASETS.CLASSES", rest)
        )
        self.take_boxes(is_taken)
        # COCO evaluation sorts classes by their ids.
        ids = [self.category_ids[index] for index in old]
        self.category_ids = ids if ids == sorted(ids) else list(range(1, len(ids) + 1))
        self.class_names = list(names)

    def drop_boxes_without_area(self) -> None:
        """
        Leave out, in place, the boxes of which nothing lies inside their image.

        Raises:
            InputError: no box would be left.
        """
        sizes = self.sizes[self.image_indices]
        ends = np.minimum(self.boxes[:, :2] + self.boxes[:, 2:], sizes)
        has_area = (ends > self.boxes[:, :2].clip(min=0)).all(axis=1)
        count = int((~has_area).sum())
        if count:
            first = int(np.argmin(has_area))
            where = f"{self.boxes[first].tolist()} of {self.file_names[self.image_indices[first]]}"
            if count == len(self.boxes):
                raise InputError(
                    f"{self.json_file}: none of its {count} boxes has an area inside its image "
                    f"(first: {where}): are they x, y, width, height in pixels of these images?"
                )
            what = f"boxes without area in their image (first: {where})"
            self.changes.append((count, what, "left out"))
            self.take_boxes(has_area)

    def to_records(self) -> list[dict]:
        """The dataset in Detectron2's format."""
        records = [
            {"file_name": name, "width": w, "height": h, "image_id": id, "annotations": []}
            for name, (w, h), id in zip(self.file_names, self.sizes.tolist(), self.image_ids)
        ]
        columns = (self.image_indices, self.boxes, self.class_indices, self.is_crowd.astype(int))
        for image, box, index, is_crowd in zip(*(column.tolist() for column in columns)):
            records[image]["annotations"].append(
                {
                    "bbox": box,
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": index,
                    "iscrowd": is_crowd,
                }
            )
        return records

    def to_coco(self) -> dict:
        """The dataset in COCO format. Without boxes it has no ``annotations``, as a test set."""
        images = [
            {"id": id, "file_name": name, "width": w, "height": h}
            for id, name, (w, h) in zip(self.image_ids, self.file_names, self.sizes.tolist())
        ]
        categories = [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names)]
        columns = (self.image_indices, self.class_indices, self.boxes, self.areas, self.is_crowd)
        rows = zip(*(column.tolist() for column in columns))
        annotations = [
            {
                "id": number,
                "image_id": self.image_ids[image],
                "category_id": self.category_ids[index],
                "bbox": box,
                "area": area,
                "iscrowd": int(is_crowd),
            }
            for number, (image, index, box, area, is_crowd) in enumerate(rows, start=1)
        ]
        data = {"images": images, "categories": categories}
        return {**data, "annotations": annotations} if annotations else data


def read_annotations(json_file: str | os.PathLike) -> CocoData:
    """
    Read what a detector of boxes needs of a file in COCO format, whatever else it holds.

    Annotations may lack ids, ``area`` and ``iscrowd``, or have them as text; ``ignore`` counts as a
    crowd. ``file_name`` and sizes of images are as written: see :func:`gfl_d2.data.read_coco`.

    Raises:
        InputError: the file is missing or in another format, or an item cannot be understood. The
            message names it.
    """
    json_file = os.fspath(json_file)
    content = read_bytes(json_file)
    try:
        encoding = json.detect_encoding(content)
        text = content.decode(encoding)
        content = content[:100]  # COCO's own file has half a gigabyte
        data = json.loads(text)
        del text
    except (ValueError, RecursionError) as error:
        reason = _why_no_json(content, error)
        raise InputError(f"{json_file} cannot be read as JSON: {reason}") from None
    reader = _Reader(json_file)
    reader.note(int(encoding != "utf-8"), f"file in the encoding {encoding}", "decoded")
    category_ids, class_names, index_of_category = reader.read_categories(data)
    image_ids, file_names, sizes, index_of_image = reader.read_images(data)
    columns = reader.read_boxes(data, index_of_image, index_of_category)
    return CocoData(
        json_file, image_ids, file_names, sizes, category_ids, class_names, *columns, reader.changes
    )


def read_bytes(path: str) -> bytes:
    """The content of a file. Raises InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


# What files begin with that are no JSON.
_BEGINNINGS = {
    b"": "it is empty",
    b"\x1f\x8b": "it is compressed: unpack it with gunzip",
    b"PK\x03\x04": "it is compressed: unpack it with unzip",
    b"version https://git-lfs": "it is a placeholder of Git LFS: run 'git lfs pull'",
    b"<": "it is XML or HTML; docs/data.md tells how to convert other formats",
}


def _why_no_json(content: bytes, error: Exception) -> str:
    """Why a file cannot be read that begins with this content, in one line."""
    beginning = content.lstrip()
    for start, reason in _BEGINNINGS.items():
        if beginning.startswith(start) if start else not beginning:
            return reason
    if isinstance(error, UnicodeDecodeError):
        return f"{error}. Save it as UTF-8"
    if str(error).startswith("Extra data"):
        return f"{error}. It holds several JSON values, and must be one object"
    return f"{error}. Was it copied or written in full?"


class _Reader:
    """Reads the lists of one file, and notes what it reads otherwise than it is written."""

    def __init__(self, json_file: str):
        self.json_file = json_file
        self.changes = []
        self._file_names = {}  # by the id of the image

    def fail(self, message: str) -> NoReturn:
        raise InputError(f"{self.json_file}: {message}")

    def note(self, count: int, what: str, read_as: str) -> None:
        if count:
            self.changes.append((count, what, read_as))

    def items(self, data: Any, kind: str) -> list[dict]:
        if not isinstance(data, dict) or not isinstance(data.get(kind), list):
            raise InputError(
                f"{self.json_file} is not in COCO format: it has no list '{kind}'. docs/data.md "
                "tells how to convert other formats"
            )
        for index, item in enumerate(data[kind]):
            if type(item) is not dict:
                value = repr(item)[:60]
                self.fail(
                    f"item {index} of '{kind}' is not an object, but {value}: correct or delete it"
                )
        return data[kind]

    def column(self, items: list[dict], kind: str, key: str) -> list:
        try:
            return [item[key] for item in items]
        except KeyError:
            index = next(i for i, item in enumerate(items) if key not in item)
            id = f" (id {items[index]['id']!r})" if "id" in items[index] else ""
            self.fail(f"item {index} of '{kind}'{id} lacks '{key}': add it, or delete the item")

    def name(self, items: list[dict], index: int) -> str:
        """An annotation, for a message."""
        item = items[index]
        name = f"annotation {item['id']!r}" if "id" in item else f"item {index} of 'annotations'"
        image, category = item.get("image_id"), item.get("category_id")
        is_id = not isinstance(image, (list, dict))
        file = self._file_names.get(_to_scalar(image), "unknown") if is_id else "unknown"
        return f"{name} (image {image!r}, {file}; category {category!r})"

    def read_categories(self, data: Any) -> tuple[list[int], list[str], dict]:
        """Ids and names of the classes in order, and the index of a class by its id."""
        items = self.items(data, "categories")
        names = {}
        written = self.column(items, "categories", "id"), self.column(items, "categories", "name")
        for id, name in zip(*written):
            number = _to_number(id)
            if not isinstance(number, (int, str)):
                self.fail(f"category id {id!r} is neither a number nor a text: correct it")
            if isinstance(name, bool) or not isinstance(name, (str, int, float)) or name == "":
                self.fail(f"category {id} has no proper name, but {name!r}: correct it")
            if names.setdefault(number, str(name)) != str(name):
                twice = f"{names[number]!r} and {name!r}"
                self.fail(f"category id {id} occurs twice, for {twice}: give each an id of its own")
        if not names:
            self.fail("it has no categories: add the classes")
        self.note(len(items) - len(names), "categories that repeat another", "merged")
        odd = sum(type(id) is not int for id in written[0])
        if all(isinstance(id, int) for id in names):
            self.note(odd, "category ids that are not written as integers", "integers")
            order = sorted(names)
            ids = order
        else:
            self.note(odd, "category ids that are text", "numbered from 1, as they come")
            order = list(names)
            ids = list(range(1, len(order) + 1))
        self.note(
            sum(type(name) is not str for name in written[1]),
            "class names that are numbers",
            "text",
        )
        counts = collections.Counter(names.values())
        repeated = [id for id in order if counts[names[id]] > 1]
        self.note(len(repeated), "categories of the same name", "told apart by their ids")
        for id in repeated:
            while counts[names[id]]:
                names[id] = f"{names[id]} (id {id})"
        return ids, [names[id] for id in order], {id: i for i, id in enumerate(order)}

    def read_images(self, data: Any) -> tuple[list, list[str], np.ndarray, dict]:
        """Ids, file names and sizes of the images in order, and the index of one by its id."""
        items = self.items(data, "images")
        images = {}
        written = self.column(items, "images", "id"), self.column(items, "images", "file_name")
        for item, id, file_name in zip(items, *written):
            if isinstance(id, (list, dict)):
                self.fail(f"image id {id!r} is neither a number nor a text: correct it")
            if not isinstance(file_name, str) or not file_name:
                self.fail(f"image {id!r} has no proper file_name, but {file_name!r}: correct it")
            image = (file_name, *(_to_size(item.get(key)) for key in ("width", "height")))
            known = images.setdefault(_to_scalar(id), image)
            if known != image:
                twice = " and ".join(f"{name} ({w}x{h})" for name, w, h in (known, image))
                self.fail(f"image id {id!r} occurs twice, for {twice}: give each an id of its own")
        self.note(len(items) - len(images), "images that repeat another", "merged")
        self._file_names = {id: image[0] for id, image in images.items()}
        ids, odd = list(images), sum(isinstance(id, (float, bool)) for id in written[0])
        types = set(map(type, ids))
        if types <= {int} or types == {str}:
            self.note(odd, "image ids that are not written as integers", "integers")
            ids.sort()
            new_ids = ids
        elif len(set(map(str, ids))) == len(ids):
            self.note(len(ids), "image ids of several types", "text")
            ids.sort(key=str)
            new_ids = [str(id) for id in ids]
        else:
            self.note(len(ids), "image ids of several types", "numbered from 1, as they come")
            new_ids = list(range(1, len(ids) + 1))
        sizes = np.array([images[id][1:] for id in ids], dtype=np.int64).reshape(-1, 2)
        index = {id: i for i, id in enumerate(ids)}
        return new_ids, [images[id][0] for id in ids], sizes, index

    def read_boxes(self, data: Any, index_of_image: dict, index_of_category: dict) -> tuple:
        """The columns of :class:`CocoData` from ``image_indices`` to ``is_crowd``."""
        has_list = data.get("annotations") is not None
        items = self.items(data, "annotations") if has_list else []
        if not items:
            self.note(1, "file without annotations", "a test set: predictions, and no AP")
        image_indices = self._find(items, "image_id", index_of_image, _to_scalar)
        class_indices = self._find(items, "category_id", index_of_category, _to_number)
        boxes = self._read_bboxes(items)
        self._note_annotation_ids([item.get("id") for item in items])
        is_crowd = self._read_flags(items, "iscrowd", may_lack=False)
        is_ignored = self._read_flags(items, "ignore", may_lack=True)
        self.note(int(is_ignored.sum()), "annotations with 'ignore'", "crowds")
        areas = self._read_areas(items, boxes)
        return image_indices, class_indices, boxes, areas, is_crowd | is_ignored

    def _find(
        self, items: list[dict], key: str, index: dict, to_id: Callable[[Any], Any]
    ) -> np.ndarray:
        """The indices of the images or categories that annotations name by their ids."""
        values = self.column(items, "annotations", key)
        try:
            found = [index.get(to_id(value), -1) for value in values]
        except TypeError:  # a list or an object
            found = [-1 if isinstance(v, (list, dict)) else index.get(to_id(v), -1) for v in values]
        kind = key[: -len("_id")]
        self.note(found.count(-1), f"annotations whose {key} is of another type", f"the {kind}'s")
        if -1 in found:
            # An id may be a text here and a number there.
            by_text = collections.defaultdict(list)
            for id, i in index.items():
                by_text[str(id)].append(i)
            for i in (i for i, place in enumerate(found) if place < 0):
                places = by_text.get(str(to_id(values[i])), ())
                if len(places) != 1:
                    self.fail(
                        f"{self.name(items, i)} is of unknown {kind} {values[i]!r}; known: "
                        f"{name_some(index)}. Add the {kind}, or delete the annotation"
                    )
                found[i] = places[0]
        odd = sum(type(value) is not type(to_id(value)) for value in values)
        self.note(odd, f"annotations whose {key} is not written as an integer", "integers")
        return np.array(found, dtype=np.int64)

    def _read_bboxes(self, items: list[dict]) -> np.ndarray:
        """(M, 4), float64."""
        values = self.column(items, "annotations", "bbox")
        is_sound = set(map(type, values)) <= {list} and set(map(len, values)) <= {4}
        numbers = itertools.chain.from_iterable(values)
        if is_sound and set(map(type, numbers)) <= {int, float}:
            try:
                boxes = np.fromiter(itertools.chain.from_iterable(values), dtype=np.float64)
            except OverflowError:
                boxes = np.array([np.nan])
            if np.isfinite(boxes).all():
                boxes = boxes.reshape(-1, 4)
                if (boxes[:, 2:] < 0).any():
                    i = int((boxes[:, 2:] < 0).any(axis=1).argmax())
                    where = f"{self.name(items, i)} has bbox {values[i]!r}"
                    self.fail(f"{where}, of negative width or height: {_REMEDY}")
                return boxes
        wrong = [i for i, value in enumerate(values) if not _is_bbox(value)]
        where = f"{self.name(items, wrong[0])} has bbox {str(values[wrong[0]])[:60]}"
        remedy = f"{_REMEDY}; {len(wrong)} of {len(items)} are like that"
        self.fail(f"{where}, not four finite numbers x, y, width, height: {remedy}")

    def _note_annotation_ids(self, ids: list) -> None:
        missing = ids.count(None)
        self.note(missing, "annotations without id", "numbered from 1")
        odd = sum(type(id) is not int or id < 1 for id in ids) - missing
        self.note(odd, "annotation ids that are not integers from 1", "numbered from 1")
        if not missing and not odd:
            repeated = len(ids) - len(set(ids))
            self.note(repeated, "annotation ids that repeat another", "numbered from 1")

    def _read_flags(self, items: list[dict], key: str, may_lack: bool) -> np.ndarray:
        """(M,), bool, of a key that is 0 or 1, in one of several ways to write it."""
        values = [item.get(key) for item in items]
        try:
            flags = {value: _to_flag(value) for value in set(values)}
        except TypeError:
            flags = {None: None}
        if None in flags.values():
            pairs = enumerate(values)
            i = next(i for i, v in pairs if isinstance(v, (list, dict)) or _to_flag(v) is None)
            where = f"{self.name(items, i)} has '{key}' {str(values[i])[:60]!r}"
            self.fail(f"{where}, neither 0 nor 1: {_REMEDY}")
        missing = values.count(None)
        if not may_lack:
            self.note(missing, f"annotations without '{key}'", "0")
        odd = sum(type(value) is not int for value in values) - missing
        self.note(odd, f"annotations whose '{key}' is not written as 0 or 1", "0 or 1")
        return np.array([flags[value] for value in values], dtype=bool)

    def _read_areas(self, items: list[dict], boxes: np.ndarray) -> np.ndarray:
        """(M,), float64. An area may be that of a mask, but is not larger than the box."""
        values = [item.get("area") for item in items]
        areas = np.array([v if type(v) in (int, float) and abs(v) < 1e300 else 0 for v in values])
        # Some count the pixels of a box, with those of both edges.
        is_wrong = ~((areas > 0) & (areas <= (boxes[:, 2:] + 1).prod(axis=1)))
        missing = values.count(None)
        self.note(missing, "annotations without 'area'", "width x height")
        self.note(int(is_wrong.sum()) - missing, "annotations of wrong 'area'", "width x height")
        return np.where(is_wrong, boxes[:, 2:].prod(axis=1), areas)


def _to_scalar(value: Any) -> Any:
    """An id that has no equal of another type: 1.0 is 1, and true is not."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else value


def _to_number(value: Any) -> Any:
    """An id as an integer if it is written as one in whatever way."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None if isinstance(value, bool) else value


def _to_size(value: Any) -> int:
    """Width or height, 0 if it is not written or no positive number."""
    number = _to_float(value)
    if number is not None and math.isfinite(number) and number > 0:
        return math.ceil(number)
    return 0


def _to_float(value: Any) -> float:
    """A number, also one written as text; NaN for anything else."""
    if type(value) not in (int, float, str):
        return math.nan
    try:
        return float(value)
    except (OverflowError, ValueError):
        return math.nan


def _to_flag(value: Any) -> int | None:
    """0 or 1, also for what lacks; None if the value says neither."""
    if value is None:
        return 0
    return _FLAGS.get(value.strip().lower() if isinstance(value, str) else value)


def _is_bbox(value: Any) -> bool:
    """Whether it is a list of four finite numbers."""
    is_list = isinstance(value, list) and len(value) == 4
    # Text is no number here.
    return is_list and all(not isinstance(v, str) and math.isfinite(_to_float(v)) for v in value)
