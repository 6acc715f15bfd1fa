"""Models made faster for inference."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch.testing import assert_close

from gfl_d2 import load_config
from gfl_d2.deploy import Predictor, compile_parts, has_fast_bfloat16, prepare_for_inference
from gfl_d2.deploy.fusing import FrozenNormConv2d, PackedConv2d
from gfl_d2.errors import InputError
from models import randomize_norms
from scripts import ROOT

CONFIGS = {
    "gfl_R_50_FPN_1x": (),
    "gfl_R_101_DCN_FPN_ms_2x": ("MODEL.RESNETS.DEPTH", 50),
    "gfl_v2_R2_101_DCN_FPN_ms_2x": ("MODEL.RESNETS.DEPTH", 50),
    "gfl_R_18_FPN_bccd": (),
    "retinanet_R_18_FPN_bccd": (),
}


def load(name, *opts):
    small = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", 64)
    if "retinanet" not in name:
        small += ("MODEL.GFL.CONV_DIM", 64, "MODEL.GFL.NUM_CONVS", 1)
        small += ("MODEL.GFL.SCORE_THRESH_TEST", 0.001)
    return load_config(str(ROOT / "configs" / f"{name}.yaml"), [*small, *CONFIGS[name], *opts])


def build(cfg):
    torch.manual_seed(0)
    return randomize_norms(build_model(cfg))


def outputs(model, size=(96, 128)):
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.backbone(images)
        return model.head([features[name] for name in model.head_in_features])


@pytest.mark.parametrize("name", CONFIGS)
def test_optimized_models_give_the_same(name):
    model = build(load(name))
    optimized = prepare_for_inference(load(name), copy.deepcopy(model))
    kinds = [type(module).__name__ for module in optimized.modules()]
    assert not any("BatchNorm" in kind for kind in kinds)
    for maps, expected_maps in zip(outputs(optimized), outputs(model)):
        for actual, expected in zip(maps, expected_maps):
            assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_options():
    cfg = load("gfl_R_50_FPN_1x", "TEST.OPTIMIZE", False)
    model = prepare_for_inference(cfg, build(cfg))
    assert model.backbone.bottom_up.stem.conv1.norm is not None
    assert not any(isinstance(module, PackedConv2d) for module in model.modules())
    with pytest.raises(InputError, match=r"TEST\.PRECISION"):
        load("gfl_R_50_FPN_1x", "TEST.PRECISION", "int8")
    with pytest.raises(InputError, match=r"TEST\.PRECISION"):
        load("gfl_R_50_FPN_1x", "TEST.PRECISION", "float16")  # no GPU
    for key in ("TEST.COMPILE", "SOLVER.COMPILE"):
        with pytest.raises(InputError, match=key):
            load("gfl_R_50_FPN_1x", key, "fast")


@pytest.mark.skipif(not has_fast_bfloat16("cpu"), reason="a processor without bfloat16")
@pytest.mark.parametrize("name", ["gfl_R_50_FPN_1x", "gfl_v2_R2_101_DCN_FPN_ms_2x"])
def test_bfloat16_is_close(name):
    cfg = load(name)
    expected = outputs(prepare_for_inference(cfg, build(cfg)))
    cfg = load(name, "TEST.PRECISION", "bfloat16")
    model = prepare_for_inference(cfg, build(cfg))
    for maps, expected_maps in zip(outputs(model), expected):
        for actual, x in zip(maps, expected_maps):
            assert actual.dtype == torch.bfloat16 or x.shape[1] == 1
            error = (actual.float() - x).norm() / x.norm()
            assert error < 0.05
    with torch.no_grad():
        (detections,) = model([{"image": torch.rand(3, 96, 128) * 255}])
    assert detections["instances"].scores.dtype == torch.float32
    assert len(detections["instances"]) > 0


def test_compiled_parts_are_used(monkeypatch):
    """Compilation itself is PyTorch's; here it does as little as it can."""
    cfg = load("gfl_R_18_FPN_bccd", "TEST.COMPILE", "default")
    model = build(cfg)
    expected = model([{"image": torch.ones(3, 64, 96)}])[0]["instances"].scores
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compiled.append((self, mode))
    )
    prepare_for_inference(cfg, model)
    assert compiled == [(model.backbone, "default"), (model.head, "default")]
    scores = model([{"image": torch.ones(3, 64, 96)}])[0]["instances"].scores
    assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_training", [False, True])
def test_what_is_compiled_gives_the_same(monkeypatch, is_training):
    """Traced by PyTorch's compiler, but run as it is."""

    def trace(self, mode):
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    frozen = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.ZERO_INIT_RESIDUAL", False)
    cfg = load("gfl_R_18_FPN_bccd", *frozen, "TEST.COMPILE", "default")
    model = build(cfg)
    compiled = copy.deepcopy(model)
    if is_training:
        assert any(isinstance(module, FrozenNormConv2d) for module in compiled.modules())
        compile_parts(compiled, "default")
    else:
        prepare_for_inference(cfg, compiled)
    results = []
    for m in (model, compiled):
        images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        with torch.set_grad_enabled(is_training):
            features = m.backbone(images)
            maps = [x for part in m.head(list(features.values())) for x in part]
        if is_training:
            maps += torch.autograd.grad(sum(x.sin().sum() for x in maps), list(m.parameters()))
        results.append(maps)
    assert m.backbone._compiled_call_impl is not None
    for actual, expected in zip(*results):
        assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_predictor_detects_as_detectron2s():
    cfg = load("gfl_R_50_FPN_1x", "INPUT.MIN_SIZE_TEST", 64)
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    torch.manual_seed(0)
    expected = DefaultPredictor(cfg)(image)["instances"]
    torch.manual_seed(0)
    detections = Predictor(cfg)(image)["instances"]
    assert len(detections) == len(expected) > 0
    assert_close(detections.scores, expected.scores, rtol=1e-4, atol=1e-6)
