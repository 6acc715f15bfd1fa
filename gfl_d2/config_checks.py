"""Checks of config values, so that a mistake is one line at the start."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.layers import get_norm
from PIL import Image
from torch import nn

from .calibration import Calibration, load_calibration
from .errors import InputError
from .registry import (
    ASSIGNER_REGISTRY,
    BOX_REPRESENTATION_REGISTRY,
    DISTILLATION_REGISTRY,
    QUALITY_REGISTRY,
)

__all__ = [
    "check_calibration", "check_config", "check_gfl_config", "get_value",
    "read_calibration", "require",
]  # fmt: skip

_COMPILE_MODES = (
    "", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
)  # fmt: skip
_CHOICES = {
    "INPUT.RESIZE_FILTER": ("pillow", "opencv"),
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical", "both"),
    "MODEL.GFL.BBOX_REG_LOSS_TYPE": ("giou", "iou"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "SOLVER.COMPILE": _COMPILE_MODES,
    "TEST.AUG.MERGE": ("nms", "vote"),
    "TEST.COMPILE": _COMPILE_MODES,
    "TEST.PRECISION": ("float32", "bfloat16", "float16"),
}
_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")
_SAMPLERS_OF_MAIN = ("WeightedTrainingSampler", "WeightedCategoryTrainingSampler")
_LOSSES = ("QFL", "CLS", "QUALITY", "BBOX", "DFL", "KL", "LEVEL")
_WEIGHTS = [f"LOSS_{name}_WEIGHT" for name in _LOSSES]
_WEIGHTS += [f"DISTILL.{x}_WEIGHT" for x in ("LD", "VLR", "KD", "BCKD_CLS", "BCKD_BOX")]
# Keys of MODEL.GFL, what their values must be, and whether a value is that.
_RANGES = (
    (["CONV_DIM", "REG_MAX", "DGQP_TOPK", "DGQP_CHANNELS"], ">= 1", lambda x: x >= 1),
    (["ATSS_TOPK", "SAPD_LEVELS", "TOPK_CANDIDATES_TEST"], ">= 1", lambda x: x >= 1),
    (["SAPD_SHRINK"], "in (0, 1]", lambda x: 0 < x <= 1),
    (["NUM_CLASSES", "NUM_CONVS", "VFL_ALPHA", *_WEIGHTS], ">= 0", lambda x: x >= 0),
    (["BIN_WIDTH", "ANCHOR_SCALE", "BOX_NORMALIZER_MIN"], "> 0", lambda x: x > 0),
    (["DISTILL.LD_TEMPERATURE", "DISTILL.KD_TEMPERATURE"], "> 0", lambda x: x > 0),
    (["IN_FEATURES"], "a list of at least one feature name", lambda x: len(x) >= 1),
    (["PRIOR_PROB"], "in (0, 1)", lambda x: 0 < x < 1),
    # For 0 < beta < 1 the gradient of QFL is infinite where the prediction meets the target.
    (
        ["QFL_BETA", "FOCAL_LOSS_GAMMA", "VFL_GAMMA", "MAL_GAMMA"],
        "0 or >= 1",
        lambda x: x == 0 or x >= 1,
    ),
    (["FOCAL_LOSS_ALPHA"], "in [0, 1], or negative", lambda x: x <= 1),
    (["SCORE_THRESH_TEST"], "in [0, 1)", lambda x: 0 <= x < 1),
    (["BOX_WEIGHT_MIN", "NMS_THRESH_TEST"], "in [0, 1]", lambda x: 0 <= x <= 1),
)


def get_value(cfg: CfgNode, key: str) -> Any:
    """The value of a key with dots, such as "MODEL.GFL.NORM"."""
    return functools.reduce(getattr, key.split("."), cfg)


def require(cfg: CfgNode, key: str, holds: object, allowed: str) -> None:
    """Raise an InputError that says what a key must be, and what it is, unless ``holds``."""
    if not holds:
        raise InputError(f"{key} must be {allowed}, got {get_value(cfg, key)!r}")


def check_config(cfg: CfgNode) -> None:
    """
    Check a config with the keys of this project, whatever its meta-architecture.

    Raises:
        InputError: a value is out of range, contradicts another or asks for what is not there; the
            message names the key.
    """
    if cfg.MODEL.META_ARCHITECTURE == "GFL":
        check_gfl_config(cfg)
    else:
        _check_general(cfg)
        when = f"for MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r}"
        require(cfg, "TEST.UNCERTAINTY", not cfg.TEST.UNCERTAINTY, f"False {when}")
        require(cfg, "TEST.CALIBRATION", not cfg.TEST.CALIBRATION, f"'' {when}")
        terms = cfg.MODEL.GFL.DISTILL.TERMS
        require(cfg, "MODEL.GFL.DISTILL.TERMS", not terms, f"[] {when}")


def check_gfl_config(cfg: CfgNode) -> None:
    """
    As :func:`check_config`, for GFL or what is derived from it under another name: ``MODEL.GFL``,
    the keys that GFL depends on, and all others.
    """
    _check_general(cfg)
    gfl = cfg.MODEL.GFL
    for keys, allowed, holds in _RANGES:
        for key in (f"MODEL.GFL.{key}" for key in keys):
            require(cfg, key, holds(get_value(cfg, key)), allowed)
    # The parts that are chosen by name check the keys of their own.
    QUALITY_REGISTRY.get(gfl.QUALITY).from_config(cfg)
    box = BOX_REPRESENTATION_REGISTRY.get(gfl.BOX_REPRESENTATION).from_config(cfg)
    allowed = f"False when MODEL.GFL.BOX_REPRESENTATION is {gfl.BOX_REPRESENTATION!r}"
    is_known = box.has_uncertainty or not cfg.TEST.UNCERTAINTY
    require(cfg, "TEST.UNCERTAINTY", is_known, f"{allowed}, which predicts no distribution")
    ASSIGNER_REGISTRY.get(gfl.ASSIGNER)
    calibration = read_calibration(cfg)
    if calibration and gfl.NUM_CLASSES:
        number = len(calibration.thing_classes)
        allowed = f"of {gfl.NUM_CLASSES} classes, as MODEL.GFL.NUM_CLASSES, and has {number}"
        require(cfg, "TEST.CALIBRATION", number == gfl.NUM_CLASSES, allowed)
    terms = gfl.DISTILL.TERMS
    for name in terms:
        DISTILLATION_REGISTRY.get(name).from_config(cfg)
    is_set = len(set(terms)) == len(terms)
    require(cfg, "MODEL.GFL.DISTILL.TERMS", is_set, "a list that names each term once")
    _check_norm(cfg)
    key, offset = "MODEL.ANCHOR_GENERATOR.OFFSET", cfg.MODEL.ANCHOR_GENERATOR.OFFSET
    allowed = "0.0 when MODEL.GFL.LEGACY_ANCHOR_CENTERS is True"
    require(cfg, key, offset == 0 or not gfl.LEGACY_ANCHOR_CENTERS, allowed)
    require(cfg, key, 0 <= offset < 1, "in [0, 1)")
    require(cfg, "TEST.DETECTIONS_PER_IMAGE", cfg.TEST.DETECTIONS_PER_IMAGE >= 1, ">= 1")
    for key in ("MASK_ON", "KEYPOINT_ON", "LOAD_PROPOSALS"):
        require(cfg, f"MODEL.{key}", not cfg.MODEL[key], "False: GFL does not have it")


def read_calibration(cfg: CfgNode) -> Calibration | None:
    """The file of ``TEST.CALIBRATION``, if any. Raises InputError if it is missing or not sound."""
    if not cfg.TEST.CALIBRATION:
        return None
    try:
        return load_calibration(cfg.TEST.CALIBRATION)
    except InputError as error:
        raise InputError(
            f"TEST.CALIBRATION: {error}. TEST.CALIBRATION \"''\" does without it"
        ) from None


def check_calibration(cfg: CfgNode, class_names: Sequence[str] | None, whose: str) -> None:
    """
    Raises:
        InputError: the file of ``TEST.CALIBRATION`` is of other classes than these of ``whose``, a
            model or dataset. None: they are not known.
    """
    calibration = read_calibration(cfg)
    if calibration and class_names:
        try:
            calibration.check_classes(class_names, whose)
        except InputError as error:
            raise InputError(f"TEST.CALIBRATION {cfg.TEST.CALIBRATION}: {error}") from None


def _check_norm(cfg: CfgNode) -> None:
    key, gfl = "MODEL.GFL.NORM", cfg.MODEL.GFL
    try:
        norm = get_norm(gfl.NORM, 64)
    except KeyError:
        require(cfg, key, False, "the name of a normalization, such as 'GN', or ''")
    # The towers are shared by levels whose features differ by far.
    has_running_average = isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    allowed = "'GN', or another without batch statistics: all levels would share their average"
    require(cfg, key, not has_running_average, allowed)
    fits_groups = gfl.CONV_DIM % 32 == 0 and gfl.CONV_DIM >= 64
    allowed = "a multiple of 32, and at least 64, when MODEL.GFL.NORM is 'GN'"
    is_used = gfl.NORM == "GN" and gfl.NUM_CONVS > 0
    require(cfg, "MODEL.GFL.CONV_DIM", fits_groups or not is_used, allowed)


def _check_general(cfg: CfgNode) -> None:
    for section in ("MODEL", "INPUT", "DATALOADER", "SOLVER"):
        for key, value in _floats(section, cfg[section]):
            # The norm of gradients may be the maximum norm.
            if not math.isfinite(value) and key != "SOLVER.CLIP_GRADIENTS.NORM_TYPE":
                raise InputError(f"{key} must be finite, got {value}")
    samplers = _SAMPLERS + (_SAMPLERS_OF_MAIN if "REPEAT_SQRT" in cfg.DATALOADER else ())
    for key, names in {"DATALOADER.SAMPLER_TRAIN": samplers, **_CHOICES}.items():
        require(cfg, key, get_value(cfg, key) in names, f"one of {names}")
    _check_device(cfg)
    _check_channels(cfg)
    if cfg.MODEL.RESNETS.ZERO_INIT_RESIDUAL:
        _check_zero_init(cfg)
    both = cfg.SOLVER.BF16 and cfg.SOLVER.AMP.ENABLED
    require(cfg, "SOLVER.BF16", not both, "False when SOLVER.AMP.ENABLED is True")
    works = cfg.TEST.PRECISION != "float16" or cfg.MODEL.DEVICE != "cpu"
    require(cfg, "TEST.PRECISION", works, "'float32' or 'bfloat16' on a CPU")
    _check_views(cfg)


def _check_views(cfg: CfgNode) -> None:
    sizes, tiles = cfg.TEST.AUG.MIN_SIZES, cfg.TEST.TILES
    are_sizes = len(sizes) > 0 and all(isinstance(x, int) and x >= 1 for x in sizes)
    require(cfg, "TEST.AUG.MIN_SIZES", are_sizes, "a list of at least one size in pixels, >= 1")
    require(cfg, "TEST.AUG.MAX_SIZE", cfg.TEST.AUG.MAX_SIZE >= 1, ">= 1")
    require(cfg, "TEST.TILES.SIZE", tiles.SIZE == 0 or tiles.SIZE >= 32, "0, or >= 32")
    require(cfg, "TEST.TILES.OVERLAP", 0 <= tiles.OVERLAP <= 0.5, "in [0, 0.5]")
    is_one_view = not cfg.TEST.AUG.ENABLED and tiles.SIZE == 0
    allowed = "False with TEST.AUG.ENABLED or TEST.TILES.SIZE: boxes of several views are merged"
    require(cfg, "TEST.UNCERTAINTY", is_one_view or not cfg.TEST.UNCERTAINTY, allowed)


def _floats(key: str, value: object) -> Iterator[tuple[str, float]]:
    """All floats in a config, with their keys."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _floats(f"{key}.{name}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floats(key, item)


def _check_device(cfg: CfgNode) -> None:
    key = "MODEL.DEVICE"
    try:
        device_type = torch.device(cfg.MODEL.DEVICE).type
    except RuntimeError:
        require(cfg, key, False, "a device of PyTorch, such as 'cuda' or 'cpu'")
    has_device = device_type != "cuda" or torch.cuda.is_available()
    require(cfg, key, has_device, "'cpu' on this machine, which has no GPU")


def _check_channels(cfg: CfgNode) -> None:
    image_format = cfg.INPUT.FORMAT
    number = _num_channels(image_format)
    allowed = "'BGR', 'RGB', 'L' or another that Detectron2 reads images in"
    require(cfg, "INPUT.FORMAT", number > 0, allowed)
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        values, allowed = cfg.MODEL[key], f"{number} numbers for INPUT.FORMAT {image_format!r}"
        are_numbers = all(isinstance(value, (int, float)) for value in values)
        require(cfg, f"MODEL.{key}", len(values) == number and are_numbers, allowed)
    require(cfg, "MODEL.PIXEL_STD", min(cfg.MODEL.PIXEL_STD) > 0, "> 0")


def _num_channels(image_format: str) -> int:
    """Channels of images that Detectron2 reads in this format, 0 if it cannot."""
    try:
        image = convert_PIL_to_numpy(Image.new("RGB", (1, 1)), image_format)
    except (KeyError, ValueError):
        return 0
    return image.shape[2] if image_format and image.ndim == 3 else 0


def _check_zero_init(cfg: CfgNode) -> None:
    when = "when MODEL.RESNETS.ZERO_INIT_RESIDUAL is True"
    model, names = cfg.MODEL, ("build_gfl_resnet_fpn_backbone", "build_gfl_res2net_fpn_backbone")
    require(cfg, "MODEL.BACKBONE.NAME", model.BACKBONE.NAME in names, f"one of {names} {when}")
    # A frozen block with a zero scale would stay the identity for ever.
    is_trainable = model.RESNETS.NORM not in ("", "FrozenBN")
    require(cfg, "MODEL.RESNETS.NORM", is_trainable, f"a trainable one {when}")
    require(cfg, "MODEL.BACKBONE.FREEZE_AT", model.BACKBONE.FREEZE_AT < 2, f"< 2 {when}")
