"""Quality Focal Loss over whole maps against its plain form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from gfl_d2.modeling import Positives, fused_qfl, quality_focal_loss, quality_focal_loss_sum


def random_case(seed, shape, num_positives, num_unreal, dtype=torch.float32, scale=4.0):
    """Logits, positives with their labels and qualities, and the same as dense targets."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale - 2).to(dtype)
    num_positives = min(num_positives, n * h * w)
    place = torch.randperm(n * h * w, generator=generator)[:num_positives]
    # What is no positive may be where a positive is.
    unreal = torch.randint(0, n * h * w, (num_unreal,), generator=generator)
    is_real = torch.arange(num_positives + num_unreal) < num_positives
    labels = torch.randint(0, c, (len(is_real),), generator=generator)
    quality = torch.rand(len(is_real), generator=generator)
    dense_labels = torch.full((n * h * w,), c).index_copy_(0, place, labels[:num_positives])
    dense_quality = torch.zeros(n * h * w).index_copy_(0, place, quality[:num_positives])
    place = torch.cat((place, unreal))
    image, cell = place // (h * w), place % (h * w)
    positives = Positives(image, cell // w, cell % w, is_real)
    return logits, positives, labels, quality, dense_labels, dense_quality


def one_level(logits, positives, labels, quality, beta=2.0, valid_sizes=None):
    sizes = None if valid_sizes is None else [valid_sizes]
    return quality_focal_loss_sum([logits], [positives], labels, quality, beta, sizes)


def plain(logits, labels, quality, beta, valid):
    flat = logits.permute(0, 2, 3, 1).flatten(0, 2)
    return quality_focal_loss(flat[valid], labels[valid], quality[valid], beta, "sum")


def mask(shape, valid_sizes):
    n, _, h, w = shape
    valid = torch.zeros(n, h, w, dtype=torch.bool)
    for image, (rows, columns) in zip(valid, valid_sizes):
        image[:rows, :columns] = True
    return valid.flatten()


@given(
    seed=st.integers(0, 2**31 - 1),
    shape=st.tuples(*(st.integers(1, n) for n in (3, 6, 9, 9))),
    num_positives=st.integers(0, 12),
    num_unreal=st.integers(0, 3),
    beta=st.sampled_from([0.0, 1.0, 2.0, 2.5]),
    channels_last=st.booleans(),
    block=st.sampled_from([1, 16, 2**16]),
    padding=st.floats(0, 1),
)
@settings(max_examples=150)
def test_equals_the_plain_form(
    seed, shape, num_positives, num_unreal, beta, channels_last, block, padding
):
    logits, positives, labels, quality, *dense = random_case(seed, shape, num_positives, num_unreal)
    # The first image is whole; positives lie anywhere, so only where there is no padding.
    valid_sizes = [shape[2:]] * shape[0]
    if num_positives == 0:
        valid_sizes[1:] = [tuple(math.ceil(side * padding) or 1 for side in shape[2:])] * (
            shape[0] - 1
        )
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    before, fused_qfl._BLOCK = fused_qfl._BLOCK, block
    try:
        grads = []
        losses = []
        for compute in (
            lambda x: one_level(x, positives, labels, quality, beta, valid_sizes),
            lambda x: plain(x.double(), *dense, beta, mask(shape, valid_sizes)),
        ):
            x = logits.clone().requires_grad_()
            loss = compute(x)
            (loss * 0.3).backward()
            losses.append(loss.detach().float())
            grads.append(x.grad)
    finally:
        fused_qfl._BLOCK = before
    assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5 * float(grads[1].abs().max()))


def test_float64_is_exact():
    logits, positives, labels, quality, *dense = random_case(0, (2, 4, 6, 5), 8, 0, torch.float64)
    valid = mask(logits.shape, [(6, 5)] * 2)
    loss = one_level(logits, positives, labels, quality)
    assert_close(loss, plain(logits, *dense, 2.0, valid), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """The loss is float32's of the same logits; its gradient is rounded once."""
    logits, positives, labels, quality, *dense = random_case(0, (2, 4, 6, 5), 8, 0, dtype)
    logits.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = one_level(logits, positives, labels, quality)
    (grad,) = torch.autograd.grad(loss, logits)
    exact = plain(logits.double(), *dense, 2.0, mask(logits.shape, [(6, 5)] * 2))
    (exact_grad,) = torch.autograd.grad(exact, logits)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert_close(grad, exact_grad)


@pytest.mark.parametrize("value", [-1e4, -80.0, 80.0, 1e4])
def test_extreme_logits(value):
    logits = torch.full((1, 2, 1, 2), value, requires_grad=True)
    at = torch.tensor([0])
    positives = Positives(at, at, at, at == 0)
    loss = one_level(logits, positives, at, torch.ones(1))
    loss.backward()
    # Right and certain costs nothing, wrong and certain costs the logit.
    assert_close(loss.detach(), torch.tensor(3 * value if value > 0 else -value))
    assert logits.grad.isfinite().all()


def test_gradient_can_be_taken_twice():
    """Of the same graph: what is kept for it is not used up."""
    logits, positives, labels, quality, *_ = random_case(0, (2, 4, 6, 5), 8, 0)
    logits.requires_grad_()
    loss = one_level(logits, positives, labels, quality)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_levels_add_up():
    cases = [random_case(i, (2, 4, 6 - i, 5), 8 - 4 * i, 2 * i) for i in range(3)]
    levels = [case[0].requires_grad_() for case in cases]
    positives, labels, quality = zip(*(case[1:4] for case in cases))
    losses = [
        quality_focal_loss_sum(levels, positives, torch.cat(labels), torch.cat(quality)),
        sum(one_level(*case[:4]) for case in cases),
    ]
    assert_close(losses[0], losses[1])
    for actual, expected in zip(*(torch.autograd.grad(loss, levels) for loss in losses)):
        assert_close(actual, expected)


def test_under_autocast():
    """Float32 stays, though products are in lower precision there."""
    logits, positives, labels, quality, *dense = random_case(0, (2, 4, 6, 5), 8, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = one_level(logits, positives, labels, quality)
    exact = plain(logits.double(), *dense, 2.0, mask(logits.shape, [(6, 5)] * 2))
    assert_close(loss.double(), exact, rtol=1e-5, atol=0)
