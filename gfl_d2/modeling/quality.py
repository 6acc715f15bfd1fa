"""How the quality of localization enters the score: the choices of ``MODEL.GFL.QUALITY``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from .fused_qfl import NO_LOSS_LOGIT, quality_focal_loss_sum
from .precision import full_precision

if TYPE_CHECKING:
    from .box_representation import BoxRepresentation
    from .criterion import Predictions, Targets

__all__ = [
    "DistributionGuidedQuality",
    "DistributionGuidedQualityPredictor",
    "JointQuality",
    "NoQuality",
    "Quality",
    "QualityBranch",
    "QualityGuided",
    "build_quality",
    "centerness",
    "joint_logits",
]


def joint_logits(logits: Tensor, quality: Tensor) -> Tensor:
    """
    The logit of a product of two probabilities: z with
    ``sigmoid(z) = sigmoid(logits) * sigmoid(quality)``, that is
    ``z = -log(exp(-quality) + exp(-logits) + exp(-quality - logits))``. No probability is formed,
    so none is rounded to 0 or 1. Computed in float32 or better.

    Args:
        logits, quality: broadcastable.
    """
    logits, quality = full_precision(logits), full_precision(quality)
    return -torch.logaddexp(-quality, F.softplus(-quality) - logits)


def centerness(distances: Tensor) -> Tensor:
    """
    How central a location is in a box (FCOS, Tian et al., ICCV 2019, eq. 3).

    Args:
        distances: shape (..., 4), to the left, top, right and bottom side.

    Returns:
        Tensor: shape (...), in [0, 1]: 1 in the centre, 0 on the border and outside.
    """
    distances = distances.clamp(min=0)
    near = torch.minimum(distances[..., :2], distances[..., 2:])
    far = torch.maximum(distances[..., :2], distances[..., 2:])
    return (near / far.clamp(min=torch.finfo(far.dtype).tiny)).prod(dim=-1).sqrt()


def _centerness(targets: Targets) -> Tensor:
    return centerness(targets.gt_distances)


def _iou(targets: Targets) -> Tensor:
    return targets.iou


class Quality(ABC):
    """
    What a score stands for beside the class, and how it is trained.

    Shapes: N images, C classes, P positive locations.
    """

    def build_predictor(self, channels: int, box: BoxRepresentation) -> nn.Module | None:
        """
        Args:
            channels: of the box tower.
            box: what the head predicts of a box.

        Returns:
            what predicts a quality logit, shape (N, 1, H, W), from the output of the box tower,
            shape (N, channels, H, W), and the box predictions, shape (N, 4 * V, H, W). None (the
            default) if nothing is predicted beside classes and boxes.
        """
        return None

    def score_logits(self, logits: Tensor, quality: Tensor | None) -> Tensor:
        """
        Logits of the scores that detections have.

        Args:
            logits: shape (N, C, ...), class logits.
            quality: shape (N, 1, ...), quality logits, if there is a predictor.

        Returns:
            Tensor: shape (N, C, ...), of the class scores, times the quality if it is predicted.
        """
        return logits if quality is None else joint_logits(logits, quality)

    @abstractmethod
    def losses(
        self, predictions: Predictions, targets: Targets
    ) -> tuple[dict[str, Tensor], Tensor]:
        """
        Args:
            predictions: of the head.
            targets: what they are compared with.

        Returns:
            losses (dict[str, Tensor]): weighted sums over all valid locations.
            weights (Tensor): shape (P,), of the positives in the box losses. No gradient. What they
            are where :attr:`Targets.is_real` is False does not matter.
        """


@dataclass(frozen=True)
class JointQuality(Quality):
    """
    One score for both, trained with Quality Focal Loss to be the IoU of the predicted box. The
    weight of a positive is its best score (GFL).
    """

    beta: float = 2.0
    weight: float = 1.0

    def losses(self, predictions, targets):
        return self._losses(predictions.logits, targets)

    def _losses(self, logits: list[Tensor], targets: Targets) -> tuple[dict[str, Tensor], Tensor]:
        loss = quality_focal_loss_sum(
            logits,
            targets.positives,
            targets.labels,
            targets.iou,
            self.beta,
            targets.valid_sizes,
        )
        best = targets.take([maps.detach() for maps in logits]).amax(dim=1)
        return {"loss_qfl": self.weight * loss}, full_precision(best).sigmoid()


@dataclass(frozen=True)
class DistributionGuidedQuality(JointQuality):
    """
    The score is the class score times a quality predicted from the shape of the box distributions,
    trained as one (GFLv2, Li et al., CVPR 2021).
    """

    topk: int = 4
    channels: int = 64

    def build_predictor(self, channels, box):
        return DistributionGuidedQualityPredictor(box.num_values, self.topk, self.channels)

    def losses(self, predictions, targets):
        # An infinite logit in the padding would make the gradient of the product NaN there.
        logits, quality = (
            targets.without_padding(x, 0) for x in (predictions.logits, predictions.quality)
        )
        return self._losses(list(map(self.score_logits, logits, quality)), targets)


class DistributionGuidedQualityPredictor(nn.Sequential):
    """
    The DGQP of GFLv2: from the ``topk`` largest probabilities of each side's distribution and
    their mean, by two 1x1 convolutions, to a logit.
    """

    def __init__(self, num_bins: int, topk: int = 4, channels: int = 64):
        """
        Args:
            num_bins: n + 1, of each distribution.
            topk: in [1, num_bins].
            channels: between the two convolutions.
        """
        super().__init__(
            nn.Conv2d(4 * (topk + 1), channels, kernel_size=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, 1, kernel_size=1),
        )
        self.num_bins = num_bins
        self.topk = topk

    def forward(self, features: Tensor, distributions: Tensor) -> Tensor:
        """
        Args:
            features: not used.
            distributions: shape (N, 4 * (n + 1), H, W), logits.

        Returns:
            Tensor: shape (N, 1, H, W), logits of the quality.
        """
        return super().forward(self.statistics(distributions).to(self[0].weight))

    def statistics(self, distributions: Tensor) -> Tensor:
        """Shape (N, 4 * (topk + 1), H, W): of each side the largest, descending, and their mean."""
        probs = full_precision(distributions).unflatten(1, (4, self.num_bins)).softmax(dim=2)
        largest = probs.topk(self.topk, dim=2).values
        return torch.cat((largest, largest.mean(dim=2, keepdim=True)), dim=2).flatten(1, 2)


@dataclass(frozen=True)
class NoQuality(Quality):
    """The score of a class alone, trained with focal loss. All positives weigh the same."""

    alpha: float = 0.25
    gamma: float = 2.0
    weight: float = 1.0

    def losses(self, predictions, targets):
        background = self._background_loss(predictions.logits, targets)
        positives = self._positive_losses(predictions.logits, targets)
        loss = background + targets.mask(positives).sum()
        return {"loss_cls": self.weight * loss}, torch.ones_like(targets.iou)

    def _background_loss(self, logits: list[Tensor], targets: Targets) -> Tensor:
        """Sum over all valid locations but the positives."""
        total = sum(
            self._focal_loss(maps).sum() for maps in targets.without_padding(logits, NO_LOSS_LOGIT)
        )
        return total - targets.mask(self._focal_loss(targets.take(logits)).sum(dim=1)).sum()

    def _positive_losses(self, logits: list[Tensor], targets: Targets) -> Tensor:
        """Shape (P,), summed over classes."""
        logits = targets.take(logits)
        return self._focal_loss(logits, F.one_hot(targets.labels, logits.shape[1])).sum(dim=1)

    def _focal_loss(self, logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Of each logit; the target is 0 by default."""
        target = torch.zeros_like(logits) if target is None else target.to(logits)
        return sigmoid_focal_loss(logits, target, alpha=self.alpha, gamma=self.gamma)


@dataclass(frozen=True)
class QualityBranch(NoQuality):
    """
    A branch beside the box predictor, trained on the positives alone to predict their centerness
    or IoU, which multiplies the class score at inference. What it is to predict weighs the box
    losses (FCOS, ATSS; Jiang et al., ECCV 2018).
    """

    name: str = "centerness"  # of the loss
    target: Callable[[Targets], Tensor] = _centerness
    quality_weight: float = 1.0

    def build_predictor(self, channels, box):
        return _BranchPredictor(channels, 1, kernel_size=3, padding=1)

    def losses(self, predictions, targets):
        losses, _ = super().losses(predictions, targets)
        target = self.target(targets)
        predicted = full_precision(targets.take(predictions.quality)[:, 0])
        loss = F.binary_cross_entropy_with_logits(predicted, target, reduction="none")
        loss = targets.mask(loss).sum()
        return {**losses, f"loss_{self.name}": self.quality_weight * loss}, target


class _BranchPredictor(nn.Conv2d):
    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        return super().forward(features)


@dataclass(frozen=True)
class QualityGuided(NoQuality):
    """
    No prediction of the quality: the centerness or IoU of a positive weighs its classification
    loss, so that well-localized positives score higher. Weights are ``quality^eta``, scaled to
    leave the positives' total loss as it is (Wu et al., "IoU-balanced Loss Functions for
    Single-stage Object Detection", eq. 1 and 2).
    """

    target: Callable[[Targets], Tensor] = _centerness
    eta: float = 1.5

    def losses(self, predictions, targets):
        background = self._background_loss(predictions.logits, targets)
        positives = targets.mask(self._positive_losses(predictions.logits, targets))
        weights = targets.mask(self.target(targets).pow(self.eta))
        total, weighted = positives.detach().sum(), (weights * positives.detach()).sum()
        weights = weights * total / weighted.clamp(min=torch.finfo(weighted.dtype).tiny)
        loss = background + (weights * positives).sum()
        return {"loss_cls": self.weight * loss}, torch.ones_like(targets.iou)


def build_quality(cfg: CfgNode) -> Quality:
    """The choice of ``MODEL.GFL.QUALITY``, whose keys are in :mod:`gfl_d2.config`."""
    gfl = cfg.MODEL.GFL
    qfl = {"beta": gfl.QFL_BETA, "weight": gfl.LOSS_QFL_WEIGHT}
    focal = {
        "alpha": gfl.FOCAL_LOSS_ALPHA,
        "gamma": gfl.FOCAL_LOSS_GAMMA,
        "weight": gfl.LOSS_CLS_WEIGHT,
    }
    branch = {**focal, "quality_weight": gfl.LOSS_QUALITY_WEIGHT}
    build = {
        "joint": lambda: JointQuality(**qfl),
        "dgqp": lambda: DistributionGuidedQuality(
            **qfl, topk=gfl.DGQP_TOPK, channels=gfl.DGQP_CHANNELS
        ),
        "none": lambda: NoQuality(**focal),
        "centerness": lambda: QualityBranch(**branch, name="centerness", target=_centerness),
        "iou": lambda: QualityBranch(**branch, name="iou", target=_iou),
        "centerness_guided": lambda: QualityGuided(**focal, target=_centerness),
        "iou_guided": lambda: QualityGuided(**focal, target=_iou),
    }
    return build[gfl.QUALITY]()
