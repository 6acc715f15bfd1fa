"""Checks of config values, so that a mistake is one line at the start."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from PIL import Image
from torch import nn

from .errors import InputError
from .registry import ASSIGNER_REGISTRY, BOX_REPRESENTATION_REGISTRY, QUALITY_REGISTRY

__all__ = ["check_config", "check_gfl_config", "check_training_config"]

_COMPILE_MODES = (
    "", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
)  # fmt: skip
_SAMPLERS = (
    "TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"
)  # fmt: skip
_SAMPLERS_OF_MAIN = ("WeightedTrainingSampler", "WeightedCategoryTrainingSampler")


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


def check_gfl_config(cfg: CfgNode) -> None:
    """
    As :func:`check_config`, for GFL or what is derived from it under another name: ``MODEL.GFL``,
    the keys that GFL depends on, and all others.
    """
    _check_general(cfg)
    gfl = cfg.MODEL.GFL
    rules = {
        "NUM_CLASSES": (gfl.NUM_CLASSES >= 1, ">= 1"),
        "IN_FEATURES": (len(gfl.IN_FEATURES) >= 1, "a list of at least one feature name"),
        "NUM_CONVS": (gfl.NUM_CONVS >= 0, ">= 0"),
        "CONV_DIM": (gfl.CONV_DIM >= 1, ">= 1"),
        "PRIOR_PROB": (0 < gfl.PRIOR_PROB < 1, "in (0, 1)"),
        "REG_MAX": (gfl.REG_MAX >= 1, ">= 1"),
        "BIN_WIDTH": (gfl.BIN_WIDTH > 0, "> 0"),
        "DGQP_TOPK": (gfl.DGQP_TOPK >= 1, ">= 1"),
        "DGQP_CHANNELS": (gfl.DGQP_CHANNELS >= 1, ">= 1"),
        "ANCHOR_SCALE": (gfl.ANCHOR_SCALE > 0, "> 0"),
        "ATSS_TOPK": (gfl.ATSS_TOPK >= 1, ">= 1"),
        # For 0 < beta < 1 the gradient of QFL is infinite where the prediction meets the target.
        "QFL_BETA": (gfl.QFL_BETA == 0 or gfl.QFL_BETA >= 1, "0 or >= 1"),
        "FOCAL_LOSS_ALPHA": (gfl.FOCAL_LOSS_ALPHA <= 1, "in [0, 1], or negative"),
        "FOCAL_LOSS_GAMMA": (gfl.FOCAL_LOSS_GAMMA == 0 or gfl.FOCAL_LOSS_GAMMA >= 1, "0 or >= 1"),
        **{
            f"LOSS_{name}_WEIGHT": (gfl[f"LOSS_{name}_WEIGHT"] >= 0, ">= 0")
            for name in ("QFL", "CLS", "QUALITY", "BBOX", "DFL", "KL")
        },
        "BOX_NORMALIZER_MIN": (gfl.BOX_NORMALIZER_MIN > 0, "> 0"),
        "SCORE_THRESH_TEST": (0 <= gfl.SCORE_THRESH_TEST < 1, "in [0, 1)"),
        "TOPK_CANDIDATES_TEST": (gfl.TOPK_CANDIDATES_TEST >= 1, ">= 1"),
        "NMS_THRESH_TEST": (0 <= gfl.NMS_THRESH_TEST <= 1, "in [0, 1]"),
    }
    for key, (holds, allowed) in rules.items():
        _require(holds, f"MODEL.GFL.{key}", allowed, gfl[key])
    _check_parts(cfg)
    _check_norm(gfl)
    offset = cfg.MODEL.ANCHOR_GENERATOR.OFFSET
    _require(
        offset == 0 or not gfl.LEGACY_ANCHOR_CENTERS,
        "MODEL.ANCHOR_GENERATOR.OFFSET",
        "0.0 when MODEL.GFL.LEGACY_ANCHOR_CENTERS is True",
        offset,
    )
    _require(0 <= offset < 1, "MODEL.ANCHOR_GENERATOR.OFFSET", "in [0, 1)", offset)
    number = cfg.TEST.DETECTIONS_PER_IMAGE
    _require(number >= 1, "TEST.DETECTIONS_PER_IMAGE", ">= 1", number)
    for key in ("MASK_ON", "KEYPOINT_ON", "LOAD_PROPOSALS"):
        _require(not cfg.MODEL[key], f"MODEL.{key}", "False: GFL does not have it", True)
    allowed = "0: GFL draws no pictures in training (tools/visualize_results.py does, of results)"
    _require(cfg.VIS_PERIOD == 0, "VIS_PERIOD", allowed, cfg.VIS_PERIOD)


def check_training_config(cfg: CfgNode) -> None:
    """
    Check what only training depends on, after :func:`check_config`.

    Raises:
        InputError: the message names the key.
    """
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        raise InputError(
            "SOLVER.AMP.ENABLED must be False on a CPU: it is float16 for GPUs; "
            "SOLVER.BF16 works on both"
        )
    metric, test = cfg.TEST.BEST_CHECKPOINT_METRIC, cfg.DATASETS.TEST
    if not metric or not test or cfg.TEST.EVAL_PERIOD <= 0:
        return
    prefix = next((f"{name}/" for name in test if metric.startswith(f"{name}/")), "")
    if len(test) > 1 and not prefix:
        raise InputError(
            f"TEST.BEST_CHECKPOINT_METRIC must begin with one of the {len(test)} datasets of "
            f"DATASETS.TEST, for instance '{test[0]}/{metric}', or be '', got {metric!r}"
        )
    if len(test) == 1 and prefix:
        raise InputError(
            "TEST.BEST_CHECKPOINT_METRIC must not name the dataset when DATASETS.TEST has only "
            f"one: '{metric[len(prefix) :]}', got {metric!r}"
        )


def _check_parts(cfg: CfgNode) -> None:
    """Make the parts that are chosen by name, which check the keys of their own."""
    gfl = cfg.MODEL.GFL
    QUALITY_REGISTRY.get(gfl.QUALITY).from_config(cfg)
    BOX_REPRESENTATION_REGISTRY.get(gfl.BOX_REPRESENTATION).from_config(cfg)
    ASSIGNER_REGISTRY.get(gfl.ASSIGNER).from_config(cfg)


def _check_norm(gfl: CfgNode) -> None:
    try:
        norm = get_norm(gfl.NORM, 64)
    except KeyError:
        allowed = "the name of a normalization, such as 'GN', or ''"
        _require(False, "MODEL.GFL.NORM", allowed, gfl.NORM)
    # The towers are shared by levels whose features differ by far.
    has_running_average = isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    allowed = "'GN', or another without batch statistics: all levels would share their average"
    _require(not has_running_average, "MODEL.GFL.NORM", allowed, gfl.NORM)
    _require(
        gfl.NORM != "GN" or gfl.NUM_CONVS == 0 or (gfl.CONV_DIM % 32 == 0 and gfl.CONV_DIM >= 64),
        "MODEL.GFL.CONV_DIM",
        "a multiple of 32, and at least 64, when MODEL.GFL.NORM is 'GN'",
        gfl.CONV_DIM,
    )


def _check_general(cfg: CfgNode) -> None:
    for section in ("MODEL", "INPUT", "DATALOADER", "SOLVER"):
        for key, value in _floats(section, cfg[section]):
            # The norm of gradients may be the maximum norm.
            if not math.isfinite(value) and key != "SOLVER.CLIP_GRADIENTS.NORM_TYPE":
                raise InputError(f"{key} must be finite, got {value}")
    _check_device(cfg.MODEL.DEVICE)
    _check_input(cfg)
    _check_zero_init(cfg)

    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    samplers = _SAMPLERS + (_SAMPLERS_OF_MAIN if "REPEAT_SQRT" in cfg.DATALOADER else ())
    _require(sampler in samplers, "DATALOADER.SAMPLER_TRAIN", f"one of {samplers}", sampler)
    clip, clips = cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, ("value", "norm", "full_model")
    _require(clip in clips, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", f"one of {clips}", clip)
    both = cfg.SOLVER.BF16 and cfg.SOLVER.AMP.ENABLED
    _require(not both, "SOLVER.BF16", "False when SOLVER.AMP.ENABLED is True", cfg.SOLVER.BF16)
    precision, precisions = cfg.TEST.PRECISION, ("float32", "bfloat16", "float16")
    _require(precision in precisions, "TEST.PRECISION", f"one of {precisions}", precision)
    on_gpu = precision != "float16" or cfg.MODEL.DEVICE != "cpu"
    _require(on_gpu, "TEST.PRECISION", "'float32' or 'bfloat16' on a CPU", precision)
    for key, mode in (("TEST", cfg.TEST.COMPILE), ("SOLVER", cfg.SOLVER.COMPILE)):
        _require(mode in _COMPILE_MODES, f"{key}.COMPILE", f"one of {_COMPILE_MODES}", mode)
    allowed = "False: there is no test-time augmentation for dense detectors yet"
    _require(not cfg.TEST.AUG.ENABLED, "TEST.AUG.ENABLED", allowed, True)


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


def _check_device(device: str) -> None:
    try:
        device_type = torch.device(device).type
    except RuntimeError:
        _require(False, "MODEL.DEVICE", "a device of PyTorch, such as 'cuda' or 'cpu'", device)
    has_device = device_type != "cuda" or torch.cuda.is_available()
    _require(has_device, "MODEL.DEVICE", "'cpu' on this machine, which has no GPU", device)


def _check_input(cfg: CfgNode) -> None:
    image_format = cfg.INPUT.FORMAT
    num_channels = _num_channels(image_format)
    allowed = "'BGR', 'RGB', 'L' or another that Detectron2 reads images in"
    _require(num_channels > 0, "INPUT.FORMAT", allowed, image_format)
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        values = cfg.MODEL[key]
        fits = len(values) == num_channels
        allowed = f"{num_channels} numbers for INPUT.FORMAT {image_format!r}"
        _require(fits, f"MODEL.{key}", allowed, values)
    _require(min(cfg.MODEL.PIXEL_STD) > 0, "MODEL.PIXEL_STD", "> 0", cfg.MODEL.PIXEL_STD)
    flip, flips = cfg.INPUT.RANDOM_FLIP, ("none", "horizontal", "vertical", "both")
    _require(flip in flips, "INPUT.RANDOM_FLIP", f"one of {flips}", flip)


def _num_channels(image_format: str) -> int:
    """Channels of images that Detectron2 reads in this format, 0 if it cannot."""
    if image_format in ("BGR", "YUV-BT.601"):  # its own
        return 3
    try:
        number = Image.getmodebands(image_format)
    except KeyError:
        return 0
    # Of Pillow's modes with one channel, Detectron2 knows "L" alone.
    return number if number > 1 or image_format == "L" else 0


def _check_zero_init(cfg: CfgNode) -> None:
    if not cfg.MODEL.RESNETS.ZERO_INIT_RESIDUAL:
        return
    when = "when MODEL.RESNETS.ZERO_INIT_RESIDUAL is True"
    name = cfg.MODEL.BACKBONE.NAME
    builders = ("build_gfl_resnet_fpn_backbone", "build_gfl_res2net_fpn_backbone")
    _require(name in builders, "MODEL.BACKBONE.NAME", f"one of {builders} {when}", name)
    # A frozen block with a zero scale would stay the identity for ever.
    norm, freeze_at = cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT
    is_trainable = norm not in ("", "FrozenBN")
    _require(is_trainable, "MODEL.RESNETS.NORM", f"a trainable one {when}", norm)
    _require(freeze_at < 2, "MODEL.BACKBONE.FREEZE_AT", f"< 2 {when}", freeze_at)


def _require(holds: bool, key: str, allowed: str, value: object) -> None:
    if not holds:
        raise InputError(f"{key} must be {allowed}, got {value!r}")
