"""
Training on a GPU waits for no value between the head and the gradients: here with tensors that are
on a GPU and have no values. They refuse whatever asks for one, for a shape that depends on one, or
for a CPU's tensor beside them.
"""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gfl_d2.modeling import Predictions
from models import CHOICES, DISTILLED, STRIDES, build_gfl, gfl_of_choices, make_input

SIZE = (128, 192)

# Where there is no GPU, tensors without values on one need it.
IS_NEW = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
needs_gpu = pytest.mark.skipif(
    not (IS_NEW or torch.cuda.is_available()), reason="PyTorch before 2.9, and no GPU"
)
on_gpu = pytest.param("cuda", marks=needs_gpu)


def train(num_boxes, *choices, device="cuda", first_iteration=0):
    """
    One step. Iteration 19 logs values, those before do not. The gradients need a real GPU, so they
    are computed on a CPU only.
    """
    with FakeTensorMode(), EventStorage(first_iteration):
        with torch.device(device):
            features = [torch.randn(2, 32, -(-SIZE[0] // s), -(-SIZE[1] // s)) for s in STRIDES]
            model = gfl_of_choices(features, *choices).train()
        gt_instances = []
        for n in num_boxes:
            gt = Instances(SIZE, gt_boxes=Boxes(torch.rand(n, 4, device=device)))
            gt.gt_classes = torch.zeros(n, dtype=torch.int64, device=device)
            gt_instances.append(gt)
        # The second image is smaller: there is padding.
        images = ImageList(torch.rand(2, 3, *SIZE, device=device), [SIZE, (100, 160)])
        predictions = model.head(features)
        teacher = Predictions(*([torch.rand_like(x) for x in maps] for maps in predictions[:2]))
        losses = model.forward_training(images, features, predictions, gt_instances, teacher)
        if device == "cpu":
            sum(losses.values()).backward()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("device", [on_gpu, "cpu"])
@pytest.mark.parametrize("choices", [*CHOICES, DISTILLED])
def test_no_value_is_waited_for(choices, device):
    losses = train((3, 0), *choices, device=device)
    assert all(loss.shape == () and loss.device.type == device for loss in losses.values())


@pytest.mark.parametrize("device", [on_gpu, "cpu"])
@pytest.mark.parametrize("num_boxes", [(3, 0), (0, 0)])
def test_no_value_is_waited_for_when_levels_are_chosen_softly(num_boxes, device):
    """SAPD, from half of the schedule on."""
    choices = ("none", "dirac", "sapd", "SOLVER.MAX_ITER", 2)
    losses = train(num_boxes, *choices, device=device, first_iteration=1)
    assert set(losses) == {"loss_cls", "loss_bbox", "loss_level"}


@needs_gpu
def test_no_value_is_waited_for_without_boxes():
    assert set(train((0, 0), "joint", "general")) == {"loss_qfl", "loss_bbox", "loss_dfl"}


@needs_gpu
def test_the_check_would_find_it():
    """Logging reads values."""
    with pytest.raises(DataDependentOutputException):
        train((3, 1), first_iteration=19)


@needs_gpu
def test_a_step_without_values_leaves_nothing_behind():
    """The next real one is as if it had not been."""

    def losses():
        with EventStorage():
            return build_gfl().train()([make_input(), make_input([])])

    expected = losses()
    train((3, 1), "joint", "general")
    for name, loss in losses().items():
        assert torch.equal(loss, expected[name])
