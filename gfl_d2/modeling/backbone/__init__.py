from .deform import DeformConv2d, use_torchvision_deform_conv
from .fpn import (
    LastLevelP6P7OnP5,
    build_gfl_fpn,
    build_gfl_resnet_fpn_backbone,
    zero_init_residual,
)
from .layer_decay import layer_decay_factors
from .regnet import build_gfl_regnet_fpn_backbone
from .res2net import (
    BLOCKS_PER_STAGE,
    DeepStem,
    Res2NetBlock,
    build_gfl_res2net_fpn_backbone,
    build_res2net_backbone,
)
from .timm_backbone import TimmBackbone, build_gfl_timm_fpn_backbone
from .vit import ViTPyramid, build_gfl_vit_backbone
