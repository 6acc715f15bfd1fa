"""
Losses of Generalized Focal Loss, as stateless functions.

Shapes: R locations, C classes, n + 1 bins. Shapes of results are those with the reduction "none";
"mean" and "sum" give a scalar, another is a ValueError. Half-precision inputs are computed in
float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .box_ops import MIN_AREA, box_area, iou_and_union
from .precision import full_precision

__all__ = [
    "distillation_loss", "distribution_focal_loss", "gaussian_kl_loss", "giou_loss", "iou_loss",
    "quality_focal_loss",
]  # fmt: skip

# IoUs below count as this: the largest IoU loss is -ln of it.
_MIN_IOU = 1e-6


def quality_focal_loss(
    logits: Tensor, labels: Tensor, quality: Tensor, beta: float = 2.0, reduction: str = "none"
) -> Tensor:
    """
    Quality Focal Loss, shape (R, C) (GFL paper, eq. 5): ``|y - sigma|^beta * BCE(sigma, y)`` for
    each class, sigma = sigmoid(logit), where y is the quality at the labelled class and 0 at every
    other. With qualities of 0 and 1 it is the focal loss with gamma = beta and no alpha.

    Args:
        logits: shape (R, C).
        labels: shape (R,), int64 in [0, C]; C is background.
        quality: shape (R,), in [0, 1]: IoU of the predicted with the ground-truth box. Not used
            where the label is background. No gradient flows to it.
        beta: exponent of the modulating factor, 0 or >= 1. The factor takes part in the gradient.
    """
    logits = full_precision(logits)
    num_locations, num_classes = logits.shape
    # The column of the background class takes what is not used.
    target = logits.new_zeros(num_locations, num_classes + 1)
    quality = quality.detach().to(logits)
    target = target.scatter_(1, labels[:, None], quality[:, None])[:, :num_classes]
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = (target - logits.sigmoid()).abs().pow(beta) * loss
    return _reduce(loss, reduction)


def distribution_focal_loss(logits: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
    """
    Distribution Focal Loss, shape (R,) (GFL paper, eq. 6): for y_i <= y <= y_{i+1},
    ``-((y_{i+1} - y) * log S_i + (y - y_i) * log S_{i+1})`` with S the softmax of the logits.

    Args:
        logits: shape (R, n + 1), one box side of a location each.
        target: shape (R,), continuous, in bins, in [0, n].
    """
    log_probs = F.log_softmax(full_precision(logits), dim=-1)
    target = target.to(log_probs)
    # A target of exactly n belongs to the last interval, [n - 1, n].
    left = target.floor().long().clamp(max=logits.shape[1] - 2)
    weight_right = target - left
    log_left, log_right = log_probs.gather(1, torch.stack((left, left + 1), dim=1)).unbind(dim=1)
    return _reduce(-((1 - weight_right) * log_left + weight_right * log_right), reduction)


def gaussian_kl_loss(
    mean: Tensor, log_variance: Tensor, target: Tensor, reduction: str = "none"
) -> Tensor:
    """
    Divergence of a predicted Gaussian from a target known exactly, up to a constant (He et al.,
    "Bounding Box Regression with Uncertainty", CVPR 2019, eq. 9 and 10): with d = |target - mean|
    and s = log variance, ``exp(-s) * d^2 / 2 + s / 2`` where d <= 1, and beyond, where a square
    would let few targets rule the gradient, ``exp(-s) * (d - 1/2) + s / 2``.

    Args:
        mean, log_variance, target: of one shape, that of the result, in any common unit.
    """
    mean, log_variance = full_precision(mean), full_precision(log_variance)
    error = F.smooth_l1_loss(mean, target.to(mean), reduction="none", beta=1.0)
    return _reduce((-log_variance).exp() * error + log_variance / 2, reduction)


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, reduction: str = "none"
) -> Tensor:
    """
    Divergence of a student's distribution from its teacher's, both softened by a temperature T
    (Hinton et al., 2015), shape (R,): ``T^2 * mean_i of KL(t_i || s_i)`` with t and s the softmax
    of the logits divided by T. The mean, not the sum, over the bins or classes is that of LD
    (Zheng et al., CVPR 2022).

    Args:
        logits, teacher_logits: shape (R, n + 1), or (R, C). No gradient flows to the teacher's.
        temperature: T > 0.
    """
    log_probs, teacher = (
        F.log_softmax(full_precision(x) / temperature, dim=-1)
        for x in (logits, teacher_logits.detach())
    )
    loss = F.kl_div(log_probs, teacher.to(log_probs), reduction="none", log_target=True)
    return _reduce(loss.mean(dim=-1) * temperature**2, reduction)


def giou_loss(boxes: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
    """
    1 - generalized IoU (Rezatofighi et al., CVPR 2019) of boxes paired by position, shape (R,), in
    [0, 2]. Unlike fvcore's, denominators have a floor instead of an added epsilon: identical boxes
    of any size have a loss of exactly 0.

    Args:
        boxes, target: shape (R, 4), XYXY in any common unit. The gradient flows to both.
    """
    boxes, target = full_precision(boxes), full_precision(target)
    iou, union = iou_and_union(boxes, target)
    left_top = torch.min(boxes[:, :2], target[:, :2])
    right_bottom = torch.max(boxes[:, 2:], target[:, 2:])
    enclosing = box_area(left_top, right_bottom).clamp(min=MIN_AREA)
    return _reduce(1 - (iou - (enclosing - union) / enclosing), reduction)


def iou_loss(boxes: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
    """
    -ln IoU (UnitBox, Yu et al., ACM Multimedia 2016) of boxes paired by position, shape (R,), in
    [0, 13.9]: there is no gradient for boxes with an IoU below 1e-6.

    Args:
        boxes, target: shape (R, 4), XYXY in any common unit. The gradient flows to both.
    """
    iou, _ = iou_and_union(full_precision(boxes), full_precision(target))
    return _reduce(-iou.clamp(min=_MIN_IOU).log(), reduction)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return loss if reduction == "none" else getattr(loss, reduction)()
