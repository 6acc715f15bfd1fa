"""Models made faster for inference: the same results, by a plain module."""

from __future__ import annotations

import copy
import io
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from gfl_d2 import add_gfl_config, load_config
from gfl_d2.checkpoint import describe_model, load_checkpoint_config
from gfl_d2.deploy import Predictor, compile_parts, prepare_for_inference
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


@pytest.fixture(autouse=True, scope="module")
def bfloat16_on_any_processor():
    """It is slow on some, and gives the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gfl_d2.deploy.predictor.has_fast_bfloat16", lambda _: True)
        yield


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


@torch.no_grad()
def detect(model, height=64, width=96):
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 255
    return model([{"image": image}])[0]["instances"]


def assert_same_detections(actual, expected):
    assert len(actual) == len(expected) > 0
    assert torch.equal(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(actual.scores, expected.scores)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def prepared(request):
    cfg = load("gfl_R_18_FPN_bccd", "TEST.PRECISION", request.param)
    return prepare_for_inference(cfg, build(cfg))


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
    with pytest.raises(InputError, match=r"TEST\.PRECISION"):
        load("gfl_R_50_FPN_1x", "TEST.PRECISION", "int8")
    with pytest.raises(InputError, match=r"TEST\.PRECISION"):
        load("gfl_R_50_FPN_1x", "TEST.PRECISION", "float16")  # no GPU
    for key in ("TEST.COMPILE", "SOLVER.COMPILE"):
        with pytest.raises(InputError, match=key):
            load("gfl_R_50_FPN_1x", key, "fast")


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
    detections = detect(model)
    assert detections.scores.dtype == torch.float32
    assert len(detections) > 0


def test_without_bfloat16_a_model_stays_in_float32(monkeypatch, caplog):
    monkeypatch.setattr("gfl_d2.deploy.predictor.has_fast_bfloat16", lambda _: False)
    cfg = load("gfl_R_18_FPN_bccd", "TEST.PRECISION", "bfloat16")
    logits, *_ = outputs(prepare_for_inference(cfg, build(cfg)))
    assert logits[0].dtype == torch.float32
    assert "no bfloat16 on this machine" in caplog.text


# What users do with a plain module.


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        saved_and_loaded,
        lambda model: AveragedModel(model).module,
    ],
    ids=["deepcopy", "pickle", "save", "AveragedModel"],
)
def test_copies_have_weights_of_their_own(prepared, copied):
    expected = detect(prepared)
    other = copied(prepared)
    assert_same_detections(detect(other), expected)
    with torch.no_grad():
        other.head.cls_score.bias.add_(1)
    assert detect(other).scores[0] > expected.scores[0]
    assert_same_detections(detect(prepared), expected)


@pytest.mark.slow
def test_threads_give_what_one_gives(prepared):
    sizes = [(64, 96), (96, 64), (128, 160), (65, 97)] * 8
    random.Random(0).shuffle(sizes)
    expected = {size: detect(prepared, *size) for size in set(sizes)}
    with ThreadPoolExecutor(max_workers=8) as threads:
        results = list(threads.map(lambda size: detect(prepared, *size), sizes))
    for size, result in zip(sizes, results):
        assert_same_detections(result, expected[size])


def test_hooks_see_every_module(prepared):
    """As Grad-CAM and profilers do, at sizes that come again too."""
    model, calls = copy.deepcopy(prepared), []
    modules = {name: m for name, m in model.named_modules() if hasattr(m, "weight")}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    for _ in range(3):
        calls.clear()
        detect(model)
        assert set(calls) == set(modules)


def test_autocast_of_the_user_stays_in_force():
    cfg = load("gfl_R_18_FPN_bccd")
    model = prepare_for_inference(cfg, build(cfg))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            logits, *_ = outputs(model)
        assert logits[0].dtype == torch.bfloat16


# torch.compile


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["training", "float32", "bfloat16"])
def test_what_is_compiled_gives_the_same(monkeypatch, mode):
    """Traced by PyTorch's compiler without a break, but run as it is."""

    def trace(self, mode):
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    is_training = mode == "training"
    precision = "float32" if is_training else mode
    cfg = load("gfl_R_18_FPN_bccd", "TEST.COMPILE", "default", "TEST.PRECISION", precision)
    model = build(cfg)
    compiled = copy.deepcopy(model)
    if is_training:
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
    tolerance = 0.05 if precision == "bfloat16" else 1e-4
    for expected, actual in zip(*results):
        expected = expected.detach()
        atol = tolerance * float(expected.abs().max())
        assert_close(actual.float(), expected, rtol=tolerance, atol=atol)


# Predictor

IMAGE = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_predictor_detects_as_detectron2s(image_format):
    cfg = load("gfl_R_50_FPN_1x", "INPUT.MIN_SIZE_TEST", 64, "INPUT.FORMAT", image_format)
    torch.manual_seed(0)
    expected = DefaultPredictor(cfg)(IMAGE)["instances"]
    torch.manual_seed(0)
    detections = Predictor(cfg)(IMAGE)["instances"]
    assert len(detections) == len(expected) > 0
    assert_close(detections.scores, expected.scores, rtol=1e-4, atol=1e-6)


def test_predictor_loads_all_or_nothing(tmp_path):
    """Detectron2's would leave the classifier random, and say so in the log."""
    path = str(tmp_path / "two.pth")
    two, three = (load("gfl_R_18_FPN_bccd", "MODEL.GFL.NUM_CLASSES", n) for n in (2, 3))
    model = build(two)
    torch.save({"model": model.state_dict()}, path)
    two, three = two.clone(), three.clone()
    for cfg in (two, three):
        cfg.defrost()
        cfg.MODEL.WEIGHTS = path
    predictor = Predictor(two)
    assert torch.equal(predictor.model.head.cls_score.weight, model.head.cls_score.weight)
    assert predictor.cfg.MODEL.WEIGHTS == two.MODEL.WEIGHTS == path
    with pytest.raises(InputError, match=r"two\.pth does not fit the model.*cls_score.weight"):
        Predictor(three)


def test_predictor_without_a_gpu(monkeypatch, caplog):
    """The README's snippet, with Detectron2's default of MODEL.DEVICE."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = get_cfg()
    add_gfl_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "gfl_R_18_FPN_bccd.yaml"))
    cfg.MODEL.WEIGHTS = ""
    assert cfg.MODEL.DEVICE == "cuda"
    predictor = Predictor(cfg)
    assert "there is no GPU: using the CPU" in caplog.text
    assert predictor.model.device.type == predictor.cfg.MODEL.DEVICE == "cpu"
    assert cfg.MODEL.DEVICE == "cuda"  # the user's own is not changed


def save_described(path, *opts, names=("cat", "dog")):
    cfg = load("gfl_R_18_FPN_bccd", "MODEL.GFL.NUM_CLASSES", 2, "INPUT.MIN_SIZE_TEST", 64, *opts)
    model = build(cfg)
    torch.save({"model": model.state_dict(), **describe_model(cfg, names)}, path)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(path)
    return cfg


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_predictor_of_a_checkpoint_alone(tmp_path, clean_catalogs, kind):
    path = tmp_path / "model_final.pth"
    cfg = save_described(path, "DATASETS.TEST", "('not_registered',)")
    predictor = Predictor(kind(path))
    assert str(path) == predictor.cfg.MODEL.WEIGHTS
    assert predictor.metadata.thing_classes == ["cat", "dog"]
    assert_same_detections(predictor(IMAGE)["instances"], Predictor(cfg)(IMAGE)["instances"])
    changed = Predictor(load_checkpoint_config(path, ["TEST.DETECTIONS_PER_IMAGE", 3]))
    assert len(changed(IMAGE)["instances"]) == 3


@pytest.mark.slow
def test_names_of_the_classes(tmp_path, clean_catalogs):
    """The checkpoint's, whatever the catalog calls them; the catalog is unchanged."""
    path = tmp_path / "model_final.pth"
    cfg = save_described(path, "DATASETS.TEST", "('toy',)")
    assert Predictor(cfg).metadata.thing_classes == ["cat", "dog"]
    assert MetadataCatalog.get("toy").get("thing_classes") is None
    MetadataCatalog.get("toy").thing_classes = ["Katze", "Hund"]
    assert Predictor(cfg).metadata.thing_classes == ["cat", "dog"]
    assert Predictor(path).metadata.thing_classes == ["cat", "dog"]
    assert MetadataCatalog.get("toy").thing_classes == ["Katze", "Hund"]

    same = save_described(path, "DATASETS.TEST", "('toy',)", names=("Katze", "Hund"))
    assert Predictor(path).metadata is MetadataCatalog.get("toy")
    same.DATASETS.TEST = ()
    assert Predictor(same).metadata.thing_classes == ["Katze", "Hund"]
    save_described(path, "DATASETS.TEST", "('toy',)", names=None)
    assert Predictor(path).metadata is MetadataCatalog.get("toy")


def test_predictor_of_a_file_without_a_config(tmp_path):
    torch.save({"model": build(load("gfl_R_18_FPN_bccd")).state_dict()}, tmp_path / "old.pth")
    with pytest.raises(InputError, match=r"old\.pth carries no config: give a config"):
        Predictor(tmp_path / "old.pth")
