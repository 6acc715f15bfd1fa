"""Models of timm as backbones: their features, training, freezing and mistakes."""

from __future__ import annotations

import copy
import logging
import pickle
import socket

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch.testing import assert_close

from gfl_d2 import load_config
from gfl_d2.errors import InputError
from gfl_d2.modeling.backbone import TimmBackbone, layer_decay_factors, timm_backbone
from models import make_input, randomize_norms, small_config, train_step
from scripts import ROOT

timm = pytest.importorskip("timm")

SWIN = "swin_tiny_patch4_window7_224"
# Small models of timm for tests, of several kinds, and the Swin of the configs.
NAMES = ("test_resnet", "test_convnext", "test_efficientnet", SWIN)
# With symmetric and with TensorFlow's padding, and stages that are not those of the strides.
LITE = "tf_efficientnet_lite0"
SMALL_HEAD = ("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.GFL.CONV_DIM", 64, "MODEL.GFL.NUM_CONVS", 1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test wants the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def config(name, *opts):
    """Of a small GFL on a model of timm."""
    return small_config(
        *("joint", "general", "atss", "MODEL.BACKBONE.NAME", "build_gfl_timm_fpn_backbone"),
        *("MODEL.TIMM.NAME", name, *opts),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_are_those_of_the_whole_model(name):
    """Taken from the whole model by hooks, with its weights under the same names."""
    torch.manual_seed(0)
    options = {"strict_img_size": False} if name == SWIN else {}
    whole = randomize_norms(timm.create_model(name, num_classes=3, **options))
    backbone = TimmBackbone(name).eval()
    state = {f"net.model.{n}": value for n, value in whole.state_dict().items()}
    result = backbone.load_state_dict(state, strict=False)
    assert result.missing_keys == []
    outputs = {}
    for info in whole.feature_info:
        hook = lambda m, x, y, info=info: outputs.update({info["reduction"]: y.clone()})  # noqa: E731
        whole.get_submodule(info["module"]).register_forward_hook(hook)
    image = torch.randn(2, 3, 64, 160)
    features = backbone(image)
    whole(image)
    assert list(features) == ["res3", "res4", "res5"]
    for (feature, value), stride in zip(features.items(), (8, 16, 32)):
        expected = outputs[stride].permute(0, 3, 1, 2) if name == SWIN else outputs[stride]
        assert value.shape[-2:] == (64 // stride, 160 // stride)
        assert backbone.output_shape()[feature] == ShapeSpec(value.shape[1], stride=stride)
        assert_close(value, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gfl_swin_tiny_FPN_1x", "gfl_convnext_tiny_FPN_1x"])
def test_configs_train(name):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *SMALL_HEAD]
    torch.manual_seed(0)
    model = build_model(load_config(str(ROOT / "configs" / f"{name}.yaml"), opts))
    assert model.backbone.size_divisibility == 32
    assert model.backbone.output_shape()["p3"].stride == 8
    inputs = [make_input(), make_input(size=(96, 70))]  # padded to a multiple of 32
    before = copy.deepcopy(dict(model.named_parameters()))
    for _ in range(2):
        losses = train_step(model, inputs)
        assert all(loss.isfinite() for loss in losses.values())
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert any(n.startswith("backbone.bottom_up.net.model.") for n in changed)


def test_images_of_any_size_and_channels():
    backbone = build_backbone(config(SWIN, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]))
    for size in ((32, 32), (64, 320), (256, 96)):
        features = backbone(torch.zeros(1, 3, *size))
        assert features["p5"].shape[-2:] == (size[0] // 32, size[1] // 32)
    pixels = ("MODEL.PIXEL_MEAN", [1.0], "MODEL.PIXEL_STD", [1.0])
    grey = build_model(config("test_efficientnet", "INPUT.FORMAT", "L", *pixels))
    assert grey.backbone.bottom_up.net.model.conv_stem.weight.shape[1] == 1


def test_layers_after_the_last_feature_are_left_out():
    """A parameter that is not used would stop distributed training."""
    backbone = TimmBackbone("test_resnet", out_features=["res2", "res3"])
    features = backbone(torch.randn(2, 3, 64, 64))
    assert [f.shape[-1] for f in features.values()] == [16, 8]
    sum(f.sum() for f in features.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_drop_path():
    torch.manual_seed(0)
    backbone = TimmBackbone("test_convnext", drop_path_rate=0.5).train()
    image = torch.randn(2, 3, 64, 64)
    assert not torch.equal(backbone(image)["res5"], backbone(image)["res5"])
    backbone.eval()
    assert torch.equal(backbone(image)["res5"], backbone(image)["res5"])


# Stages


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        (LITE, {"conv_stem": 1, "blocks.0": 1, "blocks.1": 2, "blocks.2": 3, "blocks.3": 4,
                "blocks.4": 4, "blocks.5": 5, "blocks.6": 5}),
        (SWIN, {"patch_embed": 1, "layers.0": 2, "layers.1": 3, "layers.2": 4, "layers.3": 5}),
        ("convnext_tiny", {"stem": 1, "stages.0": 2, "stages.1": 3, "stages.3": 5}),
        ("resnet18", {"conv1": 1, "bn1": 1, "layer1": 2, "layer2": 3, "layer4": 5}),
        ("repvgg_a0", {"stem": 1, "stages.0": 2, "stages.3": 5}),
    ],
)  # fmt: skip
def test_stages(name, stages):
    with torch.device("meta"):
        found = TimmBackbone(name).stages()
    for part, stage in stages.items():
        values = {s for n, s in found.items() if n.startswith(f"net.model.{part}.")}
        assert values == {stage}, part


@pytest.mark.parametrize("freeze_norms", [False, True])
def test_frozen_stages_and_norms(freeze_norms):
    torch.manual_seed(0)
    opts = ("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.TIMM.FREEZE_NORMS", freeze_norms)
    model = build_model(config(LITE, *opts))
    bottom_up = model.backbone.bottom_up
    frozen = {n for n, stage in TimmBackbone(LITE).stages().items() if stage <= 2}
    before = {name: value.clone() for name, value in bottom_up.state_dict().items()}
    train_step(model, [make_input(), make_input(size=(70, 96))])
    trained = dict(bottom_up.named_parameters())
    for name, value in bottom_up.state_dict().items():
        part = name.rpartition(".")[0]
        if f"{part}.weight" in frozen or (freeze_norms and ".bn" in name):
            assert torch.equal(value, before[name]), name
            assert name not in trained or not trained[name].requires_grad
        elif name.endswith(".running_mean"):
            assert not torch.equal(value, before[name]), name
    for name, parameter in trained.items():
        assert (parameter.grad is None) == (name in frozen), name


@torch.no_grad()
def test_frozen_norms_compute_the_same():
    torch.manual_seed(0)
    plain = randomize_norms(TimmBackbone(LITE)).double()
    frozen = TimmBackbone(LITE, freeze_at=2, freeze_norms=True).double()
    result = frozen.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys == []
    assert all(name.endswith(".num_batches_tracked") for name in result.unexpected_keys)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for name, value in frozen.train()(image).items():
        assert_close(value, plain(image)[name])


def test_layer_decay():
    model = build_model(config(LITE))
    factors = layer_decay_factors(model, 0.5)
    prefix = "backbone.bottom_up.net.model."
    for part, power in (("conv_stem", 5), ("blocks.1", 4), ("blocks.4", 2), ("blocks.6", 1)):
        assert {f for n, f in factors.items() if n.startswith(prefix + part)} == {0.5**power}
    rest = {f for n, f in factors.items() if not n.startswith(prefix)}
    assert rest == {1.0}
    assert factors.keys() == dict(model.named_parameters()).keys()


# A plain module


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_copies(name):
    torch.manual_seed(0)
    model = build_model(config(name)).eval()
    model.test_score_thresh = 0.0
    inputs = [make_input()]
    expected = model(inputs)[0]["instances"].scores
    assert len(expected) > 0
    other = build_model(config(name)).eval()
    other.test_score_thresh = 0.0
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(copied(inputs)[0]["instances"].scores, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_convnext", LITE])
@torch.no_grad()
def test_traced_for_other_sizes(name):
    backbone = randomize_norms(build_backbone(config(name)))
    traced = torch.jit.trace(backbone, torch.zeros(1, 3, 64, 96), strict=False)
    image = torch.randn(2, 3, 96, 160)
    for feature, value in backbone(image).items():
        assert_close(traced(image)[feature], value)


# Mistakes


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("", [], r"MODEL\.TIMM\.NAME must be a model of timm.*got ''"),
        ("convnext_tinny", [], r"MODEL\.TIMM\.NAME .*such as convnext_tiny.*'convnext_tinny'"),
        ("hf-hub:timm/convnext_tiny.fb_in1k", [], r"MODEL\.TIMM\.NAME"),
        ("vit_tiny_patch16_224", [], r"NAME vit_tiny_patch16_224 cannot be.*of any size"),
        ("test_convnext", ["MODEL.FPN.IN_FEATURES", ["s1"]], r"IN_FEATURES.*'res2', 'res3"),
        ("vgg11", ["MODEL.BACKBONE.FREEZE_AT", 2], r"FREEZE_AT must be 0.*vgg11"),
        ("vgg11", ["MODEL.TIMM.DROP_PATH_RATE", 0.1], r"NAME vgg11 cannot be.*drop_path_rate"),
        ("test_convnext", ["MODEL.TIMM.DROP_PATH_RATE", 1.0], r"DROP_PATH_RATE must be in"),
    ],
)  # fmt: skip
def test_mistakes(name, opts, message):
    with torch.device("meta"), pytest.raises(InputError, match=message) as error:
        build_backbone(config(name, *opts))
    assert "\n" not in str(error.value)


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(timm_backbone.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install timm"):
        TimmBackbone("test_convnext")


@pytest.mark.parametrize(
    ("name", "opts", "warns"),
    [
        ("test_resnet", ["MODEL.WEIGHTS", "a.pth"], True),  # of mean and deviation 127.5
        ("resnet18", ["MODEL.WEIGHTS", "a.pth"], False),
        ("resnet18", ["MODEL.WEIGHTS", "a.pth", "INPUT.FORMAT", "BGR"], True),
        ("test_resnet", [], False),  # random weights are for any
    ],
)
def test_pixels_of_pretrained_weights(name, opts, warns, caplog):
    with caplog.at_level(logging.WARNING), torch.device("meta"):
        build_backbone(config(name, *opts))
    messages = [r.getMessage() for r in caplog.records if f"weights of {name}" in r.getMessage()]
    assert len(messages) == warns
