"""
Res2Net (Gao et al., "Res2Net: A New Multi-scale Backbone Architecture", TPAMI 2019) in its "v1d"
form: three 3x3 convolutions for a stem, average pooling in the shortcuts that downsample.
"""

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from ...config_checks import require
from .deform import DeformConv2d
from .fpn import build_gfl_fpn, zero_init_residual

__all__ = [
    "BLOCKS_PER_STAGE", "DeepStem", "Res2NetBlock", "build_gfl_res2net_fpn_backbone",
    "build_res2net_backbone",
]  # fmt: skip

# Of a ResNet by its depth. Up to 34 it has basic blocks, above that bottlenecks.
BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions and a max-pooling: stride 4."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, *, norm: str = "BN"):
        """
        ``out_channels`` are those of the last convolution, twice those of the other two; even.
        ``norm`` is a name that :func:`detectron2.layers.get_norm` knows.
        """
        super().__init__(in_channels, out_channels, 4)
        width = out_channels // 2
        self.conv1 = _conv(in_channels, width, 3, norm, stride=2)
        self.conv2 = _conv(width, width, 3, norm)
        self.conv3 = _conv(width, out_channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """From shape (N, C, H, W) to (N, C', ceil(H / 4), ceil(W / 4))."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu_(conv(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class Res2NetBlock(CNNBlockBase):
    """
    A bottleneck whose 3x3 convolution is a hierarchy of smaller ones. The features x_1 ... x_s
    between the 1x1 convolutions, s = ``scales``, become

        y_i = K_i(x_i + y_{i-1}), i < s, with y_0 = 0, and y_s = x_s

    where K_i is convolution, normalization and ReLU. (The paper counts the part without a
    convolution as the first.) In the first block of a stage nothing is added, since the resolution
    changes: y_i = K_i(x_i), and x_s is average-pooled if the stride is 2. At stride 1 (in res2)
    x_s is left alone, as in the GFLv2 authors' model; the Res2Net authors' code pools it there
    too, over 3x3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int,
        scales: int = 4,
        stride: int = 1,
        is_first: bool = False,
        norm: str = "BN",
        deformable: bool = False,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
    ):
        """
        Args:
            width: channels of each x_i.
            scales: s, >= 2.
            stride: 1, or 2 when ``is_first``.
            is_first: whether this is the first block of a stage.
            norm: a name that :func:`detectron2.layers.get_norm` knows.
            deformable: whether the 3x3 convolutions are. Their offsets are 0 at first.
            deform_modulated: whether they also weight each tap (DCNv2).
            deform_num_groups: groups of channels that share offsets; a divisor of ``width``.
        """
        if stride != 1 and not is_first:
            raise ValueError(f"Only the first block of a stage has a stride, got {stride}")
        super().__init__(in_channels, out_channels, stride)
        self.width, self.is_first, self.deform_modulated = width, is_first, deform_modulated
        self.conv1 = _conv(in_channels, width * scales, 1, norm)
        convs = [_conv(width, width, 3, norm, stride=stride) for _ in range(scales - 1)]
        self.convs = nn.ModuleList(DeformConv2d(conv) if deformable else conv for conv in convs)
        self.conv_offsets = None
        if deformable:
            channels = (27 if deform_modulated else 18) * deform_num_groups
            self.conv_offsets = nn.ModuleList(
                Conv2d(width, channels, kernel_size=3, stride=stride, padding=1) for _ in convs
            )
            for conv in self.conv_offsets:
                nn.init.zeros_(conv.weight)
                nn.init.zeros_(conv.bias)
        self.conv3 = _conv(width * scales, out_channels, 1, norm)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """From shape (N, C, H, W) to (N, C', ceil(H / stride), ceil(W / stride))."""
        *splits, last = F.relu_(self.conv1(x)).split(self.width, dim=1)
        outputs = []
        for i, split in enumerate(splits):
            if i > 0 and not self.is_first:
                split = split + outputs[-1]
            outputs.append(F.relu_(self._convolve(i, split)))
        if self.stride != 1:
            last = F.avg_pool2d(last, kernel_size=3, stride=self.stride, padding=1)
        out = self.conv3(torch.cat([*outputs, last], dim=1))

        if self.stride != 1:
            # An odd last row or column is averaged over what there is of it.
            x = F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True, count_include_pad=False)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return F.relu_(out + x)

    def _convolve(self, i: int, x: Tensor) -> Tensor:
        if self.conv_offsets is None:
            return self.convs[i](x)
        offset = self.conv_offsets[i](x)
        if not self.deform_modulated:
            return self.convs[i](x, offset)
        first, second, mask = offset.chunk(3, dim=1)
        return self.convs[i](x, torch.cat([first, second], dim=1), mask.sigmoid())


def build_res2net_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """
    Detectron2's ResNet with a :class:`DeepStem` and :class:`Res2NetBlock`, from the keys of
    ``MODEL.RESNETS`` and ``MODEL.RES2NET``. Deformable convolutions run on CPU and GPU.

    Raises:
        InputError: a key has a value for which there is no Res2Net; the message names it.
    """
    _check(cfg)
    resnets = cfg.MODEL.RESNETS
    in_channels, out_channels = resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    stem = DeepStem(input_shape.channels, in_channels, norm=resnets.NORM)
    stages = []
    for i, num_blocks in enumerate(BLOCKS_PER_STAGE[resnets.DEPTH]):
        stage = ResNet.make_stage(
            Res2NetBlock,
            num_blocks,
            in_channels=in_channels,
            out_channels=out_channels,
            width=_width(cfg, i),
            scales=cfg.MODEL.RES2NET.SCALES,
            stride_per_block=[1 if i == 0 else 2] + [1] * (num_blocks - 1),
            is_first_per_block=[True] + [False] * (num_blocks - 1),
            norm=resnets.NORM,
            deformable=resnets.DEFORM_ON_PER_STAGE[i],
            deform_modulated=resnets.DEFORM_MODULATED,
            deform_num_groups=resnets.DEFORM_NUM_GROUPS,
        )
        stages.append(stage)
        in_channels, out_channels = out_channels, out_channels * 2
    res2net = ResNet(stem, stages, out_features=resnets.OUT_FEATURES)
    res2net.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    if resnets.ZERO_INIT_RESIDUAL:
        zero_init_residual(res2net)
    return res2net


@BACKBONE_REGISTRY.register()
def build_gfl_res2net_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """:func:`build_res2net_backbone` and Detectron2's FPN, P3 to P7."""
    return build_gfl_fpn(cfg, build_res2net_backbone(cfg, input_shape))


def _conv(in_channels: int, out_channels: int, kernel: int, norm: str, stride: int = 1) -> Conv2d:
    padding, norm_layer = kernel // 2, get_norm(norm, out_channels)
    conv = Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False, norm=norm_layer)
    weight_init.c2_msra_fill(conv)
    return conv


def _width(cfg, stage: int) -> int:
    """Channels of a split; ``BASE_WIDTH`` is for 64 channels, those of a bottleneck in res2."""
    bottleneck_channels = (cfg.MODEL.RESNETS.RES2_OUT_CHANNELS // 4) * 2**stage
    return bottleneck_channels * cfg.MODEL.RES2NET.BASE_WIDTH // 64


def _check(cfg) -> None:
    resnets, res2net = cfg.MODEL.RESNETS, cfg.MODEL.RES2NET
    stem, res2 = resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    deform, groups = resnets.DEFORM_ON_PER_STAGE, resnets.DEFORM_NUM_GROUPS
    widths = [_width(cfg, i) for i in range(4)]
    divides = groups >= 1 and all(w % groups == 0 for w, on in zip(widths, deform) if on)
    default = "64, its default (the width is that of MODEL.RES2NET.BASE_WIDTH),"
    wide = "large enough for a channel per split (RES2_OUT_CHANNELS / 4 * BASE_WIDTH / 64 >= 1)"
    divisor = f"a divisor of the width of a split in every deformable stage (of {widths})"
    for key, holds, allowed in (
        ("RESNETS.DEPTH", resnets.DEPTH in (50, 101, 152), "50, 101 or 152"),
        ("RESNETS.NUM_GROUPS", resnets.NUM_GROUPS == 1, "1"),
        ("RESNETS.WIDTH_PER_GROUP", resnets.WIDTH_PER_GROUP == 64, default),
        ("RESNETS.STRIDE_IN_1X1", not resnets.STRIDE_IN_1X1, "False"),
        ("RESNETS.RES5_DILATION", resnets.RES5_DILATION == 1, "1"),
        ("RESNETS.STEM_OUT_CHANNELS", stem >= 2 and stem % 2 == 0, "even and positive"),
        ("RESNETS.RES2_OUT_CHANNELS", res2 >= 4 and res2 % 4 == 0, "a positive multiple of 4"),
        ("RES2NET.SCALES", res2net.SCALES >= 2, ">= 2"),
        ("RES2NET.BASE_WIDTH", widths[0] >= 1, wide),
        ("RESNETS.DEFORM_ON_PER_STAGE", len(deform) == 4, "a list of four, for res2 to res5"),
        ("RESNETS.DEFORM_NUM_GROUPS", divides, divisor),
    ):
        require(cfg, f"MODEL.{key}", holds, f"{allowed} for a Res2Net")
