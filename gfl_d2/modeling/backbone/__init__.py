from .deform import DeformConv2d, use_torchvision_deform_conv
from .fpn import LastLevelP6P7OnP5, build_gfl_resnet_fpn_backbone

__all__ = [
    "DeformConv2d",
    "LastLevelP6P7OnP5",
    "build_gfl_resnet_fpn_backbone",
    "use_torchvision_deform_conv",
]
