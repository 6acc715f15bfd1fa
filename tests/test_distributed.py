"""Two processes are one batch of two, also where one of them has no box."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from gfl_d2.modeling import Predictions
from models import CHOICES, DISTILLED, STRIDES, gfl_of_choices
from reference_data import assert_close_to_largest

SIZE = (128, 192)
BOXES = [[10.3, 20.2, 80.1, 90.7], [60.0, 5.0, 188.0, 120.0], [100.5, 30.5, 140.2, 77.0]]
# The boxes of the two images: one has none, or both have some.
BATCHES = [[BOXES, []], [BOXES[:1], BOXES[1:]]]
ALL_CHOICES = [*CHOICES, DISTILLED]


def train(choices, boxes, images, wrap=lambda model: model):
    """Losses, gradients and parameters after a step on these images, 0 or 1 or both."""
    torch.manual_seed(0)
    features = [torch.randn(2, 32, -(-SIZE[0] // s), -(-SIZE[1] // s)) for s in STRIDES]
    model = gfl_of_choices([x[images] for x in features], *choices).train()
    # The sum of the positives' weights, here and over processes, is to be above its floor.
    torch.nn.init.zeros_(model.head.cls_score.bias)
    model.criterion.box_normalizer_min = 0.1
    inputs = []
    for image in images:
        gt = Instances(SIZE, gt_boxes=Boxes(torch.tensor(boxes[image]).reshape(-1, 4)))
        gt.gt_classes = torch.arange(len(gt.gt_boxes))
        inputs.append({"image": torch.zeros(3, *SIZE), "instances": gt})
    # Only terms of distillation look at it.
    teacher = Predictions(
        *([3 * torch.randn(2, n, *x.shape[2:])[images] for x in features] for n in (3, 4 * 17))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = wrap(model)
    with EventStorage():
        losses = wrapped(inputs, teacher)
    sum(losses.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    losses = {name: loss.detach() for name, loss in losses.items()}
    return losses, gradients, dict(model.named_parameters())


def train_all(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = {
        (choices, i): train(choices, boxes, [rank], DistributedDataParallel)
        for choices in ALL_CHOICES
        for i, boxes in enumerate(BATCHES)
    }
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(train_all, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("number", range(len(BATCHES)))
@pytest.mark.parametrize("choices", ALL_CHOICES)
def test_two_processes_are_one_batch_of_two(of_two_processes, choices, number):
    """
    Normalizers are means over processes, so the mean of the losses, and the gradients that
    DistributedDataParallel averages, are those of the whole batch.
    """
    losses, gradients, _ = train(choices, BATCHES[number], [0, 1])
    (losses_0, gradients_0, parameters_0), (losses_1, gradients_1, parameters_1) = (
        result[choices, number] for result in of_two_processes
    )
    for name, loss in losses.items():
        assert_close((losses_0[name] + losses_1[name]) / 2, loss)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all()
        assert_close_to_largest(gradients_0[name], gradient, 1e-4)
        assert torch.equal(gradients_1[name], gradients_0[name])
        assert torch.equal(parameters_1[name], parameters_0[name])
