from .deform import DeformConv2d, use_torchvision_deform_conv
from .fpn import LastLevelP6P7OnP5, build_gfl_fpn, build_gfl_resnet_fpn_backbone
from .res2net import (
    BLOCKS_PER_STAGE,
    DeepStem,
    Res2NetBlock,
    build_gfl_res2net_fpn_backbone,
    build_res2net_backbone,
)
