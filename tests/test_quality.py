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
    Positives,
    Predictions,
    QualityBranch,
    QualityGuided,
    Targets,
    centerness,
    joint_logits,
)
from gfl_d2.modeling.quality import DistributionGuidedQualityPredictor
from models import split

N, C = 2, 3
SIZES = [(2, 3), (1, 3)]  # of two levels
R = 9
# The last location of the second image is padding.
VALID_SIZES = [[(2, 3), (2, 3)], [(1, 3), (1, 2)]]
finite = st.floats(-60, 60)


def make_targets(num_positives: int = 4, seed: int = 0, num_unreal: int = 0) -> Targets:
    """
    Positives at random places, level by level. The last ``num_unreal`` are as candidates on a GPU
    that are none: anywhere, and with values that must not matter.
    """
    generator = torch.Generator().manual_seed(seed)
    level_of = torch.tensor([0] * 12 + [1] * 5)
    places = torch.randperm(17, generator=generator)[:num_positives].sort().values
    positives = []
    for level, (height, width) in enumerate(SIZES):
        of_level = places[level_of[places] == level] - 12 * level
        is_real = torch.ones(len(of_level), dtype=torch.bool)
        if level == 1 and num_unreal:
            of_level = torch.cat((of_level, of_level.new_tensor([0, 1] * num_unreal)[:num_unreal]))
            is_real = torch.cat((is_real, is_real.new_zeros(num_unreal)))
        cell = of_level % (height * width)
        positives.append(
            Positives(of_level // (height * width), cell // width, cell % width, is_real)
        )
    is_real = torch.cat([p.is_real for p in positives])
    labels = torch.randint(0, C, (num_positives,), generator=generator)
    distances = torch.rand(num_positives, 4, generator=generator, dtype=torch.float64) * 5
    iou = torch.rand(num_positives, generator=generator, dtype=torch.float64)
    labels, distances, iou = (
        torch.cat((x, x.new_ones(num_unreal, *x.shape[1:]))) for x in (labels, distances, iou)
    )
    return Targets(
        positives=positives,
        valid_sizes=VALID_SIZES,
        is_real=is_real,
        labels=labels,
        predictions=distances,
        boxes=distances,
        gt_boxes=distances,
        gt_distances=distances,
        iou=iou,
    )


def spread(targets: Targets, values: torch.Tensor, other: float) -> torch.Tensor:
    """Values of the real positives among all locations: shape (N, R)."""
    maps = []
    for positives, part, size in zip(targets.positives, split(targets, values), SIZES):
        level = values.new_full((N, *size), other)
        real = positives.is_real
        level[positives.image[real], positives.row[real], positives.column[real]] = part[real]
        maps.append(level.flatten(1))
    return torch.cat(maps, dim=1)


def flatten(maps):
    return torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)


VALID = torch.ones(N, R, dtype=torch.bool)
VALID[1, -1] = False


def make_logits(num_classes: int = C, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(N, num_classes, *size, generator=generator, dtype=torch.float64) * 2
        for size in SIZES
    ]


def make_predictions(logits=None, quality=None):
    return Predictions(logits or make_logits(), [], quality or make_logits(1, seed=1))


def focal_loss(logits, targets):
    """Of every valid location and class, one at a time: (N, R, C) as nested lists."""
    losses, logits = np.zeros((N, R, C)), flatten(logits).detach()
    labels = spread(targets, targets.labels, C)
    for i in range(N):
        for j in range(R):
            for c in range(C):
                p = 1 / (1 + math.exp(-float(logits[i, j, c])))
                is_positive = int(labels[i, j]) == c
                p_t, alpha_t = (p, 0.25) if is_positive else (1 - p, 0.75)
                if VALID[i, j]:
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
        targets, predictions = make_targets(), make_predictions()
        losses, weights = JointQuality(beta=beta, weight=3.0).losses(predictions, targets)
        iou, labels = spread(targets, targets.iou, 0), spread(targets, targets.labels, C)
        logits = flatten(predictions.logits)
        expected = 0.0
        for i in range(N):
            for j in range(R):
                for c in range(C):
                    y = float(iou[i, j]) if int(labels[i, j]) == c else 0.0
                    p = 1 / (1 + math.exp(-float(logits[i, j, c])))
                    bce = -(y * math.log(p) + (1 - y) * math.log(1 - p))
                    expected += abs(y - p) ** beta * bce * bool(VALID[i, j])
        assert float(losses["loss_qfl"]) == pytest.approx(3 * expected, rel=1e-12)
        assert_close(weights, targets.take(predictions.logits).sigmoid().amax(dim=1))


class TestDistributionGuidedQuality:
    def test_loss_is_qfl_of_the_product(self):
        """With probabilities, as the paper writes it."""
        targets, predictions = make_targets(), make_predictions()
        losses, weights = DistributionGuidedQuality().losses(predictions, targets)
        p = flatten(predictions.logits).sigmoid() * flatten(predictions.quality).sigmoid()
        labels = spread(targets, targets.labels, C)
        y = F.one_hot(labels, C + 1)[..., :C] * spread(targets, targets.iou, 0)[..., None]
        loss = (y - p).abs() ** 2 * F.binary_cross_entropy(p, y, reduction="none")
        assert_close(losses["loss_qfl"], loss[VALID].sum())
        best = targets.take(predictions.logits).sigmoid().amax(dim=1)
        assert_close(weights, best * targets.take(predictions.quality)[:, 0].sigmoid())

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
        distributions = [torch.randn(N, 4 * 6, *size, requires_grad=True) for size in SIZES]
        predicted = [predictor(None, maps) for maps in distributions]
        logits = [maps.float() for maps in make_logits()]
        losses, _ = quality.losses(make_predictions(logits, predicted), make_targets())
        losses["loss_qfl"].backward()
        assert all((maps.grad != 0).any() for maps in distributions)
        assert all((p.grad != 0).any() for p in predictor.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_certain_predictions_under_autocast(self, dtype):
        """Probabilities of 0 and 1 to half precision: the loss is that of float32."""
        targets = make_targets()
        # Values that half precision has.
        logits, quality = (
            [(maps * 20).to(dtype).requires_grad_() for maps in make_logits(number, seed)]
            for number, seed in ((C, 0), (1, 1))
        )
        with torch.autocast("cpu", dtype=dtype):
            predictions = make_predictions(logits, quality)
            losses, _ = DistributionGuidedQuality().losses(predictions, targets)
        losses["loss_qfl"].backward()
        assert all(maps.grad.isfinite().all() for maps in (*logits, *quality))
        predictions = make_predictions([x.double() for x in logits], [x.double() for x in quality])
        exact, _ = DistributionGuidedQuality().losses(predictions, targets)
        assert_close(losses["loss_qfl"].double(), exact["loss_qfl"], rtol=1e-5, atol=0)


class TestNoQuality:
    def test_is_focal_loss(self):
        targets, predictions = make_targets(), make_predictions()
        losses, weights = NoQuality(weight=2.0).losses(predictions, targets)
        expected = 2 * focal_loss(predictions.logits, targets).sum()
        assert float(losses["loss_cls"]) == pytest.approx(expected)
        assert weights.tolist() == [1.0] * 4

    def test_score_is_the_class_score(self):
        logits = make_logits()[0]
        assert torch.equal(NoQuality().score_logits(logits, None), logits)


BRANCHES = {
    "centerness": (QualityBranch(), lambda t: centerness(t.gt_distances)),
    "iou": (QualityBranch(name="iou", target=lambda t: t.iou), lambda t: t.iou),
}


class TestQualityBranch:
    @pytest.mark.parametrize("name", BRANCHES)
    def test_losses(self, name):
        branch, target = BRANCHES[name]
        targets, predictions = make_targets(), make_predictions()
        losses, weights = branch.losses(predictions, targets)
        expected = focal_loss(predictions.logits, targets).sum()
        assert float(losses["loss_cls"]) == pytest.approx(expected)
        p = targets.take(predictions.quality)[:, 0].sigmoid()
        y = target(targets)
        assert_close(losses[f"loss_{name}"], -(y * p.log() + (1 - y) * (1 - p).log()).sum())
        assert torch.equal(weights, y)

    def test_only_positives_teach_the_branch(self):
        targets = make_targets()
        quality = [maps.requires_grad_() for maps in make_logits(1)]
        losses, _ = QualityBranch().losses(make_predictions(quality=quality), targets)
        losses["loss_centerness"].backward()
        is_positive = spread(targets, targets.labels, C) < C
        grad = flatten([maps.grad for maps in quality])[..., 0]
        assert torch.equal(grad != 0, is_positive)

    def test_score_is_the_product(self):
        logits, quality = make_logits()[0], make_logits(1, seed=1)[0]
        scores = QualityBranch().score_logits(logits, quality).sigmoid()
        assert_close(scores, logits.sigmoid() * quality.sigmoid())


class TestQualityGuided:
    def test_positives_keep_their_total_loss(self):
        """And it is shared out by centerness to the power of 1.5."""
        targets = make_targets()
        logits = [maps.requires_grad_() for maps in make_logits()]
        losses, weights = QualityGuided().losses(make_predictions(logits), targets)
        assert float(losses["loss_cls"]) == pytest.approx(focal_loss(logits, targets).sum())
        assert weights.tolist() == [1.0] * 4

        # The weight of a positive is the factor of its gradient.
        guided = torch.autograd.grad(losses["loss_cls"], logits)
        plain = NoQuality().losses(make_predictions(logits), targets)[0]["loss_cls"]
        plain = torch.autograd.grad(plain, logits)
        factor = (targets.take(guided) / targets.take(plain))[:, 0]
        expected = centerness(targets.gt_distances) ** 1.5
        assert_close(factor / factor[0], expected / expected[0], rtol=1e-5, atol=0)
        is_negative = spread(targets, targets.labels, C) == C
        assert_close(flatten(guided)[is_negative], flatten(plain)[is_negative])

    @pytest.mark.parametrize("iou", [0.0, 1.0])
    def test_equal_qualities_leave_focal_loss(self, iou):
        targets = make_targets()._replace(iou=torch.full((4,), iou, dtype=torch.float64))
        predictions = make_predictions()
        guided, _ = QualityGuided(target=lambda t: t.iou).losses(predictions, targets)
        plain, _ = NoQuality().losses(predictions, targets)
        if iou:
            assert float(guided["loss_cls"]) == pytest.approx(float(plain["loss_cls"]))
        else:  # no positive is worth learning from
            assert guided["loss_cls"].isfinite()
            assert guided["loss_cls"] < plain["loss_cls"]


CHOICES = [
    JointQuality(),
    DistributionGuidedQuality(),
    NoQuality(),
    QualityBranch(),
    QualityGuided(),
]


@pytest.mark.parametrize("quality", CHOICES)
def test_no_positive(quality):
    """Finite, and connected to all predictions."""
    logits, predicted = ([x.requires_grad_() for x in make_logits(n)] for n in (C, 1))
    targets = make_targets(num_positives=0)
    losses, weights = quality.losses(make_predictions(logits, predicted), targets)
    sum(losses.values()).backward()
    assert weights.shape == (0,)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(maps.grad.isfinite().all() for maps in logits)
    if quality.build_predictor(8, GeneralDistribution()) is not None:
        assert all(maps.grad is not None for maps in predicted)


@pytest.mark.parametrize("quality", CHOICES)
def test_candidates_that_are_not_positive_do_not_matter(quality):
    """Losses and gradients are those without them."""
    results = []
    for num_unreal in (0, 3):
        logits, predicted = ([x.requires_grad_() for x in make_logits(n)] for n in (C, 1))
        targets = make_targets(num_unreal=num_unreal)
        losses, _ = quality.losses(make_predictions(logits, predicted), targets)
        sum(losses.values()).backward()
        results.append((losses, [maps.grad for maps in logits], [maps.grad for maps in predicted]))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("quality", CHOICES)
def test_infinite_logits_in_the_padding_do_not_matter(quality):
    results = []
    for value in (0.0, math.inf):
        logits, predicted = (make_logits(n) for n in (C, 1))
        for maps in (logits, predicted):
            maps[1][1, :, :, 2] = value
            for x in maps:
                x.requires_grad_()
        losses, _ = quality.losses(make_predictions(logits, predicted), make_targets())
        sum(losses.values()).backward()
        results.append((losses, [maps.grad for maps in logits]))
    assert_close(results[1], results[0])
    assert (results[1][1][1][1, :, :, 2] == 0).all()
