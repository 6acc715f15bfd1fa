"""A dataset of boxes in memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from detectron2.structures import BoxMode

from ..errors import InputError, name_some

__all__ = ["MIN_SIDE", "CocoData"]

MIN_SIDE = 1e-5  # pixels; less is what arithmetic left of 0. Detectron2 trains on no such box.


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
        if len(old) < len(self.class_names):
            rest = f"left out, with {int((~is_taken).sum())} boxes"
            number = len(self.class_names) - len(old)
            self.changes.append((number, "classes not in DATASETS.CLASSES", rest))
        self.take_boxes(is_taken)
        ids = [self.category_ids[index] for index in old]
        if ids != sorted(ids):
            # COCO evaluation sorts classes by their ids. Ids that the file does not have cannot be
            # taken for its own.
            first = max(self.category_ids) + 1
            ids = list(range(first, first + len(ids)))
            read_as = f"with the category ids {ids[0]} to {ids[-1]}, in results too"
            self.changes.append((len(ids), "classes in the order of DATASETS.CLASSES", read_as))
        self.category_ids = ids
        self.class_names = list(names)

    def drop_boxes_without_area(self) -> None:
        """
        Leave out, in place, the boxes of which nothing lies inside their image.

        Raises:
            InputError: no box would be left.
        """
        sizes = np.where(self.sizes > 0, self.sizes, np.inf)[self.image_indices]
        ends = np.minimum(self.boxes[:, :2] + self.boxes[:, 2:], sizes)
        has_area = (ends - self.boxes[:, :2].clip(min=0) > MIN_SIDE).all(axis=1)
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
            {"id": id, "file_name": os.path.abspath(name), "width": w, "height": h}
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
