"""
Detectron2's ViTDet (Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection",
ECCV 2022), which its main branch has.
"""

from __future__ import annotations

from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import nn

from ...config_checks import require
from ...errors import InputError
from .fpn import LastLevelP6P7OnP5

try:
    from detectron2.modeling.backbone import SimpleFeaturePyramid, ViT, get_vit_lr_decay_rate
except ImportError:  # Detectron2 0.6
    SimpleFeaturePyramid, ViT, get_vit_lr_decay_rate = Backbone, None, None

__all__ = ["ViTPyramid", "build_gfl_vit_backbone", "get_vit_lr_decay_rate"]

_PATCH = 16


class ViTPyramid(SimpleFeaturePyramid):
    """Detectron2's pyramid of a ViT, for images of any size."""

    @property
    def size_divisibility(self) -> int:
        # Detectron2's own is for images that were padded to squares.
        return self._size_divisibility


@BACKBONE_REGISTRY.register()
def build_gfl_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ViTPyramid:
    """
    Detectron2's ViT, from the keys of ``MODEL.VIT``, and its simple feature pyramid, P3 to P7.

    Raises:
        InputError: this is Detectron2 0.6, or a key is out of range; the message names it.
    """
    if ViT is None:
        raise InputError(
            "MODEL.BACKBONE.NAME build_gfl_vit_backbone needs Detectron2's main branch: this "
            "Detectron2 has no ViT"
        )
    keys, channels = cfg.MODEL.VIT, cfg.MODEL.FPN.OUT_CHANNELS
    are_blocks = all(0 <= block < keys.DEPTH for block in keys.GLOBAL_BLOCKS)
    is_divisor = keys.NUM_HEADS >= 1 and keys.EMBED_DIM % keys.NUM_HEADS == 0
    for key, holds, allowed in (
        ("VIT.DEPTH", keys.DEPTH >= 1, ">= 1"),
        ("VIT.NUM_HEADS", is_divisor, "a divisor of MODEL.VIT.EMBED_DIM"),
        ("VIT.WINDOW_SIZE", keys.WINDOW_SIZE >= 1, ">= 1"),
        ("VIT.GLOBAL_BLOCKS", are_blocks, "a list of blocks, in [0, MODEL.VIT.DEPTH)"),
        ("VIT.IMAGE_SIZE", keys.IMAGE_SIZE >= _PATCH, f">= {_PATCH}"),
        ("VIT.DROP_PATH_RATE", 0 <= keys.DROP_PATH_RATE < 1, "in [0, 1)"),
        ("BACKBONE.FREEZE_AT", cfg.MODEL.BACKBONE.FREEZE_AT == 0, "0 for a ViT"),
    ):
        require(cfg, f"MODEL.{key}", holds, allowed)
    vit = ViT(
        img_size=keys.IMAGE_SIZE,
        patch_size=_PATCH,
        in_chans=input_shape.channels,
        embed_dim=keys.EMBED_DIM,
        depth=keys.DEPTH,
        num_heads=keys.NUM_HEADS,
        drop_path_rate=keys.DROP_PATH_RATE,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_size=keys.WINDOW_SIZE,
        window_block_indexes=sorted(set(range(keys.DEPTH)) - set(keys.GLOBAL_BLOCKS)),
        use_rel_pos=True,
    )
    return ViTPyramid(
        net=vit,
        in_feature="last_feat",
        out_channels=channels,
        scale_factors=(2.0, 1.0, 0.5),
        top_block=LastLevelP6P7OnP5(channels),
    )
