"""Res2Net: against its definition written out a second time, and the config keys."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import deform_conv2d

from gfl_d2 import add_gfl_config
from gfl_d2.errors import InputError
from gfl_d2.modeling.backbone import (
    DeepStem,
    DeformConv2d,
    Res2NetBlock,
    build_res2net_backbone,
)


def random_values(module):
    """In float64, with normalizations and offsets that do something."""
    torch.manual_seed(0)
    for name, value in module.double().state_dict().items():
        if name.endswith(("norm.weight", "running_var")):
            nn.init.uniform_(value, 0.5, 1.5)
        elif value.dim() == 1:
            nn.init.normal_(value, std=0.5)
        else:
            nn.init.normal_(value, std=0.3)
    return module


def make_block(in_channels=8, out_channels=16, width=3, **kwargs):
    return random_values(
        Res2NetBlock(in_channels, out_channels, width=width, norm="FrozenBN", **kwargs)
    )


def norm(values, name, x):
    keys = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (values[f"{name}.norm.{key}"].view(-1, 1, 1) for key in keys)
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def box_sum(x, kernel, stride, padding):
    """The sum over a window, zeros around the map."""
    ones = torch.ones(x.shape[1], 1, kernel, kernel, dtype=x.dtype)
    return F.conv2d(x, ones, stride=stride, padding=padding, groups=x.shape[1])


def expected_block(values, x, width, stride, is_first, deform=None):
    """
    The block by its definition, one split after the other. ``values`` is its state dict,
    ``deform`` "plain" or "modulated".
    """
    hidden = norm(values, "conv1", F.conv2d(x, values["conv1.weight"])).relu()
    scales = hidden.shape[1] // width
    y, outputs = 0, []
    for i in range(scales - 1):
        part = hidden[:, i * width : (i + 1) * width]
        part = part if is_first else part + y
        weight = values[f"convs.{i}.weight"]
        if deform is None:
            y = F.conv2d(part, weight, stride=stride, padding=1)
        else:
            offset_weight, offset_bias = (
                values[f"conv_offsets.{i}.{key}"] for key in ("weight", "bias")
            )
            offset = F.conv2d(part, offset_weight, offset_bias, stride=stride, padding=1)
            mask = None
            if deform == "modulated":
                taps = offset.shape[1] // 3
                offset, mask = offset[:, : 2 * taps], offset[:, 2 * taps :].sigmoid()
            y = deform_conv2d(part, offset, weight, stride=stride, padding=1, mask=mask)
        y = norm(values, f"convs.{i}", y).relu()
        outputs.append(y)
    last = hidden[:, (scales - 1) * width :]
    if stride == 2:
        last = box_sum(last, 3, 2, padding=1) / 9  # the zeros around the map count
        bottom, right = x.shape[2] % 2, x.shape[3] % 2
        x, present = (F.pad(z, (0, right, 0, bottom)) for z in (x, torch.ones_like(x)))
        x = box_sum(x, 2, 2, padding=0) / box_sum(present, 2, 2, padding=0)
    out = norm(values, "conv3", F.conv2d(torch.cat([*outputs, last], 1), values["conv3.weight"]))
    if "shortcut.weight" in values:
        x = norm(values, "shortcut", F.conv2d(x, values["shortcut.weight"]))
    return (out + x).relu()


@pytest.mark.parametrize("deform", [None, "plain", "modulated"])
@pytest.mark.parametrize("scales", [2, 4])
@pytest.mark.parametrize(
    ("in_channels", "stride", "is_first"),
    [(8, 1, True), (8, 2, True), (16, 2, True), (16, 1, True), (16, 1, False)],
)
def test_block_is_as_defined(in_channels, stride, is_first, scales, deform):
    block = make_block(
        in_channels,
        stride=stride,
        is_first=is_first,
        scales=scales,
        deformable=deform is not None,
        deform_modulated=deform == "modulated",
    )
    assert (block.shortcut is None) == (in_channels == 16 and stride == 1)
    x = torch.randn(2, in_channels, 7, 10, dtype=torch.float64)  # an odd number of rows
    expected = expected_block(block.state_dict(), x, 3, stride, is_first, deform)
    assert 0.1 < (expected > 0).double().mean() < 0.9  # neither all cut off nor nothing
    assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def test_stem():
    stem = random_values(DeepStem(3, 8, norm="FrozenBN"))
    values = stem.state_dict()
    assert [values[f"conv{i}.weight"].shape[0] for i in (1, 2, 3)] == [4, 4, 8]
    x = image = torch.randn(2, 3, 33, 46, dtype=torch.float64)
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        x = F.conv2d(x, values[f"conv{i}.weight"], stride=stride, padding=1)
        x = norm(values, f"conv{i}", x).relu()
    # What a ReLU gives is never below the zeros that surround it here.
    x = F.unfold(F.pad(x, (1, 1, 1, 1)), 3, stride=2).view(2, 8, 9, 9, 12).amax(2)
    assert_close(stem(image), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("modulated", "groups"), [(False, 1), (False, 3), (True, 1), (True, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_initial_offsets_make_a_plain_convolution(modulated, groups, stride):
    """Offsets start at 0 and the modulation at sigmoid(0) = 1/2."""
    torch.manual_seed(0)
    kwargs = {"width": 6, "stride": stride, "is_first": True}
    block = Res2NetBlock(
        8, 16, deformable=True, deform_modulated=modulated, deform_num_groups=groups, **kwargs
    ).eval()
    plain = Res2NetBlock(8, 16, **kwargs).eval()
    values = {k: v for k, v in block.state_dict().items() if "conv_offsets" not in k}
    plain.load_state_dict(values)
    if modulated:
        for conv in plain.convs:
            conv.weight.data /= 2
    for conv in block.conv_offsets:
        assert conv.weight.shape == ((27 if modulated else 18) * groups, 6, 3, 3)
    x = torch.randn(2, 8, 9, 12)
    assert_close(block(x), plain(x), rtol=1e-4, atol=1e-5)


def test_parameter_names():
    """Checkpoints depend on them."""
    block = Res2NetBlock(8, 16, width=2, scales=3, is_first=True, deformable=True)
    convs = ["conv1", "convs.0", "convs.1", "conv3", "shortcut"]
    names = [name for c in convs for name in (f"{c}.weight", f"{c}.norm.weight", f"{c}.norm.bias")]
    names += [f"conv_offsets.{i}.{key}" for i in (0, 1) for key in ("weight", "bias")]
    assert sorted(name for name, _ in block.named_parameters()) == sorted(names)
    stem = [name for name, _ in DeepStem(3, 8).named_parameters()]
    names = [f"conv{i}.{key}" for i in (1, 2, 3) for key in ("weight", "norm.weight", "norm.bias")]
    assert sorted(stem) == sorted(names)


def test_stride_outside_the_first_block():
    with pytest.raises(ValueError, match="first block"):
        Res2NetBlock(16, 16, width=3, stride=2)


def small_config(**resnets):
    cfg = get_cfg()
    add_gfl_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_gfl_res2net_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32  # splits of 3, 6, 13 and 26 channels
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


@pytest.mark.parametrize("modulated", [False, True])
def test_backbone(modulated):
    torch.manual_seed(0)
    cfg = small_config(
        DEFORM_ON_PER_STAGE=[False, True, False, True],
        DEFORM_MODULATED=modulated,
        DEFORM_NUM_GROUPS=2,  # of 6 and 26 channels; nothing to the 3 and 13 of other stages
    )
    backbone = build_backbone(cfg)
    for i, stage in enumerate(backbone.bottom_up.stages):
        for conv in (conv for block in stage for conv in block.convs):
            assert isinstance(conv, DeformConv2d) == (i in (1, 3))
        for conv in (conv for block in stage for conv in block.conv_offsets or ()):
            assert conv.out_channels == (54 if modulated else 36)
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    features = backbone(torch.randn(2, 3, 64, 96))
    for name, stride in strides.items():
        assert features[name].shape == (2, 16, -(-64 // stride), -(-96 // stride))
    sum(f.square().sum() for f in features.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_stages():
    """From the config: number of blocks, their width, which is the first, no normalization."""
    cfg = small_config(DEPTH=152, NORM="")
    cfg.MODEL.RES2NET.SCALES = 8
    cfg.MODEL.RES2NET.BASE_WIDTH = 16
    res2net = build_res2net_backbone(cfg, ShapeSpec(channels=3))
    assert not any("norm" in name for name in res2net.state_dict())
    assert [len(stage) for stage in res2net.stages] == [3, 8, 36, 3]
    for i, stage in enumerate(res2net.stages):
        for j, block in enumerate(stage):
            assert block.conv1.weight.shape[0] == 8 * 2 * 2**i  # 8 splits of 2, 4, 8 and 16
            assert len(block.convs) == 7
            assert block.is_first == (j == 0)
            assert block.stride == (2 if i > 0 and j == 0 else 1)
            assert block.out_channels == 32 * 2**i


def test_frozen_stages():
    cfg = small_config()
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    res2net = build_res2net_backbone(cfg, ShapeSpec(channels=3))
    frozen = {n.split(".")[0] for n, p in res2net.named_parameters() if not p.requires_grad}
    trainable = {n.split(".")[0] for n, p in res2net.named_parameters() if p.requires_grad}
    assert frozen == {"stem", "res2"}
    assert trainable == {"res3", "res4", "res5"}
    for name, module in res2net.named_modules():
        is_frozen = name.startswith(("stem", "res2"))
        if name.endswith(".norm"):
            assert isinstance(module, FrozenBatchNorm2d if is_frozen else nn.BatchNorm2d), name


@pytest.mark.parametrize(("depth", "parameters"), [(50, 23_669_352), (101, 43_176_920)])
def test_number_of_parameters(depth, parameters):
    """With the classifier of 2048 * 1000 + 1000 the published 25.7 M and 45.2 M."""
    cfg = small_config(DEPTH=depth, STEM_OUT_CHANNELS=64, RES2_OUT_CHANNELS=256)
    with torch.device("meta"):  # shapes without memory
        res2net = build_res2net_backbone(cfg, ShapeSpec(channels=3))
    assert sum(p.numel() for p in res2net.parameters()) == parameters
    assert [stage[0].width for stage in res2net.stages] == [26, 52, 104, 208]


def test_zero_init_residual():
    """Every block starts as its shortcut."""
    res2net = build_res2net_backbone(small_config(ZERO_INIT_RESIDUAL=True), ShapeSpec(channels=3))
    for stage in res2net.stages:
        first, *others = stage
        x = torch.randn(2, first.in_channels, 8, 8)
        pooled = F.avg_pool2d(x, 2) if first.stride == 2 else x
        assert_close(first(x), first.shortcut(pooled).relu())
        for block in others:
            x = torch.randn(2, block.in_channels, 4, 4)
            assert_close(block(x), x.relu())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("RESNETS.DEPTH", 18),
        ("RESNETS.NUM_GROUPS", 32),
        ("RESNETS.WIDTH_PER_GROUP", 4),
        ("RESNETS.STRIDE_IN_1X1", True),
        ("RESNETS.RES5_DILATION", 2),
        ("RESNETS.STEM_OUT_CHANNELS", 9),
        ("RESNETS.RES2_OUT_CHANNELS", 30),
        ("RESNETS.DEFORM_ON_PER_STAGE", [False, True, True]),
        ("RESNETS.DEFORM_NUM_GROUPS", 2),  # of 13 channels in res4
        ("RES2NET.SCALES", 1),
        ("RES2NET.BASE_WIDTH", 7),
    ],
)
def test_unsupported_values(key, value):
    cfg = small_config(DEFORM_ON_PER_STAGE=[False, False, True, True])
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(InputError) as error:
        build_backbone(cfg)
    assert f"MODEL.{key} must be" in str(error.value)
    assert repr(value) in str(error.value)
