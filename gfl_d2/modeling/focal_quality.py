"""
The choices of ``MODEL.GFL.QUALITY`` that train the class score with focal loss: what the paper's
ablations compare GFL with, ATSS among it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from ..registry import QUALITY_REGISTRY
from .background_loss import background_terms
from .box_ops import centerness
from .distributed import all_reduce_mean
from .precision import full_precision
from .quality import Quality
from .structures import Levels, Predictions, Samples

__all__ = ["CenternessBranch", "CenternessGuided", "IoUBranch", "IoUGuided", "NoQuality"]


@QUALITY_REGISTRY.register("none")
@dataclass(frozen=True)
class NoQuality(Quality):
    """The score of a class alone, trained with focal loss. All positives weigh the same."""

    alpha: float = 0.25  # negative for no weighting of positives against negatives
    gamma: float = 2.0
    weight: float = 1.0

    @classmethod
    def from_config(cls, cfg):
        gfl = cfg.MODEL.GFL
        return cls(gfl.FOCAL_LOSS_ALPHA, gfl.FOCAL_LOSS_GAMMA, gfl.LOSS_CLS_WEIGHT)

    @property
    def negative_weight(self) -> float:
        return 1 - self.alpha if self.alpha >= 0 else 1.0

    def losses(self, predictions, levels, samples):
        background, positives = self._focal_losses(predictions, levels, samples)
        return {"loss_cls": self.weight * (background + positives.sum())}

    def _focal_losses(
        self, predictions: Predictions, levels: Levels, samples: Samples
    ) -> tuple[Tensor, Tensor]:
        """
        Returns:
            background (Tensor): a scalar, the loss of everything else.
            positives (Tensor): shape (P,), the loss of each positive's own class.
        """
        whole, picked, excess = self.split_loss(predictions.class_logits, levels, samples)
        loss = sigmoid_focal_loss(
            picked, torch.ones_like(picked), alpha=self.alpha, gamma=self.gamma
        )
        return self.negative_weight * (whole - excess.sum()), samples.weigh(loss)

    def box_weights(self, predictions, samples):
        return torch.ones_like(samples.iou)


@dataclass(frozen=True)
class _QualityBranch(NoQuality):
    """
    A branch beside the box predictor, trained on the positives alone to predict their quality,
    which multiplies the class score at inference. What it is to predict weighs the box losses.
    """

    quality_weight: float = 1.0
    name: ClassVar[str]  # of the quality

    @classmethod
    def from_config(cls, cfg):
        weight = cfg.MODEL.GFL.LOSS_QUALITY_WEIGHT
        return replace(super().from_config(cfg), quality_weight=weight)

    def build_predictor(self, channels, box):
        return _BranchPredictor(channels, 1, kernel_size=3, padding=1)

    def losses(self, predictions, levels, samples):
        logits = full_precision(samples.quality_logits)
        target = self.box_weights(predictions, samples).to(logits)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return {
            **super().losses(predictions, levels, samples),
            f"loss_{self.name}": self.quality_weight * samples.weigh(loss).sum(),
        }


class _BranchPredictor(nn.Conv2d):
    def forward(self, features: Tensor, box_values: Tensor) -> Tensor:
        return super().forward(features)


@QUALITY_REGISTRY.register("centerness")
class CenternessBranch(_QualityBranch):
    """A branch for the centerness (FCOS, Tian et al., ICCV 2019; ATSS)."""

    name = "centerness"

    def box_weights(self, predictions, samples):
        return centerness(samples.gt_distances)


@QUALITY_REGISTRY.register("iou")
class IoUBranch(_QualityBranch):
    """A branch for the IoU of the predicted box (Jiang et al., ECCV 2018)."""

    name = "iou"

    def box_weights(self, predictions, samples):
        return samples.iou


class _QualityGuided(NoQuality):
    """
    No prediction of the quality: it weighs the classification loss of a positive, so that
    well-localized positives score higher. Weights are ``quality^1.5``, scaled to leave the
    positives' total loss over all processes as it is (Wu et al., "IoU-balanced Loss Functions for
    Single-stage Object Detection", eq. 1 and 2).
    """

    adds_up = False
    eta: ClassVar[float] = 1.5

    @abstractmethod
    def guide(self, samples: Samples) -> Tensor:
        """The quality, shape (P,), in [0, 1]. No gradient."""

    def losses(self, predictions, levels, samples):
        background, positives = self._focal_losses(predictions, levels, samples)
        # All classes of a positive are weighted, not the labelled one alone.
        logits = full_precision(samples.matches.take(predictions.class_logits)).flatten(0, 2)
        is_other = F.one_hot(samples.classes, logits.shape[1]) == 0
        others = (background_terms(logits, self.gamma) * is_other).sum(dim=1)
        others = self.negative_weight * samples.weigh(others)
        background, positives = background - others.sum(), positives + others

        weights = samples.mask(self.guide(samples).pow(self.eta))
        sums = torch.stack((positives.sum(), (weights * positives).sum()))
        total, weighted = all_reduce_mean(sums).unbind()
        weights = weights * total / weighted.clamp(min=torch.finfo(weighted.dtype).tiny)
        return {"loss_cls": self.weight * (background + (weights * positives).sum())}


@QUALITY_REGISTRY.register("centerness_guided")
class CenternessGuided(_QualityGuided):
    """Guided by the centerness."""

    def guide(self, samples):
        return centerness(samples.gt_distances)


@QUALITY_REGISTRY.register("iou_guided")
class IoUGuided(_QualityGuided):
    """Guided by the IoU of the predicted box."""

    def guide(self, samples):
        return samples.iou
