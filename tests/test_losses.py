"""Properties of the losses and box distributions, whatever the reference implementation."""

from __future__ import annotations

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close
from torchvision.ops import box_iou, generalized_box_iou

from gfl_d2.modeling import (
    aligned_iou,
    bbox_to_distance,
    distance_to_bbox,
    distribution_focal_loss,
    giou_loss,
    integral,
    iou_loss,
    quality_focal_loss,
)

fractions = st.floats(0.001, 0.999)
seeds = st.integers(0, 2**31 - 1)


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 50
    sizes = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 50 + 0.5
    return torch.cat((corners, corners + sizes), dim=1)


class TestQualityFocalLoss:
    @given(seed=seeds, gamma=st.sampled_from([0.0, 1.0, 2.0, 2.5, 4.0]))
    def test_hard_labels_are_focal_loss(self, seed, gamma):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(20, 5, generator=generator) * 4
        labels = torch.randint(0, 6, (20,), generator=generator)
        target = torch.nn.functional.one_hot(labels, 6)[:, :5].float()
        assert_close(
            quality_focal_loss(logits, labels, torch.ones(20), beta=gamma),
            sigmoid_focal_loss(logits, target, alpha=-1, gamma=gamma),
        )

    @given(quality=fractions, beta=st.sampled_from([0.0, 1.0, 2.0, 3.0]))
    def test_minimum_is_where_the_score_is_the_quality(self, quality, beta):
        scores = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
        loss = quality_focal_loss(
            scores.logit()[:, None],
            torch.zeros(1000, dtype=torch.int64),
            torch.full((1000,), quality, dtype=torch.float64),
            beta=beta,
        )
        assert abs(scores[loss.argmin()] - quality) <= 0.001

    def test_background_has_target_zero_whatever_its_quality(self):
        logits = torch.randn(6, 3)
        labels = torch.full((6,), 3)
        assert_close(
            quality_focal_loss(logits, labels, torch.rand(6)),
            quality_focal_loss(logits, labels, torch.zeros(6)),
        )

    @pytest.mark.parametrize("beta", [0.0, 1.0, 1.5, 2.0, 3.0])
    def test_gradient(self, beta):
        logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([0, 1, 2, 3, 3])
        quality = torch.rand(5, dtype=torch.float64)
        assert gradcheck(lambda x: quality_focal_loss(x, labels, quality, beta=beta), (logits,))

    @pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
    def test_extreme_logits(self, beta):
        logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
        loss = quality_focal_loss(logits, torch.tensor([0, 2]), torch.ones(2), beta=beta)
        loss.sum().backward()
        # Right and certain costs nothing, wrong and certain costs the logit.
        assert_close(loss, torch.tensor([[0.0, 0.0], [0.0, 1e4]]))
        assert logits.grad.isfinite().all()

    def test_empty(self):
        logits = torch.zeros(0, 4, requires_grad=True)
        labels = torch.zeros(0, dtype=torch.int64)
        quality_focal_loss(logits, labels, torch.zeros(0), reduction="sum").backward()
        assert logits.grad.shape == (0, 4)


class TestDistributionFocalLoss:
    @given(target=st.floats(0, 8))
    @settings(max_examples=20)
    def test_optimum_reproduces_the_target(self, target):
        """The best distribution is on the two neighbouring bins, and its expectation is y."""
        logits = torch.zeros(1, 9, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = distribution_focal_loss(logits, torch.tensor([target]), reduction="sum")
            loss.backward()
            return loss

        optimizer.step(closure)
        expected = (logits.detach().softmax(1) * torch.arange(9)).sum()
        assert abs(expected - target) < 0.02

    @given(seed=seeds)
    def test_is_cross_entropy_at_whole_targets(self, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(9, 9, generator=generator)
        target = torch.arange(9)
        assert_close(
            distribution_focal_loss(logits, target.float()),
            torch.nn.functional.cross_entropy(logits, target, reduction="none"),
        )

    def test_gradient(self):
        logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
        target = torch.tensor([0.0, 0.3, 1.0, 2.7, 3.99, 4.0], dtype=torch.float64)
        assert gradcheck(lambda x: distribution_focal_loss(x, target), (logits,))


class TestIntegral:
    @given(index=st.integers(0, 7))
    def test_one_hot_is_its_bin(self, index):
        logits = torch.full((4, 8), -1e4)
        logits[:, index] = 0
        assert_close(integral(logits.flatten(), 7), torch.full((4,), float(index)))

    def test_uniform_is_the_middle(self):
        assert_close(integral(torch.zeros(2, 3, 4 * 17), 16), torch.full((2, 3, 4), 8.0))

    def test_sides_come_in_order(self):
        logits = torch.full((4, 5), -1e4)
        logits[torch.arange(4), torch.tensor([3, 0, 4, 1])] = 0
        assert_close(integral(logits.flatten(), 4), torch.tensor([3.0, 0.0, 4.0, 1.0]))

    def test_gradient(self):
        logits = torch.randn(2, 4 * 6, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: integral(x, 5), (logits,))


class TestBoxes:
    @given(seed=seeds)
    def test_distances_to_boxes_and_back(self, seed):
        generator = torch.Generator().manual_seed(seed)
        centers = torch.rand(10, 2, generator=generator, dtype=torch.float64) * 100
        distances = torch.randn(10, 4, generator=generator, dtype=torch.float64) * 30
        boxes = distance_to_bbox(centers, distances)
        assert_close(bbox_to_distance(centers, boxes), distances)

    def test_literal(self):
        centers = torch.tensor([[10.0, 20.0]])
        boxes = torch.tensor([[7.0, 15.0, 11.0, 26.0]])  # 3 left, 5 up, 1 right, 6 down
        assert_close(bbox_to_distance(centers, boxes), torch.tensor([[3.0, 5.0, 1.0, 6.0]]))

    @given(seed=seeds)
    def test_ious_are_those_of_torchvision(self, seed):
        boxes, target = random_boxes(20, seed), random_boxes(20, seed + 1)
        assert_close(aligned_iou(boxes, target), box_iou(boxes, target).diagonal())
        expected = 1 - generalized_box_iou(boxes, target).diagonal()
        assert_close(giou_loss(boxes, target), expected, rtol=1e-6, atol=1e-6)

    @given(seed=seeds, scale=st.floats(0.01, 100))
    def test_giou_does_not_depend_on_the_unit(self, seed, scale):
        boxes, target = random_boxes(20, seed), random_boxes(20, seed + 1)
        assert_close(giou_loss(boxes * scale, target * scale), giou_loss(boxes, target))

    def test_giou_of_identical_boxes_is_exact(self):
        boxes = torch.tensor([[0.0, 0.0, 0.01, 0.02], [3.0, 4.0, 500.0, 700.0]])
        assert torch.equal(giou_loss(boxes, boxes), torch.zeros(2))

    def test_giou_gradient(self):
        boxes, target = random_boxes(8, 0).requires_grad_(), random_boxes(8, 1)
        assert gradcheck(lambda x: giou_loss(x, target), (boxes,))

    @given(seed=seeds)
    def test_iou_loss_is_the_logarithm(self, seed):
        boxes, target = random_boxes(20, seed), random_boxes(20, seed + 1)
        expected = -box_iou(boxes, target).diagonal().clamp(min=1e-6).log()
        assert_close(iou_loss(boxes, target), expected)
        assert_close(iou_loss(boxes, target, "sum"), expected.sum())

    def test_iou_loss_of_boxes_apart_is_finite_and_has_no_gradient(self):
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]], requires_grad=True)
        loss = iou_loss(boxes, boxes.detach() + 5)
        loss.sum().backward()
        assert (loss > 13).all()
        assert (boxes.grad == 0).all()

    def test_giou_without_area_is_finite(self):
        boxes = torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 9.0]], requires_grad=True)
        target = torch.tensor([[5.0, 5.0, 5.0, 5.0], [1.0, 1.0, 2.0, 2.0]])
        giou_loss(boxes, target).sum().backward()
        assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = torch.randn(8, 20).to(dtype)
    labels, quality = torch.arange(8) % 3, torch.rand(8)
    pairs = [
        (lambda x: quality_focal_loss(x, labels, quality)),
        (lambda x: distribution_focal_loss(x, quality * 19)),
        (lambda x: integral(x, 4)),
    ]
    for function in pairs:
        assert function(logits).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(function(logits), function(logits.float()))
