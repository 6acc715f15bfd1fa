"""What the head predicts of a box: each choice against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from gfl_d2.modeling import DiracDelta, Gaussian, GeneralDistribution, gaussian_kl_loss

CHOICES = [GeneralDistribution(), GeneralDistribution(8, 0.5), DiracDelta(), Gaussian()]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("box", CHOICES)
def test_shapes_and_range(box):
    predictions = randn(3, 5, 4 * box.num_values) * 30
    distances = box.decode(predictions)
    assert distances.shape == (3, 5, 4)
    assert distances.min() >= 0
    assert distances.max() <= box.max_distance * (1 + 1e-9)
    for loss in box.losses(predictions[0], distances[0]).values():
        assert loss.shape == (5,)
        assert loss.isfinite().all()


@pytest.mark.parametrize("box", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decoded_in_float32(box, dtype):
    predictions = (randn(7, 4 * box.num_values) * 3).to(dtype)
    distances = box.decode(predictions)
    assert distances.dtype == torch.float32
    assert_close(distances, box.decode(predictions.float()))
    for loss in box.losses(predictions, distances).values():
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("box", CHOICES)
def test_sides_do_not_mix(box):
    """A side is decoded from its own V numbers: left, top, right, bottom."""
    predictions = randn(1, 4 * box.num_values)
    before = box.decode(predictions)[0]
    for side in range(4):
        changed = predictions.clone()
        changed[0, side * box.num_values] += 1
        is_changed = box.decode(changed)[0] != before
        assert is_changed.tolist() == [i == side for i in range(4)]


@pytest.mark.parametrize("box", CHOICES)
def test_gradient(box):
    predictions = randn(2, 4 * box.num_values).requires_grad_()
    target = torch.tensor([[0.3, 1.7, 2.2, 3.6], [0.1, 0.9, 1.2, 2.5]], dtype=torch.float64)
    assert gradcheck(box.decode, (predictions,))
    if box.losses(predictions, target):
        assert gradcheck(lambda x: tuple(box.losses(x, target).values()), (predictions,))


@given(
    n=st.integers(1, 20),
    width=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    fraction=st.floats(0, 0.99),
)
def test_general_distribution_can_express_any_distance_in_its_range(n, width, fraction):
    """The distribution that DFL asks for has its target as its mean, and the lowest loss."""
    box = GeneralDistribution(n, width)
    target = torch.full((1, 4), fraction * (n - 0.1) * width, dtype=torch.float64)
    y = target[0, 0].item() / width
    left = min(math.floor(y), n - 1)
    probs = torch.full((n + 1,), 1e-12, dtype=torch.float64)
    probs[left] += left + 1 - y
    probs[left + 1] += y - left
    predictions = probs.log().repeat(4)[None]
    assert_close(box.decode(predictions), target, rtol=0, atol=1e-8 * width * n)
    lowest = box.losses(predictions, target)["loss_dfl"]
    other = box.losses(predictions + randn(1, 4 * (n + 1)) / 2, target)["loss_dfl"]
    assert (lowest <= other + 1e-9).all()


def test_bin_width_scales_distances():
    predictions = randn(5, 4 * 17)
    narrow, wide = GeneralDistribution(16, 0.5), GeneralDistribution(16, 2.0)
    assert_close(wide.decode(predictions), 4 * narrow.decode(predictions))
    target = torch.rand(5, 4, dtype=torch.float64) * 8
    assert_close(wide.losses(predictions, 4 * target), narrow.losses(predictions, target))


def test_dfl_weight():
    predictions, target = randn(5, 4 * 17), torch.rand(5, 4, dtype=torch.float64) * 16
    losses = [GeneralDistribution(dfl_weight=w).losses(predictions, target) for w in (1.0, 0.0)]
    assert (losses[0]["loss_dfl"] > 0).all()
    assert (losses[1]["loss_dfl"] == 0).all()


def test_dirac_delta_starts_at_the_prior():
    assert_close(DiracDelta(3.0).decode(torch.zeros(2, 4)), torch.full((2, 4), 3.0))
    assert_close(DiracDelta(3.0).decode(torch.full((2, 4), math.log(2))), torch.full((2, 4), 6.0))
    assert DiracDelta().decode(torch.full((2, 4), 1e4)).isfinite().all()


def test_gaussian_mean_is_as_of_dirac_delta():
    predictions = randn(5, 4 * 2)
    means = predictions.view(5, 4, 2)[..., 0]
    assert_close(Gaussian(3.0).decode(predictions), DiracDelta(3.0).decode(means))


@pytest.mark.parametrize("error", [0.02, 0.5, 1.0, 1.5, 20.0])
def test_gaussian_kl_loss(error):
    """Against the equations of the paper; the best variance is twice what it multiplies."""
    log_variance = torch.linspace(-9, 9, 18001, dtype=torch.float64)
    mean = torch.full_like(log_variance, 5.0)
    loss = gaussian_kl_loss(mean, log_variance, mean + error)
    penalty = error**2 / 2 if error <= 1 else error - 0.5
    expected = [math.exp(-s) * penalty + s / 2 for s in log_variance.tolist()]
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    assert log_variance[loss.argmin()].item() == pytest.approx(math.log(2 * penalty), abs=2e-3)


def test_gaussian_with_extreme_variances_is_finite():
    predictions = torch.zeros(1, 8).index_fill_(1, torch.tensor([1, 3]), -1e4)
    predictions[0, [5, 7]] = 1e4
    predictions.requires_grad_()
    loss = Gaussian().losses(predictions, torch.ones(1, 4))["loss_kl"]
    loss.sum().backward()
    assert loss.isfinite().all()
    assert predictions.grad.isfinite().all()
