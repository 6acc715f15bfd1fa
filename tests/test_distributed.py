"""Two or four processes are one batch, also where some of them have no box."""

from __future__ import annotations

import functools

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from gfl_d2.modeling import Predictions
from models import DISTILLED, QUALITIES, STRIDES, gfl_of_choices
from processes import run_processes

SIZE = (64, 96)
BOXES = [[5.1, 10.1, 40.0, 45.3], [30.0, 2.5, 94.0, 60.0], [50.2, 15.2, 70.1, 38.5]]
# The boxes of four images.
BATCHES = [[BOXES, [], [], []], [BOXES[:1], BOXES[1:], [], BOXES], [[], [], [], []]]
ALL_CHOICES = [
    *(
        (quality, box, assigner)
        for quality in QUALITIES
        for box in ("general", "dirac", "gaussian")
        for assigner in ("atss", "dynamic_atss", "sapd")
        if quality != "dgqp" or box == "general"
    ),
    *((*DISTILLED[:4], str([term])) for term in ("ld", "ld_vlr", "kd", "bckd")),
]


def train(choices, images, wrap=lambda model: model):
    """For each of the batches losses and gradients of these of the images."""
    torch.manual_seed(0)
    features = [torch.randn(4, 32, -(-SIZE[0] // s), -(-SIZE[1] // s)) for s in STRIDES]
    model = gfl_of_choices([x[images] for x in features], *choices).train()
    # The sum of the positives' weights, here and over processes, is to be above its floor.
    torch.nn.init.zeros_(model.head.cls_score.bias)
    model.criterion.box_normalizer_min = 1e-3
    # Only terms of distillation look at it.
    teacher = Predictions(
        *([3 * torch.randn(4, n, *x.shape[2:])[images] for x in features] for n in (3, 4 * 17))
    )
    wrapped, results = wrap(model), []
    for boxes in BATCHES:
        inputs = []
        for image in images:
            gt = Instances(SIZE, gt_boxes=Boxes(torch.tensor(boxes[image]).reshape(-1, 4)))
            gt.gt_classes = torch.arange(len(gt.gt_boxes))
            inputs.append({"image": torch.zeros(3, *SIZE), "instances": gt})
        model.zero_grad()
        with EventStorage():
            losses = wrapped(inputs, teacher)
        sum(losses.values()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append(({name: loss.detach() for name, loss in losses.items()}, gradients))
    return results


def train_share(rank):
    share = len(BATCHES[0]) // comm.get_world_size()
    images = list(range(rank * share, (rank + 1) * share))
    return {choices: train(choices, images, DistributedDataParallel) for choices in ALL_CHOICES}


@pytest.fixture(scope="module", params=[2, 4])
def of_processes(tmp_path_factory, request):
    return run_processes(train_share, request.param, tmp_path_factory.mktemp("processes"))


# For two numbers of processes.
of_one_process = functools.lru_cache(maxsize=None)(lambda choices: train(choices, [0, 1, 2, 3]))


@pytest.mark.slow
@pytest.mark.parametrize("choices", ALL_CHOICES)
def test_processes_are_one_batch(of_processes, choices):
    """
    Normalizers are means over processes, so the mean of the losses, and the gradients that
    DistributedDataParallel averages, are those of the whole batch.
    """
    for i, (losses, gradients) in enumerate(of_one_process(choices)):
        shares = [result[choices][i] for result in of_processes]
        for name, loss in losses.items():
            mean = torch.stack([own[name] for own, _ in shares]).mean()
            assert mean.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-7), (i, name)
        largest = max(gradient.abs().max() for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert gradient.isfinite().all()
            assert (shares[0][1][name] - gradient).abs().max() <= 1e-5 * largest, (i, name)
            assert all(torch.equal(own[name], shares[0][1][name]) for _, own in shares)
