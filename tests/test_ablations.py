"""The ablation grid: every combination of choices, and the configs of the paper's tables."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

from gfl_d2 import load_config
from gfl_d2.errors import InputError
from models import OF_SAPD, build_gfl, make_input

CONFIGS = Path(__file__).parent.parent / "configs"
ROWS = sorted(p for p in (CONFIGS / "ablations").glob("*.yaml") if not p.stem.startswith("Base"))

# Of each choice: the losses that it brings, and the predictions beside the classes.
QUALITIES = {
    "joint": {"loss_qfl"},
    "dgqp": {"loss_qfl"},
    "vfl": {"loss_vfl"},
    "mal": {"loss_mal"},
    "none": {"loss_cls"},
    "centerness": {"loss_cls", "loss_centerness"},
    "iou": {"loss_cls", "loss_iou"},
    "centerness_guided": {"loss_cls"},
    "iou_guided": {"loss_cls"},
}
BOXES = {"general": {"loss_dfl"}, "dirac": set(), "gaussian": {"loss_kl"}}
NUM_VALUES = {"general": 17, "dirac": 1, "gaussian": 2}


@pytest.mark.parametrize(
    ("quality", "box", "assigner"),
    [
        choice
        for choice in itertools.product(QUALITIES, BOXES, ("atss", "dynamic_atss"))
        if choice[0] != "dgqp" or choice[1] == "general"
    ]
    + [(*choice, "sapd") for choice in OF_SAPD],
)
def test_every_combination_trains_and_detects(quality, box, assigner):
    model = build_gfl(quality, box, assigner, "MODEL.GFL.SCORE_THRESH_TEST", 0.001).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = [make_input(), make_input([])]
    for _ in range(2):
        with EventStorage():
            losses = model(inputs)
        of_assigner = {"loss_level"} if assigner == "sapd" else set()
        assert set(losses) == QUALITIES[quality] | BOXES[box] | {"loss_bbox"} | of_assigner
        assert all(loss.isfinite() for loss in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert name.startswith("backbone") or (parameter.grad != 0).any(), name
        optimizer.step()

    assert model.head.bbox_pred.out_channels == 4 * NUM_VALUES[box]
    with torch.no_grad():
        (output,) = model.eval()(inputs[:1])
    detections = output["instances"]
    assert len(detections) > 0
    assert detections.pred_boxes.tensor.isfinite().all()
    assert detections.scores.max() <= 1


@pytest.mark.parametrize("box", ["dirac", "gaussian"])
def test_quality_of_distributions_needs_distributions(box):
    with pytest.raises(InputError, match=r"MODEL\.GFL\.BOX_REPRESENTATION.*MODEL\.GFL\.QUALITY"):
        build_gfl("dgqp", box)


def test_quality_of_distributions_needs_enough_bins():
    """Four of the largest probabilities are those of four bins, which are 0 to 3."""
    assert build_gfl("dgqp", "general", "atss", "MODEL.GFL.REG_MAX", 3).head.quality.topk == 4
    message = (
        r"MODEL\.GFL\.DGQP_TOPK must be at most MODEL\.GFL\.REG_MAX \+ 1 when "
        r"MODEL\.GFL\.QUALITY is 'dgqp', got 4"
    )
    with pytest.raises(InputError, match=message):
        build_gfl("dgqp", "general", "atss", "MODEL.GFL.REG_MAX", 2)


@pytest.mark.parametrize(
    ("quality", "keys"),
    [
        ("joint", {"QFL_BETA": "beta", "LOSS_QFL_WEIGHT": "weight"}),
        ("dgqp", {"QFL_BETA": "beta", "LOSS_QFL_WEIGHT": "weight", "DGQP_TOPK": "topk",
                  "DGQP_CHANNELS": "channels"}),
        ("vfl", {"VFL_GAMMA": "beta", "VFL_ALPHA": "alpha", "LOSS_CLS_WEIGHT": "weight"}),
        ("mal", {"MAL_GAMMA": "beta", "LOSS_CLS_WEIGHT": "weight"}),
        *((name, {"FOCAL_LOSS_GAMMA": "gamma", "FOCAL_LOSS_ALPHA": "alpha",
                  "LOSS_CLS_WEIGHT": "weight"})
          for name in ("none", "centerness", "iou", "centerness_guided", "iou_guided")),
        *((name, {"LOSS_QUALITY_WEIGHT": "quality_weight"}) for name in ("centerness", "iou")),
    ],
)  # fmt: skip
def test_values_reach_the_quality(quality, keys):
    """Each its own field, and what a class has by default is the config's default."""
    default = build_gfl(quality).head.quality
    assert default == type(default)()
    for key, name in keys.items():
        value = getattr(default, name) + 1 if "ALPHA" not in key else 0.5
        changed = build_gfl(quality, "general", "atss", f"MODEL.GFL.{key}", value).head.quality
        assert changed == dataclasses.replace(default, **{name: value})


def test_values_reach_the_choices():
    model = build_gfl("dgqp", "general", "dynamic_atss", "MODEL.GFL.DGQP_TOPK", 3,
                  "MODEL.GFL.DGQP_CHANNELS", 8, "MODEL.GFL.BIN_WIDTH", 0.5,
                  "MODEL.GFL.LOSS_DFL_WEIGHT", 0.5, "MODEL.GFL.ATSS_TOPK", 5)  # fmt: skip
    assert model.head.quality_pred[0].in_channels == 4 * 4
    assert model.head.quality_pred[0].out_channels == 8
    assert (model.head.box.bin_width, model.head.box.dfl_weight) == (0.5, 0.5)
    assert type(model.assigner).__name__ == "DynamicATSSAssigner"
    assert model.assigner.topk == 5
    box = build_gfl("iou", "gaussian", "atss", "MODEL.GFL.LOSS_KL_WEIGHT", 5.0,
                    "MODEL.GFL.ANCHOR_SCALE", 6.0).head.box  # fmt: skip
    assert (box.prior, box.kl_weight) == (3.0, 5.0)


# Table 1a, ATSS column; table 2a, ATSS column; table 3.
PUBLISHED = {
    "table_1a_no_quality_branch": ("none", "dirac", 38.0),
    "table_1a_centerness_branch": ("centerness", "dirac", 39.2),
    "table_1a_iou_branch": ("iou", "dirac", 39.6),
    "table_1a_centerness_guided": ("centerness_guided", "dirac", 38.2),
    "table_1a_iou_guided": ("iou_guided", "dirac", 38.9),
    "table_1a_joint_qfl": ("joint", "dirac", 39.9),
    "table_2a_dirac_delta": ("centerness", "dirac", 39.2),
    "table_2a_gaussian": ("centerness", "gaussian", 39.3),
    "table_2a_general": ("centerness", "general", 39.3),
    "table_2a_general_dfl": ("centerness", "general", 39.5),
    "table_3_atss": ("centerness", "dirac", 39.2),
    "table_3_qfl": ("joint", "dirac", 39.9),
    "table_3_dfl": ("centerness", "general", 39.5),
    "table_3_qfl_dfl": ("joint", "general", 40.2),
}


# What they are compared with, and the published AP on test-dev.
SAPD = {
    "sapd_R_50_FPN_1x": ("gfl_R_50_FPN_1x", "41.7"),
    "sapd_R_101_FPN_ms_2x": ("gfl_R_101_FPN_ms_2x", "43.5"),
}


def test_every_row_has_a_config():
    assert {row.stem for row in ROWS} == {*PUBLISHED, "dynamic_atss", *SAPD}


@pytest.mark.parametrize("name", PUBLISHED)
def test_row(name):
    quality, box, ap = PUBLISHED[name]
    path = CONFIGS / "ablations" / f"{name}.yaml"
    gfl = load_config(str(path)).MODEL.GFL
    assert (quality, box, "atss") == (gfl.QUALITY, gfl.BOX_REPRESENTATION, gfl.ASSIGNER)
    assert (0.0 if name == "table_2a_general" else 0.25) == gfl.LOSS_DFL_WEIGHT
    assert re.search(r"Published[^:]*: ([\d.]+) /", path.read_text()).group(1) == str(ap)


def test_rows_change_nothing_else():
    """Schedule, data and backbone are those of gfl_R_50_FPN_1x."""
    base = load_config(str(CONFIGS / "gfl_R_50_FPN_1x.yaml"))
    for row in ROWS:
        if row.stem in SAPD:
            continue
        cfg = load_config(str(row))
        for key in ("QUALITY", "BOX_REPRESENTATION", "ASSIGNER", "LOSS_DFL_WEIGHT"):
            cfg.defrost()
            cfg.MODEL.GFL[key] = base.MODEL.GFL[key]
        assert cfg == base, row.stem


@pytest.mark.parametrize("name", SAPD)
def test_row_of_sapd(name):
    path, (base, ap) = CONFIGS / "ablations" / f"{name}.yaml", SAPD[name]
    assert f"{ap} " in path.read_text()
    cfg, expected = load_config(str(path)), load_config(str(CONFIGS / f"{base}.yaml"))
    expected.defrost()
    expected.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    gfl = expected.MODEL.GFL
    gfl.ASSIGNER, gfl.QUALITY, gfl.BOX_REPRESENTATION = "sapd", "none", "dirac"
    gfl.BBOX_REG_LOSS_TYPE, gfl.LOSS_BBOX_WEIGHT = "iou", 1.0
    assert cfg == expected
    assert (gfl.ANCHOR_SCALE / 2, gfl.FOCAL_LOSS_ALPHA, gfl.FOCAL_LOSS_GAMMA) == (4.0, 0.25, 2.0)
    assert (gfl.SAPD_SHRINK, gfl.SAPD_LEVELS, gfl.LOSS_LEVEL_WEIGHT) == (0.2, 3, 0.1)
