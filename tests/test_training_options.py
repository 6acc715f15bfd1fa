"""The keys that the trainer adds: each is switched on in a training that finishes."""

from __future__ import annotations

import json
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import models  # noqa: F401  (registers the tiny backbone)
from gfl_d2 import load_config
from gfl_d2.checkpoint import GFLCheckpointer, load_checkpoint_config
from gfl_d2.config import check_training_config
from gfl_d2.data import register_datasets
from gfl_d2.deploy import Predictor
from gfl_d2.engine import Trainer, read_metrics
from gfl_d2.engine.solver import scale_to_batch
from gfl_d2.engine.validation import evaluate_losses
from gfl_d2.engine.writers import build_writer
from gfl_d2.errors import InputError
from toy_training import CONFIG, options, write_dataset

TINY = ("MODEL.BACKBONE.NAME", "build_tiny_backbone", "MODEL.RESNETS.ZERO_INIT_RESIDUAL", False)
RETINANET = ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 2)
EMA = ("MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.9, "MODEL_EMA.WARMUP", 3)


class Killed(BaseException):
    pass


class Killer(HookBase):
    """Ends a training after an iteration, as a kill would, but that Detectron2's hooks may end."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter == self.iteration:
            raise Killed


class Recorder(HookBase):
    """Keeps the weights after each step."""

    def __init__(self):
        self.weights = []

    def after_step(self):
        state = self.trainer.model.state_dict()
        self.weights.append({k: v.double().numpy().copy() for k, v in state.items()})


class LearningRates(HookBase):
    def __init__(self):
        self.rates = []

    def before_step(self):
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])


@pytest.fixture
def dataset(tmp_path, clean_catalogs):
    write_dataset(tmp_path)
    return tmp_path


@pytest.fixture
def train(dataset):
    """Train with these options, in a folder of this name; gives the trainer."""

    def start(name, *opts, hooks=(), resume=False):
        opts = ["SEED", 1, *opts, "OUTPUT_DIR", dataset / name]
        cfg = load_config(CONFIG, options(dataset, *opts))
        torch.manual_seed(0)
        np.random.seed(0)
        register_datasets(cfg)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume)
        trainer.register_hooks(list(hooks))
        trainer.train()
        return trainer

    return start


@pytest.fixture
def one_image(dataset):
    """So that the order of images is the same after --resume."""
    data = json.loads((dataset / "instances.json").read_text())
    data["images"] = data["images"][2:3]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] == 3]
    (dataset / "instances.json").write_text(json.dumps(data))


def read(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def fake_service(monkeypatch, name, **functions):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for key, value in functions.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.slow
def test_all_keys_together(dataset, train, monkeypatch):
    logged = []
    run = SimpleNamespace(log=lambda scalars, step: logged.append((step, scalars)),
                          finish=lambda: logged.append("end"))  # fmt: skip
    fake_service(monkeypatch, "wandb", init=lambda **kwargs: run)
    fake_service(
        monkeypatch, "mlflow", start_run=lambda: logged.append("start"),
        log_text=lambda text, path: logged.append(path), end_run=lambda: None,
        log_metrics=lambda scalars, step: None,
    )  # fmt: skip
    train(
        "all", *EMA, "SOLVER.ACCUMULATE", 2, "SOLVER.LOG_GRAD_NORM", True, "VIS_PERIOD", 2,
        "SOLVER.EARLY_STOPPING.PATIENCE", 9, "SOLVER.OVERRIDE_ON_RESUME", True,
        "SOLVER.OPTIMIZER", "AdamW", "SOLVER.LAYER_DECAY", 0.5, "SOLVER.BASE_LR", 0.0001,
        "SOLVER.AUTO_SCALE_LR", 4, "SOLVER.MAX_ITER", 2, "TEST.EVAL_LOSS", True,
        "WRITERS", ["wandb", "mlflow"], "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR",
        "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler",
        "SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.0,
    )  # fmt: skip
    folder = dataset / "all"
    records = read_metrics(folder, "iteration")
    assert set(records) == {4, 5}  # AUTO_SCALE_LR doubled MAX_ITER; the last is the evaluation
    names = {"grad_norm", "total_loss", "bbox/AP", "val/loss_qfl", "val/total_loss"}
    assert names <= set().union(*records.values())
    content = read(folder)
    assert content["model"].keys() == content["ema"].keys()
    assert "ema" not in read(folder, "model_best.pth")
    steps = [item[0] for item in logged if isinstance(item, tuple)]
    assert steps == sorted(set(steps))
    assert logged[0] == "start"
    assert {"config.yaml", "end"} <= {item for item in logged if isinstance(item, str)}
    (event_file,) = folder.glob("events.out.tfevents*")
    events = EventAccumulator(str(event_file)).Reload()
    images = events.Tags()["images"]
    assert sorted(images) == [f"{k}/{i}" for k in ("detections", "distributions") for i in range(3)]
    assert [e.step for e in events.Images("detections/0")] == [1, 3]


@pytest.mark.slow
def test_what_watches_a_training_does_not_change_it(dataset, train):
    """Weights and statistics of BatchNorm, with flips and sizes drawn in this process."""
    common = ["INPUT.MIN_SIZE_TRAIN", "(48, 64)", "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1]
    train("off", *common)
    opts = ["SOLVER.LOG_GRAD_NORM", True, "TEST.EVAL_LOSS", True, "VIS_PERIOD", 1]
    train("on", *common, *EMA, *opts, "SOLVER.EARLY_STOPPING.PATIENCE", 9)
    assert_equal(read(dataset / "on")["model"], read(dataset / "off")["model"])


def test_writers_write_each_scalar_once(monkeypatch):
    logged = []
    fake_service(
        monkeypatch, "mlflow", start_run=lambda: None, log_text=lambda *args: None,
        log_metrics=lambda scalars, step: logged.append((step, scalars)),
    )  # fmt: skip
    writer = build_writer("mlflow", load_config(CONFIG, ["MODEL.DEVICE", "cpu"]))
    with EventStorage(3) as storage:
        storage.put_scalar("bbox/AP-dog (big)", 1.5, smoothing_hint=False)
        writer.write()
        storage.step()
        storage.put_scalar("lr", 0.1, smoothing_hint=False)
        writer.write()
    assert logged == [(3, {"bbox/AP-dog _big_": 1.5}), (4, {"lr": 0.1})]


# Averages of weights


@pytest.mark.slow
def test_averages_are_those_of_the_definition(dataset, train):
    recorder = Recorder()
    trainer = train("run", *EMA, "SOLVER.MAX_ITER", 5, "SOLVER.BASE_LR", 0.05, hooks=[recorder])
    first = GFLCheckpointer(Trainer.build_model(trainer.cfg)).model.state_dict()
    content = read(dataset / "run")
    assert first.keys() == content["ema"].keys()
    start = train("start", *EMA, "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 0.0)
    expected = {k: v.double().numpy() for k, v in start.model.state_dict().items()}
    for name in expected:
        if not name.endswith(("running_mean", "running_var")):
            continue
        expected[name] = np.full_like(expected[name], float(name.endswith("var")))
    for t, weights in enumerate(recorder.weights, start=1):
        decay = 0.9 * (1 - np.exp(-t / 3))
        expected = {k: decay * v + (1 - decay) * weights[k] for k, v in expected.items()}
    number = 0
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            assert content["ema"][name] == 5
            continue
        np.testing.assert_allclose(content["ema"][name], value, rtol=1e-5, atol=1e-6)
        number += not torch.equal(content["ema"][name], content["model"][name])
    assert number > 60


@pytest.mark.slow
def test_averages_are_evaluated(dataset, train, caplog):
    trainer = train("run", *EMA, "SOLVER.BASE_LR", 0.05)
    content = read(dataset / "run")
    average = trainer._evaluated_model
    assert_equal(average.state_dict(), content["ema"])
    assert read_metrics(dataset / "run")[4]["bbox/AP"] == Trainer.test(trainer.cfg, average)[
        "bbox"]["AP"]  # fmt: skip
    # The best of the two evaluations, as it was then.
    best = read(dataset / "run", "model_best.pth")
    if best["iteration"] == 2:
        assert_equal(best["model"], content["ema"])
    path = dataset / "run" / "model_final.pth"
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    scores = {}
    for name, opts in {"ema": [], "model": ["MODEL_EMA.ENABLED", False]}.items():
        cfg = load_checkpoint_config(path, [*opts, "MODEL.DEVICE", "cpu", "TEST.OPTIMIZE", False])
        predictor = Predictor(cfg)
        assert_equal(predictor.model.state_dict(), content[name])
        scores[name] = predictor(image)["instances"].scores
    assert not torch.equal(scores["ema"], scores["model"])
    assert "has averages too" in caplog.text
    model = Trainer.build_model(trainer.cfg)
    GFLCheckpointer(model, complete=True).load(str(path))  # of whoever evaluates
    assert_equal(model.state_dict(), content["ema"])
    GFLCheckpointer(model).load(str(path))  # a training that starts from it
    assert_equal(model.state_dict(), content["model"])


@pytest.mark.slow
def test_resumed_averages_are_uninterrupted_ones(dataset, train, one_image):
    opts = [*EMA, "SOLVER.MAX_ITER", 5, "INPUT.RANDOM_FLIP", "none"]
    train("whole", *opts)
    with pytest.raises(Killed):
        train("parts", *opts, hooks=[Killer(2)])
    assert (dataset / "parts" / "last_checkpoint").read_text() == "model_0000001.pth"
    train("parts", *opts, resume=True)
    whole, parts = (read(dataset / name) for name in ("whole", "parts"))
    assert_equal(whole["ema"], parts["ema"])
    assert_equal(whole["model"], parts["model"])
    assert not torch.equal(whole["ema"]["head.cls_score.weight"],
                           whole["model"]["head.cls_score.weight"])  # fmt: skip


def test_averages_that_start_at_a_resumption(dataset, train, caplog):
    train("run", *TINY, "SOLVER.MAX_ITER", 2)
    train("run", *TINY, *EMA, "SOLVER.MAX_ITER", 3, resume=True)
    assert "no averages" in caplog.text
    assert "ema" in read(dataset / "run")


# Early stopping


def metrics_in_turn(monkeypatch, values):
    """Evaluation k, counted over the whole training, gives values[k - 1]."""

    def test(self):
        return {"bbox": {"AP": values[self.iter]}}

    monkeypatch.setattr(Trainer, "_evaluate", test)


AP = [1.0, 5.0, 5.5, float("nan"), 5.9, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]


@pytest.mark.parametrize(
    ("patience", "delta", "last"), [(2, 0.0, 3 + 1 + 3), (3, 1.0, 4), (1, 0.0, 3)]
)
def test_early_stopping(dataset, train, monkeypatch, caplog, patience, delta, last):
    """
    With a delta of 1 nothing is better than 5.0 up to 5.9, three evaluations later. Without one,
    5.5, 5.9 and 9.0 are better.
    """
    metrics_in_turn(monkeypatch, AP)
    opts = [*TINY, "SOLVER.MAX_ITER", 10, "TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 1]
    opts += ["TEST.EVAL_LOSS", True]  # evaluates by _evaluate
    opts += ["SOLVER.EARLY_STOPPING.PATIENCE", patience, "SOLVER.EARLY_STOPPING.MIN_DELTA", delta]
    train("run", *opts)
    assert read(dataset / "run")["iteration"] == last
    assert (dataset / "run" / "last_checkpoint").read_text() == "model_final.pth"
    assert "the training ends" in caplog.text
    # It stays at its end, unless it is told to go on.
    train("run", *opts, resume=True)
    assert read(dataset / "run")["iteration"] == last


def test_early_stopping_names_the_metrics_that_there_are(dataset, train, monkeypatch, caplog):
    metrics_in_turn(monkeypatch, AP)
    opts = [*TINY, "SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 1, "TEST.EVAL_LOSS", True]
    opts += ["SOLVER.EARLY_STOPPING.PATIENCE", 1, "TEST.BEST_CHECKPOINT_METRIC", "bbox/ap"]
    train("run", *opts)
    assert "This evaluation gave no 'bbox/ap', but bbox/AP" in caplog.text


@pytest.mark.parametrize("killed", [2, 4, 5])
def test_resumed_early_stopping(dataset, train, monkeypatch, killed):
    """Killed at any time, it ends where it would have ended."""
    metrics_in_turn(monkeypatch, AP)
    opts = [*TINY, "SOLVER.MAX_ITER", 10, "TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 2]
    opts += ["TEST.EVAL_LOSS", True, "SOLVER.EARLY_STOPPING.PATIENCE", 2]
    with pytest.raises(Killed):
        train("run", *opts, hooks=[Killer(killed)])
    train("run", *opts, resume=True)
    assert read(dataset / "run")["iteration"] == 7


# Validation loss


def test_validation_loss_is_that_of_one_batch(dataset, train):
    """Of all images, which have one size here, as the training computes it."""
    trainer = train("run", *TINY, "SOLVER.MAX_ITER", 2)
    model = trainer.model.train()
    actual = evaluate_losses(trainer.cfg, model, "toy_val")
    assert model.training
    assert model.head.training
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.INPUT.RANDOM_FLIP, cfg.SOLVER.IMS_PER_BATCH = "none", 6
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert len({inputs["image_id"] for inputs in batch}) == 6
    with EventStorage(), torch.no_grad():
        expected = {name: loss.item() for name, loss in model(batch).items()}
    expected["total_loss"] = sum(expected.values())
    assert actual == pytest.approx(expected, rel=1e-5)


def test_validation_loss_of_other_models(train):
    opts = [*RETINANET, "TEST.EVAL_LOSS", True]
    with pytest.raises(InputError, match=r"RetinaNet has not the criterion.*TEST\.EVAL_LOSS False"):
        train("run", *opts)


# Optimizers


def test_scaled_schedule():
    opts = ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", 4, "SOLVER.AUTO_SCALE_LR", 16]
    cfg = load_config(CONFIG, [*opts, "SOLVER.BASE_LR", 0.01, "SOLVER.STEPS", "(900, 1104)"])
    scaled = scale_to_batch(cfg)
    solver = scaled.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (4, 0.0025)
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (4800, (3600, 4416), 400)
    assert (scaled.TEST.EVAL_PERIOD, solver.REFERENCE_WORLD_SIZE) == (1600, 0)
    assert scale_to_batch(scaled) == scaled
    # What happens in every iteration goes on happening.
    often = ["SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1]
    cfg = load_config(CONFIG, [*opts[:2], "SOLVER.AUTO_SCALE_LR", 2, *often])
    scaled = scale_to_batch(cfg)
    assert scaled.SOLVER.MAX_ITER == 300
    assert (scaled.SOLVER.CHECKPOINT_PERIOD, scaled.TEST.EVAL_PERIOD) == (1, 1)


def test_layer_decay_and_parameters_without_weight_decay():
    opts = ["MODEL.DEVICE", "cpu", "SOLVER.OPTIMIZER", "AdamW", "SOLVER.LAYER_DECAY", 0.5]
    opts += ["SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.BASE_LR", 0.001, "MODEL.GFL.CONV_DIM", 64]
    cfg = load_config(
        CONFIG, [*opts, "SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.0]
    )
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    factors = {"stem": 2**-5, "res2": 2**-4, "res3": 2**-3, "res4": 2**-2, "res5": 2**-1}
    seen = set()
    for name, parameter in model.named_parameters():
        group, part = groups.pop(parameter), re.search(r"stem|res\d|$", name).group()
        assert group["lr"] == pytest.approx(0.001 * factors.get(part, 1.0)), name
        is_kernel = parameter.ndim == 4 or name == "head.scales"
        assert group["weight_decay"] == (0.05 if is_kernel else 0.0), name
        seen.add(part)
    assert not groups
    assert seen == {"", *factors}
    tiny = load_config(CONFIG, [*opts, *TINY])
    with pytest.raises(InputError, match=r"SOLVER\.LAYER_DECAY must be 1"):
        Trainer.build_optimizer(tiny, Trainer.build_model(tiny))


@pytest.mark.parametrize("clip", ["value", "norm", "full_model"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_gradient_norm_is_from_before_clipping(kind, clip):
    opts = ["MODEL.DEVICE", "cpu", "SOLVER.LOG_GRAD_NORM", True, "SOLVER.OPTIMIZER", kind]
    opts += ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01]
    model = nn.Linear(2, 2)
    optimizer = Trainer.build_optimizer(load_config(CONFIG, opts), model)
    model.weight.grad, model.bias.grad = torch.full((2, 2), 3.0), torch.full((2,), 4.0)
    with EventStorage() as storage:
        optimizer.step()
        assert storage.latest()["grad_norm"][0] == pytest.approx((4 * 9 + 2 * 16) ** 0.5)
    assert model.weight.grad.max() <= 0.01


def test_changes_at_a_resumption(dataset, train, one_image, caplog):
    opts = [*TINY, "INPUT.RANDOM_FLIP", "none", "SOLVER.MAX_ITER", 6]
    with pytest.raises(Killed):
        train("run", *opts, "SOLVER.BASE_LR", 0.01, hooks=[Killer(3)])
    caplog.clear()
    changed = ["SOLVER.BASE_LR", 0.004, "SOLVER.WEIGHT_DECAY", 0.5, "SOLVER.MOMENTUM", 0.5]
    changed += ["SOLVER.WEIGHT_DECAY_NORM", 0.5, "SOLVER.STEPS", "(5,)"]
    opts += [*changed, "SOLVER.OVERRIDE_ON_RESUME", True]
    rates = LearningRates()
    trainer = train("run", *opts, hooks=[rates], resume=True)
    assert re.search(r"SOLVER\.BASE_LR .* 0.01, not 0.004", caplog.text)
    groups = trainer.optimizer.param_groups
    assert {(group["weight_decay"], group["momentum"]) for group in groups} == {(0.5, 0.5)}
    assert rates.rates == pytest.approx([0.004, 0.0004])  # of iterations 4 and 5


# Data


def test_rare_classes_are_repeated(dataset, train):
    """Image 6 alone has a dog left: f = 1/6, repeat factor sqrt(t / f) with t = 2/3 is 2."""
    data = json.loads((dataset / "instances.json").read_text())
    data["annotations"] = [
        a for a in data["annotations"] if a["category_id"] == 1 or a["image_id"] == 6
    ]
    (dataset / "instances.json").write_text(json.dumps(data))
    opts = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    trainer = train(
        "run", *TINY, *opts, "DATALOADER.REPEAT_THRESHOLD", 2 / 3, "SOLVER.MAX_ITER", 14
    )
    seen = [
        inputs["image_id"] for _ in range(35) for inputs in next(trainer._trainer._data_loader_iter)
    ]
    counts = {i: seen.count(i) for i in range(1, 7)}
    assert counts[6] == pytest.approx(2 * counts[3], abs=2)


# Mistakes


@pytest.mark.parametrize(
    ("opts", "pattern"),
    [
        (["SOLVER.ACCUMULATE", 3], r"ACCUMULATE must be a divisor of SOLVER.IMS_PER_BATCH, 8"),
        (["SOLVER.ACCUMULATE", 0], "ACCUMULATE"),
        (["MODEL_EMA.DECAY", 1.0], r"MODEL_EMA\.DECAY must be in"),
        (["MODEL_EMA.WARMUP", -1], r"MODEL_EMA\.WARMUP"),
        (["MODEL_EMA.ENABLED", True, "TEST.PRECISE_BN.ENABLED", True], "PRECISE_BN"),
        (
            [
                *["MODEL.GFL.DISTILL.TERMS", ["ld"], "MODEL.GFL.DISTILL.TEACHER_WEIGHTS", "a.pth"],
                *["TEST.PRECISE_BN.ENABLED", True],
            ],
            "PRECISE_BN.ENABLED must be False with MODEL.GFL.DISTILL",
        ),
        (["SOLVER.MAX_ITER", 0], r"MAX_ITER must be a number of iterations, >= 1"),
        (["SOLVER.CHECKPOINT_PERIOD", 0], r"CHECKPOINT_PERIOD must be a number of iterations"),
        (["TEST.BEST_CHECKPOINT_METRIC", "val/total_loss"], "of which more is better"),
        (["SOLVER.OPTIMIZER", "Adam"], r"SOLVER\.OPTIMIZER must be one of"),
        (["SOLVER.LAYER_DECAY", 0.0], "LAYER_DECAY"),
        (["SOLVER.AUTO_SCALE_LR", -8], "AUTO_SCALE_LR"),
        (["SOLVER.AUTO_SCALE_LR", 8, "SOLVER.REFERENCE_WORLD_SIZE", 8], "AUTO_SCALE_LR must be 0"),
        (["SOLVER.EARLY_STOPPING.PATIENCE", 2, "TEST.EVAL_PERIOD", 0], "PATIENCE must be 0"),
        (["SOLVER.EARLY_STOPPING.PATIENCE", -2], "PATIENCE"),
        (["SOLVER.EARLY_STOPPING.MIN_DELTA", -1.0], "MIN_DELTA"),
        (["VIS_PERIOD", -1], "VIS_PERIOD"),
        (["VIS_PERIOD", 1, "DATASETS.TRAIN", (), "DATASETS.TEST", ()], "VIS_PERIOD must be 0"),
        (["WRITERS", "['tensorboard']"], "WRITERS must be a list of 'wandb' and 'mlflow'"),
        (["WRITERS", "['wandb']"], "'wandb', which is not installed: pip install wandb"),
    ],
)
def test_mistakes(opts, pattern):
    cfg = load_config(CONFIG, ["MODEL.DEVICE", "cpu", *opts])
    with pytest.raises(InputError, match=pattern):
        check_training_config(cfg)
