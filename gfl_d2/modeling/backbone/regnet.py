"""Detectron2's RegNet (Radosavovic et al., "Designing Network Design Spaces", CVPR 2020)."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem

from ...config_checks import require
from .fpn import build_gfl_fpn

__all__ = ["build_gfl_regnet_fpn_backbone"]


@BACKBONE_REGISTRY.register()
def build_gfl_regnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    Detectron2's RegNet, from the keys of ``MODEL.REGNET``, and its FPN, P3 to P7.

    Raises:
        InputError: there is no RegNet of these widths, or none for these features or images.
    """
    keys, features = cfg.MODEL.REGNET, cfg.MODEL.FPN.IN_FEATURES
    require(cfg, "INPUT.FORMAT", input_shape.channels == 3, "one of 3 channels for a RegNet")
    for key, holds, allowed in (
        ("DEPTH", keys.DEPTH >= 4, ">= 4"),
        ("W_A", keys.W_A >= 0, ">= 0"),
        ("W_0", keys.W_0 > 0 and keys.W_0 % 8 == 0, "a positive multiple of 8"),
        ("W_M", keys.W_M > 1, "> 1"),
        ("GROUP_WIDTH", keys.GROUP_WIDTH >= 1, ">= 1"),
        ("SE_RATIO", 0 <= keys.SE_RATIO <= 1, "in [0, 1]"),
    ):
        require(cfg, f"MODEL.REGNET.{key}", holds, allowed)
    are_stages = all(feature in ("s1", "s2", "s3", "s4") for feature in features)
    require(cfg, "MODEL.FPN.IN_FEATURES", are_stages, "of 's1' to 's4' for a RegNet")
    regnet = RegNet(
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        depth=keys.DEPTH,
        w_a=keys.W_A,
        w_0=keys.W_0,
        w_m=keys.W_M,
        group_width=keys.GROUP_WIDTH,
        se_ratio=keys.SE_RATIO,
        norm=keys.NORM,
        out_features=features,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return build_gfl_fpn(cfg, regnet)
