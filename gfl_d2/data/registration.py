"""Data in COCO format, checked together with its images and registered with Detectron2."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from ..errors import InputError, name_some
from ..files import atomic_write
from .coco_data import CocoData
from .coco_format import read_annotations
from .images import ImageHeader, cache_folder, find_images, read_headers, read_image
from .json_values import read_bytes

__all__ = ["read_coco", "register_coco_format"]

logger = logging.getLogger(__name__)

# Which share of the boxes, and how many, may leave their image before that looks like a mistake,
# and the share of the image's side that they may leave it by.
_MAX_OUTSIDE, _MIN_OUTSIDE = 0.03, 3
_TOLERANCE = 0.01
# What images of 12 bits that were not scaled to 16 do not reach.
_MIN_BRIGHTEST = 16
# Which share of the boxes may lie in the first pixel.
_MAX_NORMALIZED = 0.5


def register_coco_format(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    classes: Sequence[str] = (),
    check_images: bool = True,
) -> None:
    """
    Read a dataset in COCO format by :func:`read_coco` and register it, so that its ``name`` can be
    used in ``DATASETS.TRAIN`` and ``DATASETS.TEST``. To register the same again does nothing; where
    the file has changed, it is read anew.

    Its metadata are Detectron2's for COCO. ``json_file`` is a sound copy in a cache folder where
    the file itself is not fit for COCO evaluation, and ``annotation_file`` is always the file.

    Raises:
        InputError: as :func:`read_coco`, or ``name`` is taken by other data.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    metadata = MetadataCatalog.get(name)
    source = (json_file, image_root)
    if name in DatasetCatalog:
        registered = metadata.get("source")
        if registered is None:
            raise InputError(
                f"The name '{name}' belongs to a dataset that is already registered, by Detectron2 "
                "or by other code: choose another"
            )
        if registered != source:
            raise InputError(
                f"Dataset '{name}' is registered twice, with {' and '.join(registered)}, then with "
                f"{json_file} and {image_root}: choose another name"
            )
    version = (_digest(read_bytes(json_file)), tuple(classes), check_images)
    if metadata.get("version") == version:
        return
    data = read_coco(json_file, image_root, classes, check_images)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        metadata = MetadataCatalog.get(name)
    # Set at once, where load_coco_json would set classes only when the data is first loaded.
    metadata.set(
        source=source,
        version=version,
        annotation_file=json_file,
        json_file=_sound_file(data),
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=data.class_names,
        thing_dataset_id_to_contiguous_id={id: i for i, id in enumerate(data.category_ids)},
        num_images=len(data.image_ids),
        num_crowds=int(data.is_crowd.sum()),
        num_images_with_boxes=len(np.unique(data.image_indices[~data.is_crowd])),
    )
    DatasetCatalog.register(name, data.to_records)


def read_coco(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    classes: Sequence[str] = (),
    check_images: bool = True,
) -> CocoData:
    """
    Read a dataset in COCO format, whoever wrote it, as a sound one of boxes alone. One table in the
    log sums up what was read otherwise than it is written. No file is changed.

    Args:
        json_file, image_root: annotations, and the folder that their ``file_name`` is relative to.
        classes: names of those to keep, in this order; all, in the order of their ids, if empty.
        check_images: False for who can do without some of them: an image that is missing, cannot
            be read or has another size is no error then, and keeps the size that the file says.

    Returns:
        CocoData: ``file_names`` are paths, and no ``sizes`` lacks but those of images that cannot
        be read either, without ``check_images``.

    Raises:
        InputError: the file is not sound, or an image is missing, cannot be read or has another
            size than the file says.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    data = read_annotations(json_file)
    _refuse_normalized(data)
    if classes:
        data.take_classes(classes)
    of_images = _add_images(data, image_root, check_images)
    _warn_of_boxes_outside(data)
    data.drop_boxes_without_area()
    rows = [*data.changes, *of_images]
    if rows:
        table = tabulate(rows, headers=["number", "what", "read as"], tablefmt="pipe")
        logger.warning(f"{json_file} is used with these changes; the file stays as it is:\n{table}")
    return data


def _add_images(data: CocoData, image_root: str, check_images: bool) -> list[tuple[int, str, str]]:
    """Turn file names into paths and fill in sizes, in place. Returns changes like CocoData's."""
    if not os.path.isdir(image_root):
        raise InputError(
            f"{image_root}, which must have the images of {data.json_file}, is not a folder"
        )
    found, ways = find_images(image_root, data.file_names)
    paths = [path or os.path.join(image_root, n) for path, n in zip(found, data.file_names)]
    headers = read_headers(image_root, paths)
    # Not known of images that cannot be used.
    real = np.array(
        [(0, 0) if isinstance(header, str) else header[:2] for header in headers], dtype=np.int64
    ).reshape(-1, 2)
    is_unknown = (data.sizes == 0).any(axis=1)
    data.sizes = np.where(is_unknown[:, None], real, data.sizes)
    if check_images:
        _refuse_missing(data, [path for path, place in zip(paths, found) if place is None])
        _refuse_unfit(data, image_root, headers)
        differs = (data.sizes != real).any(axis=1)
        if differs.any():
            _refuse_sizes(data, headers, real, differs.nonzero()[0])
    data.file_names = paths
    is_deep = (not isinstance(header, str) and header.bits == 16 for header in headers)
    deep = [path for path, is_so in zip(paths, is_deep) if is_so]
    changes = [(count, "images not found by their file_name", way) for way, count in ways.items()]
    if is_unknown.any():
        changes.append((int(is_unknown.sum()), "images without size", "that of the image file"))
    if deep:
        changes.append((len(deep), "images of 16 bits", "8 bits: value / 256, as OpenCV does"))
        _warn_of_dark_image(deep[0])
    return changes


def _warn_of_dark_image(path: str) -> None:
    try:
        brightest = int(read_image(path, "L").max())
    except InputError:  # it is named when it is used
        return
    if brightest < _MIN_BRIGHTEST:
        logger.warning(
            f"{path} has 16 bits, of which the highest are not used: as 8 bits its values are 0 to "
            f"{brightest}, nearly black. Scale the images up, by 16 for 12 bits"
        )


def _refuse_missing(data: CocoData, missing: list[str]) -> None:
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(data.image_ids)} images of {data.json_file} do not exist, "
            f"or are those of another file_name: {name_some(missing)}. Correct the folder of the "
            "images, or the file names"
        )


def _refuse_unfit(data: CocoData, image_root: str, headers: list[ImageHeader | str]) -> None:
    bits = "32 bits per channel, or signed ones: save it with 8"
    unfit = [
        f"{name} ({header if isinstance(header, str) else bits})"
        for name, header in zip(data.file_names, headers)
        if isinstance(header, str) or header.bits == 32
    ]
    if unfit:
        raise InputError(
            f"{len(unfit)} of the {len(headers)} images of {data.json_file}, in {image_root}, "
            f"cannot be used: {name_some(unfit)}. Replace them, or delete them from the file"
        )


def _refuse_sizes(
    data: CocoData, headers: list[ImageHeader], real: np.ndarray, wrong: np.ndarray
) -> None:
    def describe(i: int) -> str:
        (width, height), (real_width, real_height) = data.sizes[i].tolist(), real[i].tolist()
        return f"{data.file_names[i]} is {real_width}x{real_height}, not {width}x{height}"

    is_swapped = (data.sizes[wrong] == real[wrong][:, ::-1]).all()
    if is_swapped and all(headers[i].is_turned for i in wrong):
        hint = (
            "The file has the sizes before the EXIF rotation, which is applied here. If the boxes "
            "are of the upright pictures, swap width and height in the file; else remove the EXIF "
            "orientation from the images"
        )
    elif is_swapped:
        hint = "Width and height are swapped in the file: swap them back"
    else:
        hint = (
            "If the boxes are right for the images as they are, remove width and height from the "
            "file; if the images are resized copies, use the original ones"
        )
    raise InputError(
        f"{len(wrong)} of the {len(real)} images of {data.json_file} have another size than it "
        f"says: {name_some(map(describe, wrong.tolist()), 3)}. {hint}"
    )


def _refuse_normalized(data: CocoData) -> None:
    # Rounding takes some a little beyond 1. An image of few pixels may have such boxes.
    has_area = (data.boxes[:, 2:] > 0).all(axis=1)
    is_small = (data.boxes[has_area] <= 1.05).all(axis=1)
    share = is_small.mean() if len(is_small) else 0
    if share > _MAX_NORMALIZED and data.sizes.max(initial=0) != 1:
        raise InputError(
            f"{data.json_file}: in {int(is_small.sum())} of {len(is_small)} boxes all values of "
            "'bbox' are at most 1, so they are normalized: multiply x and width by the width of "
            "the image, y and height by its height"
        )


def _warn_of_boxes_outside(data: CocoData) -> None:
    sizes = data.sizes[data.image_indices]
    is_known = (sizes > 0).all(axis=1)
    sizes = sizes[is_known]
    if not len(sizes):
        return
    starts, sides = data.boxes[is_known, :2], data.boxes[is_known, 2:]
    margins = 1 + _TOLERANCE * sizes

    def leaves(starts: np.ndarray, ends: np.ndarray, sizes: np.ndarray) -> float:
        outside = (starts < -margins) | (ends > sizes + margins)
        return float(outside.any(axis=1).mean())

    share = leaves(starts, starts + sides, sizes)
    if share <= _MAX_OUTSIDE or share * len(sizes) < _MIN_OUTSIDE:
        return
    guesses = {
        "they look like x0, y0, x1, y1: write x0, y0, width, height": max(
            leaves(starts, sides, sizes), float((sides < starts).any(axis=1).mean())
        ),
        "they look like centres with width and height: write the left upper corner": leaves(
            starts - sides / 2, starts + sides / 2, sizes
        ),
        "they fit the images turned by 90 degrees: were these rotated?": leaves(
            starts, starts + sides, sizes[:, ::-1]
        ),
    }
    guess = min(guesses, key=guesses.get)
    if guesses[guess] > _MAX_OUTSIDE / 3:
        guess = "were they made on images of another size?"
    logger.warning(f"{data.json_file}: {100 * share:.0f}% of the boxes leave their image; {guess}")


def _sound_file(data: CocoData) -> str:
    """The file itself if pycocotools reads the same from it, else a copy for it."""
    if not data.changes:
        return data.json_file
    content = json.dumps(data.to_coco()).encode()
    # File systems limit the length of names.
    stem = os.path.basename(os.path.splitext(data.json_file)[0])[:50]
    # Changed data has another name: an evaluator may still use the old file.
    name = f"{stem}-{_digest(content)}.json"
    try:
        path = os.path.join(cache_folder("annotations"), name)
        if not os.path.isfile(path):
            with atomic_write(path) as file:
                file.write(content)
    except OSError as error:
        raise InputError(
            f"{name}, a sound copy of {data.json_file}, cannot be written: {error}. $FVCORE_CACHE "
            "names the folder of such files"
        ) from None
    return path


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()
