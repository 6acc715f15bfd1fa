"""Exported files detect what the model does, and what cannot be exported is refused at once."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from gfl_d2 import __version__
from gfl_d2.checkpoint import describe_model
from gfl_d2.deploy.export import EXTENSIONS, ExportOptions, export_model, exporting, load_exported
from gfl_d2.errors import InputError
from models import CHOICES, WITH_RESNET, small_config
from scripts import load_script

# Two levels instead of five: the exporters take a while for each. In three sizes, of which the
# smallest is the least that there can be.
TWO_LEVELS = ("MODEL.GFL.IN_FEATURES", ["p3", "p5"], "INPUT.MIN_SIZE_TEST", 320)
# Those that differ at inference: other choices differ in their losses.
COMBINATIONS = [
    (*x[:2],) for x in CHOICES if x[0] in ("joint", "dgqp", "centerness") and x[2] == "atss"
]
RESNET = (*WITH_RESNET, "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32)
DEFORM = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, True])
BACKBONES = {
    "ResNeXt": (*RESNET, "MODEL.RESNETS.NUM_GROUPS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 2),
    "DCN": (*RESNET, *DEFORM),
    "DCNv2": (*RESNET, *DEFORM, "MODEL.RESNETS.DEFORM_MODULATED", True),
    "Res2Net": (
        *("MODEL.BACKBONE.NAME", "build_gfl_res2net_fpn_backbone", "MODEL.RESNETS.DEPTH", 50),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.STRIDE_IN_1X1", False),
    ),
}


def make_config(folder, quality="joint", box="general", *opts):
    """Of a model with random weights that detects something, in a checkpoint."""
    weights = str(folder / "weights.pth")
    cfg = small_config(quality, box, "atss", *TWO_LEVELS, "MODEL.WEIGHTS", weights, *opts)
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if "offset" in name:  # of deformable convolutions, 0 at first
            nn.init.normal_(parameter, std=1.0 if name.endswith("bias") else 1e-4)
    nn.init.normal_(model.head.cls_score.weight, std=0.2)
    nn.init.constant_(model.head.cls_score.bias, -2.0)
    content = {"model": model.state_dict(), **describe_model(cfg, ["red", "white", "platelet"])}
    torch.save(content, weights)
    return cfg


@pytest.fixture
def picture(tmp_path):
    """Blobs of some size, 90 x 120 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    path = str(tmp_path / "picture.png")
    cv2.imwrite(path, cv2.resize(pixels, (120, 90), interpolation=cv2.INTER_CUBIC))
    return path


def export(cfg, folder, picture, **options):
    options = ExportOptions(**options)
    path = folder / f"model{EXTENSIONS[options.format]}"
    return path, export_model(cfg, options, path, picture)


def assert_same(check):
    assert check.unmatched == 0
    assert check.detections > 10


@pytest.mark.parametrize("choices", COMBINATIONS)
def test_choices(choices, tmp_path, picture):
    """In the format that takes a second. Checked by `export_model` at three sizes."""
    _, check = export(make_config(tmp_path, *choices), tmp_path, picture, format="torchscript")
    assert_same(check)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones(backbone, tmp_path, picture):
    cfg = make_config(tmp_path, "joint", "general", *BACKBONES[backbone])
    _, check = export(cfg, tmp_path, picture, format="torchscript")
    assert_same(check)


def has_packages(*names):
    return all(importlib.util.find_spec(name) for name in names)


# Continuous integration has all of them.
NEEDS = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torchscript": (),
    "torch-export": (),
}
FORMATS = [
    pytest.param(x, marks=pytest.mark.skipif(not has_packages(*NEEDS[x]), reason="not installed"))
    for x in EXTENSIONS
]


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_any_size_with_nms(file_format, tmp_path, picture):
    cfg = make_config(tmp_path)
    path, check = export(cfg, tmp_path, picture, format=file_format)
    assert_same(check)
    assert len(check.lines) == 6  # three sizes, one image and two
    exported = load_exported(path)
    info = exported.metadata
    assert info["version"] == __version__
    assert info["class_names"] == ["red", "white", "platelet"]
    assert (info["input_format"], info["input_type"]) == (cfg.INPUT.FORMAT, "float32")
    assert (info["min_size"], info["max_size"]) == (320, cfg.INPUT.MAX_SIZE_TEST)
    assert info["resize_filter"] == "pillow"
    assert (info["size_divisibility"], info["size"], info["nms"]) == (32, None, True)
    assert info["score_threshold"] == cfg.MODEL.GFL.SCORE_THRESH_TEST
    assert info["config"] == cfg.dump()
    # What the padding holds does not matter, and the number of detections is always the same.
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 160, 192)).astype(np.float32)
    sizes = np.array([[150, 170]])
    boxes, scores, labels = exported(pixels, sizes)
    assert boxes.shape == (1, cfg.TEST.DETECTIONS_PER_IMAGE, 4)
    assert scores.shape == labels.shape == boxes.shape[:2]
    assert labels.dtype == np.int64
    assert (scores[0, :-1] >= scores[0, 1:]).all() and scores[0, 0] > 0.1 and scores[0, -1] == 0
    pixels[:, :, 150:] = 255
    pixels[:, :, :, 170:] = 255
    np.testing.assert_array_equal(exported(pixels, sizes)[0], boxes)


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_one_size_without_nms_from_bytes(file_format, tmp_path, picture):
    cfg = make_config(tmp_path)
    path, check = export(
        cfg, tmp_path, picture, format=file_format, nms=False, size=(96, 160), uint8=True
    )
    assert_same(check)
    assert len(check.lines) == 1
    exported = load_exported(path)
    boxes, scores, _ = exported(np.zeros((1, 3, 96, 160)), np.array([[96, 160]]))
    # All pairs of 240 + 15 locations and 3 classes.
    assert boxes.shape == (1, 3 * (12 * 20 + 3 * 5), 4) and scores.shape == boxes.shape[:2]


@pytest.mark.slow
@pytest.mark.skipif(not has_packages(*NEEDS["onnx"]), reason="not installed")
def test_onnx_of_deformable_convolutions(tmp_path, picture):
    cfg = make_config(tmp_path, "dgqp", "general", *BACKBONES["DCNv2"])
    path, check = export(cfg, tmp_path, picture, format="onnx", size=(160, 224), opset=19)
    assert_same(check)
    import onnx

    model = onnx.load(path)
    assert [x.version for x in model.opset_import] == [19]
    assert "DeformConv" in {node.op_type for node in model.graph.node}


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_half(file_format, tmp_path, picture):
    whole, half = tmp_path / "whole", tmp_path / "half"
    cfg = make_config(tmp_path)
    sizes = []
    for folder, is_half in ((whole, False), (half, True)):
        folder.mkdir()
        _, check = export(
            cfg, folder, picture, format=file_format, half=is_half, size=(96, 160), nms=False
        )
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
    assert check.box_difference > 0
    assert sizes[1] < 0.8 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS[:2])
def test_int8(file_format, tmp_path, picture):
    if file_format == "openvino":
        pytest.importorskip("nncf")
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(picture, images)
    path, check = export(
        make_config(tmp_path), tmp_path, picture, format=file_format, size=(160, 224),
        int8=str(images),
    )  # fmt: skip
    assert check.score_difference > 1e-4  # it is quantized
    assert check.unmatched <= 0.1 * check.detections
    assert load_exported(path).metadata["precision"] == "int8"
    if file_format == "onnx":
        assert_predictors_are_float(path)


def assert_predictors_are_float(path):
    """Those of two levels, and they alone, have their own weights instead of dequantized ones."""
    graph = pytest.importorskip("onnx").load(path).graph
    stored = {tensor.name for tensor in graph.initializer}
    convolutions = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    in_float = sorted(name for name in convolutions if name in stored)
    predictors = ["model.head.bbox_pred.weight", "model.head.cls_score.weight"]
    assert in_float == sorted(2 * predictors)
    assert len(convolutions) > len(in_float)


REFUSED = {
    "an extension": (dict(format="onnx", output="model.pt"), r"ends with \.onnx, got .*model\.pt"),
    "a folder": (dict(format="onnx", output="no/model.onnx"), r"no for the output does not exist"),
    "half and int8": (dict(format="onnx", half=True, int8="x"), r"--half and --int8 exclude"),
    "int8": (dict(format="torchscript", int8="x"), r"--int8 is for onnx and openvino"),
    "no images": (dict(format="onnx", int8="none"), r"none is neither a picture nor a folder"),
    "opset": (dict(format="onnx", opset=11), r"--opset must be 18 to 23, got 11"),
    "size": (dict(format="torchscript", size=(100, 96)), r"multiples of 32, got 100 96"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what, tmp_path, picture):
    options, message = REFUSED[what]
    output = tmp_path / options.get("output", f"model{EXTENSIONS[options['format']]}")
    options = {key: value for key, value in options.items() if key != "output"}
    cfg = make_config(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=message) as error:
        export_model(cfg, ExportOptions(**options), output, picture)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("file_format", "opset", "message"),
    [("openvino", 20, "OpenVINO reads no deformable"), ("onnx", 18, "need --opset 19 or higher")],
)
def test_refused_deformable_convolutions(file_format, opset, message, tmp_path, picture):
    cfg = make_config(tmp_path, "joint", "general", *BACKBONES["DCN"])
    with pytest.raises(InputError, match=message):
        export(cfg, tmp_path, picture, format=file_format, opset=opset)


def test_a_missing_package_is_named(tmp_path, picture, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"nncf: pip install -e '\.\[openvino\]'"):
        export(make_config(tmp_path), tmp_path, picture, format="openvino", int8=str(tmp_path))


def test_a_checkpoint_of_another_size(tmp_path, picture):
    cfg = make_config(tmp_path)
    other = small_config(
        *("joint", "general", "atss", *TWO_LEVELS, "MODEL.GFL.NUM_CLASSES", 7),
        *("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS),
    )
    with pytest.raises(InputError, match=r"does not fit the model.*head\.cls_score"):
        export(other, tmp_path, picture, format="torchscript")
    assert "model.ts" not in os.listdir(tmp_path)


def test_a_file_that_differs_is_not_written(tmp_path, picture, monkeypatch):
    """As if the exporter had changed the model."""
    cfg, prepare = make_config(tmp_path), exporting._prepare

    def wrong(model, half):
        copied = prepare(model, half)
        copied.head.scales.mul_(1.02)
        return copied

    monkeypatch.setattr(exporting, "_prepare", wrong)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=r"model\.ts is not written, since its detections differ"):
        export(cfg, tmp_path, picture, format="torchscript")
    assert sorted(os.listdir(tmp_path)) == before


def test_keys_of_evaluation_do_not_matter(tmp_path, picture, caplog):
    cfg = make_config(
        tmp_path, "joint", "general", "TEST.COMPILE", "default", "TEST.PRECISION", "bfloat16",
        "TEST.AUG.ENABLED", True, "TEST.TILES.SIZE", 64,
    )  # fmt: skip
    assert_same(export(cfg, tmp_path, picture, format="torchscript")[1])
    expected = "Exported files do without TEST.AUG.ENABLED, TEST.TILES.SIZE."
    assert expected in caplog.text


def test_command(tmp_path, picture, monkeypatch, capsys):
    cfg = make_config(tmp_path)
    script, output = load_script("tools/export_model.py"), tmp_path / "model.ts"
    arguments = ["--format", "torchscript", "--size", "96", "160", cfg.MODEL.WEIGHTS, str(output)]
    monkeypatch.setattr(sys, "argv", ["", *arguments, "--images", picture])
    script.main()
    assert "batch 1, 96 x 160" in capsys.readouterr().out
    assert load_exported(output).metadata["size"] == [96, 160]
    monkeypatch.setattr(sys, "argv", ["", *arguments, "TEST.DETECTIONS_PER_IMAGE", "5", "NO", "1"])
    with pytest.raises(SystemExit, match=r"Error: .*NO"):
        script.main()
