"""Losses and box distributions against the reference implementation."""

import pytest
import torch
from torch.testing import assert_close

from gfl_d2.modeling import (
    distribution_focal_loss,
    giou_loss,
    integral,
    quality_focal_loss,
)
from reference_data import assert_close_to_largest, case, load

# What the reference adds to the number that it divides reduced losses by.
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "name",
    ["random", "beta_1_5", "eighty_classes", "one_class", "all_background", "extreme_logits"],
)
def test_quality_focal_loss(name):
    ref = case(load("quality_focal_loss"), name)
    logits = ref["pred"].requires_grad_()
    loss = quality_focal_loss(logits, ref["label"], ref["score"], beta=float(ref["beta"]))
    assert_close(loss, ref["loss_elementwise"], rtol=1e-5, atol=1e-7)

    reduced = (ref["weight"] * loss.sum(dim=1)).sum() / (ref["avg_factor"] + EPS)
    assert_close(reduced, ref["loss_reduced"], rtol=1e-5, atol=0)
    reduced.backward()
    assert_close_to_largest(logits.grad, ref["grad"], 1e-5)


@pytest.mark.parametrize("name", ["n16", "n8"])
def test_distribution_focal_loss(name):
    ref = case(load("distribution_focal_loss"), name)
    logits = ref["pred"].requires_grad_()
    loss = distribution_focal_loss(logits, ref["target"])
    assert_close(loss, ref["loss_none"], rtol=1e-5, atol=1e-6)

    reduced = 0.25 * (ref["weight"] * loss).sum() / (4 + EPS)
    assert_close(reduced, ref["loss_reduced"], rtol=1e-5, atol=0)
    reduced.backward()
    assert_close_to_largest(logits.grad, ref["grad"], 1e-5)


@pytest.mark.parametrize(("name", "reg_max"), [("n16", 16), ("n8", 8)])
def test_integral(name, reg_max):
    ref = case(load("integral"), name)
    logits = ref["pred"].requires_grad_()
    distance = integral(logits, reg_max)
    assert_close(distance, ref["distance"], rtol=1e-5, atol=1e-6)
    (distance * ref["cotangent"]).sum().backward()
    assert_close_to_largest(logits.grad, ref["grad"], 1e-5)


def test_giou_loss():
    ref = load("giou_loss")
    boxes = ref["pred"].requires_grad_()
    loss = giou_loss(boxes, ref["target"])
    assert_close(loss, ref["loss_none"], rtol=1e-5, atol=1e-6)
    assert_close(
        2 * (ref["weight"] * loss).sum() / (1 + EPS), ref["loss_reduced"], rtol=1e-5, atol=0
    )
    loss.sum().backward()
    smooth = ref["smooth"]
    assert_close_to_largest(boxes.grad[smooth], ref["grad"][smooth], 1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda r: quality_focal_loss(
            torch.zeros(2, 3), torch.tensor([0, 3]), torch.ones(2), reduction=r
        ),
        lambda r: distribution_focal_loss(torch.zeros(2, 5), torch.ones(2), reduction=r),
        lambda r: giou_loss(torch.zeros(2, 4), torch.ones(2, 4), reduction=r),
    ],
)
def test_reductions(loss):
    assert_close(loss("sum"), loss("none").sum())
    assert_close(loss("mean"), loss("none").mean())
    with pytest.raises(ValueError, match="reduction"):
        loss("average")
