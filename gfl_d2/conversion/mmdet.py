"""The two directions: from MMDetection's format, and back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..errors import InputError, name_some
from .facts import COCO_CLASSES, LEGACY_CENTERS, NUM_CLASSES, Facts, infer_config
from .files import LEFTOVERS, Checkpoint, keep_plain, own_memory
from .fit import TRAINABLE_BATCH_NORMS
from .names import BOTTOM_UP, COUNTER, pack, rules_for, translate, unpack
from .structure import check_structure

__all__ = ["Conversion", "from_mmdet", "to_mmdet"]

# The bins of the box distributions, 0 to n: in MMDetection, and in the authors' v1 code base.
_PROJECT, _LEGACY_PROJECT = "bbox_head.integral.project", "bbox_head.distribution_project.project"
# What is left out for good, and why. The classifier only of a backbone.
_CLASSIFIER = "the ImageNet classifier"
_LEFT_OUT = {
    "the average of weights over training (EMA)": re.compile(r"ema_.*"),
    "pixel mean and deviation, which the config has": re.compile(
        r"data_preprocessor\.(mean|std)"
    ),
    _CLASSIFIER: re.compile(r"(head\.)?(fc|classifier)\.(weight|bias)"),
}  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """
    Weights in another format.

    Attributes:
        content: to be saved, see :func:`write_checkpoint`.
        facts: about the weights.
        notes: sentences about what was left out, and what else there is to know.
    """

    content: dict[str, Any]
    facts: Facts
    notes: list[str]


def from_mmdet(checkpoint: Checkpoint, cfg: CfgNode | None = None) -> Conversion:
    """
    Convert a detector of MMDetection 2 or 3, or of the authors' GFocal (v1) and GFocalV2 releases,
    or an ImageNet backbone of torchvision, timm or MMPretrain, to a checkpoint of ours.

    Values and dtypes stay as they are. What belongs into no model of ours, but is needed for
    :func:`to_mmdet` to give the same again, is kept beside the model, where checkpointers do not
    look.

    Args:
        checkpoint: see :func:`read_checkpoint`.
        cfg: decides what weights may leave open: whether the last class channel of a GFLv2 model
            is the background; the kind of deformable convolutions in several groups; whether the
            model has the counters of BatchNorm (otherwise they are kept beside it). Whether all of
            it fits is for :func:`check_config` to say.

    Raises:
        InputError: the weights are of another model, or incomplete; the message names the keys.
    """
    path = checkpoint.path
    if _is_ours(checkpoint):
        raise InputError(
            f"Weights file {path} is a checkpoint of this project already (--to mmdet converts it)"
        )
    is_detector = any(name.startswith(("bbox_head.", "neck.")) for name in checkpoint.weights)
    split = _split(checkpoint, is_detector)
    if not split.sources:
        raise InputError(
            f"Weights file {path} is neither of a GFL detector nor of an ImageNet backbone: it has "
            f"{name_some(list(checkpoint.weights), 3)}"
        )
    tensors = {here: checkpoint.weights[there] for here, there in split.sources.items()}
    config = infer_config(path, tensors, is_detector, cfg)
    background: dict[str, Tensor] = {}
    if is_detector:
        config[LEGACY_CENTERS] = _is_legacy(checkpoint)
        if _has_background(checkpoint, config, cfg):
            config[NUM_CLASSES] -= 1
            tensors, background = _split_background(tensors, config[NUM_CLASSES])
    facts = Facts(_name_source(checkpoint, is_detector), is_detector, config)
    check_structure(path, tensors, facts, name_there=split.name_there, unknown=split.unknown)
    _check_constants(checkpoint, split.constants, config)

    # Frozen norms have no counters. Trainable ones do without (PyTorch sets them to 0).
    has_counters = (
        cfg is not None
        and cfg.MODEL.BACKBONE.FREEZE_AT == 0
        and cfg.MODEL.RESNETS.NORM in TRAINABLE_BATCH_NORMS
    )
    counters = [] if has_counters else [name for name in tensors if name.endswith(COUNTER)]
    model = pack({name: value for name, value in tensors.items() if name not in counters})
    content: dict[str, Any] = {"model": {name: own_memory(value) for name, value in model.items()}}
    if is_detector:
        beside = {there: checkpoint.weights[there] for there in split.constants}
        beside.update({split.sources[here]: tensors[here] for here in counters})
        names = {*split.sources.values(), *split.constants}
        content[LEFTOVERS] = {
            "names": [name for name in checkpoint.weights if name in names],
            "tensors": {name: own_memory(value) for name, value in beside.items()},
            "background": {split.sources[here]: own_memory(v) for here, v in background.items()},
            "meta": keep_plain(checkpoint.meta),
        }
    notes = _take_notes(checkpoint, split, facts, has_background=bool(background))
    return Conversion(content, facts, notes)


def to_mmdet(checkpoint: Checkpoint, cfg: CfgNode | None = None) -> Conversion:
    """
    Convert a checkpoint of ours to MMDetection's format. One that :func:`from_mmdet` made becomes
    what it was. For any other, the constants and counters that MMDetection has besides are made.

    Args:
        checkpoint: see :func:`read_checkpoint`.
        cfg: as in :func:`from_mmdet`, and the box representation if there are two numbers a side.

    Raises:
        InputError: the weights are of another model, or incomplete; the message names the keys.
    """
    path = checkpoint.path
    if not _is_ours(checkpoint):
        raise InputError(
            f"Weights file {path} is no checkpoint of this project: it has "
            f"{name_some(list(checkpoint.weights), 3)}"
        )
    tensors = unpack(checkpoint.weights)
    is_detector = any(name.startswith("head.") for name in tensors)
    facts = Facts("Detectron2", is_detector, infer_config(path, tensors, is_detector, cfg))
    if cfg is None and facts.config.get("MODEL.GFL.REG_MAX") == 1:
        raise InputError(
            f"Weights file {path}: its two numbers a box side may be a distribution or a Gaussian. "
            "Of --config-file, MODEL.GFL.BOX_REPRESENTATION decides"
        )
    check_structure(path, tensors, facts)

    order, beside, background = _read_leftovers(checkpoint)
    rules = rules_for(tensors)
    weights = {}
    for here, value in tensors.items():
        names = [name for _, name in translate(here, rules, back=True)]
        there = next((name for name in names if name in order), names[0])
        weights[there] = torch.cat((value, background[there])) if there in background else value
        counter = re.sub(r"\.running_var$", COUNTER, there)
        if counter != there and (counter in order or not order):
            weights[counter] = beside.get(counter, torch.zeros((), dtype=torch.long))
    notes = [f"Ignored: {', '.join(checkpoint.ignored)}."] if checkpoint.ignored else []
    if is_detector and cfg is None and not order:
        notes.append(
            "Not checked, as weights do not show it: that MODEL.GFL.BIN_WIDTH is 1.0 and anchor "
            "centres are MMDetection's. Give --config-file to check it."
        )
    if is_detector:
        bins = torch.arange(facts.config["MODEL.GFL.REG_MAX"] + 1).to(
            checkpoint.weights["head.scales"]
        )
        for name in (_PROJECT, _LEGACY_PROJECT):
            if name in order or (name == _PROJECT and not order):
                weights[name] = beside.get(name, bins)
        if _LEGACY_PROJECT in order or (cfg is not None and cfg.MODEL.GFL.LEGACY_ANCHOR_CENTERS):
            notes.append(
                "Anchor centres are at (stride - 1) / 2: the weights are for the authors' first "
                "code base, not for MMDetection 2 or 3."
            )
    content = {
        "state_dict": {
            name: own_memory(weights[name])
            for name in sorted(weights, key=lambda name: order.get(name, len(order)))
        },
        "meta": checkpoint.leftovers.get("meta", {}),
    }
    return Conversion(content, facts, notes)


def _read_leftovers(
    checkpoint: Checkpoint,
) -> tuple[dict[str, int], dict[str, Tensor], dict[str, Tensor]]:
    """
    Returns:
        order: the place of each name there. Empty if the weights were never there.
        beside: constants and counters, by name there.
        background: a class channel that was left out, by name there.

    Raises:
        InputError: they do not go with the weights.
    """
    names = checkpoint.leftovers.get("names", [])
    beside = checkpoint.leftovers.get("tensors", {})
    background = checkpoint.leftovers.get("background", {})

    def fits(name: str, value: Any) -> bool:
        here = checkpoint.weights.get(name.replace("bbox_head.gfl_cls.", "head.cls_score."))
        return isinstance(value, Tensor) and here is not None and value.shape[1:] == here.shape[1:]

    if not (
        isinstance(names, list)
        and isinstance(beside, dict)
        and isinstance(background, dict)
        and all(isinstance(name, str) for name in (*names, *beside, *background))
        and all(isinstance(value, Tensor) for value in beside.values())
        and all(fits(*item) for item in background.items())
    ):
        raise InputError(
            f"Weights file {checkpoint.path}: what an earlier conversion kept aside "
            f"({LEFTOVERS!r}) does not go with the weights"
        )
    return {name: i for i, name in enumerate(names)}, beside, background


def _is_ours(checkpoint: Checkpoint) -> bool:
    ours = (f"{BOTTOM_UP}.", "head.cls_score.")
    return any(name.startswith(ours) for name in checkpoint.weights)


def _is_legacy(checkpoint: Checkpoint) -> bool:
    """Whether weights are of the code base whose anchor centres are at (stride - 1) / 2."""
    version = str(checkpoint.meta.get("mmdet_version", ""))
    return _LEGACY_PROJECT in checkpoint.weights or version.startswith(("0.", "1."))


def _name_source(checkpoint: Checkpoint, is_detector: bool) -> str:
    if not is_detector:
        return "ImageNet"
    version = str(checkpoint.meta.get("mmdet_version", ""))
    if any(name.startswith("bbox_head.reg_conf.") for name in checkpoint.weights):
        name = "GFocalV2"
    elif _is_legacy(checkpoint):
        name = "GFocal, the authors' v1 code base"
    else:
        name = ""
    library = f"MMDetection {version}".strip()
    return f"{name} ({library})" if name else library


def _has_background(checkpoint: Checkpoint, config: Mapping[str, Any], cfg: CfgNode | None) -> bool:
    """Whether the last class channel is of no class, as in the authors' GFLv2."""
    channels = config[NUM_CLASSES]
    if config["MODEL.GFL.QUALITY"] != "dgqp":
        return False
    candidates = [_find_num_classes(checkpoint.meta)]
    if cfg is not None:
        candidates.append(cfg.MODEL.GFL.NUM_CLASSES)
    candidates.append(COCO_CLASSES)
    for number in candidates:
        if number in (channels, channels - 1):
            return number < channels
    raise InputError(
        f"Weights file {checkpoint.path}: bbox_head.gfl_cls has {channels} channels. Whether the "
        "last of them is the background, as in the authors' GFLv2, the file does not say: "
        f"{NUM_CLASSES} of --config-file decides"
    )


def _find_num_classes(meta: Mapping[str, Any]) -> int | None:
    """The number of class names, which MMDetection 2 and 3 keep in different places."""
    dataset = meta.get("dataset_meta")
    for place in (meta, dataset if isinstance(dataset, Mapping) else {}):
        for key in ("CLASSES", "classes"):
            if isinstance(place.get(key), (list, tuple)):
                return len(place[key])
    return None


def _split_background(
    tensors: dict[str, Tensor], num_classes: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    Returns:
        tensors: with ``num_classes`` class channels.
        background: the channel that came after them, by name. Empty if there was none.
    """
    names = ("head.cls_score.weight", "head.cls_score.bias")
    if any(tensors[n].shape[:1] != (num_classes + 1,) for n in names if n in tensors):
        return tensors, {}  # one of them is damaged
    tensors, background = dict(tensors), {}
    for name in names:
        if name in tensors:
            tensors[name], background[name] = tensors[name].split((num_classes, 1))
    return tensors, background


def _take_notes(
    checkpoint: Checkpoint, split: _Split, facts: Facts, *, has_background: bool
) -> list[str]:
    notes = []
    if checkpoint.ignored:
        notes.append(f"Ignored: {', '.join(checkpoint.ignored)}.")
    notes += [f"Left out, {what}: {name_some(names, 3)}." for what, names in split.left_out.items()]
    if has_background:
        number = facts.config[NUM_CLASSES]
        notes.append(f"Left out, the background: the last of {number + 1} class channels.")
    if facts.config.get(LEGACY_CENTERS):
        notes.append(
            "Anchor centres are at (stride - 1) / 2, as in the authors' first code base: set "
            f"{LEGACY_CENTERS} True."
        )
    return notes


@dataclass
class _Split:
    """The names in a file, by what becomes of them."""

    # What the names there lack: those of torchvision and timm are of a backbone alone.
    prefix: str = ""
    # Name here -> name there, of what a rule translates.
    sources: dict[str, str] = field(default_factory=dict)
    # How often each rule did.
    used: Counter = field(default_factory=Counter)
    constants: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def name_there(self, here: str) -> str:
        """The name in the file, or of what the file lacks, after the rule that others follow."""
        if here in self.sources:
            return self.sources[here]
        candidates = translate(here, rules_for(self.sources), back=True)
        _, there = max(candidates, key=lambda candidate: self.used[candidate[0]])
        return there[len(self.prefix) :]


def _split(checkpoint: Checkpoint, is_detector: bool) -> _Split:
    has_prefix = is_detector or any(n.startswith("backbone.") for n in checkpoint.weights)
    split = _Split(prefix="" if has_prefix else "backbone.")
    rules = rules_for(checkpoint.weights)
    kinds = {k: names for k, names in _LEFT_OUT.items() if not (is_detector and k == _CLASSIFIER)}
    for there in checkpoint.weights:
        kind = next((kind for kind, names in kinds.items() if names.fullmatch(there)), None)
        translations = translate(f"{split.prefix}{there}", rules)
        if kind is not None:
            split.left_out.setdefault(kind, []).append(there)
        elif there in (_PROJECT, _LEGACY_PROJECT):
            split.constants.append(there)
        elif not translations:
            split.unknown.append(there)
        else:
            rule, here = translations[0]
            if here in split.sources:
                raise InputError(
                    f"Weights file {checkpoint.path}: {split.sources[here]} and {there} are two "
                    "names of the same parameter"
                )
            split.sources[here] = there
            split.used[rule] += 1
    return split


def _check_constants(
    checkpoint: Checkpoint, names: Iterable[str], config: Mapping[str, Any]
) -> None:
    for name in names:
        value = checkpoint.weights[name].double()
        bins = torch.arange(config["MODEL.GFL.REG_MAX"] + 1).to(value)
        if value.shape != bins.shape or not torch.allclose(value, bins, atol=1e-3):
            raise InputError(
                f"Weights file {checkpoint.path}: {name} is not 0, 1, ..., {len(bins) - 1}, the "
                "bins that bbox_head.gfl_reg has logits for"
            )
