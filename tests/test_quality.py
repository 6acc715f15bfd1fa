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
    CenternessBranch,
    CenternessGuided,
    DistributionGuidedQuality,
    GeneralDistribution,
    GroundTruth,
    IoUBranch,
    IoUGuided,
    JointQuality,
    Levels,
    LocationGrid,
    MatchabilityAwareQuality,
    Matches,
    NoQuality,
    Predictions,
    Samples,
    VarifocalQuality,
    centerness,
    joint_logits,
)
from gfl_d2.modeling.quality import DistributionGuidedQualityPredictor
from gfl_d2.registry import QUALITY_REGISTRY

N, C = 2, 3
SHAPES = [(2, 3), (1, 3)]  # of two levels
R = 9
# The last location of the second image is padding.
LEVELS: Levels = LocationGrid((8, 8))(SHAPES, torch.tensor([(16, 24), (16, 24)]))
LEVELS.valid_sizes[1, 1] = torch.tensor((1, 2))
finite = st.floats(-60, 60)


def make_samples(predictions: Predictions, num_positives: int = 4, seed: int = 0) -> Samples:
    """
    Positives at random places, of a box each. The box's candidate on the other level is not
    positive: it is at any place, and its values must not matter.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(17, generator=generator)[:num_positives]
    # Places 0 to 11 are those of the first level.
    level, cell = (place >= 12).long(), torch.where(place >= 12, place - 12, place)
    area = torch.tensor([6, 3])[level]
    row, column = torch.zeros(2, num_positives, 2, 1, dtype=torch.int64)
    box = torch.arange(num_positives)
    row[box, level, 0], column[box, level, 0] = cell % area // 3, cell % area % 3
    is_positive = torch.zeros(num_positives, 2, 1, dtype=torch.bool)
    is_positive[box, level] = True
    matches = Matches(cell // area, row, column, is_positive)
    labels = torch.randint(0, C, (num_positives,), generator=generator)
    distances, iou = (
        torch.rand(2 * num_positives, *shape, generator=generator, dtype=torch.float64)
        for shape in ((4,), ())
    )
    return Samples(
        matches=matches,
        gt=GroundTruth(torch.zeros(num_positives, 4), labels, matches.image),
        is_positive=is_positive.flatten(),
        image=matches.image.repeat_interleave(2),
        classes=labels.repeat_interleave(2),
        quality_logits=matches.take(predictions.quality_logits).flatten(),
        box_values=distances,
        boxes=distances,
        gt_boxes=distances,
        gt_distances=5 * distances,
        iou=iou,
    )


def spread(samples: Samples, values: torch.Tensor, other: float) -> torch.Tensor:
    """Values of the positives among all locations: from shape (P,) to (N, R)."""
    matches, maps = samples.matches, []
    for i, shape in enumerate(SHAPES):
        level = values.new_full((N, *shape), other)
        real = matches.is_positive[:, i, 0]
        place = matches.image, matches.row[:, i, 0], matches.column[:, i, 0]
        level[tuple(x[real] for x in place)] = values.view(-1, 2)[:, i][real]
        maps.append(level.flatten(1))
    return torch.cat(maps, dim=1)


def positives(samples: Samples, maps: list[torch.Tensor]) -> torch.Tensor:
    """Values of the positives: from maps of shape (N, X, Hi, Wi) to (num_positives, X)."""
    return samples.matches.take(maps).flatten(0, 2)[samples.is_positive]


def flatten(maps):
    return torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)


VALID = torch.ones(N, R, dtype=torch.bool)
VALID[1, -1] = False


def make_logits(num_classes: int = C, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(N, num_classes, *shape, generator=generator, dtype=torch.float64) * 2
        for shape in SHAPES
    ]


def make_predictions(logits=None, quality=None):
    return Predictions(logits or make_logits(), [], quality or make_logits(1, seed=1))


def focal_loss(logits, samples, alpha=0.25, gamma=2.0):
    """Of every valid location and class, one at a time: (N, R, C) as nested lists."""
    losses, logits = np.zeros((N, R, C)), flatten(logits).detach()
    labels = spread(samples, samples.classes, C)
    for i in range(N):
        for j in range(R):
            for c in range(C):
                p = 1 / (1 + math.exp(-float(logits[i, j, c])))
                is_positive = int(labels[i, j]) == c
                p_t, alpha_t = (p, alpha) if is_positive else (1 - p, 1 - alpha)
                if VALID[i, j]:
                    losses[i, j, c] = -alpha_t * (1 - p_t) ** gamma * math.log(p_t)
    return losses


def score_loss(quality, loss_of):
    """The loss, and that of a plain sum over all valid locations and classes."""
    predictions = make_predictions()
    samples = make_samples(predictions)
    predictions = predictions._replace(quality_logits=None)
    samples = samples._replace(quality_logits=None)
    (loss,) = quality.losses(predictions, LEVELS, samples).values()
    iou, labels = spread(samples, samples.iou, 0), spread(samples, samples.classes, C)
    logits, expected = flatten(predictions.class_logits), 0.0
    for i, j, c in np.ndindex(N, R, C):
        p = 1 / (1 + math.exp(-float(logits[i, j, c])))
        q = float(iou[i, j]) if int(labels[i, j]) == c else None
        expected += loss_of(p, q) * bool(VALID[i, j])
    return float(loss), expected


def cross_entropy(p, y):
    return -(y * math.log(p) + (1 - y) * math.log(1 - p))


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
        quality = JointQuality(beta=beta, weight=3.0)
        loss, expected = score_loss(
            quality, lambda p, q: abs((q or 0) - p) ** beta * cross_entropy(p, q or 0)
        )
        assert loss == pytest.approx(3 * expected, rel=1e-12)

    def test_weight_of_a_positive_is_its_best_score(self):
        predictions, quality = make_predictions(), JointQuality()
        samples = make_samples(predictions)._replace(quality_logits=None)
        best = positives(samples, predictions.class_logits).sigmoid().amax(dim=1)
        assert_close(quality.box_weights(predictions, samples)[samples.is_positive], best)


class TestIoUAwareQualities:
    def test_varifocal_loss(self):
        def loss_of(p, q):
            return 0.6 * p**3 * cross_entropy(p, 0) if q is None else q * cross_entropy(p, q)

        quality = VarifocalQuality(beta=3.0, weight=2.0, alpha=0.6)
        loss, expected = score_loss(quality, loss_of)
        assert loss == pytest.approx(2 * expected, rel=1e-12)

    def test_matchability_aware_loss(self):
        def loss_of(p, q):
            return p**1.5 * cross_entropy(p, 0) if q is None else cross_entropy(p, q**1.5)

        loss, expected = score_loss(MatchabilityAwareQuality(weight=2.0), loss_of)
        assert loss == pytest.approx(2 * expected, rel=1e-12)


class TestDistributionGuidedQuality:
    def test_loss_is_qfl_of_the_product(self):
        """With probabilities, as the paper writes it."""
        predictions = make_predictions()
        samples, quality = make_samples(predictions), DistributionGuidedQuality()
        losses = quality.losses(predictions, LEVELS, samples)
        p = flatten(predictions.class_logits).sigmoid()
        p = p * flatten(predictions.quality_logits).sigmoid()
        labels = spread(samples, samples.classes, C)
        y = F.one_hot(labels, C + 1)[..., :C] * spread(samples, samples.iou, 0)[..., None]
        loss = (y - p).abs() ** 2 * F.binary_cross_entropy(p, y, reduction="none")
        assert_close(losses["loss_qfl"], loss[VALID].sum())
        best = positives(samples, predictions.class_logits).sigmoid().amax(dim=1)
        best = best * positives(samples, predictions.quality_logits)[:, 0].sigmoid()
        assert_close(quality.box_weights(predictions, samples)[samples.is_positive], best)

    def test_statistics(self):
        distributions = torch.randn(2, 4 * 6, 3, 5, dtype=torch.float64)
        predictor = DistributionGuidedQualityPredictor(num_bins=6, topk=3, channels=64)
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
        distributions = [torch.randn(N, 4 * 6, *shape, requires_grad=True) for shape in SHAPES]
        predicted = [predictor(None, maps) for maps in distributions]
        predictions = make_predictions([maps.float() for maps in make_logits()], predicted)
        losses = quality.losses(predictions, LEVELS, make_samples(predictions))
        losses["loss_qfl"].backward()
        assert all((maps.grad != 0).any() for maps in distributions)
        assert all((p.grad != 0).any() for p in predictor.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_certain_predictions_under_autocast(self, dtype):
        """Probabilities of 0 and 1 to half precision: the loss is that of float32."""
        # Values that half precision has.
        logits, quality = (
            [(maps * 20).to(dtype).requires_grad_() for maps in make_logits(number, seed)]
            for number, seed in ((C, 0), (1, 1))
        )
        with torch.autocast("cpu", dtype=dtype):
            predictions = make_predictions(logits, quality)
            samples = make_samples(predictions)
            losses = DistributionGuidedQuality().losses(predictions, LEVELS, samples)
        losses["loss_qfl"].backward()
        assert all(maps.grad.isfinite().all() for maps in (*logits, *quality))
        predictions = make_predictions([x.double() for x in logits], [x.double() for x in quality])
        exact = DistributionGuidedQuality().losses(predictions, LEVELS, samples)
        assert_close(losses["loss_qfl"].double(), exact["loss_qfl"], rtol=1e-5, atol=0)


class TestNoQuality:
    @pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.5)])
    def test_is_focal_loss(self, alpha, gamma):
        predictions = make_predictions()
        samples, quality = make_samples(predictions), NoQuality(alpha, gamma, weight=2.0)
        losses = quality.losses(predictions, LEVELS, samples)
        expected = 2 * focal_loss(predictions.class_logits, samples, alpha, gamma).sum()
        assert float(losses["loss_cls"]) == pytest.approx(expected)
        assert (quality.box_weights(predictions, samples) == 1).all()

    def test_without_alpha(self):
        """A negative alpha weighs nothing: twice the loss of alpha 1/2."""
        predictions = make_predictions()
        samples = make_samples(predictions)
        losses = NoQuality(alpha=-1.0).losses(predictions, LEVELS, samples)
        expected = 2 * focal_loss(predictions.class_logits, samples, 0.5).sum()
        assert float(losses["loss_cls"]) == pytest.approx(expected)

    def test_score_is_the_class_score(self):
        logits = make_logits()[0]
        assert torch.equal(NoQuality().score_logits(logits, None), logits)


BRANCHES = {
    "centerness": (CenternessBranch(), lambda samples: centerness(samples.gt_distances)),
    "iou": (IoUBranch(), lambda samples: samples.iou),
}


class TestQualityBranch:
    @pytest.mark.parametrize("name", BRANCHES)
    def test_losses(self, name):
        branch, target = BRANCHES[name]
        predictions = make_predictions()
        samples = make_samples(predictions)
        losses = branch.losses(predictions, LEVELS, samples)
        expected = focal_loss(predictions.class_logits, samples).sum()
        assert float(losses["loss_cls"]) == pytest.approx(expected)
        p = positives(samples, predictions.quality_logits)[:, 0].sigmoid()
        y = target(samples)[samples.is_positive]
        assert_close(losses[f"loss_{name}"], -(y * p.log() + (1 - y) * (1 - p).log()).sum())
        assert torch.equal(branch.box_weights(predictions, samples), target(samples))

    def test_only_positives_teach_the_branch(self):
        quality = [maps.requires_grad_() for maps in make_logits(1)]
        predictions = make_predictions(quality=quality)
        samples = make_samples(predictions)
        CenternessBranch().losses(predictions, LEVELS, samples)["loss_centerness"].backward()
        is_positive = spread(samples, samples.classes, C) < C
        grad = flatten([maps.grad for maps in quality])[..., 0]
        assert torch.equal(grad != 0, is_positive)

    def test_score_is_the_product(self):
        logits, quality = make_logits()[0], make_logits(1, seed=1)[0]
        scores = CenternessBranch().score_logits(logits, quality).sigmoid()
        assert_close(scores, logits.sigmoid() * quality.sigmoid())


class TestQualityGuided:
    def test_positives_keep_their_total_loss(self):
        """And it is shared out by centerness to the power of 1.5."""
        logits = [maps.requires_grad_() for maps in make_logits()]
        predictions = make_predictions(logits)
        samples = make_samples(predictions)
        loss = CenternessGuided().losses(predictions, LEVELS, samples)["loss_cls"]
        assert float(loss.detach()) == pytest.approx(focal_loss(logits, samples).sum())
        assert (CenternessGuided().box_weights(predictions, samples) == 1).all()

        # The weight of a positive is the factor of its gradient, in all classes.
        guided = torch.autograd.grad(loss, logits)
        plain = NoQuality().losses(predictions, LEVELS, samples)["loss_cls"]
        plain = torch.autograd.grad(plain, logits)
        factor = positives(samples, guided) / positives(samples, plain)
        expected = centerness(samples.gt_distances)[samples.is_positive] ** 1.5
        assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-5, atol=0)
        assert_close(factor[:, 0] / factor[0, 0], expected / expected[0], rtol=1e-5, atol=0)
        is_negative = spread(samples, samples.classes, C) == C
        assert_close(flatten(guided)[is_negative], flatten(plain)[is_negative])

    @pytest.mark.parametrize("iou", [0.0, 1.0])
    def test_equal_qualities_leave_focal_loss(self, iou):
        predictions = make_predictions()
        samples = make_samples(predictions)
        samples = samples._replace(iou=torch.full_like(samples.iou, iou))
        guided = IoUGuided().losses(predictions, LEVELS, samples)["loss_cls"]
        plain = NoQuality().losses(predictions, LEVELS, samples)["loss_cls"]
        if iou:
            assert float(guided) == pytest.approx(float(plain))
        else:  # no positive is worth learning from
            assert guided.isfinite()
            assert guided < plain


CHOICES = [
    JointQuality(),
    DistributionGuidedQuality(),
    NoQuality(),
    CenternessBranch(),
    IoUBranch(),
    CenternessGuided(),
    IoUGuided(),
]


def losses_and_gradients(quality, logits, predicted, num_positives=4, **changes):
    """Gradients of class logits, then of quality logits; None where there is none."""
    for maps in (*logits, *predicted):
        maps.requires_grad_()
    predictions = make_predictions(logits, predicted)
    samples = make_samples(predictions, num_positives)
    if quality.build_predictor(8, GeneralDistribution()) is None:
        samples = samples._replace(quality_logits=None)
        changes.pop("quality_logits", None)
    for name, change in changes.items():
        samples = samples._replace(**{name: change(getattr(samples, name), samples.is_positive)})
    losses = quality.losses(predictions, LEVELS, samples)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    return losses, [maps.grad for maps in logits], [maps.grad for maps in predicted]


@pytest.mark.parametrize("quality", CHOICES)
def test_no_positive(quality):
    """Finite, and connected to all predictions."""
    _, *grads = losses_and_gradients(quality, make_logits(), make_logits(1), num_positives=0)
    assert all(grad.isfinite().all() for grad in grads[0])
    if quality.build_predictor(8, GeneralDistribution()) is not None:
        assert all(grad is not None for grad in grads[1])


@pytest.mark.parametrize("quality", CHOICES)
def test_candidates_that_are_not_positive_do_not_matter(quality):
    """Whatever their targets and predictions are."""

    def change(values, is_positive):
        is_positive = is_positive.view(-1, *[1] * (values.ndim - 1))
        return torch.where(is_positive, values, torch.ones_like(values))

    names = ("iou", "gt_distances", "classes", "quality_logits")
    results = [
        losses_and_gradients(quality, make_logits(), make_logits(1), **changes)
        for changes in ({}, dict.fromkeys(names, change))
    ]
    assert_close(results[1], results[0])


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("quality", CHOICES)
def test_infinite_logits_in_the_padding_do_not_matter(quality, value):
    results = []
    for in_padding in (0.0, value):
        logits, predicted = (make_logits(n) for n in (C, 1))
        for maps in (logits, predicted):
            maps[1][1, :, :, 2] = in_padding
        results.append(losses_and_gradients(quality, logits, predicted))
    assert_close(results[1], results[0])
    assert (results[1][1][1][1, :, :, 2] == 0).all()


def test_targets_and_weights_have_no_gradient():
    """Of QFL and the box losses: the quality is what it is."""
    predictions = make_predictions([maps.requires_grad_() for maps in make_logits()])
    samples = make_samples(predictions)
    for quality in CHOICES:
        assert not quality.box_weights(predictions, samples).requires_grad


def test_every_choice_has_a_name():
    assert {name for name, _ in QUALITY_REGISTRY} >= {
        *("joint", "dgqp", "none", "centerness", "iou", "centerness_guided", "iou_guided")
    }
