"""Feature pyramids as GFL uses them: P3 to P7, of which P6 and P7 are made from P5."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock
from torch import Tensor, nn

from .deform import use_torchvision_deform_conv

__all__ = [
    "LastLevelP6P7OnP5", "build_gfl_fpn", "build_gfl_resnet_fpn_backbone", "zero_init_residual"
]  # fmt: skip


class LastLevelP6P7OnP5(LastLevelP6P7):
    """
    P6 and P7 by stride-2 convolutions on the output of P5, without the ReLU that Detectron2's
    (RetinaNet's) block has between them.
    """

    def __init__(self, channels: int):
        """``channels``: those of P5, P6 and P7."""
        super().__init__(channels, channels, in_feature="p5")

    def forward(self, p5: Tensor) -> list[Tensor]:
        p6 = self.p6(p5)
        return [p6, self.p7(p6)]


def zero_init_residual(resnet: ResNet) -> ResNet:
    """
    Start every residual block as the identity, in place: a zero scale in its last normalization
    (Goyal et al., "Accurate, Large Minibatch SGD", section 5.1). Returns the ResNet.
    """
    for stage in resnet.stages:
        for block in stage:
            last = block.conv2 if isinstance(block, BasicBlock) else block.conv3
            nn.init.zeros_(last.norm.weight)
    return resnet


def build_gfl_fpn(cfg, bottom_up: Backbone) -> FPN:
    """Detectron2's FPN, P3 to P7, on ``bottom_up``, from its own keys (``MODEL.FPN``)."""
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7OnP5(cfg.MODEL.FPN.OUT_CHANNELS),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_gfl_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """
    Detectron2's ResNet and FPN, P3 to P7, from its own keys (``MODEL.RESNETS``, ``MODEL.FPN``).
    Deformable convolutions (``MODEL.RESNETS.DEFORM_*``) run on CPU and GPU.
    """
    bottom_up = use_torchvision_deform_conv(build_resnet_backbone(cfg, input_shape))
    if cfg.MODEL.RESNETS.ZERO_INIT_RESIDUAL:
        zero_init_residual(bottom_up)
    return build_gfl_fpn(cfg, bottom_up)
