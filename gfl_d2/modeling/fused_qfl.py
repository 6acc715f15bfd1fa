"""Quality Focal Loss over whole maps, of which almost all is background."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .locations import Positives, fill_padding, needs_fixed_shapes
from .losses import quality_focal_loss
from .precision import full_precision

__all__ = ["NO_LOSS_LOGIT", "quality_focal_loss_sum"]

# A logit whose loss as background is 0, and its gradient.
NO_LOSS_LOGIT = -1e4
# Elements that are worked on at a time on a CPU: what fits into its cache.
_BLOCK = 2**16


def quality_focal_loss_sum(
    logits: Sequence[Tensor],
    positives: Sequence[Positives],
    labels: Tensor,
    quality: Tensor,
    beta: float = 2.0,
    valid_sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> Tensor:
    """
    What :func:`gfl_d2.modeling.quality_focal_loss` sums up to, computed with its gradient in one
    pass over the maps and in little memory: the loss of a background everywhere, corrected at the
    positives.

    Args:
        logits: of each of L levels, shape (N, C, Hi, Wi).
        positives: of each level; P locations over all levels.
        labels: shape (P,), int64 in [0, C): their classes.
        quality: shape (P,), in [0, 1], their targets.
        beta: as of :func:`quality_focal_loss`.
        valid_sizes: L times N times (height, width): the part of each map that counts. All by
            default.

    Returns:
        Tensor: a scalar, float32 or better. Its gradient cannot be differentiated again.
    """
    if valid_sizes is None:
        valid_sizes = [[maps.shape[2:]] * len(maps) for maps in logits]
    return _QualityFocalLossSum.apply(positives, labels, quality, beta, valid_sizes, *logits)


class _QualityFocalLossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args) -> Tensor:
        *ctx.args, logits = args[:5] + (args[5:],)
        loss, ctx.grads = _loss_and_gradients(*ctx.args, logits)
        # In case that they are asked for again: the gradients are given away.
        ctx.save_for_backward(*logits)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        logits = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = _loss_and_gradients(*ctx.args, logits)
        grads = [grad.mul_(grad_output).to(x.dtype) for grad, x in zip(grads, logits)]
        return *([None] * len(ctx.args)), *grads


def _loss_and_gradients(
    positives: Sequence[Positives],
    labels: Tensor,
    quality: Tensor,
    beta: float,
    valid_sizes: Sequence[Sequence[tuple[int, int]]],
    logits: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Of all levels, the gradients in float32 or better."""
    counts = [len(p.image) for p in positives]
    indices = [
        (p.image, label, p.row, p.column) for p, label in zip(positives, labels.split(counts))
    ]
    at = torch.cat([full_precision(maps[index]) for maps, index in zip(logits, indices)])
    loss, grad_at = _positive_minus_background(at, quality, beta)
    is_real = torch.cat([p.is_real for p in positives])
    total = torch.where(is_real, loss, 0).sum()
    grads_at = torch.where(is_real, grad_at, 0).split(counts)
    grads = []
    for maps, sizes, index, grad_at in zip(logits, valid_sizes, indices, grads_at):
        loss, grad = _background(maps, beta, sizes)
        total += loss
        grads.append(grad.index_put_(index, grad_at, accumulate=True))
    return total, grads


def _background(
    logits: Tensor, beta: float, valid_sizes: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Sum of the loss with a target of 0, and its gradient, in float32 or better."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    grad = torch.zeros_like(logits, dtype=dtype)
    total = grad.new_zeros(())
    for x, grad_x in _regions(logits, grad, valid_sizes):
        x = x.to(dtype)
        # The exponential of what is not positive cannot overflow. log1p takes several times as long
        # as log, which is off by 6e-8: too much only where no factor makes low scores count less.
        exponential = x.abs().neg_().exp_()
        softplus = exponential.add_(1).log_() if beta >= 2 else exponential.log1p_()
        softplus.add_(x.clamp(min=0))
        score = x.sigmoid()
        factor = score.square() if beta == 2 else score.pow(beta)
        total += (factor * softplus).sum()
        # d/dx score^beta * softplus = score^beta * (beta * (1 - score) * softplus + score)
        torch.mul(torch.addcmul(score, softplus, 1 - score, value=beta), factor, out=grad_x)
    return total, grad


def _regions(
    logits: Tensor, grad: Tensor, sizes: Sequence[tuple[int, int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of the logits and of their gradient that cover what is valid."""
    num_classes = logits.shape[1]
    if needs_fixed_shapes(logits):
        yield fill_padding(logits, sizes, NO_LOSS_LOGIT), grad
        return
    for i, (height, width) in enumerate(sizes):
        x, grad_x = logits[i, :, :height, :width], grad[i, :, :height, :width]
        # Along the axis that is the outer one in memory.
        is_channels_last = x.stride(0) < x.stride(1)
        axis, length = (1, num_classes * width) if is_channels_last else (0, height * width)
        step = max(_BLOCK // max(length, 1), 1)
        yield from zip(x.split(step, dim=axis), grad_x.split(step, dim=axis))


def _positive_minus_background(x: Tensor, quality: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The difference of the loss with target ``quality`` from that with 0, and its gradient."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        # One class, twice.
        targets = torch.stack((quality.to(x), torch.zeros_like(x))).flatten()
        labels = torch.zeros_like(targets, dtype=torch.int64)
        losses = quality_focal_loss(x.repeat(2)[:, None], labels, targets, beta)
        positive, background = losses[:, 0].chunk(2)
        difference = positive - background
        (grad,) = torch.autograd.grad(difference.sum(), x)
    return difference.detach(), grad
