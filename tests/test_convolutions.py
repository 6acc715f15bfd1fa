"""Convolutions with what follows them folded in, against Detectron2's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import nn
from torch.testing import assert_close

from gfl_d2.deploy import fusing as convolutions
from gfl_d2.deploy.fusing import (
    FrozenNormConv2d,
    PackedConv2d,
    fold_frozen_norms,
    fuse_norms,
    pack_convs,
)
from models import randomize_norms

BLOCKS = {BasicBlock: {}, BottleneckBlock: {"bottleneck_channels": 16, "num_groups": 4}}

needs_packing = pytest.mark.skipif(not convolutions._can_pack(), reason="a PyTorch without oneDNN")


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
    return randomize_norms(FPN(resnet, ["res2", "res3"], 32, norm=norm))


def make_conv(norm="FrozenBN", bias=True, activation=None, **options):
    torch.manual_seed(0)
    norm = get_norm(norm, 32)
    conv = Conv2d(8, 32, 3, padding=1, bias=bias, norm=norm, activation=activation, **options)
    return randomize_norms(conv)


def images(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 64, 96, dtype=torch.float64, generator=generator).to(dtype)


def outputs_and_gradients(model, x):
    outputs = list(model(x).values())
    # Of each output another function, none with a gradient of zero.
    loss = sum((maps * maps.detach().cos()).sum() for maps in outputs)
    return outputs + list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("block", BLOCKS)
def test_frozen_norms_are_trained_as_before(block):
    model = make_backbone(block=block).double().train()
    folded = copy.deepcopy(model)
    fold_frozen_norms(folded)
    assert any(isinstance(module, FrozenNormConv2d) for module in folded.modules())
    assert list(folded.state_dict()) == list(model.state_dict())
    x = images(torch.float64)
    for actual, expected in zip(outputs_and_gradients(folded, x), outputs_and_gradients(model, x)):
        assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, nn.ReLU()])
def test_one_frozen_norm(bias, activation):
    conv = make_conv(bias=bias, activation=activation).double()
    x = torch.randn(1, 8, 5, 7, dtype=torch.float64)
    expected = conv(x)
    fold_frozen_norms(conv)
    assert_close(conv(x), expected)
    fuse_norms(conv)
    assert conv.norm is None
    assert_close(conv(x), expected)


def test_folded_convolutions_under_autocast():
    conv = make_conv()
    x = torch.randn(1, 8, 5, 7, requires_grad=True)
    expected = conv(x)
    fold_frozen_norms(conv)
    with torch.autocast("cpu", torch.bfloat16):
        actual = conv(x)
    assert actual.dtype == torch.bfloat16
    assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("is_folded", [False, True])
def test_fused_norms_change_nothing(norm, block, is_folded):
    model = make_backbone(norm, block).double()
    fused = copy.deepcopy(model)
    if is_folded:
        fold_frozen_norms(fused)
    fuse_norms(fused)
    kinds = {type(module).__name__ for module in fused.modules()}
    assert not any("Norm" in kind for kind in kinds)
    for key, expected in model(images(torch.float64)).items():
        assert_close(fused(images(torch.float64))[key], expected, rtol=1e-9, atol=1e-9)


def test_norms_in_training_and_group_norms_stay():
    model = make_backbone("BN").train()
    fuse_norms(model)
    fold_frozen_norms(model)
    assert model.fpn_lateral2.norm is not None
    assert type(model.fpn_lateral2) is Conv2d
    conv = make_conv("GN")
    fuse_norms(conv)
    assert isinstance(conv.norm, nn.GroupNorm)


@needs_packing
@pytest.mark.parametrize("block", BLOCKS)
def test_packed_convolutions_give_the_same(block):
    model = make_backbone(block=block)
    packed = copy.deepcopy(model)
    fuse_norms(packed)
    pack_convs(packed)
    kinds = [type(module).__name__ for module in packed.modules()]
    assert kinds.count(f"Packed{block.__name__}") == 4
    assert not any(kind in ("Conv2d", block.__name__) for kind in kinds)
    for x in (images(), images()[:1, :, :32, :64]):
        with torch.no_grad():
            expected, (first, actual) = model(x), (packed(x), packed(x))
        recorded = packed(x.requires_grad_())
        for key in expected:
            assert_close(first[key], expected[key], rtol=1e-4, atol=1e-4)
            assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-4)
            assert_close(recorded[key], expected[key], rtol=1e-4, atol=1e-4)
            assert recorded[key].requires_grad


@needs_packing
@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("activation", [None, nn.ReLU(inplace=True), torch.sigmoid])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 4}, {"dilation": 2}])
def test_one_packed_convolution(norm, activation, options):
    conv = make_conv(norm, activation=activation, **options)
    x = torch.randn(2, 8, 9, 11)
    with torch.no_grad():
        expected = conv(x)
        pack_convs(conv)
        assert type(conv) is PackedConv2d
        for _ in range(3):
            assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)
        assert [packed.is_mkldnn for packed in conv._packed.values()] == [True]
        assert_close(conv(x.to(memory_format=torch.channels_last)), expected, rtol=1e-5, atol=1e-5)


@needs_packing
def test_packed_weights_follow_the_weights():
    conv, other = make_conv(""), make_conv("")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
        pack_convs(conv)
        x = torch.randn(1, 8, 6, 6)
        conv(x), conv(x)
        conv.load_state_dict(other.state_dict())
        for _ in range(2):
            assert_close(conv(x), other(x), rtol=1e-5, atol=1e-5)
        conv.weight.data = conv.weight.data * 2
        other.weight.data = other.weight.data * 2
        for _ in range(2):
            assert_close(conv(x), other(x), rtol=1e-5, atol=1e-5)


@needs_packing
def test_weights_are_packed_for_each_size(monkeypatch):
    """When it comes again, as long as it is one of the latest."""
    conv, packed = make_conv(""), []
    pack_convs(conv, num_sizes=2)
    pack = torch._C._nn.mkldnn_reorder_conv2d_weight
    monkeypatch.setattr(
        torch._C._nn, "mkldnn_reorder_conv2d_weight", lambda *a: packed.append(a[-1]) or pack(*a)
    )
    with torch.no_grad():
        for n in (6, 7, 6, 7, 6, 7, 8, 7, 8, 6):
            conv(torch.ones(1, 8, n, n))
    assert packed == [(1, 8, n, n) for n in (6, 7, 8)]


@needs_packing
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_packed_convolutions_can_be_copied(copied):
    conv = make_conv("")
    pack_convs(conv)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        conv(x)
        expected = conv(x)
        copy_of_conv = copied(conv)
        copy_of_conv(x)
        assert torch.equal(copy_of_conv(x), expected)


@needs_packing
def test_packing_in_inference_mode():
    conv = make_conv("")
    expected = conv(torch.ones(1, 8, 6, 6)).detach()
    pack_convs(conv)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            for _ in range(2):
                assert_close(conv(torch.ones(1, 8, 6, 6)), expected, rtol=1e-5, atol=1e-5)


def test_without_the_operators_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(convolutions, "_can_pack", lambda: False)
    conv = make_conv("")
    pack_convs(conv)
    assert type(conv) is Conv2d
