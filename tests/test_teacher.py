"""A training with a teacher: what the trainer does with it, and users' mistakes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from gfl_d2 import load_config
from gfl_d2.checkpoint import describe_model
from gfl_d2.data import register_datasets
from gfl_d2.engine import StudentWithTeacher, Trainer, find_teacher, trainer
from gfl_d2.errors import InputError
from gfl_d2.modeling import GFLHead
from models import DISTILLED, build_gfl, make_input, randomize_norms
from scripts import load_script
from toy_training import CONFIG, options, write_dataset

train_net = load_script("train_net.py")
TERMS = {"loss_ld", "loss_ld_vlr", "loss_kd", "loss_bckd_cls", "loss_bckd_box"}


@pytest.fixture
def dataset(tmp_path, clean_catalogs):
    write_dataset(tmp_path)
    return tmp_path


def save_teacher(folder, *opts, class_names=("cat", "dog"), with_config=True):
    """Another backbone and a wider head than the student's, with scores that differ."""
    changes = ["MODEL.RESNETS.DEPTH", 34, "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.GFL.CONV_DIM", 96]
    cfg = load_config(CONFIG, options(folder, *changes, *opts))
    torch.manual_seed(7)
    model = randomize_norms(build_model(cfg))
    nn.init.normal_(model.head.cls_score.weight, std=0.2)
    nn.init.normal_(model.head.bbox_pred.weight, std=0.2)
    nn.init.constant_(model.head.cls_score.bias, -2.0)
    description = describe_model(cfg, class_names) if with_config else {}
    torch.save({"model": model.state_dict(), **description}, folder / "teacher.pth")
    (folder / "teacher.yaml").write_text(cfg.dump())
    return model


def distill(folder, *opts):
    """Options of a training with the teacher and all terms."""
    return options(
        folder,
        *DISTILLED[3:],
        *("MODEL.GFL.DISTILL.TEACHER_WEIGHTS", folder / "teacher.pth"),
        *("TEST.EVAL_PERIOD", 0, "DATASETS.TEST", "()", "SEED", 1),
        *opts,
    )


def make_trainer(folder, *opts):
    cfg = load_config(CONFIG, distill(folder, *opts))
    register_datasets(cfg)
    return Trainer(cfg)


def run(folder, *args, opts=()):
    command = ["--config-file", CONFIG, *args, *distill(folder, *opts)]
    return train_net.main(default_argument_parser().parse_args(command))


@pytest.mark.slow
def test_training_with_a_teacher(dataset):
    """The losses are logged, and nothing of the teacher is in what is saved."""
    save_teacher(dataset)
    run(dataset, opts=["TEST.EVAL_PERIOD", 2, "DATASETS.TEST", "('toy_val',)"])
    output = dataset / "output"
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    logged = set().union(*records)
    assert logged > TERMS | {"loss_qfl", "loss_bbox", "loss_dfl", "bbox/AP"}
    alone = build_model(load_config(CONFIG, options(dataset))).state_dict()
    for name in ("model_final.pth", "model_best.pth"):
        content = torch.load(output / name, weights_only=True)
        assert {k: x.shape for k, x in content["model"].items()} == {
            k: x.shape for k, x in alone.items()
        }
    state = torch.load(output / "model_final.pth", weights_only=False)["trainer"]["_trainer"]
    assert len(state["optimizer"]["state"]) == len(list(build_student(dataset).parameters()))

    # It is evaluated without its teacher.
    (dataset / "teacher.pth").unlink()
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(dataset / "x")]
    args = default_argument_parser().parse_args(["--eval-only", *weights])
    assert 0 <= train_net.main(args)["bbox"]["AP"] <= 100


def build_student(folder):
    return build_model(load_config(CONFIG, options(folder)))


def test_the_teacher_belongs_to_the_trainer(dataset):
    save_teacher(dataset)
    made = make_trainer(dataset)
    step = made._trainer.model
    assert isinstance(step, StudentWithTeacher)
    assert made.model is step.student is made.checkpointer.model
    optimized = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in made.model.parameters()}
    assert not any(p.requires_grad for p in step.teacher.parameters())
    assert step.training
    assert step.student.training
    assert not step.train().teacher.training
    assert not any(module.training for module in step.teacher.modules())
    copies = copy.deepcopy(made.model), AveragedModel(made.model).module
    for copied in copies:
        assert copied.state_dict().keys() == made.model.state_dict().keys()


@pytest.mark.slow
def test_the_teacher_stays_as_it_is(dataset):
    """Its predictions, but for the rounding of folded BatchNorms, are those of its file."""
    teacher = save_teacher(dataset)
    made = make_trainer(dataset)
    before = {name: x.clone() for name, x in made._trainer.model.teacher.state_dict().items()}
    made.train()
    step = made._trainer.model
    assert all(torch.equal(x, before[name]) for name, x in step.teacher.state_dict().items())
    asked = step.ask_teacher([make_input()])
    with torch.no_grad():
        _, _, (logits, values) = teacher.predict([make_input()])
    for actual, expected in ((asked.class_logits, logits), (asked.box_values, values)):
        assert not any(x.requires_grad for x in actual)
        for maps, maps_of_file in zip(actual, expected):
            assert_close(maps, maps_of_file, rtol=1e-4, atol=1e-4)


def test_a_score_of_a_teacher_is_a_product():
    """GFLv2's. The student may be GFL."""
    teacher, student = build_gfl("dgqp"), build_gfl(*DISTILLED)
    step = StudentWithTeacher(student, teacher)
    asked = step.ask_teacher([make_input()])
    assert asked.quality_logits is None
    _, _, (logits, _, qualities) = teacher.predict([make_input()])
    for score, *factors in zip(asked.class_logits, logits, qualities):
        assert_close(score.sigmoid(), factors[0].sigmoid() * factors[1].sigmoid())
    with EventStorage():
        losses = step.train()([make_input()])
    assert set(losses) > TERMS


def test_a_student_starts_as_without_a_teacher(dataset):
    save_teacher(dataset)
    weights = []
    for terms in (DISTILLED[4], []):
        torch.manual_seed(3)
        path = dataset / "teacher.pth" if terms else ""
        opts = ["MODEL.GFL.DISTILL.TERMS", terms, "MODEL.GFL.DISTILL.TEACHER_WEIGHTS", path]
        made = make_trainer(dataset, *opts)
        weights.append([*made.model.state_dict().values(), torch.rand(1)])
    assert all(torch.equal(*pair) for pair in zip(*weights))


@pytest.mark.slow
def test_teacher_and_student_run_in_the_same_autocast(dataset, monkeypatch):
    dtypes = set()
    forward = GFLHead.forward

    def spy(self, features):
        logits, distributions = forward(self, features)
        dtypes.add((self.training, logits[0].dtype))
        return logits, distributions

    save_teacher(dataset)
    monkeypatch.setattr(GFLHead, "forward", spy)
    monkeypatch.setattr(trainer, "has_fast_bfloat16", lambda device_type: True)
    made = make_trainer(dataset, "SOLVER.BF16", True)
    made.train()
    assert dtypes == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert all(p.isfinite().all() for p in made.model.parameters())


@pytest.mark.slow
def test_resumed_training_is_uninterrupted_training(dataset):
    """Weights and momentum, on a single image so that the order is the same."""
    save_teacher(dataset)
    data = json.loads((dataset / "instances.json").read_text())
    data["images"] = data["images"][2:3]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] == 3]
    (dataset / "instances.json").write_text(json.dumps(data))
    opts = ["INPUT.RANDOM_FLIP", "none", "SOLVER.STEPS", "(3,)", "SOLVER.MAX_ITER"]
    run(dataset, opts=[*opts, 4, "OUTPUT_DIR", dataset / "whole"])
    run(dataset, opts=[*opts, 2, "OUTPUT_DIR", dataset / "parts"])
    run(dataset, "--resume", opts=[*opts, 4, "OUTPUT_DIR", dataset / "parts"])
    alone = ["MODEL.GFL.DISTILL.TERMS", [], "MODEL.GFL.DISTILL.TEACHER_WEIGHTS", ""]
    run(dataset, opts=[*alone, *opts, 4, "OUTPUT_DIR", dataset / "alone"])

    def flatten(name):
        content = torch.load(dataset / name / "model_final.pth", weights_only=False)
        states = content["trainer"]["_trainer"]["optimizer"]["state"].values()
        momenta = [state["momentum_buffer"] for state in states]
        return [
            torch.cat([x.flatten().double() for x in tensors])
            for tensors in (content["model"].values(), momenta)
        ]

    whole, parts, without = map(flatten, ("whole", "parts", "alone"))
    for expected, actual, limit in zip(whole, parts, (1e-3, 0.02)):
        assert (actual - expected).norm() / expected.norm() < limit
    # The teacher has taught something.
    assert (without[1] - whole[1]).norm() / whole[1].norm() > 0.05


# Users' mistakes


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.GFL.NUM_CLASSES", 5, "NUM_CLASSES is 2, but 5 of the teacher"),
        ("MODEL.GFL.REG_MAX", 8, "REG_MAX is 16, but 8 of the teacher"),
        ("MODEL.GFL.LEGACY_ANCHOR_CENTERS", True, "LEGACY_ANCHOR_CENTERS is False, but True"),
        ("INPUT.FORMAT", "BGR", "INPUT.FORMAT is 'RGB', but 'BGR' of the teacher"),
    ],
)
def test_predictions_that_cannot_be_compared(dataset, key, value, message):
    save_teacher(dataset, key, value, class_names=())
    assert message in error_of(dataset)


def error_of(dataset, *opts) -> str:
    """The message of a training that fails before anything is written."""
    with pytest.raises(SystemExit) as caught:
        run(dataset, opts=opts)
    assert not (dataset / "output").exists()
    message = caught.value.code
    assert message.startswith("Error: ")
    assert len(message.splitlines()) == 1
    return message


def test_missing_files_of_the_teacher(dataset):
    message = error_of(dataset)
    assert f"Weights file {dataset / 'teacher.pth'} does not exist" in message
    assert "MODEL.GFL.DISTILL" in message
    save_teacher(dataset, with_config=False)
    message = error_of(dataset)
    assert "teacher.pth carries no config" in message
    assert "TEACHER_CONFIG" in message
    config = ["MODEL.GFL.DISTILL.TEACHER_CONFIG", dataset / "absent.yaml"]
    assert "absent.yaml' does not exist" in error_of(dataset, *config)
    (dataset / "teacher.pth").unlink()
    config = ["MODEL.GFL.DISTILL.TEACHER_CONFIG", dataset / "teacher.yaml"]
    assert "teacher.pth does not exist" in error_of(dataset, *config)


def test_a_teacher_with_a_config_of_its_own(dataset):
    save_teacher(dataset, with_config=False)
    config = ["MODEL.GFL.DISTILL.TEACHER_CONFIG", dataset / "teacher.yaml"]
    teacher = make_trainer(dataset, *config)._trainer.model.teacher
    assert teacher.head.cls_subnet[0].out_channels == 96


@pytest.mark.parametrize(
    ("key", "value"), [("TERMS", []), ("TEACHER_WEIGHTS", ""), ("TEACHER_CONFIG", "x.yaml")]
)
def test_terms_and_teacher_need_each_other(dataset, key, value):
    opts = [f"MODEL.GFL.DISTILL.{key}", value]
    if key == "TEACHER_CONFIG":
        opts += ["MODEL.GFL.DISTILL.TERMS", [], "MODEL.GFL.DISTILL.TEACHER_WEIGHTS", ""]
    message = error_of(dataset, *opts)
    assert "DISTILL needs both TERMS" in message
    assert key in message


@pytest.mark.slow
def test_weights_that_do_not_fit_the_teachers_config(dataset):
    save_teacher(dataset)
    content = torch.load(dataset / "teacher.pth", weights_only=True)
    del content["model"]["head.bbox_pred.bias"]
    torch.save(content, dataset / "teacher.pth")
    with pytest.raises(InputError, match=r"teacher\.pth does not fit the model.*bbox_pred\.bias"):
        make_trainer(dataset)


def test_classes_in_another_order(dataset):
    save_teacher(dataset, class_names=("dog", "cat"))
    with pytest.raises(InputError, match=r"classes of MODEL\.GFL\.DISTILL.*another order"):
        make_trainer(dataset)


def test_other_levels(dataset):
    save_teacher(dataset, "MODEL.GFL.IN_FEATURES", ["p3", "p4", "p5"])
    with pytest.raises(InputError, match=r"Strides.*teacher\.pth: both must agree"):
        make_trainer(dataset)


def test_only_gfl_has_a_teacher(dataset):
    opts = ["MODEL.META_ARCHITECTURE", "RetinaNet", *DISTILLED[3:]]
    with pytest.raises(InputError, match=r"DISTILL\.TERMS must be \[\] for .*'RetinaNet'"):
        load_config(CONFIG, options(dataset, *opts))
    assert find_teacher(load_config(CONFIG, options(dataset))) is None
