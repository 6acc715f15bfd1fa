"""Where the demo's images come from, and the pictures that are written of them."""

from __future__ import annotations

import contextlib
import glob
import mimetypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from gfl_d2.errors import InputError
from gfl_d2.visualization import check_picture_path

# Ending of a video -> a codec that OpenCV's wheels can write.
VIDEO_CODECS = {".avi": "MJPG", ".mkv": "mp4v", ".mov": "mp4v", ".mp4": "mp4v", ".webm": "VP80"}


def find_files(inputs: Sequence[str], output: str | None) -> list[str]:
    """
    The files that are named, those that fit a pattern, and the images in folders and below, in
    order, each once. Hidden files in folders are left out, and what is in the folder ``output``.

    Raises:
        InputError: nothing fits a pattern, or a folder has no images.
    """
    files = {}
    for item in map(os.path.expanduser, inputs):
        if os.path.isdir(item):
            found = _images_below(item, output)
        elif os.path.exists(item) or not glob.has_magic(item):
            found = [item]  # one that is missing is reported with those that cannot be read
        else:
            found = sorted(filter(os.path.isfile, glob.glob(item, recursive=True)))
        if not found:
            raise InputError(f"--input {item}: no images there ({', '.join(IMG_EXTENSIONS)})")
        for file in found:
            files.setdefault(os.path.abspath(file), file)
    return list(files.values())


def _images_below(folder: str, output: str | None) -> list[str]:
    found, left_out = [], output and os.path.realpath(output)
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) != left_out
        )
        found += [
            os.path.join(root, name)
            for name in sorted(names)
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        ]
    return found


def name_files(files: Sequence[str]) -> list[str]:
    """The paths of files below the folder that all of them are in, with /."""
    paths = [os.path.abspath(file) for file in files]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [Path(os.path.relpath(path, common)).as_posix() for path in paths]


def is_video(path: str) -> bool:
    """Whether the name of a file says that it is a video."""
    extension = os.path.splitext(path)[1].lower()
    return extension in VIDEO_CODECS or str(mimetypes.guess_type(path)[0]).startswith("video/")


def plan_pictures(output: str, files: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """
    The picture to write for each name: ``output`` itself, or one in this folder. Where OpenCV does
    not write the format of an image, ``.png`` is added to its name.

    Raises:
        InputError: a picture cannot be written, or would replace an image.
    """
    if is_video(output):
        raise InputError(f"--output {output} is a video, but the input is images")
    if cv2.haveImageWriter(output) and not os.path.isdir(output):
        if len(files) > 1:
            raise InputError(f"--output {output} is one picture, but there are {len(files)} images")
        plan = {names[0]: output}
    else:
        plan = {
            name: os.path.join(output, name if cv2.haveImageWriter(name) else f"{name}.png")
            for name in names
        }
    originals = {os.path.realpath(file) for file in files}
    for picture in plan.values():
        if os.path.realpath(picture) in originals:
            raise InputError(f"--output {output} would replace {picture}: name another folder")
        check_picture_path(picture)
    return plan


def plan_video(output: str, source: str) -> str:
    """
    The video to write: ``output`` itself, or one in this folder.

    Raises:
        InputError: it cannot be written, or would replace the video that is read.
    """
    if cv2.haveImageWriter(output) and not os.path.isdir(output):
        raise InputError(f"--output {output} is a picture, but the input is a video")
    path = output
    if not is_video(output) or os.path.isdir(output):
        path = os.path.join(output, f"{Path(source).stem}.mp4")
    elif os.path.splitext(output)[1].lower() not in VIDEO_CODECS:
        raise InputError(f"--output {output}: name a video of {', '.join(VIDEO_CODECS)}")
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: its folder cannot be made: {error}") from None
    if os.path.realpath(path) == os.path.realpath(source):
        raise InputError(f"--output {output} would replace {source}: name another one")
    return path


class Video(NamedTuple):
    capture: cv2.VideoCapture
    num_frames: int | None  # None if it is not known
    frames_per_second: float


@contextlib.contextmanager
def open_video(source: str | int) -> Iterator[Video]:
    """A video file, an address, or the camera of this number. InputError if there is none."""
    capture = cv2.VideoCapture(source)
    try:
        if not capture.isOpened():
            name = f"Camera {source}" if isinstance(source, int) else f"Video {source}"
            missing = isinstance(source, str) and "://" not in source and not os.path.exists(source)
            reason = "does not exist" if missing else "cannot be opened by OpenCV"
            raise InputError(f"{name} {reason}")
        frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        # Some cameras and files do not tell.
        yield Video(capture, frames if frames > 0 else None, capture.get(cv2.CAP_PROP_FPS) or 25.0)
    finally:
        capture.release()


def read_frames(video: Video) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the number of a frame, from 0, and the frame, BGR."""
    number = 0
    while True:
        is_read, frame = video.capture.read()
        if not is_read:
            break
        yield number, frame
        number += 1
    if not number:
        raise InputError("The video has no frame that can be read")
