"""Boxes of registered datasets as arrays, and what the input size makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from ..data import loading, read_image
from ..errors import InputError

__all__ = ["BoxTable", "InputSize", "box_sizes", "group_rows", "read_boxes"]

# As many sizes stand for a range that the short side is drawn from.
_SIZES_OF_RANGE = 5


@dataclass(frozen=True)
class BoxTable:
    """
    The images and boxes of one or several datasets with the same classes. Shapes: N images, M
    boxes, C classes.
    """

    names: tuple[str, ...]  # of the datasets
    class_names: list[str]  # C
    files: list[str]  # N
    sizes: np.ndarray  # (N, 2), int64, height and width
    boxes: np.ndarray  # (M, 4), XYXY in pixels of the image, as annotated
    classes: np.ndarray  # (M,), int64
    image: np.ndarray  # (M,), int64 in [0, N)
    is_crowd: np.ndarray  # (M,), bool

    def take(self, keep: np.ndarray) -> BoxTable:
        """All images, with some of the boxes. ``keep``: shape (M,), bool."""
        columns = ("boxes", "classes", "image", "is_crowd")
        return replace(self, **{name: getattr(self, name)[keep] for name in columns})

    def without_crowds(self) -> BoxTable:
        return self.take(~self.is_crowd)

    def boxes_per_image(self) -> np.ndarray:
        """(N,), int64."""
        return np.bincount(self.image, minlength=len(self.files))

    def boxes_at(self, shapes: np.ndarray) -> np.ndarray:
        """The boxes, (M, 4), in images resized to these shapes, (N, 2), and clipped to them."""
        scale = (shapes / self.sizes)[self.image][:, [1, 0, 1, 0]]
        return (self.boxes * scale).clip(0, shapes[self.image][:, [1, 0, 1, 0]])


@dataclass(frozen=True)
class InputSize:
    """What ``ResizeShortestEdge`` is given: lengths of the short side, and a limit of the long."""

    short: tuple[int, ...]  # all of them are used; 0 leaves images as they are
    longest: int

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> InputSize:
        """A range that training draws from becomes five sizes, evenly spread."""
        if not is_train:
            return cls((cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST)
        short = cfg.INPUT.MIN_SIZE_TRAIN
        if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
            short = np.linspace(short[0], short[-1], _SIZES_OF_RANGE).round()
        return cls(tuple(int(x) for x in np.unique(short)), cfg.INPUT.MAX_SIZE_TRAIN)

    def scaled(self, factor: float) -> InputSize:
        """About ``factor`` times larger; short sides are multiples of 32, as padding makes them."""
        short = tuple(max(1, math.ceil(x * factor / 32 - 1e-6)) * 32 for x in self.short)
        return InputSize(short, round(self.longest * max(short) / max(self.short)))

    def shapes(self, sizes: np.ndarray, short: int | None = None) -> np.ndarray:
        """
        The shapes, (N, 2), that images of these sizes, (N, 2), are resized to.

        Args:
            short: the length of the short side, by default the median.
        """
        short = int(np.median(self.short)) if short is None else short
        if short == 0:
            return sizes
        unique, index = np.unique(sizes, axis=0, return_inverse=True)
        resize = T.ResizeShortestEdge.get_output_shape
        shapes = [resize(*size, short, self.longest) for size in unique.tolist()]
        return np.array(shapes, dtype=np.int64).reshape(-1, 2)[index.reshape(-1)]


def read_boxes(names: Sequence[str]) -> BoxTable:
    """
    Load registered datasets as one table.

    Raises:
        InputError: a dataset cannot be loaded, has no images or boxes in another format than
            Detectron2's, or an image whose size is not known cannot be read.
    """
    with loading(names):
        records = [record for name in names for record in DatasetCatalog.get(name)]
    where = f"Dataset {', '.join(names)}"
    if not records:
        raise InputError(f"{where} is empty: it has no images")
    annotations = [record.get("annotations", ()) for record in records]
    flat = [annotation for x in annotations for annotation in x]
    try:
        boxes = np.array([a["bbox"] for a in flat], dtype=np.float64).reshape(-1, 4)
        modes = np.array([int(a["bbox_mode"]) for a in flat], dtype=np.int64)
        classes = np.array([a["category_id"] for a in flat], dtype=np.int64)
        for mode in np.unique(modes):
            which = modes == mode
            boxes[which] = BoxMode.convert(boxes[which], BoxMode(mode), BoxMode.XYXY_ABS)
    except (AssertionError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise InputError(
            f"{where} has annotations that are not in Detectron2's format, with four numbers in "
            f"bbox, a bbox_mode and a category_id: {error!r}"
        ) from None
    class_names = MetadataCatalog.get(names[0]).get("thing_classes")
    if class_names is None:
        class_names = [str(i) for i in range(classes.max(initial=-1) + 1)]
    if len(classes) and not 0 <= classes.min() <= classes.max() < len(class_names):
        raise InputError(
            f"{where} has category_id {classes.min()} to {classes.max()}, but {len(class_names)} "
            f"classes: they must lie in [0, {len(class_names)})"
        )
    return BoxTable(
        names=tuple(names),
        class_names=list(class_names),
        files=[record["file_name"] for record in records],
        sizes=np.array([_image_size(record) for record in records], dtype=np.int64),
        boxes=boxes,
        classes=classes,
        image=np.repeat(np.arange(len(records)), [len(x) for x in annotations]),
        is_crowd=np.array([bool(a.get("iscrowd", 0)) for a in flat], dtype=bool),
    )


def box_sizes(boxes: np.ndarray) -> np.ndarray:
    """The roots of the areas of boxes, (K, 4)."""
    return np.sqrt((boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1))


def group_rows(values: np.ndarray) -> list[np.ndarray]:
    """The rows of each distinct value, in order of the values. ``values``: shape (K,)."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1) if len(order) else []


def _image_size(record: dict) -> tuple[int, int]:
    if "height" in record and "width" in record:
        return record["height"], record["width"]
    return read_image(record["file_name"], format="RGB").shape[:2]
