"""
What the demo writes. Each output here is a function, or a context manager that gives a function, to
call with the name of an image, the image, and its detections.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from sources import VIDEO_CODECS

from gfl_d2.errors import InputError
from gfl_d2.files import atomic_write
from gfl_d2.visualization import draw_detections, save_picture

__all__ = [
    "Stopped", "check_can_show", "check_file", "csv_file", "json_file", "pictures", "video_file",
    "window",
]  # fmt: skip

_TITLE = "Detections"
_ESCAPE = 27

Write = Callable[[Any, Any, Instances], None]


class Stopped(Exception):
    """The user wants no more images."""


def check_file(path: str) -> None:
    """Make the folder of a file to write. InputError if there can be no such file."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: its folder cannot be made: {error}") from None
    if os.path.isdir(path):
        raise InputError(f"{path}: there is a folder of this name")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or device
        if not os.access(path, os.W_OK):
            raise InputError(f"{path} cannot be written to")
    elif not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
        raise InputError(f"{path}: its folder cannot be written to")


def pictures(plan: Mapping[str, str], metadata: Metadata) -> Write:
    """A picture of each image. ``plan`` has their paths, by the images' names."""

    def write(name: str, image: Any, detections: Instances) -> None:
        save_picture(plan[name], np.asarray(draw_detections(image, detections, metadata)))

    return write


@contextlib.contextmanager
def video_file(path: str, frames_per_second: float, metadata: Metadata) -> Iterator[Write]:
    """A video of frames that all have the same size."""
    codec = cv2.VideoWriter_fourcc(*VIDEO_CODECS[os.path.splitext(path)[1].lower()])
    writer = None

    def write(name: int, image: Any, detections: Instances) -> None:
        nonlocal writer
        picture = np.asarray(draw_detections(image, detections, metadata))
        if writer is None:
            size = (picture.shape[1], picture.shape[0])
            writer = cv2.VideoWriter(path, codec, frames_per_second, size)
            if not writer.isOpened():
                raise InputError(f"Video {path} cannot be written by OpenCV: try another ending")
        writer.write(picture[:, :, ::-1])

    try:
        yield write
    finally:
        if writer is not None:
            writer.release()


@contextlib.contextmanager
def json_file(path: str, metadata: Metadata) -> Iterator[Write]:
    """COCO's result format. It is there, whole, at the end."""
    with atomic_write(path, "w") as file:
        separator = "["

        def write(name: str | int, image: Any, detections: Instances) -> None:
            nonlocal separator
            for result in instances_to_coco_json(detections, name):
                file.write(f"{separator}\n{json.dumps(result)}")
                separator = ","

        yield write
        file.write("[]" if separator == "[" else "\n]\n")


@contextlib.contextmanager
def csv_file(path: str, metadata: Metadata) -> Iterator[Write]:
    """A table with a line for each detection. It is there, whole, at the end."""
    names = metadata.get("thing_classes")
    with atomic_write(path, "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "class", "score", "x0", "y0", "x1", "y1"])

        def write(name: str | int, image: Any, detections: Instances) -> None:
            columns = (detections.pred_classes, detections.scores, detections.pred_boxes.tensor)
            for index, score, box in zip(*(column.tolist() for column in columns)):
                box = [f"{side:.2f}" for side in box]
                table.writerow([name, names[index] if names else index, f"{score:.4f}", *box])

        yield write


def check_can_show() -> None:
    """Raise InputError where OpenCV's window would end the process."""
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise InputError("There is no screen to show a window on: give --output, --json or --csv")


@contextlib.contextmanager
def window(is_video: bool, metadata: Metadata) -> Iterator[Write]:
    """A window on the screen. A picture waits for a key. Escape stops."""

    def write(name: str | int, image: Any, detections: Instances) -> None:
        picture = np.asarray(draw_detections(image, detections, metadata))
        cv2.namedWindow(_TITLE, cv2.WINDOW_NORMAL)
        cv2.imshow(_TITLE, picture[:, :, ::-1])
        if cv2.waitKey(1 if is_video else 0) == _ESCAPE:
            raise Stopped

    try:
        yield write
    except cv2.error as error:  # OpenCV without windows
        raise InputError(f"OpenCV shows no window ({error.err}): give --output") from None
    finally:
        with contextlib.suppress(cv2.error):
            cv2.destroyAllWindows()
