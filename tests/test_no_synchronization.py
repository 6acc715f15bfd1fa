"""
Training on a GPU waits for no value between the head and the gradients: here with tensors that have
none, which refuse whatever asks for a value or for a shape that depends on one.
"""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from gfl_d2.modeling import (
    GFL,
    ATSSAssigner,
    DiracDelta,
    DistributionGuidedQuality,
    DynamicATSSAssigner,
    Gaussian,
    GeneralDistribution,
    JointQuality,
    NoQuality,
    QualityBranch,
    QualityGuided,
    assigner,
    locations,
)
from models import STRIDES, gfl_on_features

SIZE = (128, 192)
CHOICES = [
    *((quality, GeneralDistribution()) for quality in (JointQuality(), NoQuality())),
    *((quality, GeneralDistribution()) for quality in (QualityBranch(), QualityGuided())),
    (DistributionGuidedQuality(), GeneralDistribution()),
    (JointQuality(), DiracDelta()),
    (NoQuality(), Gaussian()),
]


@pytest.fixture(autouse=True)
def without_values(monkeypatch):
    """Tensors are kept between calls; none of these shall stay, nor be one of before."""
    monkeypatch.setattr(GFL, "_log", lambda *_: None)  # late on a GPU, which is waited for nowhere
    for cache in (assigner._offsets, locations._to_device):
        cache.cache_clear()
    with FakeTensorMode():
        yield
    for cache in (assigner._offsets, locations._to_device):
        cache.cache_clear()


def fix_shapes(monkeypatch, is_fixed):
    for module in ("assigner", "fused_qfl"):
        monkeypatch.setattr(f"gfl_d2.modeling.{module}.needs_fixed_shapes", lambda _: is_fixed)


def train(num_boxes, **choices):
    features = [torch.randn(2, 32, -(-SIZE[0] // s), -(-SIZE[1] // s)) for s in STRIDES]
    model = gfl_on_features(features, num_classes=3, num_convs=1, conv_dim=32, **choices).train()
    gt_instances = []
    for n in num_boxes:
        gt = Instances(SIZE, gt_boxes=Boxes(torch.rand(n, 4)))
        gt.gt_classes = torch.zeros(n, dtype=torch.int64)
        gt_instances.append(gt)
    # The second image is smaller: there is padding.
    images = ImageList(torch.rand(2, 3, *SIZE), [SIZE, (100, 160)])
    losses = model.forward_training(images, features, model.head(features), gt_instances)
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("num_boxes", [(3, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize(("quality", "box"), CHOICES)
@pytest.mark.parametrize("assign", [ATSSAssigner(), DynamicATSSAssigner()])
def test_no_value_is_waited_for(monkeypatch, num_boxes, quality, box, assign):
    fix_shapes(monkeypatch, True)
    losses = train(num_boxes, quality=quality, box=box, assigner=assign)
    assert all(loss.shape == () for loss in losses.values())


def test_the_check_would_find_it(monkeypatch):
    """On a CPU, shapes follow from values."""
    fix_shapes(monkeypatch, False)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        train((3, 1))
