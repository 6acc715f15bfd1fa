"""The trainer, its hooks, output folder and metrics."""

from __future__ import annotations

import copy
import io
import json
import math
import re

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import AMPTrainer
from detectron2.utils.events import EventStorage
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gfl_d2 import load_config
from gfl_d2.checkpoint import GFLCheckpointer, load_checkpoint_config
from gfl_d2.data import register_datasets
from gfl_d2.engine import (
    BestModelSaver,
    BFloat16Trainer,
    Trainer,
    check_output_folder,
    read_metrics,
    trainer,
)
from gfl_d2.engine.parallel import _has_idle_features
from gfl_d2.errors import InputError
from toy_training import CONFIG, options, write_dataset


@pytest.fixture
def make_trainer(tmp_path, clean_catalogs):
    write_dataset(tmp_path)

    def make(*opts):
        cfg = load_config(CONFIG, options(tmp_path, *opts))
        register_datasets(cfg)
        return Trainer(cfg)

    return make


# bfloat16


@pytest.fixture
def bfloat16_trainer(make_trainer, monkeypatch):
    monkeypatch.setattr(trainer, "has_fast_bfloat16", lambda device_type: True)
    return make_trainer("SOLVER.BF16", True)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    seen = []
    hook = model.head.cls_score.register_forward_hook(lambda *args: seen.append(args[-1]))
    model.eval()([{"image": torch.full((3, 64, 96), 99.0)}])
    hook.remove()
    return seen[0]


def copy_by_deepcopy(model):
    return copy.deepcopy(model)


def copy_by_averaging(model):
    return AveragedModel(model).module


def copy_by_saving(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copy_model", [copy_by_deepcopy, copy_by_averaging, copy_by_saving])
def test_a_copy_of_a_model_in_bfloat16_training_is_a_model(bfloat16_trainer, copy_model):
    model = bfloat16_trainer.model
    expected = logits(model)
    copied = copy_model(model)
    with torch.no_grad():
        model.head.cls_score.bias.fill_(3.0)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(copied), expected)


def test_autocast_of_the_user_stays_in_force(bfloat16_trainer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(bfloat16_trainer.model).dtype == torch.bfloat16
    assert logits(bfloat16_trainer.model).dtype == torch.float32


def test_step_in_bfloat16():
    """The forward pass is in bfloat16; weights, gradients and the step are not."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x):
            y = self.linear(x)
            dtypes.append(y.dtype)
            return {"loss_a": y.float().sum(), "loss_b": y.float().mean()}

    dtypes = []
    model = Model()
    step = BFloat16Trainer(model, [torch.ones(2, 4)], torch.optim.SGD(model.parameters(), 0.25))
    before = model.linear.weight.detach().clone()
    with EventStorage() as storage:
        step.run_step()
    assert dtypes == [torch.bfloat16]
    assert model.linear.weight.grad.dtype == torch.float32
    # d(sum + mean)/dw = 2 + 1 for two inputs of ones.
    torch.testing.assert_close(model.linear.weight, before - 0.25 * 3)
    values = {name: value for name, (value, _) in storage.latest().items()}
    assert values["total_loss"] == pytest.approx(values["loss_a"] + values["loss_b"])


# Best model


class Training:
    """The part of a training that BestModelSaver sees, with metrics that the test makes up."""

    def __init__(self, folder):
        self.model = nn.Linear(1, 1)
        checkpointer = GFLCheckpointer(self.model, str(folder), description={"config": "a: 1"})
        self.hook = BestModelSaver(checkpointer, "bbox/AP")
        self.hook.trainer = self
        self.iter, self.max_iter = 0, 100
        self.hook.before_train()

    def evaluate(self, iteration, **metrics):
        """The weights are the iteration."""
        self.iter = iteration
        nn.init.constant_(self.model.weight, iteration)
        with EventStorage(iteration) as self.storage:
            self.storage.put_scalars(**metrics, smoothing_hint=False)
            self.hook.after_step()
            self.hook.after_step()  # in the next iteration, without an evaluation


def best(folder):
    content = torch.load(folder / "model_best.pth", weights_only=True)
    assert content["iteration"] == content["model"]["weight"].item()
    assert content["config"] == "a: 1"
    return content["iteration"], content["metrics"]


def test_best_model_is_remembered_with_its_metric(tmp_path):
    """A training is killed after its best evaluation, and resumed from before it."""
    training = Training(tmp_path)
    for iteration, ap in ((10, 10.0), (20, 20.0), (30, 30.0)):
        training.evaluate(iteration, **{"bbox/AP": ap})
    training = Training(tmp_path)
    training.evaluate(30, **{"bbox/AP": 25.0})
    assert best(tmp_path) == (30, {"bbox/AP": 30.0})
    training.evaluate(40, **{"bbox/AP": 35.0})
    assert best(tmp_path) == (40, {"bbox/AP": 35.0})


def test_best_model_is_not_what_training_is_resumed_from(tmp_path):
    training = Training(tmp_path)
    training.evaluate(10, **{"bbox/AP": 10.0})
    assert [path.name for path in tmp_path.iterdir()] == ["model_best.pth"]


def test_no_best_model_without_its_metric(tmp_path, caplog):
    training = Training(tmp_path)
    training.evaluate(10, **{"bbox/AP": math.nan})
    training.evaluate(20, **{"bbox/AP50": 10.0})
    assert not list(tmp_path.iterdir())
    training = Training(tmp_path)
    training.evaluate(100, **{"bbox/AP50": 10.0})
    training.hook.after_train()
    assert "TEST.BEST_CHECKPOINT_METRIC 'bbox/AP'" in caplog.text


def test_best_model_of_another_metric_is_replaced(tmp_path):
    torch.save({"model": {}, "metrics": {"bbox/AP50": 50.0}}, tmp_path / "model_best.pth")
    Training(tmp_path).evaluate(10, **{"bbox/AP": 10.0})
    assert best(tmp_path) == (10, {"bbox/AP": 10.0})


def test_damaged_best_model(tmp_path):
    (tmp_path / "model_best.pth").write_bytes(b"half")
    with pytest.raises(InputError, match=r"model_best\.pth cannot be read"):
        Training(tmp_path)


# Resuming


@pytest.mark.parametrize("key", ["SOLVER.BASE_LR", "SOLVER.WEIGHT_DECAY", "SOLVER.MOMENTUM"])
def test_what_resuming_takes_from_the_checkpoint(make_trainer, caplog, key):
    # Of their own group each, so that a change of WEIGHT_DECAY changes none.
    groups = ("SOLVER.WEIGHT_DECAY_NORM", 0.0)
    state = make_trainer(*groups, key, 0.005).state_dict()
    make_trainer(*groups, key, 0.005).load_state_dict(state)
    assert key not in caplog.text
    make_trainer(*groups, key, 0.002).load_state_dict(state)
    assert re.search(rf"{key}( \([^)]*\))? 0.005, not 0.002", caplog.text)
    assert "MODEL.WEIGHTS" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("SGD", "AdamW"), ("AdamW", "SGD")])
def test_another_optimizer_cannot_be_resumed(make_trainer, first, then):
    state = make_trainer("SOLVER.OPTIMIZER", first).state_dict()
    with pytest.raises(InputError, match=r"is not that of the checkpoint\. SOLVER\.OPTIMIZER"):
        make_trainer("SOLVER.OPTIMIZER", then).load_state_dict(state)


def test_mixed_precision_may_begin_at_a_resumption(make_trainer, caplog):
    state = make_trainer().state_dict()
    trainer = make_trainer()
    plain = trainer._trainer
    trainer._trainer = AMPTrainer(plain.model, plain.data_loader, plain.optimizer)
    trainer.load_state_dict(state)
    assert "the scaler of losses starts anew" in caplog.text


def test_layers_that_no_head_takes(make_trainer):
    """In several processes these are named to DistributedDataParallel."""
    for levels, is_idle in ((["p3", "p4", "p5"], True), (["p3", "p4", "p5", "p6", "p7"], False)):
        trainer = make_trainer("MODEL.GFL.IN_FEATURES", levels)
        assert _has_idle_features(trainer.model) == is_idle


def test_other_parameters_cannot_be_resumed(make_trainer):
    state = make_trainer("MODEL.BACKBONE.FREEZE_AT", 0).state_dict()
    fewer = make_trainer("MODEL.BACKBONE.FREEZE_AT", 1)
    with pytest.raises(InputError, match=r"optimizer does not fit.*FREEZE_AT"):
        fewer.load_state_dict(state)


def test_trainer_checks_its_config(make_trainer):
    with pytest.raises(InputError, match=r"SOLVER\.AMP"):
        make_trainer("SOLVER.AMP.ENABLED", True)
    with pytest.raises(InputError, match=r"TEST\.BEST_CHECKPOINT_METRIC"):
        make_trainer("DATASETS.TEST", "('toy_train', 'toy_val')")


def test_trainer_saves_by_its_own_checkpointer(make_trainer, tmp_path):
    """All hooks that save do so atomically."""
    hooks = make_trainer()._hooks
    checkpointers = [hook.checkpointer for hook in hooks if hasattr(hook, "checkpointer")]
    assert [type(c) for c in checkpointers] == [GFLCheckpointer]


def test_checkpoints_of_a_training_describe_the_model(make_trainer, tmp_path):
    trainer = make_trainer("SOLVER.MAX_ITER", 7, "MODEL.GFL.NUM_CLASSES", 0)
    trainer.checkpointer.save("model_1", iteration=1)
    content = torch.load(tmp_path / "output" / "model_1.pth", weights_only=True)
    assert content["class_names"] == ["cat", "dog"]
    cfg = load_checkpoint_config(tmp_path / "output" / "model_1.pth")
    assert (cfg.SOLVER.MAX_ITER, cfg.MODEL.GFL.NUM_CLASSES) == (7, 2)
    assert cfg.DATASETS == trainer.cfg.DATASETS


def test_a_training_without_names_of_classes(make_trainer, clean_catalogs):
    DatasetCatalog.register("mine", lambda: DatasetCatalog.get("toy_val"))
    trainer = make_trainer("DATASETS.TRAIN", "('mine',)")
    assert set(trainer.checkpointer.description) == {"config"}


def test_trainer_checks_evaluators_at_the_start(make_trainer):
    make_trainer()
    del MetadataCatalog.get("toy_val").evaluator_type
    MetadataCatalog.get("toy_val").evaluator_type = "sem_seg"
    with pytest.raises(InputError, match="sem_seg"):
        make_trainer()


# Output folder and metrics


@pytest.mark.parametrize("name", ["metrics.json", "model_best.pth", "last_checkpoint"])
def test_folder_of_an_earlier_training(tmp_path, name):
    check_output_folder(str(tmp_path / "absent"))
    (tmp_path / name).touch()
    (tmp_path / "config.yaml").write_text("MODEL: {}")
    check_output_folder(str(tmp_path))
    (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=rf"{name}.*--resume"):
        check_output_folder(str(tmp_path))


def write_metrics(folder, *records):
    """(iteration, {metric: value}) as Detectron2 appends them."""
    lines = [json.dumps({"iteration": iteration, **metrics}) for iteration, metrics in records]
    with open(folder / "metrics.json", "a") as file:
        file.write("\n".join(lines) + "\n")


def test_metrics_of_a_later_training_are_not_those_of_the_first(tmp_path):
    loss = {"total_loss": 1.0}
    write_metrics(tmp_path, (19, loss), (39, loss), (40, {"bbox/AP": 56.1}))
    assert list(read_metrics(tmp_path)) == [41]
    write_metrics(tmp_path, (5, loss), (6, {"bbox/AP": math.nan}))
    (record,) = read_metrics(tmp_path).values()
    assert math.isnan(record["bbox/AP"])


def test_half_a_line_of_a_killed_training_is_left_out_of_the_metrics(tmp_path):
    loss = {"total_loss": 1.0}
    write_metrics(tmp_path, (19, loss))
    with open(tmp_path / "metrics.json", "a") as file:
        file.write('{"iteration": 39, "total_l')
    assert list(read_metrics(tmp_path, "total_loss")) == [20]
    write_metrics(tmp_path, (29, loss), (39, loss))  # resumed: its first record ends that line
    write_metrics(tmp_path, (49, {**loss, 'bbox/AP-{"a': 1.0}))  # the name of a class
    assert list(read_metrics(tmp_path, "total_loss")) == [20, 30, 40, 50]


def test_metrics_of_one_iteration_in_several_records(tmp_path):
    write_metrics(tmp_path, (40, {"bbox/AP": 10.0}), (40, {"gfl/pos_quality": 0.5}))
    record = {"iteration": 40, "bbox/AP": 10.0, "gfl/pos_quality": 0.5}
    assert read_metrics(tmp_path) == {41: record}


def test_metrics_of_a_resumed_training(tmp_path):
    """Killed after iteration 59 and resumed from 40."""
    loss, again = {"total_loss": 1.0}, {"total_loss": 2.0}
    write_metrics(tmp_path, (19, loss), (39, loss), (29, {"bbox/AP": 10.0}), (59, loss))
    write_metrics(tmp_path, (49, {"bbox/AP": 20.0}))
    write_metrics(tmp_path, (59, again), (49, {"bbox/AP": 30.0}), (60, {"bbox/AP": 40.0}))
    ap = {i: record["bbox/AP"] for i, record in read_metrics(tmp_path).items()}
    assert ap == {30: 10.0, 50: 30.0, 61: 40.0}
    losses = {i: r["total_loss"] for i, r in read_metrics(tmp_path, "total_loss").items()}
    assert losses == {20: 1.0, 40: 1.0, 60: 2.0}
