"""Annotations in COCO format, as people have them, read into sound ones of boxes alone."""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from ..errors import InputError, name_some
from .coco_data import MIN_SIDE, CocoData
from .json_values import MAX_NUMBER, is_bbox, read_json, to_flag, to_number, to_scalar, to_size

__all__ = ["read_annotations"]

_REMEDY = "correct or delete that annotation"


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
    data, encoding = read_json(json_file)
    reader = _Reader(json_file)
    reader.note(int(encoding != "utf-8"), f"file in the encoding {encoding}", "decoded")
    category_ids, class_names, index_of_category = reader.read_categories(data)
    image_ids, file_names, sizes, index_of_image = reader.read_images(data)
    columns = reader.read_boxes(data, index_of_image, index_of_category)
    return CocoData(
        json_file, image_ids, file_names, sizes, category_ids, class_names, *columns, reader.changes
    )


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
        file = self._file_names.get(to_scalar(image), "unknown") if is_id else "unknown"
        return f"{name} (image {image!r}, {file}; category {category!r})"

    def read_categories(self, data: Any) -> tuple[list[int], list[str], dict]:
        """Ids and names of the classes in order, and the index of a class by its id."""
        items = self.items(data, "categories")
        names = {}
        written = self.column(items, "categories", "id"), self.column(items, "categories", "name")
        for id, name in zip(*written):
            number = to_number(id)
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
            image = (file_name, *(to_size(item.get(key)) for key in ("width", "height")))
            known = images.setdefault(to_scalar(id), image)
            if known[0] == file_name and 0 in known:  # without a size, which this one may have
                images[to_scalar(id)] = image
            elif known != image and not (known[0] == file_name and 0 in image):
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
        image_indices = self._find(items, "image_id", index_of_image, to_scalar)
        class_indices = self._find(items, "category_id", index_of_category, to_number)
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
            # An id may be a number here and a text there, with zeros before it.
            by_text = collections.defaultdict(list)
            for id, i in index.items():
                by_text[str(to_number(id))].append(i)
            for i in (i for i, place in enumerate(found) if place < 0):
                places = by_text.get(str(to_number(values[i])), ())
                if len(places) != 1:
                    rest = (v for v, place in zip(values, found) if place < 0)
                    count = sum(len(by_text.get(str(to_number(v)), ())) != 1 for v in rest)
                    self.fail(
                        f"{self.name(items, i)} is of unknown {kind} {values[i]!r}; known: "
                        f"{name_some(index)}. Add the {kind}, or delete the annotation; {count} of "
                        f"{len(items)} are like that"
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
            if (np.abs(boxes) < MAX_NUMBER).all():
                boxes = boxes.reshape(-1, 4)
                is_negative = boxes[:, 2:] < -MIN_SIDE
                if is_negative.any():
                    i = int(is_negative.any(axis=1).argmax())
                    where = f"{self.name(items, i)} has bbox {values[i]!r}"
                    self.fail(f"{where}, of negative width or height: {_REMEDY}")
                boxes[:, 2:] = boxes[:, 2:].clip(min=0)
                return boxes
        wrong = [i for i, value in enumerate(values) if not is_bbox(value)]
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
            flags = {value: to_flag(value) for value in set(values)}
        except TypeError:
            flags = {None: None}
        if None in flags.values():
            pairs = enumerate(values)
            i = next(i for i, v in pairs if isinstance(v, (list, dict)) or to_flag(v) is None)
            where = f"{self.name(items, i)} has '{key}' {repr(values[i])[:60]}"
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
