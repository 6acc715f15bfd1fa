"""Datasets loaded, and checked against each other and the config before training starts."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import logging
import os
import traceback
from collections.abc import Iterable, Iterator, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from ..config_checks import check_calibration
from ..errors import InputError, name_some
from .from_config import datasets_root, registered_names

__all__ = [
    "check_datasets", "check_registered", "compare_classes", "load_training_dicts", "loading",
    "resolve_num_classes",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Node of cfg.MODEL that holds NUM_CLASSES, by meta-architecture. Others are not checked.
_NUM_CLASSES_NODES = {"GFL": "GFL", "RetinaNet": "RETINANET"}

# Packages whose code runs when Detectron2 loads the files of a dataset.
_READERS = (
    "gfl_d2", "detectron2", "iopath", "fvcore", "pycocotools", "lvis", "json", "codecs", "xml"
)  # fmt: skip


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
    check_registered(cfg, names)
    classes = {name: _class_names(name) for name in names}
    classes = {name: known for name, known in classes.items() if known is not None}
    _check_same_classes(classes)
    for name, known in classes.items():
        check_calibration(cfg, known, f"dataset '{name}'")
    node = _NUM_CLASSES_NODES.get(cfg.MODEL.META_ARCHITECTURE)
    if node is not None:
        key = f"MODEL.{node}.NUM_CLASSES"
        _check_num_classes(key, cfg.MODEL[node].NUM_CLASSES, classes, eval_only)
    _check_not_empty(names, train, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)


def resolve_num_classes(cfg: CfgNode, eval_only: bool = False) -> CfgNode:
    """
    The config itself, or where its number of classes is 0, one with the number of classes of the
    first dataset to train on (to evaluate on: ``eval_only``), which has to be registered.

    Raises:
        InputError: the dataset does not know its classes.
    """
    node = _NUM_CLASSES_NODES.get(cfg.MODEL.META_ARCHITECTURE)
    if node is None or cfg.MODEL[node].NUM_CLASSES:
        return cfg
    names = cfg.DATASETS.TEST if eval_only else cfg.DATASETS.TRAIN
    check_registered(cfg, names[:1])
    classes = _class_names(names[0]) if names else None
    if not classes:
        raise InputError(
            f"MODEL.{node}.NUM_CLASSES is 0, and no dataset says how many there are: set it"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL[node].NUM_CLASSES = len(classes)
    cfg.freeze()
    return cfg


def compare_classes(
    names: Iterable[str], trained: Sequence[str] | None, key: str = "MODEL.WEIGHTS"
) -> None:
    """
    Compare the classes of datasets with the names that a model was ``trained`` on, where they are
    known. Other names are warned of: the classes may have been renamed. ``key`` of the config names
    its weights.

    Raises:
        InputError: a dataset has the same names in another order.
    """
    for name in names if trained else ():
        classes = _class_names(name)
        if not classes:
            continue
        if sorted(classes) == sorted(trained) and list(classes) != list(trained):
            raise InputError(
                f"Dataset '{name}' has the classes of {key} in another order: set "
                f"DATASETS.CLASSES {list(trained)}"
            )
        for index, (here, there) in enumerate(zip(classes, trained)):
            if here != there:
                logger.warning(
                    f"Class {index} of dataset '{name}' is {here!r}, and was {there!r} in the data "
                    f"that {key} were trained on."
                )
                break


def check_registered(cfg: CfgNode, names: Iterable[str]) -> None:
    """Raise InputError if one of these datasets is not registered, or its files do not exist."""
    for name in names:
        if name not in DatasetCatalog:
            close = difflib.get_close_matches(name, DatasetCatalog.list(), n=5)
            advice = f"close names: {', '.join(close)}" if close else "no registered name is close"
            entries = name_some(map(registered_names, cfg.DATASETS.REGISTER)) or "none"
            raise InputError(
                f"Dataset '{name}' is not registered; {advice}. DATASETS.REGISTER registers data "
                f"in COCO format: here {entries}"
            )
        metadata = MetadataCatalog.get(name)
        for key in ("json_file", "image_root"):
            path = metadata.get(key)
            if path and "://" not in path and not os.path.exists(path):
                raise InputError(
                    f"{path}, which dataset '{name}' needs, does not exist. The environment "
                    "variable DETECTRON2_DATASETS names the folder that Detectron2's own datasets "
                    f"are in; here it is '{datasets_root()}'."
                )


def _check_not_empty(names: tuple[str, ...], train: tuple[str, ...], needs_boxes: bool) -> None:
    for name in names:
        metadata = MetadataCatalog.get(name)
        if metadata.get("num_images") == 0:
            raise InputError(f"Dataset '{name}' is empty: {metadata.annotation_file} has no images")
    # Of datasets that others registered load_training_dicts tells, when they are loaded.
    known = [MetadataCatalog.get(name) for name in train]
    if needs_boxes and train and all(m.get("num_images_with_boxes") == 0 for m in known):
        files = ", ".join(metadata.annotation_file for metadata in known)
        num_crowds = sum(metadata.num_crowds for metadata in known)
        crowds = f": all {num_crowds} boxes are crowds ('iscrowd' or 'ignore')" * (num_crowds > 0)
        raise InputError(
            f"No image of DATASETS.TRAIN {train} has a box to train on ({files}){crowds}. To train "
            "on images without, set DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
        )


def _class_names(name: str) -> list[str] | None:
    """Class names of a registered dataset, None if it has none."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        # Detectron2's register_coco_instances knows them only when the data has been loaded.
        with loading([name]):
            DatasetCatalog.get(name)
    return metadata.get("thing_classes")


def _check_num_classes(
    key: str, number: int, classes: dict[str, list[str]], eval_only: bool
) -> None:
    for name, names in classes.items():
        if len(names) != number:
            advice = f"set {key} {len(names)}"
            if eval_only:  # the weights may be right
                advice += ", or if that is not the number of MODEL.WEIGHTS, name theirs in "
                advice += "DATASETS.CLASSES"
            raise InputError(
                f"{key} is {number}, but dataset '{name}' has {len(names)} classes "
                f"({name_some(names, 8)}): {advice}"
            )


def _check_same_classes(classes: dict[str, list[str]]) -> None:
    for first, second in zip(classes, list(classes)[1:]):
        pairs = itertools.zip_longest(classes[first], classes[second])
        for index, (name, other) in enumerate(pairs):
            if name != other:
                common = [name for name in classes[first] if name in classes[second]]
                advice = f": DATASETS.CLASSES {common} takes what both have" if common else ""
                raise InputError(
                    f"Datasets '{first}' and '{second}' must have the same classes in the same "
                    f"order, but class {index} is {name!r} in the one, {other!r} in the other"
                    f"{advice}"
                )


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
    except InputError:  # it says what is wrong already
        raise
    except (AssertionError, KeyError, OSError, ValueError) as error:
        if _comes_from_other_code(error):
            raise
        keys = ("annotation_file", "json_file")
        metadata = [MetadataCatalog.get(name) for name in names]
        files = {next(filter(None, map(m.get, keys)), None) for m in metadata} - {None}
        where = f" ({', '.join(sorted(files))})" if files else ""
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"Dataset {', '.join(names)}{where} cannot be loaded: {reason}") from None


def _comes_from_other_code(error: BaseException) -> bool:
    """Whether a function was on the way to the error that is none of those that read files."""
    # The first two are those of loading() and of the code in its block.
    walk = itertools.islice(traceback.walk_tb(error.__traceback__), 2, None)
    frames = (frame for frame, _ in walk)
    modules = (frame.f_globals.get("__name__", "") for frame in frames)
    return any(name.partition(".")[0] not in _READERS for name in modules)
