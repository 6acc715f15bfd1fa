"""What the head predicts of a box: the choices of ``MODEL.GFL.BOX_REPRESENTATION``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..registry import BOX_REPRESENTATION_REGISTRY
from .box_ops import integral
from .losses import distribution_focal_loss, gaussian_kl_loss
from .precision import full_precision

__all__ = [
    "BoxRepresentation", "DiracDelta", "Gaussian", "GeneralDistribution", "build_box_representation"
]  # fmt: skip

# How far DFL targets stay below the last bin, in bins, as in the reference implementation.
_DFL_TARGET_MARGIN = 0.1
# Largest factor between a predicted distance and the prior's, as in Detectron2's Box2BoxTransform.
_MAX_LOG_FACTOR = math.log(1000 / 16)
# Bounds of a predicted log variance. Beyond them lie exponentials that overflow in training.
_MAX_LOG_VARIANCE = 10.0


class BoxRepresentation(ABC):
    """
    How the head predicts the distances from a location to the left, top, right and bottom side of
    a box: by V numbers a side, those of left first. Distances are in strides of the level. To add a
    choice, derive from it and register the class under the name that configs shall use.
    """

    num_values: int  # V
    max_distance: float  # the largest that can be predicted
    has_uncertainty: ClassVar[bool] = False  # whether there is an `uncertainty`

    @classmethod
    @abstractmethod
    def from_config(cls, cfg: CfgNode) -> BoxRepresentation:
        """From the keys of ``MODEL.GFL``, see :mod:`gfl_d2.config`."""

    @abstractmethod
    def decode(self, values: Tensor) -> Tensor:
        """Distances >= 0, shape (..., 4), in float32 or better, of values of shape (..., 4 * V)."""

    def uncertainty(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """
        Standard deviation, in strides, and entropy, in nats, of the predicted distances: shape
        (..., 4) each, in float32 or better, of values of shape (..., 4 * V).
        """
        raise NotImplementedError(f"{type(self).__name__} predicts no distribution")

    def losses(self, values: Tensor, target: Tensor) -> dict[str, Tensor]:
        """
        The losses that shape the prediction, beside that of the decoded box. None by default.

        Args:
            values: shape (P, 4 * V), of P samples.
            target: shape (P, 4), distances.

        Returns:
            dict[str, Tensor]: of shape (P,), means over the four sides, weighted.
        """
        return {}


@BOX_REPRESENTATION_REGISTRY.register("general")
@dataclass(frozen=True)
class GeneralDistribution(BoxRepresentation):
    """
    The n + 1 logits of a distribution over the distances y_i = i * ``bin_width``, whose mean is
    the prediction, trained with Distribution Focal Loss (GFL paper, section 3).
    """

    reg_max: int = 16  # n
    bin_width: float = 1.0  # in strides
    dfl_weight: float = 0.25  # 0 for no DFL

    has_uncertainty: ClassVar[bool] = True

    @classmethod
    def from_config(cls, cfg):
        gfl = cfg.MODEL.GFL
        return cls(gfl.REG_MAX, gfl.BIN_WIDTH, gfl.LOSS_DFL_WEIGHT)

    @property
    def num_values(self) -> int:
        return self.reg_max + 1

    @property
    def max_distance(self) -> float:
        return self.reg_max * self.bin_width

    def decode(self, values: Tensor) -> Tensor:
        return integral(values, self.reg_max) * self.bin_width

    def uncertainty(self, values: Tensor) -> tuple[Tensor, Tensor]:
        probs = full_precision(values).unflatten(-1, (4, self.num_values)).softmax(dim=-1)
        bins = torch.arange(self.num_values, dtype=probs.dtype, device=probs.device)
        mean = (probs * bins).sum(dim=-1, keepdim=True)
        variance = (probs * (bins - mean).square()).sum(dim=-1)
        return variance.sqrt() * self.bin_width, torch.special.entr(probs).sum(dim=-1)

    def losses(self, values: Tensor, target: Tensor) -> dict[str, Tensor]:
        target = (target / self.bin_width).clamp(min=0, max=self.reg_max - _DFL_TARGET_MARGIN)
        loss = distribution_focal_loss(values.reshape(-1, self.num_values), target.flatten())
        return {"loss_dfl": self.dfl_weight * loss.view(-1, 4).mean(dim=1)}


@BOX_REPRESENTATION_REGISTRY.register("dirac")
@dataclass(frozen=True)
class DiracDelta(BoxRepresentation):
    """
    One number a side, the logarithm of its distance relative to a prior, that of the anchor: a
    Dirac delta distribution, as FCOS, ATSS and most others have it.
    """

    prior: float = 4.0  # in strides

    num_values: ClassVar[int] = 1

    @classmethod
    def from_config(cls, cfg):
        return cls(prior=cfg.MODEL.GFL.ANCHOR_SCALE / 2)  # half an anchor

    @property
    def max_distance(self) -> float:
        return self.prior * math.exp(_MAX_LOG_FACTOR)

    def decode(self, values: Tensor) -> Tensor:
        return self.prior * full_precision(values).clamp(max=_MAX_LOG_FACTOR).exp()


@BOX_REPRESENTATION_REGISTRY.register("gaussian")
@dataclass(frozen=True)
class Gaussian(DiracDelta):
    """
    Mean and variance of a Gaussian: the mean as :class:`DiracDelta` has it, then the logarithm of
    the variance (in strides squared), trained with the KL loss of He et al., CVPR 2019.
    """

    kl_weight: float = 0.25

    num_values: ClassVar[int] = 2
    has_uncertainty: ClassVar[bool] = True

    @classmethod
    def from_config(cls, cfg):
        return cls(cfg.MODEL.GFL.ANCHOR_SCALE / 2, cfg.MODEL.GFL.LOSS_KL_WEIGHT)

    def decode(self, values: Tensor) -> Tensor:
        return super().decode(values.unflatten(-1, (4, 2))[..., 0])

    def losses(self, values: Tensor, target: Tensor) -> dict[str, Tensor]:
        loss = gaussian_kl_loss(self.decode(values), self._log_variance(values), target)
        return {"loss_kl": self.kl_weight * loss.mean(dim=1)}

    def uncertainty(self, values: Tensor) -> tuple[Tensor, Tensor]:
        log_variance = self._log_variance(values)
        return (log_variance / 2).exp(), (log_variance + math.log(2 * math.pi * math.e)) / 2

    def _log_variance(self, values: Tensor) -> Tensor:
        log_variance = full_precision(values).unflatten(-1, (4, 2))[..., 1]
        return log_variance.clamp(-_MAX_LOG_VARIANCE, _MAX_LOG_VARIANCE)


def build_box_representation(cfg: CfgNode) -> BoxRepresentation:
    """The choice of ``MODEL.GFL.BOX_REPRESENTATION``."""
    name = cfg.MODEL.GFL.BOX_REPRESENTATION
    return BOX_REPRESENTATION_REGISTRY.get(name).from_config(cfg)
