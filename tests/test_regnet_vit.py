"""Detectron2's RegNet and ViTDet as backbones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torch.testing import assert_close

from gfl_d2 import load_config
from gfl_d2.checkpoint import GFLCheckpointer
from gfl_d2.errors import InputError
from gfl_d2.modeling.backbone import layer_decay_factors
from gfl_d2.modeling.backbone.vit import ViT
from models import make_input, small_config, train_step
from scripts import ROOT

needs_vit = pytest.mark.skipif(ViT is None, reason="Detectron2 0.6 has no ViT")

REGNET = (
    *("MODEL.BACKBONE.NAME", "build_gfl_regnet_fpn_backbone", "MODEL.REGNET.NORM", "BN"),
    *("MODEL.FPN.IN_FEATURES", ["s2", "s3", "s4"], "MODEL.REGNET.DEPTH", 13),
    # RegNetX-200MF
    *("MODEL.REGNET.W_A", 36.44, "MODEL.REGNET.W_0", 24, "MODEL.REGNET.W_M", 2.49),
    *("MODEL.REGNET.GROUP_WIDTH", 8),
)
VIT = (
    *("MODEL.BACKBONE.NAME", "build_gfl_vit_backbone", "MODEL.VIT.EMBED_DIM", 48),
    *("MODEL.VIT.DEPTH", 3, "MODEL.VIT.NUM_HEADS", 2, "MODEL.VIT.GLOBAL_BLOCKS", [2]),
    *("MODEL.VIT.WINDOW_SIZE", 3, "MODEL.VIT.IMAGE_SIZE", 128),
)
MODELS = [pytest.param(REGNET, id="regnet"), pytest.param(VIT, id="vit", marks=needs_vit)]


def config(opts, *more):
    return small_config("joint", "general", "atss", *opts, *more)


@pytest.mark.parametrize("opts", MODELS)
def test_training(opts):
    torch.manual_seed(0)
    model = build_model(config(opts))
    assert model.backbone.size_divisibility == 32
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}
    assert strides == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    inputs = [make_input(), make_input(size=(96, 70))]  # padded to a multiple of 32
    for _ in range(3):
        assert all(loss.isfinite() for loss in train_step(model, inputs).values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any() or not name.startswith("backbone"), name


@pytest.mark.parametrize("opts", MODELS)
@torch.no_grad()
def test_sizes_and_copies(opts):
    torch.manual_seed(0)
    backbone = build_backbone(config(opts)).eval()
    other = build_backbone(config(opts)).eval()
    other.load_state_dict(backbone.state_dict())
    copies = (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone)), other)
    for size in ((32, 64), (160, 96)):
        image = torch.randn(1, 3, *size)
        features = backbone(image)
        for name, shape in backbone.output_shape().items():
            expected = (-(-size[0] // shape.stride), -(-size[1] // shape.stride))
            assert features[name].shape == (1, 32, *expected)
            assert all(torch.equal(copied(image)[name], features[name]) for copied in copies)


def test_frozen_stages_of_a_regnet():
    model = build_model(config(REGNET, "MODEL.BACKBONE.FREEZE_AT", 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_step(model, [make_input(), make_input(size=(96, 70))])
    for name, value in model.state_dict().items():
        if name.startswith(("backbone.bottom_up.stem.", "backbone.bottom_up.s1.")):
            assert torch.equal(value, before[name]), name
        elif "bottom_up" in name and name.endswith(".running_mean"):
            assert not torch.equal(value, before[name]), name


def test_layer_decay_of_a_regnet():
    factors = layer_decay_factors(build_model(config(REGNET)), 0.5)
    for part, power in (("stem", 5), ("s1", 4), ("s2", 3), ("s3", 2), ("s4", 1)):
        prefix = f"backbone.bottom_up.{part}."
        assert {f for name, f in factors.items() if name.startswith(prefix)} == {0.5**power}
    assert factors["head.cls_score.weight"] == factors["backbone.fpn_lateral3.weight"] == 1


@needs_vit
def test_layer_decay_of_a_vit():
    factors = layer_decay_factors(build_model(config(VIT)), 0.5)
    assert factors["backbone.net.patch_embed.proj.weight"] == 0.5**4
    assert factors["backbone.net.blocks.0.attn.qkv.weight"] == 0.5**3
    assert factors["backbone.net.blocks.2.attn.qkv.weight"] == 0.5
    assert factors["head.cls_score.weight"] == 1


def test_regnet_of_pycls(tmp_path):
    """Its files have the names of Detectron2's RegNet, and "model_state" around them."""
    torch.manual_seed(0)
    model, target = (build_model(config(REGNET)) for _ in range(2))
    weights = {n: torch.randn_like(p) for n, p in model.backbone.bottom_up.named_parameters()}
    weights |= {"head.fc.weight": torch.zeros(10, 368), "head.fc.bias": torch.zeros(10)}
    statistics = model.backbone.bottom_up.named_buffers()
    weights |= {name: value for name, value in statistics if "running" in name}
    torch.save({"epoch": 1, "model_state": weights}, tmp_path / "regnet.pyth")
    GFLCheckpointer(target).load(str(tmp_path / "regnet.pyth"))
    for name, parameter in target.backbone.bottom_up.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    del weights["s3.b1.f.a.weight"]
    torch.save({"epoch": 1, "model_state": weights}, tmp_path / "regnet.pyth")
    with pytest.raises(InputError, match=r"Not in the file.*s3\.b1\.f\.a\.weight"):
        GFLCheckpointer(build_model(config(REGNET))).load(str(tmp_path / "regnet.pyth"))


@needs_vit
def test_vit_of_mae(tmp_path):
    """Its file has no relative positions, and a class token that is not used."""
    torch.manual_seed(0)
    target = build_model(config(VIT))
    weights = {
        name: torch.randn_like(p)
        for name, p in target.backbone.net.named_parameters()
        if "rel_pos" not in name
    }
    extra = {"cls_token": torch.zeros(1, 1, 48), "norm.weight": torch.zeros(48)}
    path = tmp_path / "mae.pth"
    torch.save({"model": {**weights, **extra}}, path)
    GFLCheckpointer(target).load(f"{path}?matching_heuristics=True")
    for name, value in weights.items():
        assert torch.equal(target.backbone.net.get_parameter(name), value), name
    del weights["blocks.1.attn.proj.weight"]
    torch.save({"model": weights}, path)
    with pytest.raises(InputError, match=r"Not in the file.*blocks\.1\.attn\.proj\.weight"):
        GFLCheckpointer(build_model(config(VIT))).load(f"{path}?matching_heuristics=True")


@needs_vit
@torch.no_grad()
def test_vit_without_windows_and_positions_is_plain_attention():
    """One block with global attention, against PyTorch's own encoder layer."""
    opts = (*VIT, "MODEL.VIT.DEPTH", 1, "MODEL.VIT.GLOBAL_BLOCKS", [0])
    torch.manual_seed(0)
    vit = build_backbone(config(opts)).net.eval()
    block = vit.blocks[0]
    layer = nn.TransformerEncoderLayer(
        48, 2, 192, activation="gelu", batch_first=True, norm_first=True, layer_norm_eps=1e-6
    ).eval()
    state = {
        "self_attn.in_proj_weight": block.attn.qkv.weight,
        "self_attn.in_proj_bias": block.attn.qkv.bias,
        "self_attn.out_proj.weight": block.attn.proj.weight,
        "self_attn.out_proj.bias": block.attn.proj.bias,
        **{f"linear{i}.{n}": getattr(block.mlp, f"fc{i}").get_parameter(n)
           for i in (1, 2) for n in ("weight", "bias")},
        **{f"norm{i}.{n}": getattr(block, f"norm{i}").get_parameter(n)
           for i in (1, 2) for n in ("weight", "bias")},
    }  # fmt: skip
    layer.load_state_dict(state)
    tokens = torch.randn(2, 4, 5, 48)
    expected = layer(tokens.reshape(2, 20, 48)).reshape(2, 4, 5, 48)
    assert_close(block(tokens), expected)


@pytest.mark.parametrize(
    ("opts", "change", "message"),
    [
        (REGNET, ["MODEL.REGNET.W_0", 12], r"REGNET\.W_0 must be a positive multiple of 8"),
        (REGNET, ["MODEL.REGNET.W_M", 1.0], r"REGNET\.W_M"),
        (REGNET, ["MODEL.REGNET.DEPTH", 0], r"REGNET\.DEPTH"),
        (REGNET, ["MODEL.REGNET.SE_RATIO", 2.0], r"REGNET\.SE_RATIO"),
        (REGNET, ["MODEL.REGNET.GROUP_WIDTH", 0], r"REGNET\.GROUP_WIDTH"),
        (REGNET, ["MODEL.REGNET.W_A", -1.0], r"REGNET\.W_A"),
        (REGNET, ["MODEL.FPN.IN_FEATURES", ["res3"]], r"IN_FEATURES must be of 's1' to 's4'"),
        pytest.param(VIT, ["MODEL.VIT.NUM_HEADS", 5], r"VIT\.NUM_HEADS", marks=needs_vit),
        pytest.param(VIT, ["MODEL.VIT.GLOBAL_BLOCKS", [3]], r"GLOBAL_BLOCKS", marks=needs_vit),
        pytest.param(VIT, ["MODEL.BACKBONE.FREEZE_AT", 1], r"FREEZE_AT", marks=needs_vit),
        pytest.param(VIT, ["MODEL.VIT.DEPTH", 0], r"VIT\.DEPTH|GLOBAL", marks=needs_vit),
        pytest.param(VIT, ["MODEL.VIT.WINDOW_SIZE", 0], r"VIT\.WINDOW_SIZE", marks=needs_vit),
        pytest.param(VIT, ["MODEL.VIT.IMAGE_SIZE", 8], r"VIT\.IMAGE_SIZE", marks=needs_vit),
        pytest.param(VIT, ["MODEL.VIT.DROP_PATH_RATE", 1.0], r"DROP_PATH_RATE", marks=needs_vit),
    ],
)
def test_mistakes(opts, change, message):
    with pytest.raises(InputError, match=message):
        build_backbone(config(opts, *change))


@pytest.mark.skipif(ViT is not None, reason="Detectron2's main branch has a ViT")
def test_vit_that_is_not_there():
    cfg = load_config(str(ROOT / "configs" / "gfl_vitdet_b_1x.yaml"), ["MODEL.DEVICE", "cpu"])
    with pytest.raises(InputError, match="needs Detectron2's main branch"):
        build_model(cfg)
