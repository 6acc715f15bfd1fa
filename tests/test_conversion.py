import os
import pickle
import shlex
import subprocess
import sys
import tempfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gfl_d2 import load_config
from gfl_d2.checkpoint import GFLCheckpointer
from gfl_d2.conversion import (
    Checkpoint,
    check_config,
    describe,
    files,
    find_configs,
    find_differences,
    from_mmdet,
    read_checkpoint,
    suggest_command,
    to_mmdet,
    write_checkpoint,
)
from gfl_d2.conversion import names as naming
from gfl_d2.errors import InputError
from reference_data import checkpoint_file
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
    assert list(weights) == list(expected)
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


# Whole detectors of MMDetection, and what they compute.


@pytest.mark.parametrize("variant", ["x50", "r50", "r50_dcn", "r50_dcnv2"])
def test_detectors_of_mmdetection_compute_the_same(tmp_path, capsys, variant):
    source = checkpoint_file(f"mmdet_gfl_narrow_{variant}.pth")
    expected = np.load(checkpoint_file(f"mmdet_gfl_narrow_{variant}_expected.npz"))
    image = expected["image_rgb"]
    assert run_tool(source, tmp_path / "weights.pth") is None

    # As printed, but for what depends on the machine and the image.
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:3] == ["python", "train_net.py", "--config-file"]
    assert command[4] == "--eval-only"
    opts = [*command[5:], "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", image.shape[0]]
    predictor = DefaultPredictor(load_config(command[3], opts))

    outputs = {}
    backbone, head = predictor.model.backbone, predictor.model.head
    for i in range(2, 6):
        stage = getattr(backbone.bottom_up, f"res{i}")
        stage.register_forward_hook(lambda _, __, out, i=i: outputs.update({f"c{i}": out}))
    backbone.register_forward_hook(
        lambda _, __, out: outputs.update({f"fpn{i}": out[f"p{i + 3}"] for i in range(5)})
    )
    head.register_forward_hook(
        lambda _, __, out: outputs.update(
            {f"{n}_l{i}": x for n, maps in zip(("cls_score", "bbox_pred"), out)
             for i, x in enumerate(maps)}
        )
    )  # fmt: skip
    detections = predictor(image[:, :, ::-1])["instances"]

    for name in [f"{kind}_l{i}" for kind in ("cls_score", "bbox_pred") for i in range(5)]:
        assert outputs[name].shape == expected[name].shape
        np.testing.assert_allclose(outputs[name], expected[name], rtol=0, atol=1e-3)
    for name, step in [*((f"c{i}", 4) for i in range(2, 6)), *((f"fpn{i}", 1) for i in range(5))]:
        output = outputs[name][0]
        part = expected[f"{name}_slice"].squeeze()
        np.testing.assert_allclose(output[:8, ::step, ::step], part, rtol=0, atol=1e-3)
        mean, std = expected[f"{name}_mean"], expected[f"{name}_std"]
        np.testing.assert_allclose(output.mean(dim=(1, 2)), mean, rtol=0, atol=1e-3)
        np.testing.assert_allclose(output.std(dim=(1, 2)), std, rtol=0, atol=1e-3)

    assert len(detections) == len(expected["det_boxes"]) > 0
    np.testing.assert_array_equal(detections.pred_classes, expected["det_labels"])
    boxes, scores = detections.pred_boxes.tensor, detections.scores
    np.testing.assert_allclose(boxes, expected["det_boxes"], rtol=0, atol=0.05)
    np.testing.assert_allclose(scores, expected["det_scores"], rtol=0, atol=1e-4)


def test_trained_detector_of_mmdetection_loads(tmp_path):
    source = checkpoint_file("mmdet_gfl_r18_bccd.pth")
    config = CONFIGS / "gfl_R_18_FPN_bccd_reference.yaml"
    assert run_tool(source, tmp_path / "weights.pth", "--config-file", config) is None
    model = build_model(load_config(str(config), ["MODEL.DEVICE", "cpu"]))
    GFLCheckpointer(model, complete=True).load(str(tmp_path / "weights.pth"))
    there = read_checkpoint(source).weights
    assert there["bbox_head.gfl_cls.weight"].dtype == torch.float16  # and loading casts
    assert torch.equal(model.head.cls_score.weight, there["bbox_head.gfl_cls.weight"].float())
    counter = model.state_dict()["backbone.bottom_up.res2.0.conv1.norm.num_batches_tracked"]
    assert counter == there["backbone.layer1.0.bn1.num_batches_tracked"] > 0

    assert run_tool(tmp_path / "weights.pth", tmp_path / "back.pth", "--to", "mmdet") is None
    assert_same(read_checkpoint(tmp_path / "back.pth").weights, there)


@pytest.mark.parametrize("variant", ["x50", "r50", "r50_dcn", "r50_dcnv2"])
def test_detectors_of_mmdetection_come_back_as_they_were(tmp_path, variant):
    source = checkpoint_file(f"mmdet_gfl_narrow_{variant}.pth")
    assert run_tool(source, tmp_path / "here.pth") is None
    assert run_tool(tmp_path / "here.pth", tmp_path / "back.pth", "--to", "mmdet") is None
    there, back = (torch.load(path, weights_only=True) for path in (source, tmp_path / "back.pth"))
    assert list(back) == list(there) == ["state_dict", "meta"]
    assert_same(back["state_dict"], there["state_dict"])
    assert back["meta"] == there["meta"]


# Names.


def test_names():
    weights = {**detector((0, 0, 18, 18)), **neck_and_head(dgqp=True)}
    model = from_mmdet(checkpoint(weights, CLASSES=[*"abcde"])).content["model"]
    for there, here in {
        "backbone.conv1.weight": "backbone.bottom_up.stem.conv1.weight",
        "backbone.bn1.running_var": "backbone.bottom_up.stem.conv1.norm.running_var",
        "backbone.layer1.0.conv1.weight": "backbone.bottom_up.res2.0.conv1.weight",
        "backbone.layer2.3.bn2.bias": "backbone.bottom_up.res3.3.conv2.norm.bias",
        "backbone.layer3.5.conv2.conv_offset.bias": "backbone.bottom_up.res4.5.conv2_offset.bias",
        "backbone.layer4.0.downsample.0.weight": "backbone.bottom_up.res5.0.shortcut.weight",
        "backbone.layer4.0.downsample.1.bias": "backbone.bottom_up.res5.0.shortcut.norm.bias",
        "neck.lateral_convs.1.conv.bias": "backbone.fpn_lateral4.bias",
        "neck.fpn_convs.2.conv.weight": "backbone.fpn_output5.weight",
        "neck.fpn_convs.3.conv.weight": "backbone.top_block.p6.weight",
        "neck.fpn_convs.4.conv.weight": "backbone.top_block.p7.weight",
        "bbox_head.cls_convs.1.conv.weight": "head.cls_subnet.1.weight",
        "bbox_head.cls_convs.1.gn.weight": "head.cls_subnet.1.norm.weight",
        "bbox_head.reg_convs.0.conv.weight": "head.bbox_subnet.0.weight",
        "bbox_head.reg_convs.0.gn.bias": "head.bbox_subnet.0.norm.bias",
        "bbox_head.gfl_cls.bias": "head.cls_score.bias",
        "bbox_head.gfl_reg.weight": "head.bbox_pred.weight",
        "bbox_head.reg_conf.0.weight": "head.quality_pred.0.weight",
        "bbox_head.reg_conf.2.bias": "head.quality_pred.2.bias",
    }.items():
        assert torch.equal(model[here], weights[there]), there
    scales = [weights[f"bbox_head.scales.{i}.scale"] for i in range(5)]
    assert torch.equal(model["head.scales"], torch.stack(scales))
    assert not any("num_batches_tracked" in name or "project" in name for name in model)


def test_names_of_res2net():
    weights = res2net_detector()
    model = from_mmdet(checkpoint(weights)).content["model"]
    for there, here in {
        "stem.0.weight": "stem.conv1.weight",
        "stem.4.bias": "stem.conv2.norm.bias",
        "stem.7.running_mean": "stem.conv3.norm.running_mean",
        "layer1.2.conv1.weight": "res2.2.conv1.weight",
        "layer1.2.bn3.weight": "res2.2.conv3.norm.weight",
        "layer2.0.convs.2.weight": "res3.0.convs.2.weight",
        "layer2.0.bns.2.weight": "res3.0.convs.2.norm.weight",
        "layer3.1.convs.0.conv_offset.bias": "res4.1.conv_offsets.0.bias",
        "layer4.0.downsample.1.weight": "res5.0.shortcut.weight",
        "layer4.0.downsample.2.weight": "res5.0.shortcut.norm.weight",
    }.items():
        there, here = f"backbone.{there}", f"backbone.bottom_up.{here}"
        assert torch.equal(model[here], weights[there]), there


def test_rules_never_give_two_names_for_one():
    for rules in (naming._RESNET_RULES, naming._RES2NET_RULES):
        theirs = [there for there, _ in (*naming._DETECTOR_RULES, *rules)]
        assert len(theirs) == len(set(theirs))


@given(st.integers(0, 30), st.integers(1, 4), st.sampled_from(["weight", "bias", "running_mean"]))
def test_rules_invert_each_other(block, stage, part):
    for rules in (naming._RESNET_RULES, naming._RES2NET_RULES):
        for template, _ in (*naming._DETECTOR_RULES, *rules):
            values = {"k": stage, "w": part, "s": part, "b": block, "i": block, "c": 1}
            name = naming._fill(template, values)
            if "{w}" in template and part == "running_mean":
                assert naming.translate(name, rules) == []
                continue
            ((_, here), *rest) = naming.translate(name, (*naming._DETECTOR_RULES, *rules))
            assert not rest
            back = naming.translate(here, (*naming._DETECTOR_RULES, *rules), back=True)
            assert name in [there for _, there in back]


# The round trip.


MODELS = {
    "plain": (detector, {"mmdet_version": "2.25.0", "CLASSES": tuple("abcde"), "epoch": 12}),
    "dcn": (lambda: detector((0, 18, 18, 18)), {"mmdet_version": "3.3.0"}),
    "old names of dcn": (lambda: detector((0, 0, 27, 27), offset="conv2_offset"), {}),
    "legacy": (legacy_detector, {"mmdet_version": "1.0rc1", "config": "model = dict()"}),
    "v2": (lambda: detector(classes=81, dgqp=True), {"mmdet_version": "2.6.0", "CLASSES": COCO}),
    "res2net": (res2net_detector, {}),
    "no norm": (lambda: without_norm(detector()), {}),
    "no constants": (lambda: without(detector(), "num_batches_tracked", "project"), {}),
}  # fmt: skip


def without(weights, *parts):
    return {n: v for n, v in weights.items() if not any(part in n for part in parts)}


def without_norm(weights):
    weights = without(weights, ".gn.")
    for tower in ("cls_convs", "reg_convs"):
        for i in range(2):
            weights[f"bbox_head.{tower}.{i}.conv.bias"] = torch.randn(64)
    return weights


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_from_mmdet_is_the_identity(tmp_path, name, dtype):
    make, meta = MODELS[name]
    weights = {n: v.to(dtype) if v.is_floating_point() else v for n, v in make().items()}
    torch.save({"meta": meta, "state_dict": weights}, tmp_path / "there.pth")
    converted = from_mmdet(read_checkpoint(tmp_path / "there.pth"))
    write_checkpoint(converted.content, tmp_path / "here.pth")
    content = to_mmdet(read_checkpoint(tmp_path / "here.pth")).content
    assert_same(content["state_dict"], weights)
    assert content["meta"] == meta


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


@pytest.mark.parametrize(
    ("config", "opts"),
    [
        ("gfl_R_50_FPN_1x.yaml", ()),
        ("gfl_R_101_DCN_FPN_ms_2x.yaml", ()),
        ("gfl_X_101_32x4d_FPN_ms_2x.yaml", ("MODEL.RESNETS.NUM_GROUPS", 2)),
        ("gfl_v2_R_50_FPN_1x.yaml", ("MODEL.GFL.DGQP_TOPK", 2, "MODEL.GFL.DGQP_CHANNELS", 8)),
        ("gfl_v2_R2_101_DCN_FPN_ms_2x.yaml", ()),
        ("gfl_R_50_FPN_1x.yaml", ("MODEL.GFL.REG_MAX", 5, "MODEL.GFL.NORM", "")),
        ("gfl_R_50_FPN_1x.yaml", ("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0)),
    ],
)
def test_round_trip_from_ours_is_the_identity(config, opts):
    cfg, model = small_model(*opts, config=config)
    weights = model.state_dict()
    there = to_mmdet(Checkpoint("here.pth", weights), cfg)
    check_config(there.facts, cfg, config)
    back = from_mmdet(again(there.content), cfg)
    check_config(back.facts, cfg, config)
    assert_same(back.content["model"], weights)


def test_what_mmdetection_has_besides_is_made():
    _, model = small_model("MODEL.GFL.REG_MAX", 7)
    there = to_mmdet(Checkpoint("here.pth", model.state_dict())).content["state_dict"]
    assert there["bbox_head.integral.project"].tolist() == list(range(8))
    expected = {
        n.replace("running_var", "num_batches_tracked") for n in there if "running_var" in n
    }
    assert expected == {n for n in there if "num_batches_tracked" in n}
    assert all(there[name].dtype == torch.long and there[name] == 0 for name in expected)
    assert there["bbox_head.gfl_cls.weight"].shape[0] == 3  # no background


@pytest.mark.parametrize("make", [resnet, res2net])
def test_backbone_goes_there_and_back(make):
    weights = {n: torch.zeros_like(v) if "num_batches" in n else v for n, v in make().items()}
    here = from_mmdet(checkpoint(weights)).content
    there = to_mmdet(again(here)).content["state_dict"]
    assert there.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in there.items())
    assert_same(from_mmdet(checkpoint(there)).content["model"], here["model"])


# What a file is.


def test_weights_may_be_bare_or_wrapped():
    weights = detector()
    expected = from_mmdet(checkpoint(weights)).content["model"]
    parallel = {f"module.{name}": value for name, value in weights.items()}
    for content in (weights, {"model": weights}, {"state_dict": parallel, "meta": None}):
        assert_same(from_mmdet(again(content)).content["model"], expected)


def test_what_else_is_in_a_file_is_ignored_and_named():
    weights = detector()
    ema = {f"ema_{name.replace('.', '_')}": value for name, value in weights.items()}
    mean = {"data_preprocessor.mean": torch.zeros(3, 1, 1)}
    content = {"state_dict": {**weights, **ema, **mean}, "optimizer": {"state": {}}}
    content["ema_state_dict"] = {"module.backbone.conv1.weight": torch.zeros(1)}
    result = from_mmdet(again(content))
    assert_same(result.content["model"], from_mmdet(checkpoint(weights)).content["model"])
    notes = " ".join(result.notes)
    assert "Ignored: optimizer, ema_state_dict." in notes
    assert "(EMA): ema_backbone_conv1_weight, " in notes
    assert "data_preprocessor.mean." in notes


@pytest.mark.parametrize(
    ("weights", "meta", "source", "is_legacy"),
    [
        (detector(), {"mmdet_version": "3.3.0"}, "MMDetection 3.3.0", False),
        (detector(), {"mmdet_version": "2.1.0"}, "MMDetection 2.1.0", False),
        (detector(), {}, "MMDetection", False),
        (legacy_detector(), {}, "GFocal, the authors' v1 code base (MMDetection)", True),
        (detector(), {"mmdet_version": "1.1.0+8"}, "GFocal, the authors' v1 code base "
                                                   "(MMDetection 1.1.0+8)", True),
        (detector(dgqp=True), {"mmdet_version": "2.6.0", "CLASSES": [*"abcde"]},
         "GFocalV2 (MMDetection 2.6.0)", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_source(weights, meta, source, is_legacy):
    result = from_mmdet(checkpoint(weights, **meta))
    assert result.facts.source == source
    assert result.facts.config["MODEL.GFL.LEGACY_ANCHOR_CENTERS"] is is_legacy
    told = "set MODEL.GFL.LEGACY_ANCHOR_CENTERS True" in " ".join(result.notes)
    assert told is is_legacy


def test_old_anchor_centers_are_suggested():
    facts = from_mmdet(checkpoint(legacy_detector())).facts
    differences = find_differences(facts, narrow_config())
    command = suggest_command(facts, "c.yaml", differences, "w.pth")
    assert "MODEL.GFL.LEGACY_ANCHOR_CENTERS True" in command


@pytest.mark.parametrize(
    ("channels", "meta", "config_classes", "expected"),
    [
        (81, {"CLASSES": COCO}, None, 80),  # MMDetection 2
        (81, {"dataset_meta": {"CLASSES": COCO}}, None, 80),  # 3
        (81, {"dataset_meta": {"classes": list(COCO)}}, None, 80),
        (6, {"CLASSES": [*"abcde"]}, 6, 5),  # the file knows better
        (5, {"CLASSES": [*"abcde"]}, None, 5),
        (80, {"CLASSES": COCO}, None, 80),
        (81, {}, None, 80),  # COCO
        (80, {}, None, 80),
        (6, {}, 5, 5),
        (6, {}, 6, 6),
        (6, {"CLASSES": COCO}, 5, 5),  # names of another dataset
    ],
)
def test_background_channel_is_dropped(channels, meta, config_classes, expected):
    cfg = config_classes and narrow_config("gfl_v2_R_50_FPN_1x.yaml",
                                           "MODEL.GFL.NUM_CLASSES", config_classes)  # fmt: skip
    weights = detector(classes=channels, dgqp=True)
    result = from_mmdet(checkpoint(weights, **meta), cfg)
    assert result.facts.config["MODEL.GFL.NUM_CLASSES"] == expected
    for part in ("weight", "bias"):
        there = weights[f"bbox_head.gfl_cls.{part}"]
        assert torch.equal(result.content["model"][f"head.cls_score.{part}"], there[:expected])
    assert ("background" in " ".join(result.notes)) is (channels > expected)
    # All of the tensor that a view belongs to would be saved with it.
    saved = result.content["model"]["head.cls_score.weight"]
    assert saved.untyped_storage().nbytes() == saved.numel() * 4


def test_undecided_background_channel_is_refused():
    message = refusal(from_mmdet, checkpoint(detector(classes=6, dgqp=True)))
    assert "bbox_head.gfl_cls has 6 channels" in message
    assert "MODEL.GFL.NUM_CLASSES of --config-file decides" in message


@pytest.mark.parametrize("dgqp", [False, True])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_damaged_classifier_is_no_background_channel(dgqp, part):
    weights = detector(classes=5 + dgqp, dgqp=dgqp)
    name = f"bbox_head.gfl_cls.{part}"
    for damaged in (weights[name][:-1], torch.cat((weights[name], weights[name][:1]))):
        changed = {**weights, name: damaged}
        message = refusal(from_mmdet, checkpoint(changed, CLASSES=[*"abcde"]))
        assert "bbox_head.gfl_cls" in message


def test_first_version_has_no_background_channel():
    facts = from_mmdet(checkpoint(detector(classes=81))).facts
    assert facts.config["MODEL.GFL.NUM_CLASSES"] == 81


@pytest.mark.parametrize(
    ("channels", "modulated", "groups"),
    [(18, False, 1), (27, True, 1), (36, False, 2), (81, True, 3)],
)
@pytest.mark.parametrize("offset", ["conv2.conv_offset", "conv2_offset"])
def test_deformable_convolutions(channels, modulated, groups, offset):
    weights = detector((0, 0, channels, channels), offset=offset)
    config = from_mmdet(checkpoint(weights)).facts.config
    assert config["MODEL.RESNETS.DEFORM_ON_PER_STAGE"] == [False, False, True, True]
    assert config["MODEL.RESNETS.DEFORM_MODULATED"] is modulated
    assert config["MODEL.RESNETS.DEFORM_NUM_GROUPS"] == groups


def test_undecided_deformable_convolutions():
    weights = checkpoint(detector((0, 0, 0, 54)))
    assert "MODEL.RESNETS.DEFORM_MODULATED decides" in refusal(from_mmdet, weights)
    for modulated, groups in ((True, 2), (False, 3)):
        cfg = narrow_config("gfl_R_50_FPN_1x.yaml", "MODEL.RESNETS.DEFORM_MODULATED", modulated)
        config = from_mmdet(weights, cfg).facts.config
        assert config["MODEL.RESNETS.DEFORM_MODULATED"] is modulated
        assert config["MODEL.RESNETS.DEFORM_NUM_GROUPS"] == groups


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
    assert "the ImageNet classifier: fc.weight, fc.bias." in " ".join(result.notes)
    assert describe(result.facts) == "ResNeXt-50 32x4d; no detector"
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


def test_backbone_starts_training_of_a_detector(tmp_path):
    torch.manual_seed(0)
    result = from_mmdet(checkpoint(bare(resnet())))
    write_checkpoint(result.content, tmp_path / "R-50.pth")
    # Deformable convolutions, of which ImageNet weights know nothing, are no contradiction.
    deform = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, True]]
    cfg, model = small_model(*deform)
    assert check_config(result.facts, cfg, "config.yaml") == []
    GFLCheckpointer(model).load(str(tmp_path / "R-50.pth"))
    loaded = model.state_dict()
    for name, value in result.content["model"].items():
        assert torch.equal(loaded[name], value), name


def test_resnext_101_needs_its_config():
    with torch.device("meta"):
        theirs = torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4
        )
    facts = from_mmdet(checkpoint(theirs.state_dict())).facts
    names = {Path(file).name for file, changes in find_configs(facts, CONFIGS.glob("*.yaml"))
             if not changes}  # fmt: skip
    assert {"gfl_X_101_32x4d_FPN_ms_2x.yaml", "gfl_X_101_32x4d_DCN_FPN_ms_2x.yaml"} <= names
    assert all("X_101_32x4d" in name for name in names)
    command = suggest_command(facts, "c.yaml", [], "X-101-32x4d.pth")
    assert command == "python train_net.py --config-file c.yaml MODEL.WEIGHTS X-101-32x4d.pth"


@pytest.mark.parametrize("change", ["missing", "extra", "deep stem"])
def test_backbones_in_part_are_refused(change):
    weights = bare(resnet())
    if change == "missing":
        del weights["layer3.1.conv2.weight"]
        assert "Not in the file (1): layer3.1.conv2.weight" in refusal(
            from_mmdet, checkpoint(weights)
        )
    elif change == "extra":
        weights["layer3.1.se.fc1.weight"] = torch.zeros(1)
        message = refusal(from_mmdet, checkpoint(weights))
        assert "Not in the model (1): layer3.1.se.fc1.weight" in message
    else:
        weights["conv1.0.weight"] = weights.pop("conv1.weight")
        message = refusal(from_mmdet, checkpoint(weights))
        assert "Not in the file (1): conv1.weight" in message
        assert "Not in the model (1): conv1.0.weight" in message


# Configs.


def shipped_configs():
    names = sorted(path.name for path in CONFIGS.glob("gfl_*.yaml"))
    assert names
    return names


@pytest.mark.parametrize("name", shipped_configs())
def test_weights_of_a_shipped_config_find_it(name):
    cfg = load_config(str(CONFIGS / name), ["MODEL.DEVICE", "cpu"]).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        weights = build_model(cfg).state_dict()
    facts = to_mmdet(Checkpoint("here.pth", weights)).facts
    fitting = find_configs(facts, CONFIGS.glob("*.yaml"))
    assert all(not changes for _, changes in fitting)
    assert name in [Path(file).name for file, _ in fitting]
    assert find_differences(facts, cfg) == []


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
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    # Old anchor centres are no reason to refuse: no config has them.
    assert command[-2:] == ["MODEL.GFL.LEGACY_ANCHOR_CENTERS", "True"]
    cfg = load_config(command[3], [*command[5:], "MODEL.DEVICE", "cpu"])
    GFLCheckpointer(build_model(cfg), complete=True).load(cfg.MODEL.WEIGHTS)
    assert "options change a config" in run_tool(*args[:2], *opts)


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


# Refusals.


WEIGHTS = detector((0, 0, 27, 27), offset="conv2_offset")
NAMES = sorted(WEIGHTS)
REQUIRED = [n for n in NAMES if "num_batches_tracked" not in n and "project" not in n]
SOME = settings(max_examples=30)


@SOME
@given(st.permutations(NAMES))
def test_order_does_not_matter(names):
    expected = from_mmdet(checkpoint(WEIGHTS))
    result = from_mmdet(checkpoint({name: WEIGHTS[name] for name in names}))
    assert result.facts == expected.facts
    model = result.content["model"]
    assert model.keys() == expected.content["model"].keys()
    assert all(torch.equal(v, expected.content["model"][n]) for n, v in model.items())
    assert_same(to_mmdet(again(result.content)).content["state_dict"],
                {name: WEIGHTS[name] for name in names})  # fmt: skip


@SOME
@given(st.sampled_from(REQUIRED))
def test_missing_key_is_refused(name):
    weights = {n: v for n, v in WEIGHTS.items() if n != name}
    message = refusal(from_mmdet, checkpoint(weights))
    assert message.startswith("Weights file file.pth ")
    assert f"Not in the file (1): {name}" in message


@SOME
@given(
    st.one_of(
        st.sampled_from([f"{name}_" for name in REQUIRED]),
        st.sampled_from(REQUIRED).map(lambda name: name.replace(".0.", ".9.")).filter(
            lambda name: name not in WEIGHTS
        ),
        st.sampled_from(
            ["backbone.layer4.0.bn9.num_batches_tracked", "bbox_head.atss_centerness.weight",
             "neck.lateral_convs.3.conv.weight", "bbox_head.scales.5.scale", "fc.weight", "x"]
        ),
        st.text(min_size=1).filter(lambda name: not name.startswith("ema_")),
    )
)  # fmt: skip
def test_extra_key_is_refused(name):
    message = refusal(from_mmdet, checkpoint({**WEIGHTS, name: torch.zeros(1)}))
    assert f"Not in the model (1): {name}" in message.replace("\\n", "\n")


@SOME
@given(st.sampled_from(NAMES), st.data())
def test_wrong_shape_is_refused(name, data):
    value = WEIGHTS[name]
    shape = list(value.shape)
    axis = data.draw(st.integers(0, len(shape)))
    if axis == len(shape):
        shape.append(1)
    else:
        shape[axis] += data.draw(st.sampled_from([-1, 1, shape[axis]]))
    weights = {**WEIGHTS, name: torch.zeros(shape, dtype=value.dtype)}
    message = refusal(from_mmdet, checkpoint(weights))
    # Of the two tensors that show a number of channels, neither is wrong more than the other.
    twin = name.rpartition(".")[0] + (".bias" if name.endswith("weight") else ".weight")
    assert name in message or (twin in message and name.startswith("bbox_head.gfl_"))


def test_every_wrong_key_is_named():
    weights = {n: v for n, v in WEIGHTS.items() if not n.startswith("bbox_head.scales.3")}
    weights["bbox_head.extra"] = torch.zeros(1)
    weights["neck.fpn_convs.0.conv.bias"] = torch.zeros(7)
    weights["backbone.conv1.weight"] = weights["backbone.conv1.weight"].long()
    message = refusal(from_mmdet, checkpoint(weights))
    assert "Not in the file (1): bbox_head.scales.3.scale. " in message
    assert "Not in the model (1): bbox_head.extra. " in message
    assert "neck.fpn_convs.0.conv.bias is (7,), not (64,). " in message
    assert "Not floating-point (1): backbone.conv1.weight" in message


def test_two_names_of_one_parameter_are_refused():
    name = "backbone.layer4.0.conv2_offset.weight"
    other = "backbone.layer4.0.conv2.conv_offset.weight"
    message = refusal(from_mmdet, checkpoint({**WEIGHTS, other: WEIGHTS[name]}))
    assert f"{name} and {other} are two names" in message


@pytest.mark.parametrize("project", ["integral", "distribution_project"])
def test_other_bins_are_refused(project):
    name = f"bbox_head.{project}.project"
    for bins in (torch.arange(17.0) / 2, torch.arange(16.0)):
        weights = {**without(WEIGHTS, "project"), name: bins}
        assert f"{name} is not 0, 1, ..., 16" in refusal(from_mmdet, checkpoint(weights))


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"weight": torch.zeros(1)},
        lambda: {"bbox_head.retina_cls.weight": torch.zeros(1)},
        lambda: {n.replace("gfl_", "atss_"): v for n, v in WEIGHTS.items()},
        lambda: {**resnet(blocks=(2, 2, 2, 2)), **neck_and_head()},  # a depth that there is not
        lambda: {**resnet(), **neck_and_head(channels=48)},  # not for 32 groups
    ],
)
def test_other_models_are_refused(make):
    weights = make()
    message = refusal(from_mmdet, checkpoint(weights))
    assert "file.pth" in message


def test_wrong_direction_is_refused():
    result = from_mmdet(checkpoint(WEIGHTS))
    assert "--to mmdet" in refusal(from_mmdet, again(result.content))
    assert "no checkpoint of this project" in refusal(to_mmdet, checkpoint(WEIGHTS))


def test_incomplete_checkpoint_of_ours_is_refused():
    _, model = small_model()
    weights = model.state_dict()
    del weights["head.bbox_subnet.0.norm.bias"]
    weights["head.other"] = torch.zeros(1)
    message = refusal(to_mmdet, Checkpoint("here.pth", weights))
    assert "Not in the file (1): head.bbox_subnet.0.norm.bias. " in message
    assert "Not in the model (1): head.other" in message


@pytest.mark.parametrize(
    "damage",
    [{"names": 3}, {"names": [3]}, {"tensors": {"bbox_head.integral.project": 1}},
     {"background": {"bbox_head.gfl_cls.weight": torch.zeros(1, 2)}}],
)  # fmt: skip
def test_damaged_leftovers_are_refused(damage):
    content = from_mmdet(checkpoint(WEIGHTS)).content
    content["mmdet"].update(damage)
    assert "'mmdet'" in refusal(to_mmdet, again(content))


# Files.


class Payload:
    """Executed by an ordinary unpickler."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def payloads(marker):
    command = f"touch {shlex.quote(str(marker))}"
    code = f"open({str(marker)!r}, 'w')"
    yield Payload(os.system, command)
    yield Payload(eval, code)
    yield Payload(exec, code)
    yield Payload(open, str(marker), "w")
    yield Payload(subprocess.call, ["touch", str(marker)])
    yield Payload(os.mkdir, str(marker))


def is_refused(path, content=None):
    """Through the tool: a plain message, nothing written."""
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    message = run_tool(path, path.with_name("out.pth"))
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    assert str(message).startswith("Error: ") and str(path) in message and "\n" not in message
    return message


def test_payloads_are_dangerous(tmp_path):
    for i, payload in enumerate(payloads(tmp_path / "executed")):
        torch.save(payload, tmp_path / f"{i}.pth")
        torch.load(tmp_path / f"{i}.pth", weights_only=False)
        assert (tmp_path / "executed").exists()
        marker = tmp_path / "executed"
        marker.rmdir() if marker.is_dir() else marker.unlink()


@pytest.mark.parametrize("place", ["state_dict", "meta", "weight", "top", "plain pickle", "legacy"])
def test_pickle_with_a_payload_is_refused_unexecuted(tmp_path, place):
    marker = tmp_path / "executed"
    for payload in payloads(marker):
        contents = {
            "state_dict": {"state_dict": payload},
            "meta": {"state_dict": WEIGHTS, "meta": {"a": [payload]}},
            "weight": {"state_dict": {**WEIGHTS, "bbox_head.gfl_cls.bias": payload}},
        }
        content = contents.get(place, payload)
        path = tmp_path / "in.pth"
        if place == "plain pickle":
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=place != "legacy")
        message = is_refused(path)
        assert not marker.exists()
        assert "nothing in it has been executed" in message
        assert "weights_only=True" not in message


def test_payload_under_names_that_are_read_as_nothing(tmp_path):
    """``getattr`` is one of them: it gets nothing."""
    for call in (Payload(getattr, os, "system"), Payload(getattr, [], "append")):
        path = tmp_path / "in.pth"
        try:
            torch.save({"state_dict": WEIGHTS, "meta": {"a": call}}, path)
        except TypeError:  # modules cannot be pickled
            continue
        assert from_mmdet(read_checkpoint(path)).content["mmdet"]["meta"] == {}
        torch.save({"state_dict": {"a": call}}, path)
        assert "not map names to tensors, but 'a'" in is_refused(path)


def test_log_of_mmdetection_3_is_read_as_nothing(tmp_path, monkeypatch):
    class HistoryBuffer:
        def __init__(self):
            self.history = np.array([1.0, 2.0])
            self.methods = OrderedDict(mean=HistoryBuffer.mean)

        def mean(self):
            return self.history.mean()

    name = "mmengine.logging.history_buffer"
    module = types.ModuleType(name)
    module.HistoryBuffer = HistoryBuffer
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    HistoryBuffer.mean.__module__ = name
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    content = {
        "meta": {"epoch": 3, "score": np.float64(0.5), "dataset_meta": {"classes": tuple("abcde")}},
        "state_dict": WEIGHTS,
        "message_hub": {"log_scalars": {"loss": HistoryBuffer()}},
    }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
        patch.setitem(sys.modules, "mmengine.logging", types.ModuleType("mmengine.logging"))
        patch.setitem(sys.modules, name, module)
        torch.save(content, tmp_path / "in.pth")
    read = read_checkpoint(tmp_path / "in.pth")
    assert read.ignored == ("message_hub",)
    assert_same(read.weights, WEIGHTS)
    meta = from_mmdet(read).content["mmdet"]["meta"]
    assert meta == {"epoch": 3, "dataset_meta": {"classes": tuple("abcde")}}


def saved_bytes():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.pth"
        torch.save({"state_dict": neck_and_head(num_convs=0, channels=8)}, path)
        return path.read_bytes()


@SOME
@given(st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_refused(part):
    content = saved_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.pth"
        path.write_bytes(content[: int(part * len(content))])
        assert "cannot be read" in refusal(read_checkpoint, path)


@SOME
@given(st.binary())
def test_bytes_that_are_no_checkpoint_are_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.pth"
        path.write_bytes(content)
        assert str(path) in refusal(read_checkpoint, path)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / "in.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights")
    assert "cannot be read" in is_refused(path)
    for content in ([torch.zeros(1)], torch.zeros(1), {"state_dict": {"a": 1}}, {1: torch.zeros(1)},
                    {"epoch": 3}, {}, {"a": torch.zeros(2, 2).to_sparse()}):  # fmt: skip
        torch.save(content, path)
        is_refused(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    assert "cannot be read" in is_refused(path)
    assert "does not exist" in run_tool(tmp_path / "none.pth", tmp_path / "out.pth")


def test_output_is_checked_before_anything_is_read(tmp_path):
    path = tmp_path / "in.pth"
    path.write_bytes(b"not even a checkpoint")
    for output, reason in (
        (path, "is not overwritten"),
        (tmp_path / "out.pkl", "must end in .pth"),
        (tmp_path / "none" / "out.pth", "there is no folder"),
    ):
        assert reason in run_tool(path, output)
    (tmp_path / "link.pth").symlink_to(path)
    assert "is not overwritten" in run_tool(path, tmp_path / "link.pth")
    assert path.read_bytes() == b"not even a checkpoint"


def test_failure_to_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.pth"
    path.write_bytes(b"before")

    def save_in_part(content, file):
        Path(file).write_bytes(b"part")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", save_in_part)
    assert "No space left" in refusal(write_checkpoint, {}, path)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["out.pth"]


def test_refusal_leaves_what_was_there(tmp_path):
    (tmp_path / "out.pth").write_bytes(b"before")
    torch.save({"state_dict": without(WEIGHTS, "gfl_cls")}, tmp_path / "in.pth")
    assert "bbox_head.gfl_cls.weight" in is_refused(tmp_path / "in.pth")
    assert (tmp_path / "out.pth").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("make", "config"),
    [(resnet, "gfl_R_101_DCN_FPN_ms_2x.yaml"), (res2net, "gfl_v2_R2_101_DCN_FPN_ms_2x.yaml")],
)
def test_deformable_detectors_start_from_imagenet(tmp_path, make, config):
    """Their offsets, which ImageNet weights lack, start at 0; all else is loaded."""
    torch.manual_seed(0)
    weights = make(blocks=(3, 4, 23, 3), planes=16)
    write_checkpoint(from_mmdet(checkpoint(weights)).content, tmp_path / "weights.pth")
    opts = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    if make is resnet:
        opts += ["MODEL.RESNETS.WIDTH_PER_GROUP", 16]
    model = build_model(narrow_config(config, *opts))
    GFLCheckpointer(model).load(str(tmp_path / "weights.pth"))
    loaded = model.backbone.bottom_up.state_dict()
    offsets = [name for name in loaded if "offset" in name]
    assert offsets
    assert all((loaded[name] == 0).all() for name in offsets)
    for name, value in from_mmdet(checkpoint(weights)).content["model"].items():
        assert torch.equal(loaded[name[len("backbone.bottom_up.") :]], value), name


def test_a_gaussian_is_not_taken_for_a_distribution():
    """Both have two numbers a side where there are two bins."""
    cfg, model = small_model("MODEL.GFL.BOX_REPRESENTATION", "gaussian")
    source = Checkpoint("here.pth", model.state_dict())
    assert "MODEL.GFL.BOX_REPRESENTATION decides" in refusal(to_mmdet, source)
    facts = to_mmdet(source, cfg).facts
    assert "BOX_REPRESENTATION is 'gaussian'" in refusal(check_config, facts, cfg, "c.yaml")
    cfg, model = small_model("MODEL.GFL.REG_MAX", 1)
    facts = to_mmdet(Checkpoint("here.pth", model.state_dict()), cfg).facts
    assert check_config(facts, cfg, "c.yaml") == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("MODEL.GFL.BIN_WIDTH", 0.5), ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5)],
)
def test_what_mmdetection_does_not_have_is_refused_with_a_config(key, value):
    cfg, model = small_model(key, value)
    source = Checkpoint("here.pth", model.state_dict())
    assert key in refusal(check_config, to_mmdet(source, cfg).facts, cfg, "c.yaml")
    assert "Give --config-file" in " ".join(to_mmdet(source).notes)


def test_old_versions_of_pytorch_read_plain_files(tmp_path, monkeypatch):
    torch.save({"state_dict": detector(), "meta": {"epoch": 1}}, tmp_path / "there.pth")
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    monkeypatch.delattr(torch.serialization, "safe_globals")
    assert read_checkpoint(tmp_path / "there.pth").meta == {"epoch": 1}
