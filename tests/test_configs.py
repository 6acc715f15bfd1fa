"""Configs: every file builds, values are checked, sizes of the published models are right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from PIL import Image
from torch import nn

from gfl_d2 import add_gfl_config, load_config
from gfl_d2.config import check_training_config
from gfl_d2.errors import InputError
from gfl_d2.modeling import GFL

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    str(p.relative_to(ROOT / "configs").with_suffix(""))
    for p in (ROOT / "configs").rglob("*.yaml")
    if not p.stem.startswith("Base")
)
PUBLISHED = json.loads((Path(__file__).parent / "complexity.json").read_text())


def load(name: str, *opts):
    return load_config(str(ROOT / "configs" / f"{name}.yaml"), ["MODEL.DEVICE", "cpu", *opts])


def small(*opts):
    """A quick model."""
    return load("gfl_R_18_FPN_bccd_reference", "MODEL.FPN.OUT_CHANNELS", 32,
                "MODEL.GFL.CONV_DIM", 64, "MODEL.GFL.NUM_CONVS", 1, *opts)  # fmt: skip


class BackboneAndHead(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        features = self.model.backbone(images)
        return self.model.head([features[name] for name in self.model.head_in_features])


def count_deform_conv_macs(inputs, outputs):
    weight = inputs[1].type().sizes()
    n, _, height, width = outputs[0].type().sizes()
    return n * height * width * weight[0] * weight[1] * weight[2] * weight[3]


def count_macs(model, height, width):
    """Multiply-accumulates of the convolutions for one image."""
    count = FlopCountAnalysis(BackboneAndHead(model).eval(), torch.zeros(1, 3, height, width))
    count.unsupported_ops_warnings(False)
    count.set_op_handle("torchvision::deform_conv2d", count_deform_conv_macs)
    by_operator = count.by_operator()
    return by_operator["conv"] + by_operator["deform_conv2d"]


def count_parameters(model):
    """Parameters, with the scale and shift of frozen BatchNorm, which Detectron2 has as buffers."""
    affine = (
        buffer
        for name, buffer in model.named_buffers()
        if name.endswith(("norm.weight", "norm.bias"))
    )
    return sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in affine)


def levels_of(model):
    return model.grid([(1, 1)] * 5, torch.tensor([[64, 64]]))


def test_published_models_are_all_there():
    assert set(PUBLISHED) <= set(CONFIGS)
    assert len(PUBLISHED) == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_complexity(name):
    model = build_model(load(name))
    golden = PUBLISHED[name]
    assert count_parameters(model) == golden["parameters"]
    assert count_macs(model, 256, 256) == golden["macs_256x256"]
    plain = PUBLISHED.get(name.replace("_DCN", ""), golden)
    if plain is not golden:  # as many as the plain model's, and those that predict offsets
        assert golden["macs_256x256"] > plain["macs_256x256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gmacs", "million_parameters"),
    [
        ("gfl_R_50_FPN_1x", 207.6, 32.44),
        ("gfl_R_101_FPN_ms_2x", 283.4, 51.43),
        ("gfl_X_101_32x4d_FPN_ms_2x", 286.8, 51.06),
    ],
)
def test_published_complexity(name, gmacs, million_parameters):
    """At 1280x800, convolutions only."""
    model = build_model(load(name))
    assert count_parameters(model) / 1e6 == pytest.approx(million_parameters, abs=0.005)
    assert count_macs(model, 800, 1280) / 1e9 == pytest.approx(gmacs, abs=0.06)


def test_cost_of_the_quality_predictor():
    """Of GFLv2: 1.4 k parameters and 0.03 G."""
    models = [build_model(load(name)) for name in ("gfl_R_50_FPN_1x", "gfl_v2_R_50_FPN_1x")]
    parameters = [count_parameters(model) for model in models]
    assert parameters[1] - parameters[0] == 20 * 64 + 64 + 64 + 1
    macs = [PUBLISHED[name]["macs_256x256"] for name in ("gfl_R_50_FPN_1x", "gfl_v2_R_50_FPN_1x")]
    num_locations = 32**2 + 16**2 + 8**2 + 4**2 + 2**2
    assert macs[1] - macs[0] == num_locations * (20 * 64 + 64)


@pytest.mark.parametrize("name", CONFIGS)
def test_schedule(name):
    """Learning-rate drops come in order and before the end."""
    solver = load(name).SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = list(solver.STEPS)
        assert steps == sorted(steps)
        assert steps[0] > solver.WARMUP_ITERS
        assert steps[-1] < solver.MAX_ITER


def test_schedules_of_the_published_models():
    """Iterations and drops, and the range of the short side."""
    for name in PUBLISHED:
        cfg = load(name)
        assert cfg.SOLVER.IMS_PER_BATCH == 16
        assert cfg.SOLVER.BASE_LR == 0.01
        if name.endswith("_1x"):
            assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (90000, (60000, 80000))
            assert cfg.INPUT.MIN_SIZE_TRAIN == (800,)
        else:
            assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (180000, (120000, 160000))
            shortest = (480, 960) if "_v2_" in name else (480, 800)
            assert shortest == cfg.INPUT.MIN_SIZE_TRAIN
            assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
        assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST) == (1333, 800)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("NUM_CLASSES", 0),
        ("IN_FEATURES", []),
        ("IN_FEATURES", ["p3", "p9"]),
        ("IN_FEATURES", ["p4", "p3"]),
        ("IN_FEATURES", ["p3", "p3"]),
        ("NORM", "XY"),
        ("NORM", "BN"),  # all levels would share its average, as in the next ones
        ("NORM", "SyncBN"),
        ("NORM", "nnSyncBN"),
        ("NORM", "naiveSyncBN"),
        ("ANCHOR_SCALE", float("inf")),
        ("BIN_WIDTH", float("nan")),
        ("LOSS_QFL_WEIGHT", float("inf")),
        ("FOCAL_LOSS_ALPHA", float("-inf")),
        ("QFL_BETA", float("inf")),
        ("NUM_CONVS", -1),
        ("CONV_DIM", 48),
        ("CONV_DIM", 32),
        ("QUALITY", "IoU"),
        ("BOX_REPRESENTATION", "delta"),
        ("ASSIGNER", "hungarian"),
        ("BIN_WIDTH", 0.0),
        ("DGQP_TOPK", 0),
        ("DGQP_CHANNELS", 0),
        ("FOCAL_LOSS_ALPHA", 1.5),
        ("FOCAL_LOSS_GAMMA", -1.0),
        ("LOSS_CLS_WEIGHT", -1.0),
        ("LOSS_QUALITY_WEIGHT", -1.0),
        ("LOSS_KL_WEIGHT", -1.0),
        ("PRIOR_PROB", 1.0),
        ("REG_MAX", 0),
        ("ANCHOR_SCALE", 0.0),
        ("ATSS_TOPK", 0),
        ("QFL_BETA", 0.5),
        ("VFL_GAMMA", 0.5),
        ("VFL_ALPHA", -1.0),
        ("MAL_GAMMA", 0.5),
        ("LOSS_QFL_WEIGHT", -1.0),
        ("LOSS_BBOX_WEIGHT", -1.0),
        ("LOSS_DFL_WEIGHT", -1.0),
        ("BOX_NORMALIZER_MIN", 0.0),
        ("BOX_WEIGHT_MIN", 1.5),
        ("SCORE_THRESH_TEST", 1.0),
        ("TOPK_CANDIDATES_TEST", 0),
        ("NMS_THRESH_TEST", 1.5),
        ("NMS_CLASS_AGNOSTIC", 1),
    ],
)
def test_bad_values_name_their_key(key, value):
    with pytest.raises(InputError, match=f"MODEL.GFL.{key}"):
        build_model(small(f"MODEL.GFL.{key}", value))  # some need the backbone to be seen


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ANCHOR_GENERATOR.OFFSET", 1.0),
        ("TEST.DETECTIONS_PER_IMAGE", 0),
        ("INPUT.RANDOM_FLIP", "diagonal"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "model"),
        ("MODEL.RESNETS.NORM", "FrozenBN"),  # contradicts ZERO_INIT_RESIDUAL, as the next two
        ("MODEL.BACKBONE.FREEZE_AT", 2),
        ("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
        ("MODEL.GFL.REGMAX", 16),  # no such key
        ("MODEL.GFL.REG_MAX", "many"),
        ("MODEL.MASK_ON", True),
        ("MODEL.KEYPOINT_ON", True),
        ("MODEL.LOAD_PROPOSALS", True),
        ("MODEL.PIXEL_MEAN", [1.0]),
        ("MODEL.PIXEL_STD", [1.0, 1.0]),
        ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0]),
        ("MODEL.PIXEL_MEAN", [1.0, float("nan"), 1.0]),
        ("MODEL.DEVICE", "gpu"),
        ("INPUT.FORMAT", "rgb"),
        ("INPUT.FORMAT", "BRG"),
        ("INPUT.FORMAT", "F"),
        ("DATALOADER.SAMPLER_TRAIN", "trainingsampler"),
        ("SOLVER.BASE_LR", float("inf")),
        ("SOLVER.WEIGHT_DECAY", float("nan")),
        ("INPUT.CROP.SIZE", [0.5, float("nan")]),
    ],
)
def test_other_bad_values_name_their_key(key, value):
    with pytest.raises(InputError, match=key.rsplit(".")[-1]):
        small(key, value)


@pytest.mark.parametrize(
    ("image_format", "channels"), [("BGR", 3), ("YUV-BT.601", 3), ("L", 1), ("CMYK", 4)]
)
def test_formats_of_images(image_format, channels):
    opts = ["MODEL.PIXEL_MEAN", [1.0] * channels, "MODEL.PIXEL_STD", [1.0] * channels]
    assert len(build_model(small("INPUT.FORMAT", image_format, *opts)).pixel_mean) == channels


def test_maximum_norm_is_finite_enough():
    small("SOLVER.CLIP_GRADIENTS.NORM_TYPE", float("inf"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("INPUT.FORMAT", "rgb"), ("MODEL.GFL.BIN_WIDTH", float("inf")), ("TEST.COMPILE", "fast")],
)
def test_a_model_built_without_a_config_file_is_checked(key, value):
    cfg = get_cfg()
    add_gfl_config(cfg)
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "GFL", "MODEL.DEVICE", "cpu", key, value])
    with pytest.raises(InputError, match=key):
        build_model(cfg)


PLAIN_START = ["MODEL.RESNETS.ZERO_INIT_RESIDUAL", False]


@pytest.mark.parametrize(
    ("opts", "reason"),
    [
        (["MODEL.BACKBONE.NAME", "resnet", *PLAIN_START], "'resnet' is no registered backbone"),
        (["MODEL.RESNETS.DEPTH", 20], "KeyError: 20"),
        (["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256], "RES2_OUT_CHANNELS"),
        (["MODEL.FPN.NORM", "foo"], "KeyError: 'foo'"),
        (["MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 100], "ValueError: "),
        (["MODEL.FPN.IN_FEATURES", ["res1", "res4"]], "KeyError: 'res1'"),
    ],
)
def test_keys_of_a_backbone_that_do_not_fit(opts, reason):
    with pytest.raises(InputError, match=rf"MODEL.BACKBONE.NAME.*{reason}"):
        build_model(small(*opts))


def test_errors_of_other_backbones_keep_their_stack_trace():
    def build_wrong_backbone(cfg, input_shape):
        raise KeyError("mine")

    BACKBONE_REGISTRY.register(build_wrong_backbone)
    try:
        with pytest.raises(KeyError, match="mine"):
            build_model(small("MODEL.BACKBONE.NAME", "build_wrong_backbone", *PLAIN_START))
    finally:
        del BACKBONE_REGISTRY._obj_map["build_wrong_backbone"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there():
    cfg = small().clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cuda"
    with pytest.raises(InputError, match=r"MODEL\.DEVICE must be 'cpu' on this machine"):
        build_model(cfg)


def test_amp_is_for_gpus():
    """It is refused in training alone, so that the model can be evaluated anywhere."""
    with pytest.raises(InputError, match=r"SOLVER\.AMP\.ENABLED.* CPU.*SOLVER\.BF16"):
        check_training_config(small("SOLVER.AMP.ENABLED", True))


@pytest.mark.parametrize(
    ("test", "metric", "advice"),
    [
        (("a",), "bbox/AP", None),
        (("a",), "", None),
        (("a", "b"), "", None),
        (("a", "b"), "b/bbox/AP", None),
        ((), "bbox/AP", None),
        (("a", "b"), "bbox/AP", "'a/bbox/AP'"),
        (("a",), "a/bbox/AP", "'bbox/AP'"),
    ],
)
def test_metric_of_the_best_model(test, metric, advice):
    cfg = small("DATASETS.TEST", test, "TEST.BEST_CHECKPOINT_METRIC", metric)
    if advice is None:
        check_training_config(cfg)
        return
    with pytest.raises(InputError, match=rf"TEST\.BEST_CHECKPOINT_METRIC.*{advice}"):
        check_training_config(cfg)
    # Not used without an evaluation in training.
    check_training_config(small("DATASETS.TEST", test, "TEST.EVAL_PERIOD", 0))


def test_parts_check_their_own_keys_when_a_config_is_loaded():
    with pytest.raises(InputError, match=r"DGQP_TOPK.*REG_MAX"):
        small("MODEL.GFL.QUALITY", "dgqp", "MODEL.GFL.REG_MAX", 2)


def test_legacy_centers_and_an_offset_exclude_each_other():
    with pytest.raises(InputError, match=r"ANCHOR_GENERATOR\.OFFSET.*LEGACY_ANCHOR_CENTERS"):
        small("MODEL.GFL.LEGACY_ANCHOR_CENTERS", True, "MODEL.ANCHOR_GENERATOR.OFFSET", 0.5)
    model = build_model(small("MODEL.GFL.LEGACY_ANCHOR_CENTERS", True))
    assert levels_of(model).first.tolist() == [3.5, 7.5, 15.5, 31.5, 63.5]


def test_bf16_and_amp_exclude_each_other():
    with pytest.raises(InputError, match="AMP"):
        small("SOLVER.BF16", True, "SOLVER.AMP.ENABLED", True)


@pytest.mark.parametrize(
    "text", ["- a list", "MODEL: {GFL: [}", "_BASE_: absent.yaml", "MODEL: 3", "MODEL: {X: 1}"]
)
def test_malformed_files(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken\.yaml"):
        load_config(str(path))


@pytest.mark.parametrize(
    "option",
    [("DATASETS.CLASSES", "dog"), ("DATASETS.REGISTER", "[cells]"), ("DATASETS.TRAIN", "('a')")],
)
def test_a_name_where_a_list_is_wanted(option):
    """The shell takes quotation marks away, and ('a') is no tuple."""
    with pytest.raises(InputError, match=rf"{option[0]}, which takes a list: write .\['name'\]"):
        small(*option)


def test_values_reach_the_model():
    model = build_model(
        small(
            *("MODEL.GFL.REG_MAX", 7, "MODEL.GFL.ANCHOR_SCALE", 6.0, "MODEL.GFL.ATSS_TOPK", 5),
            *("MODEL.GFL.QFL_BETA", 2.5, "MODEL.GFL.PRIOR_PROB", 0.05, "MODEL.GFL.NORM", ""),
            *("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5, "TEST.DETECTIONS_PER_IMAGE", 7),
            *("MODEL.GFL.SCORE_THRESH_TEST", 0.3, "MODEL.GFL.NMS_THRESH_TEST", 0.4),
            *("MODEL.GFL.NMS_CLASS_AGNOSTIC", True),
        )
    )
    assert model.head.bbox_pred.out_channels == 4 * 8
    assert model.assigner.topk == 5
    assert model.head.quality.beta == 2.5
    assert model.head.cls_subnet[0].norm is None
    torch.testing.assert_close(model.head.cls_score.bias.sigmoid(), torch.full((3,), 0.05))
    assert (model.test_score_thresh, model.test_nms_thresh) == (0.3, 0.4)
    assert model.max_detections_per_image == 7
    assert model.test_nms_class_agnostic
    levels = levels_of(model)
    assert (levels.strides[0], levels.first[0], levels.anchor_sizes[0]) == (8, 4, 48)


@torch.no_grad()
def test_default_predictor():
    """From a BGR image, as OpenCV reads it, to detections in its pixels."""
    torch.manual_seed(0)
    cfg = small("MODEL.GFL.SCORE_THRESH_TEST", 0.0, "MODEL.GFL.NMS_THRESH_TEST", 1.0)
    predictor = DefaultPredictor(cfg)
    image = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    detections = predictor(image)["instances"]
    assert detections.image_size == (120, 160)
    assert len(detections) == 100

    resized = np.asarray(Image.fromarray(image[:, :, ::-1]).resize((320, 240), Image.BILINEAR))
    rgb = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
    (expected,) = predictor.model([{"image": rgb, "height": 120, "width": 160}])
    torch.testing.assert_close(detections.scores, expected["instances"].scores)


@pytest.mark.parametrize(
    ("name", "in_features"),
    [
        ("build_retinanet_resnet_fpn_backbone", ["p3", "p4", "p5", "p6", "p7"]),
        ("build_resnet_fpn_backbone", ["p3", "p4", "p5", "p6"]),
        ("build_gfl_resnet_fpn_backbone", ["p4", "p5"]),
    ],
)
def test_any_pyramid_will_do(name, in_features):
    cfg = small(
        *("MODEL.BACKBONE.NAME", name, "MODEL.GFL.IN_FEATURES", in_features),
        *("MODEL.RESNETS.ZERO_INIT_RESIDUAL", False),
    )
    model = build_model(cfg)
    assert isinstance(model, GFL)
    gt = Instances((64, 96))
    gt.gt_boxes = Boxes(torch.tensor([[10.0, 8.0, 70.0, 60.0]]))
    gt.gt_classes = torch.tensor([1])
    inputs = [{"image": torch.rand(3, 64, 96) * 255, "instances": gt}]
    with EventStorage():
        losses = model.train()(inputs * 2)
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        assert "instances" in model.eval()(inputs)[0]
