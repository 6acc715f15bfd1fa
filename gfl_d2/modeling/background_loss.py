"""The classification loss where nothing is: almost everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["background_loss", "background_terms"]

# A logit whose loss as background is 0, and its gradient.
_NO_LOSS_LOGIT = -1e4


def background_terms(logits: Tensor, gamma: float) -> Tensor:
    """The loss of each logit with a target of 0: ``sigmoid(x)^gamma * softplus(x)``."""
    return logits.sigmoid().pow(gamma) * F.softplus(logits)


def background_loss(
    logits: Tensor, valid: Tensor, index: tuple[Tensor, ...], gamma: float
) -> tuple[Tensor, Tensor]:
    """
    Focal loss without alpha, which is Quality Focal Loss too, of a map with a target of 0
    everywhere: the sum of :func:`background_terms`. The gradient, in closed form, is computed with
    it, so that one map is all it takes in memory.

    The few logits whose target is another are returned, to be corrected for by plain functions.
    Their gradient is added to the same map.

    Args:
        logits: shape (N, C, H, W).
        valid: shape (N, 1, H, W), bool. Where it is False there is neither loss nor gradient.
        index: four tensors of shape (P,), int64: image, channel, row and column of some logits.
        gamma: exponent of the modulating factor, 0 or >= 1.

    Returns:
        loss (Tensor): a scalar, in float32 or better. It can be differentiated once.
        picked (Tensor): shape (P,), the logits at ``index``, in float32 or better.
    """
    return _BackgroundLoss.apply(logits, valid, gamma, *index)


class _BackgroundLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, valid, gamma, *index):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        grad = torch.empty_like(logits, dtype=dtype)
        loss = grad.new_zeros(())
        # Image by image, so that intermediate maps are small.
        for x, is_valid, grad_x in zip(logits, valid, grad):
            x = torch.where(is_valid, x.to(dtype), _NO_LOSS_LOGIT)
            score, softplus = x.sigmoid(), F.softplus(x)
            factor = score.pow(gamma)
            loss += (factor * softplus).sum()
            # d/dx score^gamma * softplus = score^gamma * (score + gamma * (1 - score) * softplus)
            torch.mul(factor, torch.addcmul(score, 1 - score, softplus, value=gamma), out=grad_x)
        ctx.save_for_backward(grad, *index)
        ctx.dtype = logits.dtype
        return loss, logits[index].to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, grad_picked):
        grad, *index = ctx.saved_tensors
        grad = (grad * grad_loss).index_put_(tuple(index), grad_picked, accumulate=True)
        return grad.to(ctx.dtype), None, None, *(None for _ in index)
