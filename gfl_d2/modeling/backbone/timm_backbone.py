"""Models of timm (PyTorch Image Models) as backbones, by their names there."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from torch import Tensor, nn

from ...config_checks import get_value, require
from ...errors import InputError, first_line
from .fpn import build_gfl_fpn

__all__ = ["TimmBackbone", "build_gfl_timm_fpn_backbone"]

logger = logging.getLogger(__name__)


class TimmBackbone(Backbone):
    """
    The features of a model of timm. That of stride 2^s is named ``res{s}``, as in a ResNet. Layers
    after the last one asked for are left out. Weights are random: nothing is downloaded.
    Parameters have timm's names, after ``net.model.``.
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        freeze_at: int = 0,
        freeze_norms: bool = False,
    ):
        """
        Args:
            name: of the model in timm.
            out_features: names of the features, from high to low resolution.
            in_channels: of the images.
            drop_path_rate: probability, in [0, 1), that the last residual branch is left out in
                training (stochastic depth). It grows from 0 with depth.
            freeze_at: the last stage that is not trained, see :meth:`stages`; 0 for none.
            freeze_norms: every BatchNorm is constant, with the statistics that are loaded. Those
                of frozen stages always are.

        Raises:
            InputError: timm is not installed, or its model has no such features or stages, or does
                not take images of any size or ``drop_path_rate``.
        """
        super().__init__()
        with torch.device("meta"):
            strides = _create(name).feature_info.reduction()
        available = [f"res{int(math.log2(stride))}" for stride in strides]
        if any(available.count(feature) != 1 for feature in out_features):
            raise InputError(
                f"MODEL.FPN.IN_FEATURES must be of {available}, the features of timm's {name}, of "
                f"one for each stride, got {list(out_features)}"
            )
        options = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        indices = [available.index(feature) for feature in out_features]
        self.name = name
        self.net = _create(name, out_indices=indices, in_chans=in_channels, **options)
        info = self.net.feature_info
        self._out_features = list(out_features)
        self._out_feature_strides = dict(zip(out_features, info.reduction()))
        self._out_feature_channels = dict(zip(out_features, info.channels()))
        self._freeze(freeze_at, freeze_norms)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """From shape (N, C, H, W) to shapes (N, C', H / stride, W / stride), by name."""
        return dict(zip(self._out_features, self.net(x)))

    def stages(self) -> dict[str, int]:
        """
        The stage of each parameter, as Detectron2 counts them: 1 is the stem, s has the layers
        between the features of stride 2^(s - 1) and 2^s.

        Raises:
            InputError: timm does not tell.
        """
        from timm.models import group_parameters

        last = int(math.log2(max(self._out_feature_strides.values())))
        model, layers, ends = self.net.model, {}, {}
        if hasattr(model, "group_matcher"):
            layers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        for feature in self.net.feature_info.info:
            inside = [x for name, x in layers.items() if name.startswith(f"{feature['module']}.")]
            if inside:
                ends[int(math.log2(feature["reduction"]))] = max(inside)
        if not ends.keys() >= set(range(2, last)):
            raise InputError(
                f"MODEL.BACKBONE.FREEZE_AT must be 0, and SOLVER.LAYER_DECAY 1, for {self.name}: "
                "timm does not tell its stages"
            )
        stages = {0: 1}  # of layers: the first is the stem
        for layer in set(layers.values()) - {0}:
            reached = (stage for stage, end in sorted(ends.items()) if layer <= end)
            stages[layer] = max(next(reached, last), 1)
        return {f"net.model.{name}": stages[layer] for name, layer in layers.items()}

    def _freeze(self, freeze_at: int, freeze_norms: bool) -> None:
        from timm.utils import freeze

        stages = self.stages() if freeze_at > 0 else {}
        frozen = {name for name, stage in stages.items() if stage <= freeze_at}
        for name in frozen:
            self.get_parameter(name).requires_grad = False
        norms = [
            name
            for name, module in self.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and (freeze_norms or f"{name}.weight" in frozen)
        ]
        if norms:  # an empty list stands for all modules
            freeze(self, norms)


@BACKBONE_REGISTRY.register()
def build_gfl_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    :class:`TimmBackbone` from the keys of ``MODEL.TIMM``, ``MODEL.BACKBONE.FREEZE_AT`` and
    ``MODEL.FPN.IN_FEATURES``, and Detectron2's FPN, P3 to P7.

    Raises:
        InputError: as :class:`TimmBackbone`, or a key is out of range; the message names it.
    """
    keys = cfg.MODEL.TIMM
    is_probability = 0 <= keys.DROP_PATH_RATE < 1
    require(cfg, "MODEL.TIMM.DROP_PATH_RATE", is_probability, "in [0, 1)")
    bottom_up = TimmBackbone(
        keys.NAME,
        out_features=cfg.MODEL.FPN.IN_FEATURES,
        in_channels=input_shape.channels,
        drop_path_rate=keys.DROP_PATH_RATE,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        freeze_norms=keys.FREEZE_NORMS,
    )
    if cfg.MODEL.WEIGHTS and input_shape.channels == 3:
        _compare_pixels(cfg)
    return build_gfl_fpn(cfg, bottom_up)


def _create(name: str, **options) -> nn.Module:
    """The model of timm that gives features, without weights. Raises InputError."""
    if importlib.util.find_spec("timm") is None:
        raise InputError(
            "MODEL.BACKBONE.NAME build_gfl_timm_fpn_backbone needs timm: pip install timm"
        )
    import timm  # it takes seconds

    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f", such as {', '.join(similar)}" if similar else " (timm.list_models() has them)"
        raise InputError(f"MODEL.TIMM.NAME must be a model of timm{hint}, got {name!r}")
    pretrained = timm.get_pretrained_cfg(name)
    if pretrained is not None and pretrained.fixed_input_size:
        options["strict_img_size"] = False
    try:
        net = timm.create_model(name, features_only=True, feature_cls="getter", **options)
        net.model.forward_intermediates  # noqa: B018
    # What timm raises for a model without features, or without such an option.
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"MODEL.TIMM.NAME {name} cannot be a backbone for images of any size with these "
            f"options: {first_line(error)}"
        ) from None
    return net


def _compare_pixels(cfg: CfgNode) -> None:
    """Warn if images are normalized in another way than those that timm's weights are for."""
    import timm

    name = cfg.MODEL.TIMM.NAME
    pretrained = timm.get_pretrained_cfg(name)
    if pretrained is None:
        return
    wanted = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [round(255 * x, 3) for x in pretrained.mean],
        "MODEL.PIXEL_STD": [round(255 * x, 3) for x in pretrained.std],
    }
    other = {}
    for key, value in wanted.items():
        there = get_value(cfg, key)
        is_same = there == value if isinstance(value, str) else np.allclose(there, value, atol=0.5)
        if not is_same:
            other[key] = there
    if other:
        is_, has = (", ".join(f"{k} {v}" for k, v in x.items()) for x in (wanted, other))
        logger.warning(f"timm's weights of {name} are for {is_}. The config has {has}")
