"""Losses and gradients are finite numbers, whatever is predicted and whatever the boxes are."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from gfl_d2.modeling import Predictions
from models import (
    CHOICES,
    DISTILLED,
    STRIDES,
    build_gfl,
    gfl_of_choices,
    gfl_on_features,
    make_input,
)

SIZE = (128, 192)
ORDINARY = [[10.3, 20.2, 80.1, 90.7], [60.0, 5.0, 188.0, 120.0]]
BOXES = {
    "ordinary": ORDINARY,
    "none": [],
    "without an area": [[50.0, 50.0, 50.0, 50.0], [20.0, 30.0, 20.0, 90.0], [64, 64, 64.001, 64]],
    "enormous": [[-1e6, -1e6, 1e6, 1e6], [0.0, 0.0, 1e9, 1e9], [-1e20, 0, 1e20, 64]],
    "a thousand that overlap": (
        torch.tensor([40.0, 30.0, 120.0, 100.0]) + torch.linspace(0, 8, 1000)[:, None]
    ).tolist(),
}


def train(model, boxes, scale, dtype=torch.float32):
    """Losses, and the gradients of what is predicted: random numbers of this scale."""
    generator = torch.Generator().manual_seed(0)
    features = list(model.backbone.features)
    gt = Instances(SIZE, gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    gt.gt_classes = torch.arange(len(boxes)) % model.num_classes
    images = model.preprocess_image([{"image": torch.zeros(3, *SIZE)}])
    with torch.no_grad():
        like = model.head(features)
    predictions = tuple(
        [
            (scale * torch.randn(x.shape, generator=generator)).to(dtype).requires_grad_()
            for x in maps
        ]
        for maps in like
    )
    teacher = Predictions(
        *([scale * torch.randn(x.shape, generator=generator) for x in maps] for maps in like[:2])
    )
    with EventStorage():
        losses = model.train().forward_training(images, features, predictions, [gt], teacher)
    sum(losses.values()).backward()
    gradients = [x.grad for maps in predictions for x in maps if x.grad is not None]
    return losses, gradients


def features():
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 32, -(-SIZE[0] // s), -(-SIZE[1] // s)) for s in STRIDES)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("choices", [*CHOICES, DISTILLED])
def test_certain_predictions(choices):
    model = gfl_of_choices(features(), *choices)
    for name, boxes in BOXES.items():
        losses, gradients = train(model, boxes, 1e4, torch.float16)
        assert all(loss.isfinite() for loss in losses.values()), (name, losses)
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients), name


@pytest.mark.parametrize("num_classes", [1, 1203])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_few_and_many_classes(num_classes, scale):
    model = gfl_on_features(features(), num_classes=num_classes, num_convs=1)
    losses, gradients = train(model, ORDINARY, scale)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "dtype, loss_error, least_cosine",
    [(torch.float16, 0.005, 0.998), (torch.bfloat16, 0.02, 0.99)],
)
@pytest.mark.parametrize(
    "choices", [choices for choices in CHOICES if choices[2] != "dynamic_atss"]
)
def test_mixed_precision(choices, dtype, loss_error, least_cosine):
    """Losses, and the direction of the gradient, beside those of float32."""
    model = build_gfl(*choices).train()
    losses, gradients = [], []
    for enabled in (False, True):
        with EventStorage(), torch.autocast("cpu", dtype, enabled=enabled):
            losses.append(model([make_input(), make_input([])]))
        parameters = [p for p in model.parameters() if p.requires_grad]
        parts = torch.autograd.grad(sum(losses[-1].values()), parameters, allow_unused=True)
        gradients.append(torch.cat([part.flatten().double() for part in parts if part is not None]))
    exact, rounded = losses
    for name, loss in exact.items():
        assert_close(rounded[name], loss, rtol=loss_error, atol=1e-4, check_dtype=False)
    assert torch.cosine_similarity(*gradients, dim=0) > least_cosine
