"""The two directions: from MMDetection's format, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import Tensor

from ..checkpoint import describe_problems
from ..config import add_gfl_config
from ..errors import InputError, name_some
from .facts import describe, infer_config
from .files import Checkpoint
from .names import BOTTOM_UP, COUNTER, Source, names_there, unpack

__all__ = ["Conversion", "from_mmdet", "to_mmdet"]

# The bins of the box distributions, 0 to n: in MMDetection, and in the authors' v1 code base.
_BINS, _LEGACY_BINS = "bbox_head.integral.project", "bbox_head.distribution_project.project"
_NUM_CLASSES, _REG_MAX = "MODEL.GFL.NUM_CLASSES", "MODEL.GFL.REG_MAX"
_LEGACY_CENTERS = "MODEL.GFL.LEGACY_ANCHOR_CENTERS"
_COCO_CLASSES = 80
_V1 = "GFocal, the authors' v1 code base"
# Averages of weights over training, and what the config has; of a backbone its classifier too.
_LEFT_OUT = r"ema_.*|data_preprocessor\.(mean|std)"
_CLASSIFIER = r"(head\.)?(fc|classifier)\.(weight|bias)"


@dataclass(frozen=True)
class Conversion:
    """Weights in another format."""

    content: dict[str, Any]  # to be saved, see write_checkpoint
    source: str  # the code base that they come from, in words
    needed: dict[str, Any]  # values that a config must have for them to mean the same, by key
    notes: list[str]  # sentences about what was left out, and what else there is to know


def from_mmdet(checkpoint: Checkpoint, cfg: CfgNode | None = None) -> Conversion:
    """
    Convert a detector of MMDetection 2 or 3, or of the authors' GFocal (v1) and GFocalV2 releases,
    or an ImageNet backbone of torchvision, timm or MMPretrain, to a checkpoint of ours. Values and
    dtypes stay as they are. The counters of BatchNorm are left out: PyTorch starts them at 0. Names
    of the classes are kept if there is one for each.

    Args:
        checkpoint: see :func:`read_checkpoint`.
        cfg: decides what weights may leave open: whether the last class channel of a GFLv2 model
            is the background, and the kind of deformable convolutions in several groups. Only
            :func:`check_config` compares all of it.

    Raises:
        InputError: the weights are of another model, or incomplete; the message names the keys.
    """
    path, weights = checkpoint.path, checkpoint.weights
    if _is_ours(weights):
        raise InputError(
            f"Weights file {path} is a checkpoint of this project already (--to mmdet converts it)"
        )
    is_detector = any(name.startswith(("bbox_head.", "neck.")) for name in weights)
    pattern = _LEFT_OUT if is_detector else f"{_LEFT_OUT}|{_CLASSIFIER}"
    left_out = sorted(name for name in weights if re.fullmatch(pattern, name))
    notes = [f"Left out: {name_some(left_out)}."] if left_out else []
    weights = {name: value for name, value in weights.items() if name not in left_out}
    bins = {name: weights.pop(name) for name in (_BINS, _LEGACY_BINS) if name in weights}
    source = Source(path, weights, is_ours=False)
    needed = infer_config(source, is_detector, cfg)
    model = _take_all(source, needed)
    if not is_detector:
        return Conversion({"model": model}, "ImageNet", needed, notes)

    scales = [name for name in model if name.startswith("head.scales.")]
    model["head.scales"] = torch.stack([model.pop(name) for name in scales])
    for name, value in bins.items():
        if value.tolist() != list(range(needed[_REG_MAX] + 1)):
            raise InputError(
                f"Weights file {path}: {name} is not 0, 1, ..., {needed[_REG_MAX]}, the bins that "
                "bbox_head.gfl_reg has logits for"
            )
    version = str(checkpoint.meta.get("mmdet_version", ""))
    library, is_v2 = f"MMDetection {version}".strip(), needed["MODEL.GFL.QUALITY"] == "dgqp"
    is_legacy = _LEGACY_BINS in bins or version.startswith(("0.", "1."))
    if is_v2 or is_legacy:
        library = f"{'GFocalV2' if is_v2 else _V1} ({library})"
    needed[_LEGACY_CENTERS] = is_legacy
    if is_legacy:
        notes.append(
            "Anchor centres are at (stride - 1) / 2, as in the authors' first code base: set "
            f"{_LEGACY_CENTERS} True."
        )
    channels = needed[_NUM_CLASSES]
    if is_v2 and _has_background(checkpoint, channels, cfg):
        notes.append(f"Left out, the background: the last of {channels} class channels.")
        needed[_NUM_CLASSES] = channels - 1
        for name in ("head.cls_score.weight", "head.cls_score.bias"):
            model[name] = model[name][:-1].clone()  # a view would be saved with the whole
    class_names = _class_names(checkpoint, needed[_NUM_CLASSES])
    content = {"model": model, **({"class_names": class_names} if class_names else {})}
    return Conversion(content, library, needed, notes)


def to_mmdet(checkpoint: Checkpoint, cfg: CfgNode | None = None) -> Conversion:
    """
    Convert a checkpoint of ours to MMDetection's format. The bins and counters that MMDetection
    has besides are made. A GFLv2 model gets no channel for the background.

    Arguments and errors are those of :func:`from_mmdet`. ``cfg`` decides the kind of deformable
    convolutions in several groups, and the box representation if there are two numbers a side.
    """
    path, weights = checkpoint.path, unpack(checkpoint.weights)
    if not _is_ours(weights):
        raise InputError(
            f"Weights file {path} is no checkpoint of this project: it has {name_some(weights)}"
        )
    is_detector = any(name.startswith("head.") for name in weights)
    source = Source(path, weights, is_ours=True)
    needed = infer_config(source, is_detector, cfg)
    if cfg is None and needed.get(_REG_MAX) == 1:
        raise InputError(
            f"Weights file {path}: its two numbers a box side may be a distribution or a Gaussian. "
            "Of --config-file, MODEL.GFL.BOX_REPRESENTATION decides"
        )
    converted = {}
    for here, value in _take_all(source, needed).items():
        there = names_there(here, res2net=source.is_res2net)[0]
        converted[there] = value.clone()  # a scale is a view
        if there.endswith(".running_var"):
            converted[there.replace(".running_var", COUNTER)] = torch.zeros((), dtype=torch.long)
    notes, meta = [], {}
    if is_detector:
        class_names = _class_names(checkpoint, needed[_NUM_CLASSES])
        meta = {"CLASSES": tuple(class_names)} if class_names else {}  # MMDetection 3 reads it too
        needed[_LEGACY_CENTERS] = False
        bins = torch.arange(needed[_REG_MAX] + 1)
        converted[_BINS] = bins.to(weights["head.cls_score.weight"])  # its dtype
        if cfg is None:
            notes.append(
                "Not checked, as weights do not show it: that MODEL.GFL.BIN_WIDTH is 1.0 and "
                "anchor centres are MMDetection's. Give --config-file to check it."
            )
    return Conversion({"state_dict": converted, "meta": meta}, "Detectron2", needed, notes)


def _is_ours(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith((f"{BOTTOM_UP}.", "head.cls_score.")) for name in weights)


def _all_class_names(checkpoint: Checkpoint) -> list | None:
    """What the file has as the names of the classes, None if it has nothing."""
    # MMDetection 2 and 3 have the names of the classes in different places.
    places = (checkpoint.meta, checkpoint.meta.get("dataset_meta"))
    places = [place for place in places if isinstance(place, Mapping)]
    names = [place.get(key) for place in places for key in ("CLASSES", "classes")]
    return next((list(value) for value in names if isinstance(value, (list, tuple))), None)


def _class_names(checkpoint: Checkpoint, number: int) -> list[str] | None:
    names = _all_class_names(checkpoint) or []
    are_names = len(names) == number and all(isinstance(name, str) for name in names)
    return names if are_names else None


def _has_background(checkpoint: Checkpoint, channels: int, cfg: CfgNode | None) -> bool:
    """Whether the last class channel of a GFLv2 model is of no class, as in the authors'."""
    names = _all_class_names(checkpoint)
    candidates = [] if names is None else [len(names)]
    candidates += [] if cfg is None else [cfg.MODEL.GFL.NUM_CLASSES]
    for number in (*candidates, _COCO_CLASSES):
        if number in (channels, channels - 1):
            return number < channels
    raise InputError(
        f"Weights file {checkpoint.path}: bbox_head.gfl_cls has {channels} channels. Whether the "
        "last of them is the background, as in the authors' GFLv2, the file does not say: "
        f"{_NUM_CLASSES} of --config-file decides"
    )


def _take_all(source: Source, needed: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's parameters, but for counters, by name here, if the file has exactly these."""
    taken, missing, wrong, extra = {}, [], [], dict.fromkeys(source.weights)
    for here, shape in _expected_shapes(source.path, needed).items():
        there, is_counter = source.find(here), here.endswith(COUNTER)
        if there is None:
            missing += [] if is_counter else [" or ".join(source.names(here))]
            continue
        del extra[there]
        value = source.weights[there]
        if tuple(value.shape) != shape:
            wrong.append(f"{there} is {tuple(value.shape)}, not {shape}")
        elif not is_counter and not value.is_floating_point():
            wrong.append(f"{there} is {value.dtype}, not floating-point")
        if not is_counter:
            taken[here] = value
    problems = {"Not in the file": missing, "Not in the model": extra, "Not as in the model": wrong}
    if any(problems.values()):
        raise InputError(
            f"Weights file {source.path} is not all of a model and nothing else. The nearest is "
            f"{describe(needed)}. {describe_problems(problems, 10)}"
        )
    return taken


def _expected_shapes(path: str, needed: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The parameters of the model with this config, by name here. Its values take no memory."""
    cfg = get_cfg()
    add_gfl_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "GFL", "meta"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0  # where the norms are frozen they have no counters
    try:
        cfg.merge_from_list([item for pair in needed.items() for item in pair])
        with torch.device("meta"):
            weights = unpack(build_model(cfg).state_dict())
    # What Detectron2 and PyTorch raise for a model that cannot be.
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"Weights file {path}: there is no such model as its shapes describe, "
            f"{describe(needed)}: {error}"
        ) from None
    prefix = "" if _NUM_CLASSES in needed else f"{BOTTOM_UP}."
    return {n: tuple(value.shape) for n, value in weights.items() if n.startswith(prefix)}
