"""How localization quality enters the score: each choice against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from gfl_d2.modeling import (
    DistributionGuidedQuality,
    GeneralDistribution,
    JointQuality,
    NoQuality,
    QualityBranch,
    QualityGuided,
    Targets,
    centerness,
    joint_logits,
)
from gfl_d2.modeling.quality import DistributionGuidedQualityPredictor

N, R, C = 2, 9, 3
finite = st.floats(-60, 60)


def make_targets(num_positives: int = 4, seed: int = 0) -> Targets:
    """Positives at random places of two images, of which one location is not valid."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(N * R - 1, generator=generator)[:num_positives].sort().values
    labels = torch.full((N * R,), C)
    labels[places] = torch.randint(0, C, (num_positives,), generator=generator)
    valid = torch.ones(N * R, dtype=torch.bool)
    valid[-1] = False
    distances = torch.rand(num_positives, 4, generator=generator, dtype=torch.float64) * 5
    return Targets(
        labels=labels.view(N, R),
        valid=valid.view(N, R),
        image=places // R,
        location=places % R,
        predictions=distances,
        boxes=distances,
        gt_boxes=distances,
        gt_distances=distances,
        iou=torch.rand(num_positives, generator=generator, dtype=torch.float64),
    )


def make_logits(num_classes: int = C, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, R, num_classes, generator=generator, dtype=torch.float64) * 2


def focal_loss(logits, targets):
    """Of every valid location and class, one at a time: (N, R, C) as nested lists."""
    losses, logits = np.zeros((N, R, C)), logits.detach()
    for i in range(N):
        for j in range(R):
            for c in range(C):
                p = 1 / (1 + math.exp(-float(logits[i, j, c])))
                is_positive = int(targets.labels[i, j]) == c
                p_t, alpha_t = (p, 0.25) if is_positive else (1 - p, 0.75)
                if targets.valid[i, j]:
                    losses[i, j, c] = -alpha_t * (1 - p_t) ** 2 * math.log(p_t)
    return losses


class TestJointLogits:
    @given(a=finite, b=finite)
    def test_is_the_logit_of_the_product(self, a, b):
        z = joint_logits(*torch.tensor([a, b], dtype=torch.float64))
        # Of the product p, in exact terms: p / (1 - p), through 1 + exp(-a) and 1 + exp(-b).
        odds = 1 / (math.exp(-a) + math.exp(-b) + math.exp(-a - b))
        assert float(z) == pytest.approx(math.log(odds), rel=1e-12, abs=1e-12)

    @given(a=finite, b=finite)
    def test_float32_loses_nothing(self, a, b):
        inputs = torch.tensor([a, b], dtype=torch.float32)
        exact = joint_logits(*inputs.double())
        assert_close(joint_logits(*inputs).double(), exact, rtol=1e-6, atol=1e-6)

    def test_gradient(self):
        logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        quality = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
        assert gradcheck(joint_logits, (logits, quality))

    @pytest.mark.parametrize("a", [-1e4, -100.0, 0.0, 100.0, 1e4])
    @pytest.mark.parametrize("b", [-1e4, -100.0, 0.0, 100.0, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_extremes_are_finite(self, a, b, dtype):
        logits = torch.tensor([a], dtype=dtype, requires_grad=True)
        quality = torch.tensor([b], dtype=dtype, requires_grad=True)
        z = joint_logits(logits, quality)
        z.sum().backward()
        assert z.dtype == torch.float32
        assert z.isfinite().all()
        # A product is no larger than its smaller factor.
        assert z.detach() <= torch.minimum(logits, quality).float()
        assert logits.grad.isfinite().all()
        assert quality.grad.isfinite().all()


class TestCenterness:
    def test_definition(self):
        left, top, right, bottom = 1.0, 2.0, 3.0, 8.0
        expected = math.sqrt((1 / 3) * (2 / 8))
        assert float(centerness(torch.tensor([left, top, right, bottom]))) == pytest.approx(
            expected
        )

    def test_centre_border_and_outside(self):
        distances = torch.tensor([[3.0, 2, 3, 2], [0, 2, 3, 2], [-1, 2, 3, 2], [0, 0, 0, 0]])
        assert centerness(distances).tolist() == [1, 0, 0, 0]


class TestJointQuality:
    @pytest.mark.parametrize("beta", [1.0, 2.0])
    def test_against_the_definition(self, beta):
        targets, logits = make_targets(), make_logits()
        losses, weights = JointQuality(beta=beta, weight=3.0).losses(logits, None, targets)
        iou = targets.spread(targets.iou)
        expected = 0.0
        for i in range(N):
            for j in range(R):
                for c in range(C):
                    y = float(iou[i, j]) if int(targets.labels[i, j]) == c else 0.0
                    p = 1 / (1 + math.exp(-float(logits[i, j, c])))
                    bce = -(y * math.log(p) + (1 - y) * math.log(1 - p))
                    expected += abs(y - p) ** beta * bce * bool(targets.valid[i, j])
        assert float(losses["loss_qfl"]) == pytest.approx(3 * expected, rel=1e-12)
        assert_close(weights, logits[targets.image, targets.location].sigmoid().amax(dim=1))


class TestDistributionGuidedQuality:
    def test_loss_is_qfl_of_the_product(self):
        """With probabilities, as the paper writes it."""
        targets, logits, quality = make_targets(), make_logits(), make_logits(1, seed=1)
        losses, weights = DistributionGuidedQuality().losses(logits, quality, targets)
        p = logits.sigmoid() * quality.sigmoid()
        y = F.one_hot(targets.labels, C + 1)[..., :C] * targets.spread(targets.iou)[..., None]
        loss = (y - p).abs() ** 2 * F.binary_cross_entropy(p, y, reduction="none")
        assert_close(losses["loss_qfl"], loss[targets.valid].sum())
        assert_close(weights, p[targets.image, targets.location].amax(dim=1))

    def test_statistics(self):
        distributions = torch.randn(2, 4 * 6, 3, 5, dtype=torch.float64)
        predictor = DistributionGuidedQualityPredictor(num_bins=6, topk=3)
        statistics = predictor.statistics(distributions).numpy()
        assert statistics.shape == (2, 4 * 4, 3, 5)
        for n, y, x in np.ndindex(2, 3, 5):
            for side in range(4):
                e = np.exp(distributions[n, side * 6 : side * 6 + 6, y, x].numpy())
                largest = np.sort(e / e.sum())[::-1][:3]
                actual = statistics[n, side * 4 : side * 4 + 4, y, x]
                np.testing.assert_allclose(actual, [*largest, largest.mean()])

    def test_gradient_reaches_the_distributions(self):
        """Nothing is detached between the box branch and QFL."""
        quality = DistributionGuidedQuality()
        predictor = quality.build_predictor(8, GeneralDistribution(5))
        distributions = torch.randn(N, 4 * 6, 3, 3, requires_grad=True)
        predicted = predictor(None, distributions).flatten(2).transpose(1, 2)
        targets = make_targets()
        logits = make_logits().float()
        quality.losses(logits, predicted, targets)[0]["loss_qfl"].backward()
        assert (distributions.grad != 0).any()
        assert all((p.grad != 0).any() for p in predictor.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_certain_predictions_under_autocast(self, dtype):
        """Probabilities of 0 and 1 to half precision: the loss is that of float32."""
        targets = make_targets()
        logits, quality = make_logits() * 20, make_logits(1, seed=1) * 20
        # Values that half precision has.
        logits, quality = (x.to(dtype).requires_grad_() for x in (logits, quality))
        with torch.autocast("cpu", dtype=dtype):
            losses, _ = DistributionGuidedQuality().losses(logits, quality, targets)
        losses["loss_qfl"].backward()
        assert logits.grad.isfinite().all()
        assert quality.grad.isfinite().all()
        exact, _ = DistributionGuidedQuality().losses(logits.double(), quality.double(), targets)
        assert_close(losses["loss_qfl"].double(), exact["loss_qfl"], rtol=1e-5, atol=0)


class TestNoQuality:
    def test_is_focal_loss(self):
        targets, logits = make_targets(), make_logits()
        losses, weights = NoQuality(weight=2.0).losses(logits, None, targets)
        assert float(losses["loss_cls"]) == pytest.approx(2 * focal_loss(logits, targets).sum())
        assert weights.tolist() == [1.0] * 4

    def test_score_is_the_class_score(self):
        logits = make_logits()
        assert torch.equal(NoQuality().score_logits(logits, None), logits)


BRANCHES = {
    "centerness": (QualityBranch(), lambda t: centerness(t.gt_distances)),
    "iou": (QualityBranch(name="iou", target=lambda t: t.iou), lambda t: t.iou),
}


class TestQualityBranch:
    @pytest.mark.parametrize("name", BRANCHES)
    def test_losses(self, name):
        branch, target = BRANCHES[name]
        targets, logits, quality = make_targets(), make_logits(), make_logits(1, seed=1)
        losses, weights = branch.losses(logits, quality, targets)
        assert float(losses["loss_cls"]) == pytest.approx(focal_loss(logits, targets).sum())
        p = quality[targets.image, targets.location, 0].sigmoid()
        y = target(targets)
        assert_close(losses[f"loss_{name}"], -(y * p.log() + (1 - y) * (1 - p).log()).sum())
        assert torch.equal(weights, y)

    def test_only_positives_teach_the_branch(self):
        targets = make_targets()
        quality = make_logits(1).requires_grad_()
        QualityBranch().losses(make_logits(), quality, targets)[0]["loss_centerness"].backward()
        is_positive = targets.labels < C
        assert torch.equal(quality.grad[..., 0] != 0, is_positive)

    def test_score_is_the_product(self):
        logits, quality = make_logits(), make_logits(1, seed=1)
        scores = QualityBranch().score_logits(logits, quality).sigmoid()
        assert_close(scores, logits.sigmoid() * quality.sigmoid())


class TestQualityGuided:
    def test_positives_keep_their_total_loss(self):
        """And it is shared out by centerness to the power of 1.5."""
        targets, logits = make_targets(), make_logits().requires_grad_()
        losses, weights = QualityGuided().losses(logits, None, targets)
        plain = focal_loss(logits, targets)
        assert float(losses["loss_cls"]) == pytest.approx(plain.sum())
        assert weights.tolist() == [1.0] * 4

        # The weight of a positive is the factor of its gradient.
        losses["loss_cls"].backward()
        guided, logits.grad = logits.grad, None
        NoQuality().losses(logits, None, targets)[0]["loss_cls"].backward()
        factor = (guided / logits.grad)[targets.image, targets.location, 0]
        expected = centerness(targets.gt_distances) ** 1.5
        assert_close(factor / factor[0], expected / expected[0])
        is_negative = (targets.labels == C) & targets.valid
        assert_close(guided[is_negative], logits.grad[is_negative])

    @pytest.mark.parametrize("iou", [0.0, 1.0])
    def test_equal_qualities_leave_focal_loss(self, iou):
        targets = make_targets()._replace(iou=torch.full((4,), iou, dtype=torch.float64))
        logits = make_logits()
        guided = QualityGuided(target=lambda t: t.iou).losses(logits, None, targets)[0]["loss_cls"]
        plain = NoQuality().losses(logits, None, targets)[0]["loss_cls"]
        if iou:
            assert float(guided) == pytest.approx(float(plain))
        else:  # no positive is worth learning from
            assert guided.isfinite()
            assert guided < plain


@pytest.mark.parametrize(
    "quality",
    [
        JointQuality(),
        DistributionGuidedQuality(),
        NoQuality(),
        QualityBranch(),
        QualityGuided(),
    ],
)
def test_no_positive(quality):
    """Finite, and connected to all predictions."""
    targets = make_targets(num_positives=0)
    logits, predicted = make_logits().requires_grad_(), make_logits(1).requires_grad_()
    losses, weights = quality.losses(logits, predicted, targets)
    sum(losses.values()).backward()
    assert weights.shape == (0,)
    assert all(loss.isfinite() for loss in losses.values())
    assert logits.grad.isfinite().all()
    if quality.build_predictor(8, GeneralDistribution()) is not None:
        assert predicted.grad is not None
