"""Datasets as a config names them: registered, and checked before training starts."""

from __future__ import annotations

import contextlib
import difflib
import glob
import itertools
import json
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from ..errors import InputError, name_some
from .registration import register_coco_format

__all__ = [
    "check_datasets", "check_registered", "compare_classes", "load_training_dicts", "loading",
    "register_datasets", "resolve_num_classes",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Node of cfg.MODEL that holds NUM_CLASSES, by meta-architecture. Others are not checked.
_NUM_CLASSES_NODES = {"GFL": "GFL", "RetinaNet": "RETINANET"}

# Packages whose code runs when Detectron2 loads the files of a dataset.
_READERS = (
    "gfl_d2", "detectron2", "iopath", "fvcore", "pycocotools", "lvis", "json", "codecs", "xml"
)  # fmt: skip


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
            _register_folder(items[0], names, classes, check_images)
        elif items[0] in names:
            name, json_file, image_root = items
            register_coco_format(
                name,
                _find(name, "file", json_file, os.path.isfile),
                _find(name, "folder", image_root, os.path.isdir),
                classes,
                check_images,
            )
    _refuse_classes_of_others(classes, names)


def _names_of(entry: list[str] | str) -> str:
    """Which names an entry of DATASETS.REGISTER gives, for a message."""
    items = [entry] if isinstance(entry, str) else entry
    return f"{_prefix(items[0])}<split>" if len(items) == 1 else items[0]


def _prefix(folder: str) -> str:
    return f"{os.path.basename(os.path.abspath(folder))}_"


def _register_folder(
    path: str, names: Iterable[str], classes: Sequence[str], check_images: bool
) -> None:
    prefix = _prefix(path)
    wanted = [name for name in names if name.startswith(prefix)]
    if not wanted:
        return
    folder = _find(prefix[:-1], "folder", path, os.path.isdir)
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
    if not splits:
        raise InputError(
            f"DATASETS.REGISTER: {folder} has neither train/_annotations.coco.json and the like "
            "nor annotations/instances_*.json: name the files, [name, json_file, image_root]"
        )
    for name in wanted:
        split = name[len(prefix) :]
        if split in splits:
            register_coco_format(name, *splits[split], classes, check_images)
        elif name not in DatasetCatalog:
            there = name_some(f"{prefix}{split}" for split in splits)
            raise InputError(f"DATASETS.REGISTER: {folder} has no dataset '{name}', but {there}")


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
    check_registered(cfg, names)
    classes = {name: _class_names(name) for name in names}
    classes = {name: known for name, known in classes.items() if known is not None}
    _check_same_classes(classes)
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
    for name in names[:1]:
        check_registered(cfg, [name])
        classes = _class_names(name)
        if classes:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL[node].NUM_CLASSES = len(classes)
            cfg.freeze()
            return cfg
    raise InputError(
        f"MODEL.{node}.NUM_CLASSES is 0, and no dataset says how many there are: set it"
    )


def compare_classes(names: Iterable[str], trained: Sequence[str] | None) -> None:
    """
    Compare the classes of the datasets to evaluate on with the names that a model was ``trained``
    on, where they are known. Other names are warned of: the classes may have been renamed.

    Raises:
        InputError: a dataset has the same names in another order.
    """
    for name in names if trained else ():
        classes = _class_names(name) or trained
        if sorted(classes) == sorted(trained) and list(classes) != list(trained):
            raise InputError(
                f"Dataset '{name}' has the classes of MODEL.WEIGHTS in another order: set "
                f"DATASETS.CLASSES {list(trained)}"
            )
        for index, (here, there) in enumerate(zip(classes, trained)):
            if here != there:
                logger.warning(
                    f"Class {index} of dataset '{name}' is {here!r}, and was {there!r} in the data "
                    "that MODEL.WEIGHTS were trained on."
                )
                break


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


def check_registered(cfg: CfgNode, names: Iterable[str]) -> None:
    """Raise InputError if one of these datasets is not registered, or its files do not exist."""
    for name in names:
        if name not in DatasetCatalog:
            close = difflib.get_close_matches(name, DatasetCatalog.list(), n=5)
            advice = f"close names: {', '.join(close)}" if close else "no registered name is close"
            entries = name_some(map(_names_of, cfg.DATASETS.REGISTER)) or "none"
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
                    f"are in; here it is '{_datasets_root()}'."
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
