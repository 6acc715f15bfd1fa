"""The loss of a map of background, and of the logits with another target, against plain forms."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from gfl_d2.modeling import background_loss, quality_focal_loss


def random_case(seed, shape, num_picked, padding, dtype=torch.float32):
    """Logits, what of them is valid, and an index of some of them, repetitions among it."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 4 - 2).to(dtype)
    valid = torch.rand(shape[0], generator=generator) >= padding
    index = tuple(torch.randint(0, n, (num_picked,), generator=generator) for n in shape)
    return logits, valid, index


def plain(logits, valid, gamma, weights=None):
    labels = torch.full((int(valid.sum()),), logits.shape[1])
    loss = quality_focal_loss(logits[valid], labels, torch.zeros(len(labels)), gamma)
    return (loss if weights is None else weights[valid, None] * loss).sum()


@given(
    seed=st.integers(0, 2**31 - 1),
    shape=st.tuples(st.integers(1, 200), st.integers(1, 6)),
    num_picked=st.integers(0, 12),
    gamma=st.sampled_from([0.0, 1.0, 2.0, 2.5]),
    padding=st.sampled_from([0.0, 0.5]),
    part=st.sampled_from([1, 100, 2**16]),
    is_weighted=st.booleans(),
)
@settings(max_examples=150)
def test_equals_the_plain_form(seed, shape, num_picked, gamma, padding, part, is_weighted):
    logits, valid, index = random_case(seed, shape, num_picked, padding)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(shape[0], generator=generator) if is_weighted else None
    results = []
    for compute in (
        lambda x: background_loss(x, valid, index, gamma, weights),
        lambda x: (plain(x.double(), valid, gamma, weights), x.double()[index]),
    ):
        x = logits.clone().requires_grad_()
        # The package has a function of this name, too, which Python before 3.11 finds first.
        module = importlib.import_module("gfl_d2.modeling.background_loss")
        with mock.patch.object(module, "_PART", part):
            loss, picked = compute(x)
        (0.3 * loss + (picked**2).sum()).backward()
        results.append((loss.detach().float(), picked.detach().float(), x.grad))
    assert_close(results[0][:2], results[1][:2], rtol=1e-5, atol=1e-6)
    largest = float(results[1][2].abs().max())
    assert_close(results[0][2], results[1][2], rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
def test_gradient(gamma):
    logits, valid, index = random_case(0, (40, 3), 6, 0.3, torch.float64)
    inputs = (logits.requires_grad_(), valid, index, gamma)
    assert gradcheck(lambda x: background_loss(x, *inputs[1:]), inputs[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """The loss is float32's of the same logits; its gradient is rounded once."""
    logits, valid, index = random_case(0, (60, 4), 3, 0.3, dtype)
    logits.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, picked = background_loss(logits, valid, index, 2.0)
    assert loss.dtype == picked.dtype == torch.float32
    exact = plain(logits.double(), valid, 2.0)
    assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(loss, logits)
    (exact_grad,) = torch.autograd.grad(exact, logits)
    assert grad.dtype == dtype
    assert_close(grad, exact_grad)


@pytest.mark.parametrize("value", [-1e4, -80.0, 80.0, 1e4])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_extreme_logits(value, gamma):
    """Right and certain costs nothing, wrong and certain costs the logit."""
    logits = torch.full((2, 2), value, requires_grad=True)
    nothing = (torch.zeros(0, dtype=torch.int64),) * 2
    loss, _ = background_loss(logits, torch.ones(2) > 0, nothing, gamma)
    loss.backward()
    assert_close(loss.detach(), torch.tensor(4 * max(value, 0.0)))
    assert_close(logits.grad, torch.full_like(logits, float(value > 0)))


def test_nothing_of_the_padding_matters():
    logits, valid, index = random_case(0, (40, 3), 0, 0.5)
    expected, _ = background_loss(logits, valid, index, 2.0)
    logits = torch.where(valid[:, None], logits, torch.inf).requires_grad_()
    loss, _ = background_loss(logits, valid, index, 2.0)
    loss.backward()
    assert torch.equal(loss, expected)
    assert (logits.grad[~valid] == 0).all()


def test_gradient_can_be_taken_twice():
    """Of the same graph: what is kept for it is not used up."""
    logits, valid, index = random_case(0, (60, 4), 8, 0.3)
    logits.requires_grad_()
    weights = torch.linspace(0, 1, 60)
    loss, picked = background_loss(logits, valid, index, 2.0, weights)
    for factor in (0.5, 2.0):
        (grad,) = torch.autograd.grad(factor * loss + picked.sum(), logits, retain_graph=True)
        exact = factor * plain(logits, valid, 2.0, weights) + logits[index].sum()
        assert_close(grad, torch.autograd.grad(exact, logits)[0])
