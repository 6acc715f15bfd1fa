"""
Other losses for a score that stands for class and IoU: choices of ``MODEL.GFL.QUALITY`` that differ
from GFL's in what a positive's score learns, and how fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from ..registry import QUALITY_REGISTRY
from .quality import JointQuality

__all__ = ["MatchabilityAwareQuality", "VarifocalQuality"]


@QUALITY_REGISTRY.register("vfl")
@dataclass(frozen=True)
class VarifocalQuality(JointQuality):
    """
    One score for both, trained with Varifocal Loss (Zhang et al., VarifocalNet, CVPR 2021, eq. 2):
    ``q * BCE(p, q)`` at positives of IoU q, ``alpha * p^gamma * BCE(p, 0)`` elsewhere.
    """

    loss_name = "loss_vfl"
    beta: float = 2.0  # the paper's gamma
    alpha: float = 0.75

    @property
    def negative_weight(self) -> float:
        return self.alpha

    @classmethod
    def from_config(cls, cfg):
        gfl = cfg.MODEL.GFL
        return cls(beta=gfl.VFL_GAMMA, weight=gfl.LOSS_CLS_WEIGHT, alpha=gfl.VFL_ALPHA)

    def positive_loss(self, logits, quality):
        loss = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
        return quality * loss


@QUALITY_REGISTRY.register("mal")
@dataclass(frozen=True)
class MatchabilityAwareQuality(JointQuality):
    """
    One score for both, trained with Matchability-Aware Loss (Huang et al., DEIM, CVPR 2025, eq. 3):
    ``BCE(p, q^gamma)`` at positives of IoU q, ``p^gamma * BCE(p, 0)`` elsewhere.
    """

    loss_name = "loss_mal"
    beta: float = 1.5  # the paper's gamma

    @classmethod
    def from_config(cls, cfg):
        return cls(beta=cfg.MODEL.GFL.MAL_GAMMA, weight=cfg.MODEL.GFL.LOSS_CLS_WEIGHT)

    def positive_loss(self, logits, quality):
        target = quality.pow(self.beta)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
