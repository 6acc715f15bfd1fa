"""Datasets as a config names them: registered, and checked before training starts."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from ..errors import InputError, name_some
from .coco_format import register_coco_format

__all__ = ["check_datasets", "load_training_dicts", "loading", "register_datasets"]

logger = logging.getLogger(__name__)

# Node of cfg.MODEL that holds NUM_CLASSES, by meta-architecture. Others are not checked.
_NUM_CLASSES_NODES = {"GFL": "GFL", "RetinaNet": "RETINANET"}

# Packages whose code runs when Detectron2 loads the files of a dataset.
_READERS = (
    "gfl_d2", "detectron2", "iopath", "fvcore", "pycocotools", "lvis", "json", "codecs", "xml"
)  # fmt: skip


def register_datasets(cfg: CfgNode, required: Iterable[str] | None = None) -> None:
    """
    Register each ``[name, json_file, image_root]`` of ``cfg.DATASETS.REGISTER``. ``~`` and
    ``$VARIABLES`` in paths are expanded. Relative paths are looked for in the current directory,
    then in the folder that the environment variable ``DETECTRON2_DATASETS`` names ("datasets" by
    default).

    Data of the ``required`` names, by default all of ``DATASETS.TRAIN`` and ``DATASETS.TEST``, must
    be there and sound. Others are registered if they can be, so that one config serves where only
    some of its data is.

    Raises:
        InputError: an entry is malformed, or the data of a required one missing or not sound.
    """
    if required is None:
        required = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    for entry in cfg.DATASETS.REGISTER:
        is_triple = isinstance(entry, (list, tuple)) and len(entry) == 3
        if not is_triple or not all(isinstance(item, str) and item for item in entry):
            raise InputError(
                "DATASETS.REGISTER must be a list of [name, json_file, image_root], for instance "
                "[['cells_train', 'cells/train.json', 'cells/images']], but has the entry "
                f"{entry!r}"
            )
        name, json_file, image_root = entry
        try:
            register_coco_format(
                name,
                _find(name, "file", json_file, os.path.isfile),
                _find(name, "folder", image_root, os.path.isdir),
            )
        except InputError as error:
            if name in required:
                raise
            logger.info(f"Dataset '{name}' is not needed here and not registered: {error}")


def _find(name: str, kind: str, path: str, exists: Callable[[str], bool]) -> str:
    expanded = os.path.expanduser(os.path.expandvars(path))
    # The second is the first again if the path is absolute.
    candidates = (expanded, os.path.join(_datasets_root(), expanded))
    for candidate in candidates:
        if exists(candidate):
            return candidate
    places = " and ".join(dict.fromkeys(os.path.abspath(candidate) for candidate in candidates))
    raise InputError(f"DATASETS.REGISTER, '{name}': no {kind} '{path}'; looked for {places}")


def _datasets_root() -> str:
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """
    Check the datasets that training (or evaluation alone: ``eval_only``) will use against each
    other and against the config, before the model is built. Data of datasets registered by
    :func:`register_datasets` and of Detectron2's own is not loaded for this.

    Raises:
        InputError: an unknown name, missing files, an empty dataset, one that cannot be evaluated,
            classes that differ between datasets, or another number of classes than the model's.
    """
    train = () if eval_only else tuple(cfg.DATASETS.TRAIN)
    test = tuple(cfg.DATASETS.TEST)
    names = tuple(dict.fromkeys(train + test))
    used = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[used]:
        raise InputError(f"DATASETS.{used} names no dataset")
    for name in names:
        _check_exists(name)
    _check_not_empty(names, train, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    for name in test:
        problem = MetadataCatalog.get(name).get("evaluation_problem")
        if problem:
            raise InputError(f"Dataset '{name}' cannot be evaluated as it is: {problem}")
    classes = {name: _class_names(name) for name in names}
    classes = {name: known for name, known in classes.items() if known is not None}
    node = _NUM_CLASSES_NODES.get(cfg.MODEL.META_ARCHITECTURE)
    if node is not None:
        _check_num_classes(f"MODEL.{node}.NUM_CLASSES", cfg.MODEL[node].NUM_CLASSES, classes)
    _check_same_classes(classes)


def load_training_dicts(cfg: CfgNode) -> list[dict]:
    """
    The images of ``DATASETS.TRAIN`` in Detectron2's format, without those that have no box if
    ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` says so. Raises InputError if nothing is left.
    """
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    with loading(cfg.DATASETS.TRAIN):
        return get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=filter_empty)


@contextlib.contextmanager
def loading(names: Sequence[str]) -> Iterator[None]:
    """
    Around code in which Detectron2 loads registered datasets: what their files make it raise
    (AssertionError is how it reports empty and ambiguous ones) becomes an InputError. An error in
    the code of a user's own dataset is left as it is, with its traceback.
    """
    try:
        yield
    except (AssertionError, KeyError, OSError, json.JSONDecodeError) as error:
        if _comes_from_other_code(error):
            raise
        files = {MetadataCatalog.get(name).get("json_file") for name in names} - {None}
        where = f" ({', '.join(sorted(files))})" if files else ""
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"Dataset {', '.join(names)}{where} cannot be loaded: {reason}") from None


def _comes_from_other_code(error: BaseException) -> bool:
    """Whether a function was on the way to the error that is none of those that read files."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    modules = (frame.f_globals.get("__name__", "") for frame in frames)
    return any(name.partition(".")[0] not in _READERS for name in modules)


def _check_exists(name: str) -> None:
    if name not in DatasetCatalog:
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=5)
        advice = f"close names: {', '.join(close)}" if close else "no registered name is close"
        raise InputError(
            f"Dataset '{name}' is not registered; {advice}. "
            "DATASETS.REGISTER registers data in COCO format."
        )
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "image_root"):
        path = metadata.get(key)
        if path and "://" not in path and not os.path.exists(path):
            raise InputError(
                f"{path}, which dataset '{name}' needs, does not exist. The environment variable "
                "DETECTRON2_DATASETS names the folder that Detectron2's own datasets are in; "
                f"here it is '{_datasets_root()}'."
            )


def _check_not_empty(names: tuple[str, ...], train: tuple[str, ...], needs_boxes: bool) -> None:
    for name in names:
        metadata = MetadataCatalog.get(name)
        if metadata.get("num_images") == 0:
            raise InputError(f"Dataset '{name}' is empty: {metadata.json_file} has no images")
    # Of datasets that others registered load_training_dicts tells, when they are loaded.
    known = [MetadataCatalog.get(name) for name in train]
    if needs_boxes and train and all(m.get("num_images_with_boxes") == 0 for m in known):
        files = ", ".join(metadata.json_file for metadata in known)
        raise InputError(
            f"No image of DATASETS.TRAIN {train} has a box to train on ({files}), and "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves out images without"
        )


def _class_names(name: str) -> list[str] | None:
    """Class names of a registered dataset, None if it has none."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        # Detectron2's register_coco_instances knows them only when the data has been loaded.
        with loading([name]):
            DatasetCatalog.get(name)
    return metadata.get("thing_classes")


def _check_num_classes(key: str, number: int, classes: dict[str, list[str]]) -> None:
    for name, names in classes.items():
        if len(names) != number:
            raise InputError(
                f"{key} is {number}, but dataset '{name}' has {len(names)} classes "
                f"({name_some(names, 8)}): set {key} {len(names)}"
            )


def _check_same_classes(classes: dict[str, list[str]]) -> None:
    for first, second in zip(classes, list(classes)[1:]):
        pairs = itertools.zip_longest(classes[first], classes[second])
        for index, (name, other) in enumerate(pairs):
            if name != other:
                raise InputError(
                    f"Datasets '{first}' and '{second}' must have the same classes in the same "
                    f"order, but class {index} is {name!r} in the one, {other!r} in the other"
                )
