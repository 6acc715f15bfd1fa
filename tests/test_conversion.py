"""Conversion of weights: detectors there and back, names, and what a file is."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from gfl_d2 import load_config
from gfl_d2.checkpoint import GFLCheckpointer, load_checkpoint_config
from gfl_d2.conversion import (
    Checkpoint,
    check_config,
    from_mmdet,
    read_checkpoint,
    to_mmdet,
    write_checkpoint,
)
from gfl_d2.conversion import names as naming
from gfl_d2.errors import name_some
from mmdet_weights import (
    COCO,
    CONFIGS,
    again,
    assert_same,
    checkpoint,
    detector,
    legacy_detector,
    narrow_config,
    neck_and_head,
    refusal,
    res2net,
    res2net_detector,
    resnet,
    run_tool,
    small_model,
    without,
    without_norm,
)
from reference_data import checkpoint_file

# Whole detectors of MMDetection, and what they compute.


@pytest.mark.parametrize("variant", ["x50", "r50", "r50_dcn", "r50_dcnv2"])
def test_detectors_of_mmdetection_compute_the_same(tmp_path, capsys, variant):
    source = checkpoint_file(f"mmdet_gfl_narrow_{variant}.pth")
    expected = np.load(checkpoint_file(f"mmdet_gfl_narrow_{variant}_expected.npz"))
    image = expected["image_rgb"]
    assert run_tool(source, tmp_path / "weights.pth") is None

    # As printed, but for what depends on the machine and the image.
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:2] == ["python", "train_net.py"]
    opts = [*command[command.index("--eval-only") + 1 :], "MODEL.DEVICE", "cpu"]
    opts += ["INPUT.MIN_SIZE_TEST", image.shape[0]]
    if command[2] == "--config-file":
        cfg = load_config(command[3], opts)
    else:
        cfg = load_checkpoint_config(opts[1], opts)
    predictor = DefaultPredictor(cfg)

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
    scores, labels = expected["det_scores"], expected["det_labels"]
    np.testing.assert_allclose(detections.scores, scores, rtol=0, atol=1e-4)
    # Of scores that are equal but for rounding, any may come first.
    group = np.cumsum(np.diff(scores, prepend=scores[0]) < -2e-6)
    ours, theirs = (np.lexsort((x, group)) for x in (detections.pred_classes.numpy(), labels))
    np.testing.assert_array_equal(detections.pred_classes[ours], labels[theirs])
    boxes = detections.pred_boxes.tensor[ours]
    np.testing.assert_allclose(boxes, expected["det_boxes"][theirs], rtol=0, atol=0.05)

    assert run_tool(tmp_path / "weights.pth", tmp_path / "back.pth", "--to", "mmdet") is None
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert_equal_without_counters(back["state_dict"], read_checkpoint(source).weights)


def test_trained_detector_of_mmdetection_loads(tmp_path):
    source = checkpoint_file("mmdet_gfl_r18_bccd.pth")
    config = CONFIGS / "gfl_R_18_FPN_bccd_reference.yaml"
    assert run_tool(source, tmp_path / "weights.pth", "--config-file", config) is None
    model = build_model(load_config(str(config), ["MODEL.DEVICE", "cpu"]))
    GFLCheckpointer(model, complete=True).load(str(tmp_path / "weights.pth"))
    there = read_checkpoint(source).weights
    assert there["bbox_head.gfl_cls.weight"].dtype == torch.float16  # and loading casts
    assert torch.equal(model.head.cls_score.weight, there["bbox_head.gfl_cls.weight"].float())

    assert run_tool(tmp_path / "weights.pth", tmp_path / "back.pth", "--to", "mmdet") is None
    assert_equal_without_counters(read_checkpoint(tmp_path / "back.pth").weights, there)


def assert_equal_without_counters(weights, expected):
    """As loaded strictly: the same names, shapes and values, but for counters."""
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].shape == value.shape, name
        assert weights[name].dtype == value.dtype, name
        is_counter = name.endswith("num_batches_tracked")
        assert torch.equal(weights[name], torch.zeros_like(value) if is_counter else value), name


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


@pytest.mark.parametrize("config", ["gfl_v2_R_101_DCN_FPN_ms_2x", "gfl_v2_R2_101_DCN_FPN_ms_2x"])
def test_no_two_parameters_have_the_same_names(config):
    names = naming.unpack(small_model(config=f"{config}.yaml")[1].state_dict())
    res2net = "R2" in config
    there = [there for name in names for there in naming.names_there(name, res2net=res2net)]
    assert len(there) == len(set(there)) >= len(names)


# The round trip.


MODELS = {
    "plain": detector,
    "dcn": lambda: detector((0, 18, 18, 18)),
    "v2": lambda: detector(classes=80, dgqp=True, reg_max=7),
    "no norm": lambda: without_norm(detector()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_from_mmdet(tmp_path, name, dtype):
    weights = {n: v.to(dtype) if v.is_floating_point() else v for n, v in MODELS[name]().items()}
    torch.save({"meta": {}, "state_dict": weights}, tmp_path / "there.pth")
    converted = from_mmdet(read_checkpoint(tmp_path / "there.pth"))
    write_checkpoint(converted.content, tmp_path / "here.pth")
    back = to_mmdet(read_checkpoint(tmp_path / "here.pth")).content["state_dict"]
    assert_equal_without_counters(back, weights)


def test_names_of_old_versions_become_new_ones():
    old = detector((0, 0, 27, 27), offset="conv2_offset")
    new = {n.replace("conv2_offset", "conv2.conv_offset"): v for n, v in old.items()}
    here = from_mmdet(checkpoint(old)).content
    assert_same(from_mmdet(checkpoint(new)).content["model"], here["model"])
    assert_equal_without_counters(to_mmdet(again(here)).content["state_dict"], new)


def test_background_channel_does_not_come_back():
    weights = res2net_detector()
    back = to_mmdet(again(from_mmdet(checkpoint(weights)).content)).content["state_dict"]
    for name in ("bbox_head.gfl_cls.weight", "bbox_head.gfl_cls.bias"):
        weights[name] = weights[name][:80]
    assert_equal_without_counters(back, weights)


def test_counters_and_bins_are_not_needed():
    weights = without(detector(), "num_batches_tracked", "project")
    expected = from_mmdet(checkpoint(detector())).content["model"]
    assert_same(from_mmdet(checkpoint(weights)).content["model"], expected)


@pytest.mark.parametrize(
    ("config", "opts"),
    [
        ("gfl_R_50_FPN_1x.yaml", ()),
        ("gfl_R_101_DCN_FPN_ms_2x.yaml", ()),
        ("gfl_X_101_32x4d_FPN_ms_2x.yaml", ("MODEL.RESNETS.NUM_GROUPS", 2)),
        ("gfl_v2_R_50_FPN_1x.yaml", ("MODEL.GFL.DGQP_TOPK", 2, "MODEL.GFL.DGQP_CHANNELS", 8)),
        ("gfl_v2_R2_101_DCN_FPN_ms_2x.yaml", ()),
        ("gfl_R_50_FPN_1x.yaml", ("MODEL.GFL.REG_MAX", 5, "MODEL.GFL.NORM", "")),
    ],
)
def test_round_trip_from_ours_is_the_identity(config, opts):
    cfg, model = small_model(*opts, config=config)
    weights = model.state_dict()
    there = to_mmdet(Checkpoint("here.pth", weights), cfg)
    check_config(there.needed, cfg, config)
    back = from_mmdet(again(there.content), cfg)
    check_config(back.needed, cfg, config)
    assert_same(back.content["model"], weights)


@pytest.mark.parametrize("make", [resnet, res2net])
def test_backbone_goes_there_and_back(make):
    weights = make()
    here = from_mmdet(checkpoint(weights)).content
    there = to_mmdet(again(here)).content["state_dict"]
    assert_equal_without_counters(there, weights)
    assert_same(from_mmdet(checkpoint(there)).content["model"], here["model"])


# What a file is.


def test_weights_may_be_bare_or_wrapped():
    weights = detector()
    expected = from_mmdet(checkpoint(weights)).content["model"]
    parallel = {f"module.{name}": value for name, value in weights.items()}
    for content in (weights, {"model": weights}, {"state_dict": parallel, "meta": None}):
        assert_same(from_mmdet(again(content)).content["model"], expected)


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"CLASSES": tuple("abcde")}, [*"abcde"]),  # MMDetection 2
        ({"dataset_meta": {"classes": [*"abcde"]}}, [*"abcde"]),  # 3
        ({"dataset_meta": {"CLASSES": tuple("abcde")}}, [*"abcde"]),
        ({"CLASSES": tuple("abcd")}, None),
        ({"CLASSES": (1, 2, 3, 4, 5)}, None),
        ({"CLASSES": "abcde"}, None),
        ({}, None),
    ],
)
def test_names_of_classes_are_kept(meta, expected):
    content = from_mmdet(checkpoint(detector(), **meta)).content
    assert content.get("class_names") == expected
    read = again({**content, "config": "a: 1"})
    assert read.ignored == ()
    back = to_mmdet(read).content["meta"]
    assert back == ({"CLASSES": tuple(expected)} if expected else {})


def test_names_of_classes_without_the_background():
    weights = checkpoint(detector(classes=6, dgqp=True), CLASSES=[*"abcde"])
    assert from_mmdet(weights).content["class_names"] == [*"abcde"]


def test_what_else_is_in_a_file_is_ignored_and_named():
    weights = detector()
    ema = {f"ema_{name.replace('.', '_')}": value for name, value in weights.items()}
    mean = {"data_preprocessor.mean": torch.zeros(3, 1, 1)}
    content = {"state_dict": {**weights, **ema, **mean}, "optimizer": {"state": {}}}
    content["ema_state_dict"] = {"module.backbone.conv1.weight": torch.zeros(1)}
    read = again(content)
    assert read.ignored == ("optimizer", "ema_state_dict")
    result = from_mmdet(read)
    assert_same(result.content["model"], from_mmdet(checkpoint(weights)).content["model"])
    assert result.notes == [f"Left out: data_preprocessor.mean, {name_some(sorted(ema), 4)}."]


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
    assert result.source == source
    assert result.needed["MODEL.GFL.LEGACY_ANCHOR_CENTERS"] is is_legacy
    told = "set MODEL.GFL.LEGACY_ANCHOR_CENTERS True" in " ".join(result.notes)
    assert told is is_legacy


def test_old_anchor_centers_are_suggested(tmp_path, capsys):
    torch.save(legacy_detector(), tmp_path / "in.pth")
    assert run_tool(tmp_path / "in.pth", tmp_path / "out.pth") is None
    assert "MODEL.GFL.LEGACY_ANCHOR_CENTERS True" in capsys.readouterr().out.splitlines()[-1]


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
    assert result.needed["MODEL.GFL.NUM_CLASSES"] == expected
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
    needed = from_mmdet(checkpoint(detector(classes=81))).needed
    assert needed["MODEL.GFL.NUM_CLASSES"] == 81


@pytest.mark.parametrize(
    ("channels", "modulated", "groups"),
    [(18, False, 1), (27, True, 1), (36, False, 2), (81, True, 3)],
)
@pytest.mark.parametrize("offset", ["conv2.conv_offset", "conv2_offset"])
def test_deformable_convolutions(channels, modulated, groups, offset):
    weights = detector((0, 0, channels, channels), offset=offset)
    config = from_mmdet(checkpoint(weights)).needed
    assert config["MODEL.RESNETS.DEFORM_ON_PER_STAGE"] == [False, False, True, True]
    assert config["MODEL.RESNETS.DEFORM_MODULATED"] is modulated
    assert config["MODEL.RESNETS.DEFORM_NUM_GROUPS"] == groups


def test_undecided_deformable_convolutions():
    weights = checkpoint(detector((0, 0, 0, 54)))
    assert "MODEL.RESNETS.DEFORM_MODULATED decides" in refusal(from_mmdet, weights)
    for modulated, groups in ((True, 2), (False, 3)):
        cfg = narrow_config("gfl_R_50_FPN_1x.yaml", "MODEL.RESNETS.DEFORM_MODULATED", modulated)
        config = from_mmdet(weights, cfg).needed
        assert config["MODEL.RESNETS.DEFORM_MODULATED"] is modulated
        assert config["MODEL.RESNETS.DEFORM_NUM_GROUPS"] == groups
