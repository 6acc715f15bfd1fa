"""Convolutions with their BatchNorms folded in, against the same with their norms, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import Conv2d, DeformConv, FrozenBatchNorm2d, ModulatedDeformConv, get_norm
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close
from torchvision.ops import deform_conv2d

from gfl_d2.deploy import fuse_norms
from gfl_d2.modeling.backbone import DeformConv2d
from models import randomize_norms

BLOCKS = {BasicBlock: {}, BottleneckBlock: {"bottleneck_channels": 16, "num_groups": 4}}


def make_backbone(norm="FrozenBN", block=BottleneckBlock):
    """A small ResNet and FPN."""
    torch.manual_seed(0)
    options = {"norm": norm, **BLOCKS[block]}
    stages = [
        ResNet.make_stage(block, 2, in_channels=16, out_channels=32, **options),
        ResNet.make_stage(
            block, 2, in_channels=32, out_channels=64, stride_per_block=[2, 1], **options
        ),
    ]
    resnet = ResNet(BasicStem(out_channels=16, norm=norm), stages, out_features=["res2", "res3"])
    return randomize_norms(FPN(resnet, ["res2", "res3"], 32, norm=norm)).double()


def make_conv(norm="FrozenBN", conv=Conv2d, **options):
    torch.manual_seed(0)
    norm = get_norm(norm, 32) if isinstance(norm, str) else norm
    return randomize_norms(conv(8, 32, 3, padding=1, norm=norm, **options)).double()


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def images():
    return random(1, 8, 5, 7)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "naiveSyncBN"])
@pytest.mark.parametrize("block", BLOCKS)
def test_fused_norms_change_nothing(norm, block):
    model = make_backbone(norm, block)
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    assert not any("Norm" in type(module).__name__ for module in fused.modules())
    x = random(2, 3, 64, 96)
    for name, expected in model(x).items():
        assert_close(fused(x)[name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, nn.ReLU()])
def test_one_norm(bias, activation):
    conv = make_conv(bias=bias, activation=activation)
    expected = conv(images())
    fuse_norms(conv)
    assert conv.norm is None
    assert_close(conv(images()), expected)


def test_norm_without_scale():
    conv = make_conv("")
    conv.norm = nn.BatchNorm2d(32, affine=False).double()
    conv(images())  # in training: statistics move
    expected = conv.eval()(images())
    fuse_norms(conv)
    assert conv.norm is None
    assert_close(conv(images()), expected)


@pytest.mark.parametrize("is_modulated", [False, True])
def test_own_deformable_convolution(is_modulated):
    conv = DeformConv2d(make_conv("FrozenBN", bias=False))
    inputs = (images(), random(1, 18, 5, 7), random(1, 9, 5, 7) if is_modulated else None)
    expected = conv(*inputs)
    fuse_norms(conv)
    assert conv.norm is None
    assert_close(conv(*inputs), expected)


@pytest.mark.parametrize("kind", [DeformConv, ModulatedDeformConv])
def test_deformable_convolutions_of_detectron2_stay(monkeypatch, kind):
    """Its DeformConv never adds a bias. Its operators are replaced: there are none on a CPU."""

    def plain(x, offset, weight, stride, padding, dilation, *_):
        return deform_conv2d(x, offset, weight, None, stride, padding, dilation)

    def modulated(x, offset, mask, weight, bias, stride, padding, dilation, *_):
        return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)

    monkeypatch.setattr("detectron2.layers.deform_conv.deform_conv", plain)
    monkeypatch.setattr("detectron2.layers.deform_conv.modulated_deform_conv", modulated)
    conv = make_conv("BN", kind, bias=False)
    inputs = (images(), random(1, 18, 5, 7))
    if kind is ModulatedDeformConv:
        inputs += (random(1, 9, 5, 7),)
    expected = conv(*inputs)
    fuse_norms(conv)
    assert conv.norm is not None
    assert_close(conv(*inputs), expected)


class Transposed(nn.ConvTranspose2d):
    def __init__(self, *args, norm, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm

    def forward(self, x):
        return self.norm(super().forward(x))


class Standardized(Conv2d):
    """A convolution that changes its weights when it is called."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self.norm(self._conv_forward(x, weight, self.bias))


class Block(nn.Module):
    """What holds a convolution and a norm, and is none."""

    def __init__(self, *args, norm, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs)
        self.norm = norm

    def forward(self, x):
        return self.norm(self.conv(x))


class DoubledNorm(FrozenBatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def with_weight_norm():
    return parametrizations.weight_norm(make_conv())


def pruned():
    conv = make_conv()
    prune.random_unstructured(conv, "weight", 0.5)
    return conv


def in_training():
    return make_conv("BN").train()


def without_statistics():
    conv = make_conv("")
    conv.norm = nn.BatchNorm2d(32, track_running_stats=False).double()
    return conv.eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_conv(conv=Transposed),
        lambda: make_conv("BN", Standardized),
        lambda: make_conv(conv=Block),
        lambda: make_conv("GN"),
        lambda: make_conv(DoubledNorm(32)),
        with_weight_norm,
        pruned,
        in_training,
        without_statistics,
    ],
)
def test_all_others_stay(make):
    conv = make()
    names, expected = list(conv.state_dict()), conv(images())
    fuse_norms(conv)
    assert list(conv.state_dict()) == names
    assert_close(conv(images()), expected)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_norms_with_hooks_stay(register):
    conv, seen = make_conv(), []
    getattr(conv.norm, register)(lambda *args: seen.append(args[0]))
    fuse_norms(conv)
    conv(images())
    assert seen == [conv.norm]
