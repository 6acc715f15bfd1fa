"""Accumulated gradients are those of the large batch; processes average weights alike."""

from __future__ import annotations

import pytest
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gfl_d2.engine.ema import ModelAverager, share_buffers
from gfl_d2.engine.hooks import EarlyStopping, Evaluation, TrainingEnds
from gfl_d2.engine.steps import AccumulatingTrainer, BFloat16Trainer, find_criterion
from gfl_d2.errors import InputError
from models import CHOICES, WITH_RESNET, build_gfl, make_input
from processes import run_processes

BATCH = [
    make_input(),
    make_input(boxes=()),
    make_input(boxes=((5.0, 5.0, 60.0, 50.0),)),
    make_input(boxes=((1.0, 2.0, 30.0, 40.0), (20.0, 9.0, 90.0, 60.0), (60.0, 2.0, 90.0, 30.0))),
]


def adds_up(quality, box, assigner):
    return not quality.endswith("guided") and assigner != "sapd"


def step(number, *choices, opts=(), wrap=lambda model: model, kind=SimpleTrainer, batch=BATCH):
    """Losses, gradients and buffers of a step in this number of parts."""
    model = build_gfl(*choices, *opts) if choices else build_gfl(*opts)
    # With higher scores the sum of the positives' weights is above its floor.
    nn.init.zeros_(model.head.cls_score.bias)
    trainer = kind(wrap(model.train()), [batch] * 2, torch.optim.SGD(model.parameters(), 0.1))
    if number > 1:
        trainer = AccumulatingTrainer(trainer, number)
    trainer.iter = 0
    with EventStorage() as storage:
        trainer.run_step()
    losses = {k: v for k, (v, _) in storage.latest().items() if "loss" in k}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return losses, gradients, dict(model.named_buffers())


def assert_equal_steps(actual, expected):
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("choices", [c for c in CHOICES if adds_up(*c)])
def test_parts_are_one_batch(choices):
    assert_equal_steps(step(2, *choices), step(1, *choices))


@pytest.mark.parametrize("number", [3, 4])
def test_parts_of_one_image_and_of_unequal_numbers(number):
    assert_equal_steps(step(number), step(1))


def test_plain_mean_over_parts_would_be_another_step():
    """What the parts are divided by matters."""
    whole, halves = step(1), [step(1, batch=BATCH[i : i + 2]) for i in (0, 2)]
    mean = sum(losses["loss_bbox"] for losses, _, _ in halves) / 2
    assert mean != pytest.approx(whole[0]["loss_bbox"], rel=1e-3)


def test_parts_with_batch_norm():
    """Each part counts once."""
    opts = ("joint", "general", "atss", *WITH_RESNET, "MODEL.RESNETS.NORM", "BN")
    buffers = step(2, *opts)[2]
    counters = [v for name, v in buffers.items() if name.endswith("num_batches_tracked")]
    assert counters
    assert all(counter == 2 for counter in counters)


def test_parts_in_bfloat16():
    losses, gradients, _ = step(2, kind=BFloat16Trainer)
    expected, expected_gradients, _ = step(1, kind=BFloat16Trainer)
    assert losses == pytest.approx(expected, rel=1e-2)
    assert losses != pytest.approx(step(1)[0], rel=1e-6)
    for name, gradient in gradients.items():
        difference = (gradient - expected_gradients[name]).norm()
        assert difference <= 0.05 * expected_gradients[name].norm() + 1e-3, name


def test_parts_in_float16():
    """Gradients are scaled in the backward pass, and not in the step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)

    def amp_trainer(*args):
        return AMPTrainer(*args, grad_scaler=scaler)

    losses, gradients, _ = step(2, kind=amp_trainer)
    expected, expected_gradients, _ = step(1)
    assert losses == pytest.approx(expected, rel=1e-2)
    assert scaler.get_scale() == 2048  # it grows with a step that is finite
    for name, gradient in gradients.items():
        difference = (gradient - expected_gradients[name]).norm()
        assert difference <= 0.05 * expected_gradients[name].norm() + 1e-3, name
    model = build_gfl()
    trainer = AccumulatingTrainer(
        amp_trainer(model, [], torch.optim.SGD(model.parameters(), 0.1)), 2
    )
    state = trainer.state_dict()
    assert state["grad_scaler"]["scale"] == 2048
    state["grad_scaler"]["scale"] = 64.0
    trainer.load_state_dict(state)
    assert scaler.get_scale() == 64


def test_parts_draw_the_same_random_numbers():
    """Those of the pass without gradients are drawn again."""
    model, seen = build_gfl().train(), []
    model.backbone.register_forward_hook(lambda *args: seen.append(torch.rand(1).item()))
    simple = SimpleTrainer(model, [BATCH], torch.optim.SGD(model.parameters(), 0.1))
    trainer = AccumulatingTrainer(simple, 2)
    trainer.iter = 0
    with EventStorage():
        trainer.run_step()
    assert seen[:2] == seen[2:]
    assert len(set(seen)) == 2


def test_other_models_cannot_accumulate():
    simple = SimpleTrainer(nn.Linear(1, 1), [], None)
    with pytest.raises(InputError, match=r"Linear has not the criterion of GFL.*ACCUMULATE 1"):
        AccumulatingTrainer(simple, 2)


@pytest.mark.parametrize("choices", [c for c in CHOICES if not adds_up(*c)])
def test_choices_that_scale_over_the_batch(choices):
    with pytest.raises(InputError, match=r"\(MODEL\.GFL\.QUALITY or ASSIGNER\).*ACCUMULATE 1"):
        step(2, *choices)


def test_distillation_does_not_add_up():
    model = build_gfl(*CHOICES[0], "MODEL.GFL.DISTILL.TERMS", "['ld']")
    with pytest.raises(InputError, match=r"DISTILL.*ACCUMULATE 1"):
        find_criterion(model, "SOLVER.ACCUMULATE 1")


# Two processes


class Trainer:
    """The part of a trainer that the hooks see."""

    def __init__(self, hook, metric=None):
        self.start_iter, self.iter, self.max_iter = 0, 0, 100
        self.metric = metric
        self.storage = self.checkpointer = self
        hook.trainer = self
        hook.before_train()

    def latest(self):
        return {} if self.metric is None else {"bbox/AP": (self.metric, self.iter)}

    def save(self, name, iteration):
        self.saved = (name, iteration)


def train_in_parallel(rank):
    results = {"step": step(2, wrap=DistributedDataParallel, batch=BATCH[2 * rank :][:2])}

    torch.manual_seed(rank)  # also other random weights, which DistributedDataParallel makes equal
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook = ModelAverager(model, average, 0.9, 2)
    Trainer(hook)
    for _ in range(3):
        optimizer.zero_grad()
        parallel(torch.randn(2, 3, 4, 4)).square().mean().backward()
        optimizer.step()
        hook.after_step()
    results["own"] = {k: v.clone() for k, v in average.state_dict().items()}
    share_buffers(average)
    results["average"] = average.state_dict()

    # Only the first process has metrics.
    hook = EarlyStopping("bbox/AP", 1, 2)
    trainer = Trainer(hook)
    try:
        for trainer.iter, value in enumerate([1.0, 2.0, 1.0, 1.0, 3.0]):
            trainer.metric = value if rank == 0 else None
            hook.after_step()
    except TrainingEnds:
        results["end"] = (trainer.iter, getattr(trainer, "saved", None))
    return results


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    return run_processes(train_in_parallel, 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.slow
def test_processes_average_alike(of_two_processes):
    first, second = of_two_processes
    assert not torch.equal(first["own"]["1.running_mean"], second["own"]["1.running_mean"])
    for name, value in first["average"].items():
        assert torch.equal(value, second["average"][name]), name
        assert torch.equal(value, first["own"][name]), name


@pytest.mark.slow
def test_processes_stop_together(of_two_processes):
    assert of_two_processes[0]["end"] == (3, ("model_final", 3))
    assert of_two_processes[1]["end"] == (3, None)


@pytest.mark.slow
def test_parts_in_two_processes_are_one_batch(of_two_processes):
    (losses_0, gradients_0, _), (_, gradients_1, _) = (r["step"] for r in of_two_processes)
    for name, gradient in gradients_0.items():
        assert torch.equal(gradient, gradients_1[name])
    # Detectron2 has gathered the losses.
    assert_equal_steps((losses_0, gradients_0), step(1))


@pytest.mark.parametrize("fails", [False, True])
def test_a_training_that_fails_in_its_last_step_is_not_evaluated(fails):
    class ThreeSteps(TrainerBase):
        def run_step(self):
            if fails and self.iter == 2:
                raise InputError("photo.png is damaged")

    evaluations = []
    trainer = ThreeSteps()
    trainer.register_hooks([Evaluation(0, lambda: evaluations.append(trainer.iter))])
    if fails:
        with pytest.raises(InputError):
            trainer.train(0, 3)
    else:
        trainer.train(0, 3)
    assert evaluations == ([] if fails else [3])
