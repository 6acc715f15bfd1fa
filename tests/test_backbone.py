"""Backbone parts: the pyramid's last levels and deformable convolutions."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ModulatedDeformConv, ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock, build_resnet_backbone
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from gfl_d2 import add_gfl_config
from gfl_d2.modeling.backbone import (
    DeformConv2d,
    LastLevelP6P7OnP5,
    use_torchvision_deform_conv,
)
from gfl_d2.modeling.backbone.fpn import zero_init_residual


def deform_block(modulated, stride=1, groups=1):
    torch.manual_seed(0)
    block = DeformBottleneckBlock(
        8,
        16,
        bottleneck_channels=8,
        stride=stride,
        num_groups=groups,
        deform_modulated=modulated,
    )
    return use_torchvision_deform_conv(nn.Sequential(block)).eval()


def bottleneck_with_plain_conv(block, x, factor):
    """What the block computes if every tap stays where it is, multiplied by ``factor``."""
    out = F.relu(block.conv1(x))
    conv2 = block.conv2
    out = F.conv2d(
        out, conv2.weight, stride=conv2.stride, padding=conv2.padding, groups=conv2_groups(conv2)
    )
    out = F.relu(conv2.norm(out * factor))
    return F.relu(block.conv3(out) + block.shortcut(x))


def conv2_groups(conv2):
    return 8 // conv2.weight.shape[1]


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
def test_initial_offsets_make_a_plain_convolution(modulated, stride, groups):
    """Offsets start at 0 and the modulation at sigmoid(0) = 1/2."""
    model = deform_block(modulated, stride, groups)
    x = torch.randn(2, 8, 9, 11)
    expected = bottleneck_with_plain_conv(model[0], x, 0.5 if modulated else 1.0)
    assert_close(model(x), expected)


def test_offsets_are_in_the_order_y_x():
    conv = DeformConv2d(ModulatedDeformConv(1, 1, 3, padding=1, bias=False))
    nn.init.zeros_(conv.weight)
    conv.weight.data[0, 0, 1, 1] = 1  # the middle tap, number 4 of 9
    x = torch.arange(30.0).view(1, 1, 5, 6)
    offset = torch.zeros(1, 18, 5, 6)
    offset[:, 8] = 1.0  # y of tap 4: one row down
    offset[:, 9] = -0.5  # x of tap 4: half a column to the left
    mask = torch.full((1, 9, 5, 6), 0.25)
    # Between columns 2 and 3, and rows 2 to 3: values 6 * 3 + 2.5.
    assert conv(x, offset, mask)[0, 0, 2, 3] == 0.25 * (6 * 3 + 2.5)
    assert conv(x, offset)[0, 0, 2, 3] == 6 * 3 + 2.5


@pytest.mark.parametrize("modulated", [False, True])
def test_gradient_reaches_offsets(modulated):
    model = deform_block(modulated).train()
    nn.init.normal_(model[0].conv2_offset.weight, std=0.1)
    model(torch.randn(2, 8, 6, 6)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_parameter_names_are_detectron2s():
    block = DeformBottleneckBlock(8, 16, bottleneck_channels=8, deform_modulated=True)
    names = list(block.state_dict())
    weight = block.conv2.weight
    use_torchvision_deform_conv(block)
    assert list(block.state_dict()) == names
    assert block.conv2.weight is weight


def test_autocast():
    model = deform_block(modulated=True)
    x = torch.randn(1, 8, 6, 6)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)


def test_p6_and_p7():
    block = LastLevelP6P7OnP5(4)
    assert block.in_feature == "p5"
    p5 = torch.randn(1, 4, 7, 9)
    p6, p7 = block(p5)
    assert_close(p6, F.conv2d(p5, block.p6.weight, block.p6.bias, stride=2, padding=1))
    # No ReLU between: negative values of P6 reach P7.
    assert_close(p7, F.conv2d(p6, block.p7.weight, block.p7.bias, stride=2, padding=1))


@pytest.mark.parametrize("modulated", [False, True])
def test_config_keys_of_detectron2(modulated):
    cfg = get_cfg()
    add_gfl_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_gfl_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, True, True]
    cfg.MODEL.RESNETS.DEFORM_MODULATED = modulated
    backbone = build_backbone(cfg).eval()
    deform = [name for name, m in backbone.named_modules() if isinstance(m, DeformConv2d)]
    assert len(deform) == 6 + 3  # bottlenecks of res4 and res5 in ResNet-50
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 64, 96))
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    for name, stride in strides.items():
        assert features[name].shape == (1, 32, -(-64 // stride), -(-96 // stride))


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_init_residual(depth):
    """Every block starts as its shortcut."""
    cfg = get_cfg()
    add_gfl_config(cfg)
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16
    resnet = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    zero_init_residual(resnet)
    for stage in resnet.stages:
        for block in stage:
            x = torch.randn(2, block.in_channels, 8, 8)
            shortcut = x if block.shortcut is None else block.shortcut(x)
            assert_close(block(x), F.relu(shortcut))
