"""Layer-wise decay of the learning rate: from the neck back to the stem."""

from __future__ import annotations

import re

from detectron2.modeling.backbone import RegNet, ResNet
from torch import nn

from ...errors import InputError
from .timm_backbone import TimmBackbone
from .vit import ViTPyramid, get_vit_lr_decay_rate

__all__ = ["layer_decay_factors"]

_BOTTOM_UP = "backbone.bottom_up"
# In Detectron2's ResNet and RegNet: the first digit is none for the stem.
_STAGE = re.compile(rf"{re.escape(_BOTTOM_UP)}\.(?:stem|res(\d)|s(\d))\.")
_LAST_STAGE = 5


def layer_decay_factors(model: nn.Module, rate: float) -> dict[str, float]:
    """
    Of the learning rate of parameters in the backbone, by name: ``rate`` for the last stage (res5),
    its square for the one before, down to the stem; in a ViT for its last block, and so on. All
    other parameters have 1.

    Raises:
        InputError: the backbone's layers are not known.
    """
    names = [name for name, _ in model.named_parameters()]
    backbone = getattr(model, "backbone", None)
    bottom_up = getattr(backbone, "bottom_up", None)
    if isinstance(backbone, ViTPyramid):
        depth = len(backbone.net.blocks)
        return {name: get_vit_lr_decay_rate(name, rate, depth) for name in names}
    if isinstance(bottom_up, TimmBackbone):
        stages = {f"{_BOTTOM_UP}.{name}": stage for name, stage in bottom_up.stages().items()}
    elif isinstance(bottom_up, (ResNet, RegNet)):
        matches = {name: _STAGE.match(name) for name in names}
        stages = {name: _stage(match) for name, match in matches.items() if match}
    else:
        raise InputError(
            f"SOLVER.LAYER_DECAY must be 1 for this backbone, got {rate}: its layers are not known"
        )
    factors = {name: rate ** (_LAST_STAGE + 1 - stage) for name, stage in stages.items()}
    return {name: factors.get(name, 1.0) for name in names}


def _stage(match: re.Match) -> int:
    """1 for the stem, 2 for res2 of a ResNet and s1 of a RegNet, both of stride 4, and so on."""
    resnet, regnet = match.groups()
    if regnet:
        return int(regnet) + 1
    return int(resnet or 1)
