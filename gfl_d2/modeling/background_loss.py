"""The classification loss where nothing is: almost everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["background_loss", "background_terms"]

# A logit whose loss as background is 0, and its gradient.
_NO_LOSS_LOGIT = -1e4
# Logits that are worked on at a time: what fits into the cache of a CPU. Few parts, for a GPU.
_PART, _MAX_PARTS = 2**16, 32


def background_terms(logits: Tensor, gamma: float) -> Tensor:
    """The loss of each logit with a target of 0: ``sigmoid(x)^gamma * softplus(x)``."""
    return logits.sigmoid().pow(gamma) * F.softplus(logits)


def background_loss(
    logits: Tensor,
    valid: Tensor,
    index: tuple[Tensor, Tensor],
    gamma: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Focal loss without alpha, which is Quality Focal Loss too, with a target of 0 everywhere: the
    sum of :func:`background_terms`. The gradient, in closed form, is computed with it. Only the
    gradient is kept: autograd would keep several times as much.

    The few logits whose target is another are returned, to be corrected for by plain functions.
    Their gradient is added to the same memory.

    Shapes: R locations, C classes.

    Args:
        logits: shape (R, C).
        valid: shape (R,), bool. Where it is False there is neither loss nor gradient.
        index: two tensors of one shape, int64: location and class of some logits.
        gamma: exponent of the modulating factor, 0 or >= 1.
        weights: shape (R,), of the locations in the loss. None for 1.

    Returns:
        loss (Tensor): a scalar, in float32 or better. It can be differentiated once.
        picked (Tensor): the logits at ``index``, in float32 or better.
    """
    return _BackgroundLoss.apply(logits, valid, gamma, weights, *index)


class _BackgroundLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, valid, gamma, weights, *index):
        loss, ctx.grad = _loss_and_gradient(logits, valid, gamma, weights)
        ctx.gamma = gamma
        ctx.save_for_backward(logits, valid, weights, *index)
        return loss, logits[index].to(loss.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, grad_picked):
        logits, valid, weights, *index = ctx.saved_tensors
        # The gradient is given away. It is computed again if it is asked for again.
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            _, grad = _loss_and_gradient(logits, valid, ctx.gamma, weights)
        grad.mul_(grad_loss).index_put_(tuple(index), grad_picked, accumulate=True)
        return grad.to(logits.dtype), None, None, None, None, None


def _loss_and_gradient(
    logits: Tensor, valid: Tensor, gamma: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    grad = torch.empty_like(logits, dtype=dtype)
    loss = grad.new_zeros(())
    num_rows = max(_PART, logits.numel() // _MAX_PARTS) // logits.shape[1] + 1
    limit = torch.where(valid, torch.inf, _NO_LOSS_LOGIT).to(dtype)[:, None]
    parts = [y.split(num_rows) for y in (logits, limit, grad)]
    parts.append([None] * len(parts[0]) if weights is None else weights[:, None].split(num_rows))
    for x, upper, out, weight in zip(*parts):
        x = torch.minimum(x.to(dtype), upper)  # a where() takes six times as long
        score, softplus = x.sigmoid(), F.softplus(x)
        factor = torch.pow(score, gamma, out=x)
        loss += _times(torch.mul(factor, softplus, out=out), weight).sum()
        # d/dx score^gamma * softplus = score^gamma * (score + gamma * (1 - score) * softplus)
        softplus.addcmul_(score, softplus, value=-1)
        _times(torch.mul(factor, score.add_(softplus, alpha=gamma), out=out), weight)
    return loss, grad


def _times(x: Tensor, weight: Tensor | None) -> Tensor:
    """In place."""
    return x if weight is None else x.mul_(weight)
