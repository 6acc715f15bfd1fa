"""Terms of distillation against the reference implementation and their definitions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from gfl_d2 import load_config
from gfl_d2.errors import InputError
from gfl_d2.modeling import (
    BridgingCrossTask,
    ClassDistillation,
    LocalizationDistillation,
    Predictions,
    ValuableRegionDistillation,
    distillation_loss,
)
from gfl_d2.modeling.distillation import build_distillation
from models import DISTILLED, STRIDES, build_gfl, gfl_on_features, make_input, small_config
from plain_distillation import (
    BINS,
    places_of_image,
    plain_bckd,
    plain_kd,
    plain_ld,
    plain_vlr,
)
from reference_data import load
from scripts import ROOT

LEVELS = range(5)


def compare(term, student, teacher, gt_instances, **kwargs):
    """The losses of one term, for predictions of both on the same images."""
    features = [torch.zeros(len(x), 32, *x.shape[2:]) for x in student.class_logits]
    model = gfl_on_features(
        features,
        num_classes=student.class_logits[0].shape[1],
        num_convs=0,
        criterion={"distillation": [term]},
        **kwargs,
    ).train()
    images = model.preprocess_image(
        [{"image": torch.zeros(3, *x.image_size)} for x in gt_instances]
    )
    with EventStorage():
        losses = model.forward_training(images, features, student[:2], gt_instances, teacher)
    return {
        name: x for name, x in losses.items() if name not in ("loss_qfl", "loss_bbox", "loss_dfl")
    }


def ground_truth(size, boxes, classes):
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)


# The reference implementation


def reference_inputs(case):
    """Predictions of student and teacher, and the ground truth of the case."""
    heads, ref = load("gfl_head_train"), load("ld_head")
    student = Predictions(
        *([heads[f"{x}_l{i}"].clone() for i in LEVELS] for x in ("cls_score", "bbox_pred"))
    )
    teacher = Predictions(student.class_logits, [ref[f"teacher_bbox_pred_l{i}"] for i in LEVELS])
    gt_instances = [
        ground_truth(tuple(size), heads[f"{case}/gt_boxes_{i}"], heads[f"{case}/gt_labels_{i}"])
        for i, size in enumerate(heads["image_sizes"].tolist())
    ]
    return ref, student, teacher, gt_instances


@pytest.mark.parametrize("case", ["both", "one_empty", "none"])
def test_localization_distillation(case):
    ref, student, teacher, gt_instances = reference_inputs(case)
    for maps in student.box_values:
        maps.requires_grad_()
    loss = compare(LocalizationDistillation(), student, teacher, gt_instances)["loss_ld"]
    assert_close(loss, ref[f"{case}/loss_ld"], rtol=1e-5, atol=0)
    loss.backward()
    expected = [ref[f"{case}/grad_bbox_pred_l{i}"] for i in LEVELS]
    largest = max(grad.abs().max() for grad in expected).clamp(min=1e-12)
    for maps, grad in zip(student.box_values, expected):
        assert (maps.grad - grad).abs().max() / largest < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", ["both", "one_empty"])
def test_localization_distillation_of_each_level(case):
    ref, student, teacher, gt_instances = reference_inputs(case)
    for level in LEVELS:
        # A student that agrees with the teacher on all other levels.
        values = list(teacher.box_values)
        values[level] = student.box_values[level]
        one = Predictions(student.class_logits, values)
        loss = compare(LocalizationDistillation(), one, teacher, gt_instances)["loss_ld"]
        expected = ref[f"{case}/loss_ld_per_level"][level].abs()
        assert_close(loss, expected, rtol=1e-5, atol=1e-6)


# The definitions


SIZES = (96, 128), (64, 96)  # the second image is padded
CROWD = [
    [10.3, 8.2, 70.1, 60.7], [14.0, 5.0, 78.0, 66.0], [60.5, 30.5, 120.2, 77.0],
    [40.0, 40.0, 56.0, 58.0], [3.0, 4.0, 125.0, 94.0],
]  # fmt: skip


def random_predictions(seed, num_classes=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(-(-SIZES[0][0] // s), -(-SIZES[0][1] // s)) for s in STRIDES]
    return Predictions(
        *(
            [
                2 * torch.randn(2, n, *shape, generator=generator, dtype=torch.float64)
                for shape in shapes
            ]
            for n in (num_classes, 4 * BINS)
        )
    )


DEFINITIONS = {
    "loss_ld": (LocalizationDistillation(), plain_ld),
    "loss_ld_vlr": (ValuableRegionDistillation(), plain_vlr),
    "loss_kd": (ClassDistillation(), plain_kd),
    "loss_bckd_cls": (BridgingCrossTask(), lambda *args: plain_bckd(*args)[0]),
    "loss_bckd_box": (BridgingCrossTask(), lambda *args: plain_bckd(*args)[1]),
}


@pytest.mark.parametrize("boxes", [[CROWD, CROWD[:2]], [[], CROWD[:1]]])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_terms_are_as_they_are_defined(name, boxes):
    """Values, and gradients by class logits and box values."""
    term, plain = DEFINITIONS[name]
    student, teacher = random_predictions(0), random_predictions(1)
    leaves = [x.requires_grad_() for maps in student[:2] for x in maps]
    gt_instances = [
        ground_truth(size, torch.tensor(x).reshape(-1, 4), torch.zeros(len(x)).long())
        for size, x in zip(SIZES, boxes)
    ]
    actual = compare(term, student, teacher, gt_instances)[name]
    places = [
        places_of_image(student[:2], teacher[:2], i, size, STRIDES) for i, size in enumerate(SIZES)
    ]
    # Boxes are float32.
    expected = plain(places, [torch.tensor(x).tolist() for x in boxes])
    assert expected > 0.01
    assert_close(actual, expected, rtol=1e-5, atol=0)
    gradients = [
        torch.autograd.grad(
            loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for loss in (actual, expected)
    ]
    largest = max(grad.abs().max() for grad in gradients[1])
    for actual, expected in zip(*gradients):
        assert (actual - expected).abs().max() / largest < 1e-5


def test_divergence_is_that_of_large_temperatures():
    """T^2 keeps its size: as T grows, the loss nears half the variance of the difference / n."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 5, 17, generator=generator, dtype=torch.float64)
    difference = logits - teacher
    variance = difference.var(dim=1, correction=0)
    assert_close(distillation_loss(logits, teacher, 1e4), variance / 2 / 17, rtol=1e-3, atol=0)
    assert_close(distillation_loss(logits, logits + 3, 2.0), torch.zeros(5).double())
    assert_close(
        distillation_loss(logits, teacher, 2.0, "sum"),
        distillation_loss(logits, teacher, 2.0).sum(),
    )


# In a model


@pytest.mark.parametrize("name", ["loss_ld", "loss_ld_vlr", "loss_kd", "loss_bckd_box"])
def test_no_box_at_all(name):
    """Losses are zero or finite, and each is connected to what it compares."""
    term, _ = DEFINITIONS[name]
    student, teacher = random_predictions(0), random_predictions(1)
    leaves = [x.requires_grad_() for maps in student[:2] for x in maps]
    gt_instances = [ground_truth(s, torch.zeros(0, 4), torch.zeros(0).long()) for s in SIZES]
    losses = compare(term, student, teacher, gt_instances)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    gradients = [x.grad for x in leaves if x.grad is not None]
    assert gradients
    assert all(x.isfinite().all() for x in gradients)
    if name != "loss_bckd_box":
        assert losses[name] == 0


@pytest.mark.parametrize("name", DEFINITIONS)
def test_what_overflows_in_the_padding_does_not_matter(name):
    term, _ = DEFINITIONS[name]
    gt_instances = [
        ground_truth(size, torch.tensor(CROWD[:2]), torch.zeros(2).long()) for size in SIZES
    ]
    results = []
    for value in (0.0, float("inf"), float("nan")):
        student, teacher = random_predictions(0), random_predictions(1)
        for maps in (*student[:2], *teacher[:2]):
            maps[0][1, :, -1, -1] = value
        leaves = [x.requires_grad_() for maps in student[:2] for x in maps]
        loss = compare(term, student, teacher, gt_instances)[name]
        results.append((loss, torch.autograd.grad(loss, leaves, allow_unused=True)))
    for loss, gradients in results[1:]:
        assert_close(loss, results[0][0], rtol=0, atol=0)
        for actual, expected in zip(gradients, results[0][1]):
            assert actual is None or assert_close(actual, expected, rtol=0, atol=0) is None


def test_scores_of_both_are_compared():
    """A score of GFLv2 is a product: what its factors are does not matter."""
    term = BridgingCrossTask()
    student, teacher = random_predictions(0), random_predictions(1)
    gt_instances = [ground_truth(s, torch.tensor(CROWD), torch.zeros(5).long()) for s in SIZES]
    model = build_gfl("dgqp", *DISTILLED[1:])
    factors = [torch.full_like(x[:, :1], 2.0) for x in student.class_logits]
    scores = [model.head.quality.score_logits(*x) for x in zip(student.class_logits, factors)]
    expected = compare(term, Predictions(scores, student.box_values), teacher, gt_instances)
    images = model.preprocess_image([{"image": torch.zeros(3, *s)} for s in SIZES])
    with EventStorage():
        losses = model.train().forward_training(
            images, None, (*student[:2], factors), gt_instances, teacher
        )
    for name, loss in expected.items():
        assert_close(losses[name], loss)


@pytest.mark.parametrize(
    "term", [LocalizationDistillation(), ValuableRegionDistillation()], ids=["ld", "ld_vlr"]
)
def test_a_batch_twice_as_large_weighs_the_same(term):
    """The reference implementation's sums are those of its two images, whatever the batch here."""
    _, student, teacher, gt_instances = reference_inputs("both")
    once = compare(term, student, teacher, gt_instances)
    student, teacher = (
        Predictions(*([torch.cat((x, x)) for x in maps] for maps in predictions[:2]))
        for predictions in (student, teacher)
    )
    twice = compare(term, student, teacher, 2 * gt_instances)
    for name, loss in once.items():
        assert loss > 0
        assert_close(twice[name], loss)


def test_values_reach_the_terms():
    keys = {"LD_WEIGHT": 1.5, "VLR_WEIGHT": 2.5, "LD_TEMPERATURE": 3.5, "KD_WEIGHT": 4.5,
            "KD_TEMPERATURE": 5.5, "BCKD_CLS_WEIGHT": 6.5, "BCKD_BOX_WEIGHT": 7.5}  # fmt: skip
    opts = [x for key, value in keys.items() for x in (f"MODEL.GFL.DISTILL.{key}", value)]
    assert build_distillation(small_config(*DISTILLED, *opts)) == [
        LocalizationDistillation(1.5, 3.5),
        ValuableRegionDistillation(2.5, 3.5),
        ClassDistillation(4.5, 5.5),
        BridgingCrossTask(6.5, 7.5),
    ]
    assert build_gfl().criterion.distillation == []
    defaults = [type(term)() for term in build_gfl(*DISTILLED).criterion.distillation]
    assert build_gfl(*DISTILLED).criterion.distillation == defaults


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TERMS", "['ld', 'hints']"], r"TERMS must be one of 'ld'.*got 'hints'"),
        (["TERMS", "['ld', 'ld']"], "TERMS must be a list that names each term once"),
        (["LD_TEMPERATURE", 0.0], "LD_TEMPERATURE must be > 0, got 0.0"),
        (["TERMS", "[['ld']]"], r"TERMS must be one of 'ld'.*got \['ld'\]"),
        (["BCKD_BOX_WEIGHT", -1.0], "BCKD_BOX_WEIGHT must be >= 0"),
    ],
)
def test_bad_values_name_their_key(opts, message):
    with pytest.raises(InputError, match=rf"MODEL\.GFL\.DISTILL\.{message}"):
        small_config("joint", "general", "atss", f"MODEL.GFL.DISTILL.{opts[0]}", *opts[1:])


@pytest.mark.parametrize("term", ["ld", "ld_vlr"])
def test_distributions_are_needed(term):
    opts = ["MODEL.GFL.DISTILL.TERMS", [term]]
    with pytest.raises(InputError, match=rf"BOX_REPRESENTATION must be 'general'.*'{term}'"):
        small_config("joint", "dirac", "atss", *opts)


def test_one_class_has_no_distribution_over_classes():
    with pytest.raises(InputError, match=r"'kd' learns which class"):
        build_distillation(small_config(*DISTILLED, "MODEL.GFL.NUM_CLASSES", 1))


def test_the_teacher_has_no_gradient():
    model = build_gfl(*DISTILLED).train()
    with torch.no_grad():
        predictions = model.predict([make_input()])[2]
    teacher = Predictions(*([x.requires_grad_() for x in maps] for maps in predictions[:2]))
    with EventStorage():
        sum(model([make_input()], teacher).values()).backward()
    assert all(x.grad is None for maps in teacher[:2] for x in maps)


def test_terms_without_a_teacher():
    with pytest.raises(InputError, match=r"DISTILL\.TERMS needs a teacher"), EventStorage():
        build_gfl(*DISTILLED).train()([make_input()])


def test_sapd_has_no_thresholds():
    opts = ["MODEL.GFL.DISTILL.TERMS", ["ld_vlr"]]
    with pytest.raises(InputError, match=r"'ld_vlr' needs the thresholds of ATSS"):
        small_config("none", "general", "sapd", *opts)


def test_thresholds_are_needed():
    model = build_gfl(*DISTILLED).train()
    forward = type(model.assigner).forward

    class WithoutThresholds(type(model.assigner)):
        def forward(self, *args):
            return forward(self, *args)._replace(iou_threshold=None)

    model.assigner = WithoutThresholds()
    teacher = Predictions(*model.predict([make_input()])[2])
    with pytest.raises(InputError, match=r"'ld_vlr' needs the thresholds of ATSS"), EventStorage():
        model([make_input()], teacher)


def test_boxes_of_other_representations_can_be_learned():
    """BCKD compares boxes, whatever stands for them."""
    opts = ["MODEL.GFL.DISTILL.TERMS", ["kd", "bckd"]]
    model = build_gfl("none", "gaussian", "atss", *opts).train()
    teacher = build_gfl("none", "gaussian", "atss")
    torch.nn.init.normal_(teacher.head.bbox_pred.weight, std=0.1)
    torch.nn.init.zeros_(teacher.head.cls_score.bias)
    with torch.no_grad():
        predictions = Predictions(*teacher.predict([make_input()])[2])
    with EventStorage():
        losses = model([make_input()], predictions)
    assert losses["loss_bckd_box"] > 0
    assert {"loss_kd", "loss_bckd_cls"} < set(losses)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "AveragedModel": lambda model: AveragedModel(model).module,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_student_is_equal(name):
    model = build_gfl(*DISTILLED).train()
    teacher = Predictions(*build_gfl("joint", "general", "atss").predict([make_input()])[2])
    copied = COPIES[name](model)
    with EventStorage():
        losses, losses_of_copy = model([make_input()], teacher), copied([make_input()], teacher)
    assert_close(losses_of_copy, losses, rtol=0, atol=0)


# The configs of published students


@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize("terms", ["ld", "ld_vlr_kd", "bckd"])
def test_configs(terms, depth):
    """They differ from GFL's in the backbone and the teacher alone."""
    folder = ROOT / "configs"
    cfg = load_config(str(folder / "distillation" / f"{terms}_R_{depth}_FPN_1x.yaml"))
    base = load_config(str(folder / "gfl_R_50_FPN_1x.yaml"))
    expected = {"ld": ["ld"], "ld_vlr_kd": ["ld", "ld_vlr", "kd"], "bckd": ["bckd"]}[terms]
    assert expected == cfg.MODEL.GFL.DISTILL.TERMS
    assert cfg.MODEL.GFL.DISTILL.TEACHER_WEIGHTS == "gfl_R_101_FPN_ms_2x.pth"
    assert depth == cfg.MODEL.RESNETS.DEPTH
    build_model(cfg)
    for changed in (cfg, base):
        changed.defrost()
        changed.MODEL.WEIGHTS = ""
        changed.MODEL.RESNETS.update({"DEPTH": 50, "RES2_OUT_CHANNELS": 256})
        changed.MODEL.GFL.DISTILL.update({"TERMS": [], "TEACHER_WEIGHTS": ""})
    assert cfg == base
