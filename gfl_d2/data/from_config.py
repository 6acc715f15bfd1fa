"""Datasets that DATASETS.REGISTER names, registered."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import InputError, name_some
from .registration import register_coco_format

__all__ = ["datasets_root", "register_datasets", "registered_names"]


def register_datasets(
    cfg: CfgNode, names: Iterable[str] | None = None, check_images: bool = True
) -> None:
    """
    Register the datasets of these ``names``, by default those of ``DATASETS.TRAIN`` and
    ``DATASETS.TEST``, that ``DATASETS.REGISTER`` has, each by :func:`register_coco_format` with
    ``DATASETS.CLASSES``.

    An entry is ``[name, json_file, image_root]``, or a folder with one of these layouts, whose
    datasets are called after the folder and the split, such as "cells_train":

    - ``train/_annotations.coco.json`` beside the images, and so on (Roboflow's);
    - ``annotations/instances_train.json``, and images in ``train``, ``images/train`` or ``images``.

    ``~`` and ``$VARIABLES`` in paths are expanded. Relative paths are looked for in the current
    directory, then in the folder that the environment variable ``DETECTRON2_DATASETS`` names
    ("datasets" by default). The other entries are not looked at, so that one config serves where
    only some of its data is. ``check_images`` is that of :func:`read_coco`.

    Raises:
        InputError: an entry is malformed, or the data missing or not sound.
    """
    if names is None:
        names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    classes = [str(name) for name in cfg.DATASETS.CLASSES]
    if len(set(classes)) < len(classes):
        raise InputError(f"DATASETS.CLASSES names a class twice: {name_some(classes, 20)}")
    folders = {}
    for entry in cfg.DATASETS.REGISTER:
        items = [entry] if isinstance(entry, str) else entry
        is_list = isinstance(items, (list, tuple)) and len(items) in (1, 3)
        if not is_list or not all(isinstance(item, str) and item for item in items):
            raise InputError(
                "DATASETS.REGISTER must be a list of [name, json_file, image_root], or of folders, "
                "for instance [['cells_train', 'cells/train.json', 'cells/images']], but has the "
                f"entry {entry!r}"
            )
        if not all(item.isprintable() for item in items):
            raise InputError(
                f"DATASETS.REGISTER has the entry {entry!r}, in which \\ begins a control "
                "character: write paths with /, or with \\\\"
            )
        if len(items) == 1:
            folders[items[0]] = _look_into(items[0], names)
            for name, files in folders[items[0]].datasets.items():
                if name in names:
                    register_coco_format(name, *files, classes, check_images)
        elif items[0] in names:
            name, json_file, image_root = items
            register_coco_format(
                name,
                _find(name, "file", json_file, os.path.isfile),
                _find(name, "folder", image_root, os.path.isdir),
                classes,
                check_images,
            )
    for path, folder in folders.items():
        for name in names:
            # It may be another folder's, whose name begins with this one's.
            if name.startswith(_prefix(path)) and name not in DatasetCatalog:
                raise folder.problem or InputError(
                    f"DATASETS.REGISTER: {path} has no dataset '{name}', but "
                    f"{name_some(list(folder.datasets))}"
                )
    _refuse_classes_of_others(classes, names)


class _Folder(NamedTuple):
    datasets: dict[str, tuple[str, str]]  # name -> annotation file and folder of images
    problem: InputError | None = None  # why there are none


def _prefix(folder: str) -> str:
    return f"{os.path.basename(os.path.abspath(_expand(folder)))}_"


def _look_into(path: str, names: Iterable[str]) -> _Folder:
    """Nothing is found or wrong where none of ``names`` can be among the folder's datasets."""
    prefix = _prefix(path)
    if not any(name.startswith(prefix) for name in names):
        return _Folder({})
    try:
        folder = _find(prefix[:-1], "folder", path, os.path.isdir)
    except InputError as error:
        return _Folder({}, error)
    splits = {}
    for file in sorted(glob.glob(os.path.join(glob.escape(folder), "*", "_annotations.coco.json"))):
        splits[os.path.basename(os.path.dirname(file))] = (file, os.path.dirname(file))
    pattern = os.path.join(glob.escape(folder), "annotations", "instances_*.json")
    for file in sorted(glob.glob(pattern)):
        split = os.path.basename(file)[len("instances_") : -len(".json")]
        roots = [
            os.path.join(folder, *parts) for parts in ((split,), ("images", split), ("images",))
        ]
        splits[split] = (file, next(filter(os.path.isdir, roots), folder))
    problem = InputError(
        f"DATASETS.REGISTER: {folder} has neither train/_annotations.coco.json and the like "
        "nor annotations/instances_*.json: name the files, [name, json_file, image_root]"
    )
    datasets = {f"{prefix}{split}": files for split, files in splits.items()}
    return _Folder(datasets, None if datasets else problem)


def _refuse_classes_of_others(classes: Sequence[str], names: Iterable[str]) -> None:
    """DATASETS.CLASSES does nothing for datasets that DATASETS.REGISTER does not have."""
    for name in names if classes else ():
        metadata = MetadataCatalog.get(name)
        if name in DatasetCatalog and metadata.get("annotation_file") is None:
            files = [name, metadata.get("json_file", "<json_file>"), metadata.get("image_root", "")]
            raise InputError(
                f"DATASETS.CLASSES is for datasets of DATASETS.REGISTER, and '{name}' is none: add "
                f"{['my_' + files[0], *files[1:]]} there, and use that name"
            )


def _find(name: str, kind: str, path: str, exists: Callable[[str], bool]) -> str:
    expanded = _expand(path)
    # The second is the first again if the path is absolute.
    candidates = (expanded, os.path.join(datasets_root(), expanded))
    for candidate in candidates:
        if exists(candidate):
            return candidate
    places = " and ".join(dict.fromkeys(os.path.abspath(candidate) for candidate in candidates))
    raise InputError(f"DATASETS.REGISTER, '{name}': no {kind} '{path}'; looked for {places}")


def _expand(path: str) -> str:
    return os.path.expanduser(os.path.expandvars(path))


def registered_names(entry: list[str] | str) -> str:
    """Which names an entry of DATASETS.REGISTER gives, for a message."""
    items = [entry] if isinstance(entry, str) else entry
    return f"{_prefix(items[0])}<split>" if len(items) == 1 else items[0]


def datasets_root() -> str:
    """The folder of Detectron2's own datasets."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
