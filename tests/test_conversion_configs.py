"""Conversion of weights: backbones, and the configs that weights fit."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from gfl_d2 import load_config
from gfl_d2.checkpoint import GFLCheckpointer, load_checkpoint_config
from gfl_d2.conversion import (
    Checkpoint,
    check_config,
    describe,
    find_configs,
    find_differences,
    from_mmdet,
    to_mmdet,
    write_checkpoint,
)
from mmdet_weights import (
    CONFIGS,
    assert_same,
    checkpoint,
    detector,
    legacy_detector,
    narrow_config,
    refusal,
    res2net,
    resnet,
    run_tool,
    small_model,
)

# Backbones.


def test_resnext_of_torchvision_computes_the_same(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4
    ).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    result = from_mmdet(checkpoint(theirs.state_dict()))
    assert result.notes == ["Left out: fc.bias, fc.weight."]
    assert describe(result.needed) == "ResNeXt-50 32x4d; no detector"
    write_checkpoint(result.content, tmp_path / "X-50.pth")

    opts = ["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 4]
    ours = build_model(narrow_config("gfl_R_50_FPN_1x.yaml", *opts)).eval()
    GFLCheckpointer(ours).load(str(tmp_path / "X-50.pth"))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        x = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
        torch.testing.assert_close(ours.backbone.bottom_up(image)["res5"], x, rtol=1e-4, atol=1e-4)


def bare(weights):
    return {name.replace("backbone.", "", 1): value for name, value in weights.items()}


def timm_res2net(weights):
    """The names of timm."""
    stem = {"stem.0": "conv1.0", "stem.1": "conv1.1", "stem.3": "conv1.3", "stem.4": "conv1.4",
            "stem.6": "conv1.6", "stem.7": "bn1"}  # fmt: skip
    renamed = {}
    for name, value in bare(weights).items():
        start = ".".join(name.split(".")[:2])
        renamed[name.replace(start, stem[start]) if start in stem else name] = value
    return renamed


@pytest.mark.parametrize("make", [resnet, res2net])
def test_names_of_backbones(make):
    torch.manual_seed(0)
    weights = make()  # of MMPretrain
    fc = {"fc.weight": torch.zeros(10, 256), "fc.bias": torch.zeros(10)}
    head = {f"head.{name}": value for name, value in fc.items()}
    expected = from_mmdet(checkpoint({**weights, **head})).content["model"]
    assert all(name.startswith("backbone.bottom_up.") for name in expected)
    theirs = bare(weights) if make is resnet else timm_res2net(weights)
    assert_same(from_mmdet(checkpoint({**theirs, **fc})).content["model"], expected)


BACKBONES = {
    "_R_18_": lambda: torchvision.models.resnet18(),
    "_R_50_": lambda: torchvision.models.resnet50(),
    "_R_101_": lambda: torchvision.models.resnet101(),
    "_X_101_32x4d_": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4
    ),
    "_R2_101_": lambda: Weights(timm_res2net(res2net((3, 4, 23, 3), planes=64))),
}


class Weights(dict):
    def state_dict(self):
        return self


@pytest.mark.parametrize("name", BACKBONES)
def test_configs_for_a_backbone_are_of_its_kind(name):
    with torch.device("meta"):
        weights = BACKBONES[name]().state_dict()
    needed = from_mmdet(checkpoint(weights)).needed
    fitting = find_configs(needed, CONFIGS.glob("gfl_*.yaml"))
    assert fitting
    assert all(name in Path(file).name and not changes for file, changes in fitting.items())


@pytest.mark.parametrize("blocks", [(3, 4, 23, 3), (3, 8, 36, 3)])
def test_kind_of_backbone_is_never_changed(tmp_path, capsys, blocks):
    torch.save(bare(resnet(blocks)), tmp_path / "in.pth")  # of widths that no config has
    assert run_tool(tmp_path / "in.pth", tmp_path / "out.pth") is None
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:3] == ["python", "train_net.py", "--config-file"]
    assert "--eval-only" not in command
    assert "MODEL.BACKBONE.NAME" not in command
    opts = ["MODEL.DEVICE", "cpu", *command[4:]]
    name = load_config(command[3], opts).MODEL.BACKBONE.NAME
    assert name == "build_gfl_resnet_fpn_backbone"


def test_kind_of_backbone_has_to_be_that_of_the_config():
    needed = from_mmdet(checkpoint(bare(resnet((3, 4, 23, 3), planes=64)))).needed
    config = "gfl_v2_R2_101_DCN_FPN_ms_2x.yaml"
    message = refusal(check_config, needed, narrow_config(config), config)
    assert "MODEL.BACKBONE.NAME is 'build_gfl_res2net_fpn_backbone'" in message
    # Any detector may start from a ResNet.
    needed = from_mmdet(checkpoint(torchvision.models.resnet18().state_dict())).needed
    assert check_config(needed, narrow_config("retinanet_R_18_FPN_bccd.yaml"), "c.yaml") == {}


@pytest.mark.parametrize("change", ["missing", "extra", "deep stem"])
def test_backbones_in_part_are_refused(change):
    weights = bare(resnet())
    if change == "missing":
        del weights["layer3.1.conv2.weight"]
        message = refusal(from_mmdet, checkpoint(weights))
        assert "Not in the file (1): layer3.1.conv2.weight" in message
    elif change == "extra":
        weights["layer3.1.se.fc1.weight"] = torch.zeros(1)
        message = refusal(from_mmdet, checkpoint(weights))
        assert "Not in the model (1): layer3.1.se.fc1.weight" in message
    else:
        weights["conv1.0.weight"] = weights.pop("conv1.weight")
        message = refusal(from_mmdet, checkpoint(weights))
        assert "lacks conv1.weight" in message


# Configs.


def shipped_configs():
    # Those of a ResNet, ResNeXt or Res2Net.
    names = sorted(
        p.name for p in CONFIGS.glob("gfl_*.yaml") if re.match(r"gfl_(v2_)?[RX]", p.name)
    )
    # Neither MMDetection nor the authors have a GFL with P2.
    names.remove("gfl_R_50_FPN_tiny_objects.yaml")
    assert names
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_configs())
def test_weights_of_a_shipped_config_find_it(name):
    cfg = load_config(str(CONFIGS / name), ["MODEL.DEVICE", "cpu"]).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        weights = build_model(cfg).state_dict()
    needed = to_mmdet(Checkpoint("here.pth", weights)).needed
    fitting = find_configs(needed, CONFIGS.glob("gfl_*.yaml"))
    assert not any(fitting.values())
    assert name in [Path(file).name for file in fitting]
    assert find_differences(needed, cfg) == {}


def test_config_that_does_not_fit_is_refused(tmp_path):
    torch.save(detector(), tmp_path / "in.pth")
    config = CONFIGS / "gfl_v2_R_50_FPN_1x.yaml"
    message = run_tool(tmp_path / "in.pth", tmp_path / "out.pth", "--config-file", config)
    assert message.startswith(f"Error: Config file '{config}' does not fit the weights")
    assert "MODEL.RESNETS.STEM_OUT_CHANNELS is 64, not 8" in message
    assert "MODEL.GFL.QUALITY is 'dgqp', not 'joint'" in message
    assert "MODEL.RESNETS.DEPTH" not in message
    assert [file.name for file in tmp_path.iterdir()] == ["in.pth"]


def test_options_change_the_config(tmp_path, capsys):
    torch.save(legacy_detector(), tmp_path / "in.pth")
    opts = [
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.FPN.OUT_CHANNELS", "64"),
        *("MODEL.GFL.CONV_DIM", "64", "MODEL.GFL.NUM_CONVS", "2", "MODEL.GFL.NUM_CLASSES", "5"),
        *("MODEL.RESNETS.DEPTH", "50"),
    ]
    config = CONFIGS / "gfl_R_101_DCN_FPN_ms_2x.yaml"
    args = (tmp_path / "in.pth", tmp_path / "out.pth", "--config-file", config, "--", *opts)
    assert run_tool(*args) is None
    *_, told, command = capsys.readouterr().out.splitlines()
    # Old anchor centres are no reason to refuse: no config has them.
    assert "MODEL.GFL.LEGACY_ANCHOR_CENTERS True, fits, and the file has this config" in told
    words = ["python", "train_net.py", "--eval-only", "MODEL.WEIGHTS", str(args[1])]
    assert shlex.split(command) == words
    cfg = load_checkpoint_config(args[1], ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.GFL.LEGACY_ANCHOR_CENTERS is True
    GFLCheckpointer(build_model(cfg), complete=True).load(cfg.MODEL.WEIGHTS)
    assert "options change a config" in run_tool(*args[:2], *opts)


def converted(folder, weights):
    """What the tool writes for weights of MMDetection."""
    torch.save(weights, folder / "in.pth")
    assert run_tool(folder / "in.pth", folder / "out.pth") is None
    return torch.load(folder / "out.pth", weights_only=True)


def test_config_is_written_where_one_fits(tmp_path, capsys):
    model = build_model(narrow_config("gfl_R_18_FPN_demo.yaml"))
    there = to_mmdet(Checkpoint("here.pth", model.state_dict())).content["state_dict"]
    there["bbox_head.distribution_project.project"] = there.pop("bbox_head.integral.project")
    assert set(converted(tmp_path, there)) == {"model", "config"}
    *_, told, command = capsys.readouterr().out.splitlines()
    change = "MODEL.GFL.LEGACY_ANCHOR_CENTERS True"
    assert f"demo.yaml, changed by {change}, fits, and the file has this config" in told
    assert command == f"python train_net.py --eval-only MODEL.WEIGHTS {tmp_path / 'out.pth'}"
    cfg = load_checkpoint_config(tmp_path / "out.pth", ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.GFL.LEGACY_ANCHOR_CENTERS is True
    target = build_model(cfg)
    GFLCheckpointer(target, complete=True).load(cfg.MODEL.WEIGHTS)
    assert torch.equal(target.head.cls_score.weight, model.head.cls_score.weight)


@pytest.mark.parametrize("config", ["gfl_R_18_FPN_bccd.yaml", "gfl_R_101_DCN_FPN_ms_2x.yaml"])
def test_config_is_not_guessed(tmp_path, capsys, config):
    """Two fit, or one does with another backbone."""
    if "101" in config:
        _, model = small_model(config=config)
    else:
        model = build_model(narrow_config(config))
    there = to_mmdet(Checkpoint("here.pth", model.state_dict())).content["state_dict"]
    assert set(converted(tmp_path, there)) == {"model"}
    assert " --config-file " in capsys.readouterr().out.splitlines()[-1]


def test_weights_of_a_backbone_get_no_config(tmp_path):
    """Nothing of it can be evaluated."""
    assert set(converted(tmp_path, bare(resnet((3, 4, 23, 3))))) == {"model"}


@pytest.mark.slow
def test_checkpointers_load_all_without_a_word(tmp_path, caplog):
    result = from_mmdet(checkpoint(detector(classes=3, num_convs=1)))
    write_checkpoint(result.content, tmp_path / "weights.pth")
    for norm, freeze_at in (("FrozenBN", 2), ("BN", 0)):
        for checkpointer in (DetectionCheckpointer, GFLCheckpointer):
            opts = ["MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", freeze_at]
            _, model = small_model(*opts, "MODEL.FPN.OUT_CHANNELS", 64)
            if checkpointer is GFLCheckpointer:
                checkpointer = lambda model: GFLCheckpointer(model, complete=True)  # noqa: E731
            checkpointer(model).load(str(tmp_path / "weights.pth"))
            for name, value in result.content["model"].items():
                assert torch.equal(model.state_dict()[name], value), name
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize(
    ("make", "config"),
    [(resnet, "gfl_R_101_DCN_FPN_ms_2x.yaml"), (res2net, "gfl_v2_R2_101_DCN_FPN_ms_2x.yaml")],
)
def test_deformable_detectors_start_from_imagenet(tmp_path, make, config):
    """Their offsets, which ImageNet weights lack, start at 0; all else is loaded."""
    torch.manual_seed(0)
    weights = make(blocks=(3, 4, 23, 3), planes=16)
    result = from_mmdet(checkpoint(weights))
    write_checkpoint(result.content, tmp_path / "weights.pth")
    opts = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    if make is resnet:
        opts += ["MODEL.RESNETS.WIDTH_PER_GROUP", 16]
    cfg = narrow_config(config, *opts)
    assert check_config(result.needed, cfg, config) == {}
    model = build_model(cfg)
    GFLCheckpointer(model).load(str(tmp_path / "weights.pth"))
    loaded = model.backbone.bottom_up.state_dict()
    offsets = [name for name in loaded if "offset" in name]
    assert offsets
    assert all((loaded[name] == 0).all() for name in offsets)
    for name, value in result.content["model"].items():
        assert torch.equal(loaded[name[len("backbone.bottom_up.") :]], value), name
