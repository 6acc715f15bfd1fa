"""Weights as MMDetection has them, and what tests of their conversion share."""

from __future__ import annotations

import sys

import pytest
import torch
from detectron2.modeling import build_model

from gfl_d2 import load_config
from gfl_d2.conversion import (
    Checkpoint,
    files,
)
from gfl_d2.errors import InputError
from scripts import ROOT, load_script

CONFIGS = ROOT / "configs"
COCO = tuple(f"class {i}" for i in range(80))


# MMDetection's names and shapes, written down apart from the rules that translate them.


def conv(name, out_channels, in_channels, kernel, *, bias=False):
    weights = {f"{name}.weight": torch.randn(out_channels, in_channels, kernel, kernel)}
    return {**weights, f"{name}.bias": torch.randn(out_channels)} if bias else weights


def batch_norm(name, channels):
    return {
        f"{name}.weight": torch.rand(channels) + 0.5,
        f"{name}.bias": torch.randn(channels),
        f"{name}.running_mean": torch.randn(channels),
        f"{name}.running_var": torch.rand(channels) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(1234),
    }


def resnet(blocks=(3, 4, 6, 3), planes=8, groups=1, dcn=(0, 0, 0, 0), offset="conv2.conv_offset"):
    """A bottleneck ResNet of ``planes`` channels; ``dcn`` has offset channels per stage."""
    weights = {**conv("conv1", planes, 3, 7), **batch_norm("bn1", planes)}
    in_channels = planes
    for stage, number in enumerate(blocks):
        width, out_channels = planes * 2**stage, planes * 2**stage * 4
        for block in range(number):
            name = f"layer{stage + 1}.{block}"
            weights |= conv(f"{name}.conv1", width, in_channels, 1)
            weights |= batch_norm(f"{name}.bn1", width)
            weights |= conv(f"{name}.conv2", width, width // groups, 3)
            if dcn[stage]:
                weights |= conv(f"{name}.{offset}", dcn[stage], width, 3, bias=True)
            weights |= batch_norm(f"{name}.bn2", width)
            weights |= conv(f"{name}.conv3", out_channels, width, 1)
            weights |= batch_norm(f"{name}.bn3", out_channels)
            if block == 0:
                weights |= conv(f"{name}.downsample.0", out_channels, in_channels, 1)
                weights |= batch_norm(f"{name}.downsample.1", out_channels)
            in_channels = out_channels
    return {f"backbone.{name}": value for name, value in weights.items()}


def res2net(blocks=(3, 4, 6, 3), planes=16, base_width=26, scales=4, dcn=(0, 0, 0, 0)):
    weights = {}
    stem = [(0, planes // 2, 3), (3, planes // 2, planes // 2), (6, planes, planes // 2)]
    for i, out_channels, in_channels in stem:
        weights |= conv(f"stem.{i}", out_channels, in_channels, 3)
        weights |= batch_norm(f"stem.{i + 1}", out_channels)
    in_channels = planes
    for stage, number in enumerate(blocks):
        width, out_channels = planes * 2**stage * base_width // 64, planes * 2**stage * 4
        for block in range(number):
            name = f"layer{stage + 1}.{block}"
            weights |= conv(f"{name}.conv1", width * scales, in_channels, 1)
            weights |= batch_norm(f"{name}.bn1", width * scales)
            weights |= conv(f"{name}.conv3", out_channels, width * scales, 1)
            weights |= batch_norm(f"{name}.bn3", out_channels)
            if block == 0:
                weights |= conv(f"{name}.downsample.1", out_channels, in_channels, 1)
                weights |= batch_norm(f"{name}.downsample.2", out_channels)
            for i in range(scales - 1):
                weights |= conv(f"{name}.convs.{i}", width, width, 3)
                if dcn[stage]:
                    offset = f"{name}.convs.{i}.conv_offset"
                    weights |= conv(offset, dcn[stage], width, 3, bias=True)
                weights |= batch_norm(f"{name}.bns.{i}", width)
            in_channels = out_channels
    return {f"backbone.{name}": value for name, value in weights.items()}


def neck_and_head(res3_channels=64, channels=64, num_convs=2, classes=5, reg_max=16, dgqp=False):
    weights = {}
    for i in range(3):
        weights |= conv(
            f"neck.lateral_convs.{i}.conv", channels, res3_channels * 2**i, 1, bias=True
        )
    for i in range(5):
        weights |= conv(f"neck.fpn_convs.{i}.conv", channels, channels, 3, bias=True)
    for tower in ("cls_convs", "reg_convs"):
        for i in range(num_convs):
            weights |= conv(f"bbox_head.{tower}.{i}.conv", channels, channels, 3)
            weights[f"bbox_head.{tower}.{i}.gn.weight"] = torch.randn(channels)
            weights[f"bbox_head.{tower}.{i}.gn.bias"] = torch.randn(channels)
    weights |= conv("bbox_head.gfl_cls", classes, channels, 3, bias=True)
    weights |= conv("bbox_head.gfl_reg", 4 * (reg_max + 1), channels, 3, bias=True)
    for i in range(5):
        weights[f"bbox_head.scales.{i}.scale"] = torch.tensor(1.0 + i / 8)
    if dgqp:
        weights |= conv("bbox_head.reg_conf.0", 64, 20, 1, bias=True)
        weights |= conv("bbox_head.reg_conf.2", 1, 64, 1, bias=True)
    weights["bbox_head.integral.project"] = torch.arange(reg_max + 1).float()
    return weights


def detector(dcn=(0, 0, 0, 0), offset="conv2.conv_offset", **head):
    torch.manual_seed(0)
    return {**resnet(dcn=dcn, offset=offset), **neck_and_head(**head)}


def legacy_detector():
    """Of the authors' v1 code base."""
    weights = detector((0, 27, 27, 27))
    project = weights.pop("bbox_head.integral.project")
    return {**weights, "bbox_head.distribution_project.project": project}


def res2net_detector():
    torch.manual_seed(0)
    backbone = res2net(dcn=(0, 0, 18, 18))
    return {**backbone, **neck_and_head(res3_channels=128, classes=81, dgqp=True)}


def checkpoint(weights, **meta):
    return Checkpoint("file.pth", dict(weights), meta)


def again(content):
    """What is read of a file with this content."""
    return files._unwrap("again.pth", content)


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype, name
        assert torch.equal(weights[name], value), name


def narrow_config(name="gfl_R_50_FPN_1x.yaml", *opts):
    return load_config(str(CONFIGS / name), ["MODEL.DEVICE", "cpu", *opts])


def refusal(function, *args, **kwargs):
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


def run_tool(*args):
    """Of its own process but for the start of Python: exit message, or None."""
    tool = load_script("tools/convert_weights.py")
    before, sys.argv = sys.argv, ["convert_weights.py", *map(str, args)]
    try:
        tool.main()
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return None


def without(weights, *parts):
    return {n: v for n, v in weights.items() if not any(part in n for part in parts)}


def without_norm(weights):
    weights = without(weights, ".gn.")
    for tower in ("cls_convs", "reg_convs"):
        for i in range(2):
            weights[f"bbox_head.{tower}.{i}.conv.bias"] = torch.randn(64)
    return weights


def small_model(*opts, config="gfl_R_50_FPN_1x.yaml", num_classes=3):
    opts = [
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
        *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.GFL.CONV_DIM", 64, "MODEL.GFL.NUM_CONVS", 1),
        *("MODEL.GFL.NUM_CLASSES", num_classes, "MODEL.DEVICE", "cpu"),
        *opts,
    ]
    if "R2_101" not in config:
        opts = ["MODEL.RESNETS.WIDTH_PER_GROUP", 8, *opts]
    torch.manual_seed(0)
    cfg = load_config(str(CONFIGS / config), opts)
    return cfg, build_model(cfg)
