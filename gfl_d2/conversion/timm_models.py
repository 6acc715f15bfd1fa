"""From timm's models, for the backbone that takes them by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from ..checkpoint import describe_problems
from ..errors import InputError, name_some
from ..modeling.backbone import TimmBackbone
from .files import Checkpoint
from .mmdet import Conversion
from .names import BOTTOM_UP, COUNTER

__all__ = ["BUILDER", "find_timm_model", "from_timm"]

BUILDER = "build_gfl_timm_fpn_backbone"
_PREFIX = "net.model."
# Tables in old files of Swin, which the model computes.
_TABLES = re.compile(r"(relative_position_index|attn_mask)$")


def find_timm_model(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """The first of these models of timm that weights are of. "" if none is."""
    for name in names:
        with suppress(InputError):
            from_timm(checkpoint, name)
            return name
    return ""


def from_timm(checkpoint: Checkpoint, name: str) -> Conversion:
    """
    Convert weights of a model of timm, in timm's names or those of EfficientNet-PyTorch, to a
    checkpoint of ours. Values and dtypes stay as they are; the classifier and counters of BatchNorm
    are left out.

    Args:
        checkpoint: see :func:`read_checkpoint`.
        name: of the model in timm.

    Raises:
        InputError: the weights are of another model, or incomplete; the message names the keys.
            Or timm is not installed or has no such model.
    """
    backbone, whole = _expected(name)
    weights = _rename(checkpoint.weights, whole)
    problems = {
        "Not in the file": [key for key in backbone if key not in weights],
        "Not in the model": [key for key in weights if key not in whole],
        "Of another shape than in the model": [
            f"{key} is {tuple(weights[key].shape)}, not {tuple(value.shape)}"
            for key, value in backbone.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    if any(problems.values()):
        raise InputError(
            f"Weights file {checkpoint.path} is not of timm's {name}. {describe_problems(problems)}"
        )
    left_out = sorted(key for key in weights if key not in backbone and not key.endswith(COUNTER))
    notes = [f"Left out: {name_some(left_out)}."] if left_out else []
    model = {f"{BOTTOM_UP}.{_PREFIX}{key}": weights[key] for key in backbone}
    needed = {"MODEL.BACKBONE.NAME": BUILDER, "MODEL.TIMM.NAME": name}
    return Conversion({"model": model}, "ImageNet", needed, notes)


def _expected(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters by timm's names: those of the backbone, without counters, and of all the model."""
    with torch.device("meta"):
        backbone = TimmBackbone(name).state_dict()
        import timm

        whole = timm.create_model(name).state_dict()
    names = [key[len(_PREFIX) :] for key in backbone if not key.endswith(COUNTER)]
    return {key: backbone[_PREFIX + key] for key in names}, whole


def _rename(weights: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by timm's names."""
    if "_conv_stem.weight" not in weights:
        return {key: value for key, value in weights.items() if not _TABLES.search(key)}
    # EfficientNet-PyTorch has the same modules in the same order.
    pairs = list(zip(weights.items(), whole))
    kinds = all(old.rpartition(".")[2] == new.rpartition(".")[2] for (old, _), new in pairs)
    if not kinds or len(weights) != len(whole):
        return weights
    return {new: value for (_, value), new in pairs}
