"""Configuration keys of the backbones that this project adds. Their builders check them."""

from detectron2.config import CfgNode as CN

__all__ = ["add_backbone_config"]


def add_backbone_config(cfg: CN) -> None:
    """Add the keys, with their defaults, to a Detectron2 config (in place)."""
    # Start every residual block as the identity, by a zero scale in its last normalization: for
    # training from random initialization. Only with this project's backbones, a trainable
    # MODEL.RESNETS.NORM and MODEL.BACKBONE.FREEZE_AT < 2.
    cfg.MODEL.RESNETS.ZERO_INIT_RESIDUAL = False

    # Of "build_gfl_res2net_fpn_backbone": splits of a block's channels, >= 2, and their width at 64
    # bottleneck channels, >= 1.
    cfg.MODEL.RES2NET = CN()
    cfg.MODEL.RES2NET.SCALES = 4
    cfg.MODEL.RES2NET.BASE_WIDTH = 26

    # Of "build_gfl_timm_fpn_backbone": the model's name in timm (timm.list_models() has them), and
    # how likely its last residual branch is left out in training (stochastic depth), in [0, 1).
    # MODEL.FPN.IN_FEATURES and MODEL.BACKBONE.FREEZE_AT are as for a ResNet.
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = ""
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0
    # BatchNorms keep the statistics and scales of MODEL.WEIGHTS, as with "FrozenBN" in a ResNet.
    cfg.MODEL.TIMM.FREEZE_NORMS = False

    # Of "build_gfl_regnet_fpn_backbone": blocks, the rule for their widths (the paper's w_a, w_0
    # and w_m), channels of a group, squeeze-and-excitation (0 for none: RegNetX), and the norm.
    # Here RegNetX-4GF. Features are "s1" to "s4", of stride 4 to 32.
    cfg.MODEL.REGNET = CN()
    cfg.MODEL.REGNET.DEPTH = 23
    cfg.MODEL.REGNET.W_A = 38.65
    cfg.MODEL.REGNET.W_0 = 96
    cfg.MODEL.REGNET.W_M = 2.43
    cfg.MODEL.REGNET.GROUP_WIDTH = 40
    cfg.MODEL.REGNET.SE_RATIO = 0.0
    cfg.MODEL.REGNET.NORM = "FrozenBN"

    # Of "build_gfl_vit_backbone" (ViTDet; Detectron2's main branch has it): here ViT-B. Blocks have
    # attention within windows of WINDOW_SIZE patches of 16x16 pixels, but those of GLOBAL_BLOCKS.
    # IMAGE_SIZE is the side in pixels that relative positions are learned for; images of other
    # sizes interpolate them. DROP_PATH_RATE as above.
    cfg.MODEL.VIT = CN()
    cfg.MODEL.VIT.EMBED_DIM = 768
    cfg.MODEL.VIT.DEPTH = 12
    cfg.MODEL.VIT.NUM_HEADS = 12
    cfg.MODEL.VIT.WINDOW_SIZE = 14
    cfg.MODEL.VIT.GLOBAL_BLOCKS = [2, 5, 8, 11]
    cfg.MODEL.VIT.IMAGE_SIZE = 1024
    cfg.MODEL.VIT.DROP_PATH_RATE = 0.1
