"""
How the quality of localization enters the score: GFL's and GFLv2's choices of
``MODEL.GFL.QUALITY``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..errors import InputError
from ..registry import QUALITY_REGISTRY
from .background_loss import background_loss, background_terms
from .box_representation import BoxRepresentation
from .losses import quality_focal_loss
from .precision import full_precision
from .structures import Levels, Predictions, Samples, flatten_map, take_places

__all__ = [
    "DistributionGuidedQuality",
    "DistributionGuidedQualityPredictor",
    "JointQuality",
    "Quality",
    "build_quality",
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


class Quality(ABC):
    """
    What a score stands for beside the class, and how it is trained. To add a choice, derive from
    it and register the class under the name that configs shall use.

    Shapes: N images, C classes, P samples.
    """

    # Exponent of the modulating factor of the loss at the background.
    gamma: float

    # Whether :meth:`losses` of the parts of a batch add up to those of the batch.
    adds_up: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def from_config(cls, cfg: CfgNode) -> Quality:
        """From the keys of ``MODEL.GFL``, see :mod:`gfl_d2.config`."""

    def build_predictor(self, channels: int, box: BoxRepresentation) -> nn.Module | None:
        """
        Args:
            channels: of the box tower.
            box: what the head predicts of a box.

        Returns:
            a module that predicts quality logits, shape (N, 1, H, W), from the output of the box
            tower, shape (N, channels, H, W), and the box values, shape (N, 4 * V, H, W). None (the
            default) if nothing is predicted beside classes and boxes.
        """
        return None

    def score_logits(self, class_logits: Tensor, quality_logits: Tensor | None) -> Tensor:
        """
        Logits of the scores that detections have. They increase with the class logit, so that the
        best class of a location has the best score.

        Args:
            class_logits, quality_logits: broadcastable. The latter is None without a predictor.

        Returns:
            Tensor: of the class scores, times the quality if it is predicted.
        """
        if quality_logits is None:
            return class_logits
        return joint_logits(class_logits, quality_logits)

    def score_maps(self, predictions: Predictions, levels: Levels) -> list[Tensor]:
        """:meth:`score_logits` of whole maps: L times shape (N, C, Hi, Wi), to train with."""
        if predictions.quality_logits is None:
            return list(predictions.class_logits)
        maps = []
        for i, logits in enumerate(zip(predictions.class_logits, predictions.quality_logits)):
            # An infinite logit in the padding would make the gradient of the product NaN there.
            valid = levels.valid_mask(i)
            maps.append(self.score_logits(*(torch.where(valid, x, 0) for x in logits)))
        return maps

    @abstractmethod
    def losses(
        self, predictions: Predictions, levels: Levels, samples: Samples
    ) -> dict[str, Tensor]:
        """
        Args:
            predictions: of the head.
            levels: where the locations are, and which of them are padding.
            samples: what the predictions are compared with.

        Returns:
            dict[str, Tensor]: weighted sums over all locations that are not padding. Positives
            count by their weights, see :meth:`Samples.weigh`.
        """

    @abstractmethod
    def box_weights(self, predictions: Predictions, samples: Samples) -> Tensor:
        """
        Args:
            predictions, samples: as in :meth:`losses`.

        Returns:
            Tensor: shape (P,), weights of the samples in the box losses. No gradient. Those of
            samples that are not positive do not matter.
        """

    def split_loss(
        self, logits: list[Tensor], levels: Levels, samples: Samples
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        The loss of a map is that of a background everywhere, but for one logit of each positive.

        Args:
            logits: L maps of shape (N, C, Hi, Wi).

        Returns:
            background (Tensor): a scalar, the loss of the whole map as background.
            picked (Tensor): shape (P,), the logit of each positive's class.
            excess (Tensor): shape (P,), the part of ``background`` that is at these logits.
        """
        classes = samples.classes.view_as(samples.matches.row)
        total, picked = 0, []
        for i, maps in enumerate(logits):
            index = samples.matches.places(i, maps.shape), classes[:, i]
            valid = levels.valid_mask(i).flatten()
            weights = samples.matches.weight_map(i, maps.shape)
            loss, at = background_loss(flatten_map(maps), valid, index, self.gamma, weights)
            total, picked = total + loss, [*picked, at]
        picked = samples.mask(torch.stack(picked, dim=1).flatten())
        return total, picked, samples.weigh(background_terms(picked, self.gamma))


@QUALITY_REGISTRY.register("joint")
@dataclass(frozen=True)
class JointQuality(Quality):
    """
    One score for both, trained with Quality Focal Loss to be the IoU of the predicted box. The
    weight of a positive is its best score (GFL).
    """

    beta: float = 2.0
    weight: float = 1.0
    loss_name: ClassVar[str] = "loss_qfl"
    negative_weight: ClassVar[float] = 1.0

    @property
    def gamma(self) -> float:
        return self.beta

    @classmethod
    def from_config(cls, cfg):
        return cls(beta=cfg.MODEL.GFL.QFL_BETA, weight=cfg.MODEL.GFL.LOSS_QFL_WEIGHT)

    def losses(self, predictions, levels, samples):
        maps = self.score_maps(predictions, levels)
        background, picked, excess = self.split_loss(maps, levels, samples)
        positives = samples.weigh(self.positive_loss(picked, samples.iou.to(picked)))
        loss = self.negative_weight * (background - excess.sum()) + positives.sum()
        return {self.loss_name: self.weight * loss}

    def positive_loss(self, logits: Tensor, quality: Tensor) -> Tensor:
        """
        The loss of each positive's own class, shape (P,). All other logits have that of a
        background, times ``negative_weight``.

        Args:
            logits: shape (P,), in float32 or better.
            quality: shape (P,), IoU of the predicted with the ground-truth box.
        """
        labels = torch.zeros_like(logits, dtype=torch.int64)  # one column: the labelled class
        return quality_focal_loss(logits[:, None], labels, quality, self.beta)[:, 0]

    @torch.no_grad()
    def box_weights(self, predictions, samples):
        matches, best = samples.matches, []
        # Level by level, since all classes of all samples would be large.
        for i, maps in enumerate(predictions.class_logits):
            best.append(take_places(maps, matches.places(i, maps.shape)).amax(dim=-1))
        best = torch.stack(best, dim=1).flatten()
        return full_precision(self.score_logits(best, samples.quality_logits)).sigmoid()


@QUALITY_REGISTRY.register("dgqp")
@dataclass(frozen=True)
class DistributionGuidedQuality(JointQuality):
    """
    The score is the class score times a quality predicted from the shape of the box distributions,
    trained as one (GFLv2, Li et al., CVPR 2021).
    """

    topk: int = 4
    channels: int = 64

    @classmethod
    def from_config(cls, cfg):
        gfl = cfg.MODEL.GFL
        when = "when MODEL.GFL.QUALITY is 'dgqp'"
        if gfl.BOX_REPRESENTATION != "general":
            raise InputError(
                f"MODEL.GFL.BOX_REPRESENTATION must be 'general' {when}, got "
                f"{gfl.BOX_REPRESENTATION!r}"
            )
        if gfl.DGQP_TOPK > gfl.REG_MAX + 1:
            raise InputError(
                f"MODEL.GFL.DGQP_TOPK must be at most MODEL.GFL.REG_MAX + 1 {when}, got "
                f"{gfl.DGQP_TOPK}"
            )
        return cls(
            beta=gfl.QFL_BETA,
            weight=gfl.LOSS_QFL_WEIGHT,
            topk=gfl.DGQP_TOPK,
            channels=gfl.DGQP_CHANNELS,
        )

    def build_predictor(self, channels, box):
        return DistributionGuidedQualityPredictor(box.num_values, self.topk, self.channels)


class DistributionGuidedQualityPredictor(nn.Sequential):
    """
    The DGQP of GFLv2: from the ``topk`` largest probabilities of each side's distribution and
    their mean, by two 1x1 convolutions, to a logit.
    """

    def __init__(self, num_bins: int, topk: int, channels: int):
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


def build_quality(cfg: CfgNode) -> Quality:
    """The choice of ``MODEL.GFL.QUALITY``."""
    return QUALITY_REGISTRY.get(cfg.MODEL.GFL.QUALITY).from_config(cfg)
