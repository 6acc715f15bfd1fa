"""What a student learns from its teacher: the choices of ``MODEL.GFL.DISTILL.TERMS``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor
from torchvision.ops import box_iou, distance_box_iou

from ..errors import InputError
from ..registry import ASSIGNER_REGISTRY, DISTILLATION_REGISTRY
from .box_ops import distance_to_bbox
from .box_representation import BoxRepresentation
from .distributed import all_reduce_mean
from .losses import distillation_loss, giou_loss
from .precision import full_precision
from .structures import Levels, Predictions, Samples, flatten_map

__all__ = [
    "BridgingCrossTask", "ClassDistillation", "Comparison", "DistillationTerm",
    "LocalizationDistillation", "ValuableRegionDistillation", "build_distillation",
]  # fmt: skip

# Images of a process in the reference implementation of LD, whose terms are sums over a process.
_REFERENCE_IMAGES = 2
# The valuable region of a box starts at this fraction of its ATSS threshold.
_REGION_START = 0.25
_NO_THRESHOLDS = (
    "MODEL.GFL.DISTILL.TERMS 'ld_vlr' needs the thresholds of ATSS, which this MODEL.GFL.ASSIGNER "
    "does not give: use 'atss', or leave the term out"
)
# Lower bound of a mean number of positives, which is 0 only where the loss is.
_MIN_POSITIVES = 1e-6


class Comparison(NamedTuple):
    """
    A student's predictions beside its teacher's. The class logits of both are those of the scores
    that detections have.

    Shapes: N images, L levels, C classes, P samples.
    """

    student: Predictions
    teacher: Predictions  # no term has a gradient there
    levels: Levels
    samples: Samples  # of the student
    weights: Tensor  # (P,), of the samples in the box losses, 0 for what is not positive
    num_pos: Tensor  # scalar, the number of positives, as a mean over the processes
    box: BoxRepresentation

    @property
    def image_factor(self) -> float:
        """
        Scales a sum over the images of this process to as many images as the reference
        implementation had. So a term weighs as much on any number of processes.
        """
        return _REFERENCE_IMAGES / len(self.student.class_logits[0])


class DistillationTerm(ABC):
    """
    A loss of a student against its teacher. To add one, derive from it and register the class under
    the name that configs shall use.
    """

    @classmethod
    @abstractmethod
    def from_config(cls, cfg: CfgNode) -> DistillationTerm:
        """From the keys of ``MODEL.GFL.DISTILL``, see :mod:`gfl_d2.config`."""

    @abstractmethod
    def losses(self, comparison: Comparison) -> dict[str, Tensor]:
        """
        Returns:
            dict[str, Tensor]: weighted scalars by name, each connected to what it compares, also
            where nothing is positive.
        """


@DISTILLATION_REGISTRY.register("ld")
@dataclass(frozen=True)
class LocalizationDistillation(DistillationTerm):
    """
    Main part of Localization Distillation (LD, Zheng et al., CVPR 2022): the distributions of the
    positives' sides, weighted as in the box losses. A sum over the positives, which the reference
    implementation does not divide by the sum of the weights.
    """

    weight: float = 0.25
    temperature: float = 10.0

    @classmethod
    def from_config(cls, cfg):
        _require_distributions(cfg, "ld")
        distill = cfg.MODEL.GFL.DISTILL
        return cls(distill.LD_WEIGHT, distill.LD_TEMPERATURE)

    def losses(self, comparison):
        samples, teacher = comparison.samples, comparison.teacher.box_values
        teacher = samples.matches.take(teacher).flatten(0, 2)
        teacher = torch.where(samples.is_positive[:, None], teacher, 0)
        loss = self._loss_of_sides(samples.box_values, teacher, comparison.box)
        return {"loss_ld": self._scale(comparison) * (comparison.weights * loss).sum()}

    def _scale(self, comparison: Comparison) -> float:
        return self.weight * comparison.image_factor

    def _loss_of_sides(self, values: Tensor, teacher: Tensor, box: BoxRepresentation) -> Tensor:
        """Of box values of shape (R, 4 * V) to (R,), the mean over the four sides."""
        values, teacher = (x.reshape(-1, box.num_values) for x in (values, teacher))
        return distillation_loss(values, teacher, self.temperature).view(-1, 4).mean(dim=1)


@DISTILLATION_REGISTRY.register("ld_vlr")
class ValuableRegionDistillation(LocalizationDistillation):
    """
    LD in the valuable localization region (VLR): the distributions where nothing may be positive,
    but a box is near. With t the ATSS threshold of a box, that is where
    ``t / 4 <= DIoU(anchor, box) < t``, inside the box or not. A location weighs as much as the
    largest IoU of its anchor with such a box. The sum over sides is divided by 16, in LD by 4.
    """

    @classmethod
    def from_config(cls, cfg):
        _require_distributions(cfg, "ld_vlr")
        assigner = ASSIGNER_REGISTRY.get(cfg.MODEL.GFL.ASSIGNER)
        if not getattr(assigner, "gives_thresholds", False):
            raise InputError(_NO_THRESHOLDS)
        distill = cfg.MODEL.GFL.DISTILL
        return cls(distill.VLR_WEIGHT, distill.LD_TEMPERATURE)

    def losses(self, comparison):
        total = 0
        for i in range(len(comparison.levels.shapes)):
            weights = self.region(comparison.levels, comparison.samples, i)
            is_inside = (weights > 0)[:, None]
            student, teacher = (
                torch.where(is_inside, flatten_map(predictions.box_values[i]), 0)
                for predictions in (comparison.student, comparison.teacher)
            )
            loss = self._loss_of_sides(student, teacher, comparison.box)
            total = total + (weights * loss).sum()
        return {"loss_ld_vlr": self._scale(comparison) * total / 4}

    @torch.no_grad()
    def region(self, levels: Levels, samples: Samples, level: int) -> Tensor:
        """
        The weights of a level's locations, shape (N * Hi * Wi,), 0 outside of the region.

        Raises:
            InputError: the assigner gives no thresholds.
        """
        gt, threshold = samples.gt, samples.matches.iou_threshold
        if threshold is None:
            raise InputError(_NO_THRESHOLDS)
        anchors = levels.anchors(level)
        diou = distance_box_iou(gt.boxes, anchors)  # (M, Hi * Wi)
        is_valuable = (diou >= _REGION_START * threshold[:, None]) & (diou < threshold[:, None])
        iou = torch.where(is_valuable, box_iou(gt.boxes, anchors), 0)
        largest = iou.new_zeros(len(levels.valid_sizes), len(anchors))
        largest.scatter_reduce_(0, gt.image[:, None].expand_as(iou), iou, "amax")
        return torch.where(levels.valid_mask(level).flatten(1), largest, 0).flatten()


@DISTILLATION_REGISTRY.register("kd")
@dataclass(frozen=True)
class ClassDistillation(DistillationTerm):
    """
    Distillation of the positives' classes, as LD adds it: softmax over the C logits, on each level
    divided by its number of positives.
    """

    weight: float = 10.0
    temperature: float = 2.0

    @classmethod
    def from_config(cls, cfg):
        if cfg.MODEL.GFL.NUM_CLASSES == 1:
            raise InputError(
                "MODEL.GFL.DISTILL.TERMS 'kd' learns which class it is, of at least two, and "
                "MODEL.GFL.NUM_CLASSES is 1: leave the term out"
            )
        return cls(cfg.MODEL.GFL.DISTILL.KD_WEIGHT, cfg.MODEL.GFL.DISTILL.KD_TEMPERATURE)

    def losses(self, comparison):
        matches = comparison.samples.matches
        student, teacher = (
            torch.where(matches.is_positive[..., None], matches.take(predictions.class_logits), 0)
            for predictions in (comparison.student, comparison.teacher)
        )
        loss = distillation_loss(student, teacher, self.temperature).sum(dim=(0, 2))  # (L,)
        num_pos = all_reduce_mean(matches.is_positive.sum(dim=(0, 2)).to(loss))
        return {"loss_kd": self.weight * (loss / num_pos.clamp(min=_MIN_POSITIVES)).sum()}


@DISTILLATION_REGISTRY.register("bckd")
@dataclass(frozen=True)
class BridgingCrossTask(DistillationTerm):
    """
    BCKD (Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object
    Detection", ICCV 2023), over all locations that are not padding, divided by the number of
    positives.

    - Classes are as many binary ones: QFL with beta = 1 whose targets are the teacher's scores.
    - Boxes: GIoU loss against the teacher's box. A location weighs as much as the largest
      difference of its scores, which has no gradient here.
    """

    class_weight: float = 1.0
    box_weight: float = 4.0

    @classmethod
    def from_config(cls, cfg):
        return cls(cfg.MODEL.GFL.DISTILL.BCKD_CLS_WEIGHT, cfg.MODEL.GFL.DISTILL.BCKD_BOX_WEIGHT)

    def losses(self, comparison):
        class_loss = box_loss = 0
        for i in range(len(comparison.levels.shapes)):
            # With 0 for both, the padding has neither loss nor gradient.
            valid = comparison.levels.valid_mask(i)
            (logits, values), (teacher_logits, teacher_values) = (
                [full_precision(flatten_map(torch.where(valid, x[i], 0))) for x in predictions[:2]]
                for predictions in (comparison.student, comparison.teacher)
            )
            target = teacher_logits.detach().sigmoid()
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            difference = (target - logits.sigmoid()).abs()
            class_loss = class_loss + (difference * loss).sum()

            center = values.new_zeros(2)  # the loss is the same anywhere
            boxes, teacher_boxes = (
                distance_to_bbox(center, comparison.box.decode(x))
                for x in (values, teacher_values.detach())
            )
            weights = difference.detach().amax(dim=1)
            box_loss = box_loss + (weights * giou_loss(boxes, teacher_boxes)).sum()
        return {
            "loss_bckd_cls": self.class_weight * class_loss / comparison.num_pos,
            "loss_bckd_box": self.box_weight * box_loss / comparison.num_pos,
        }


def build_distillation(cfg: CfgNode) -> list[DistillationTerm]:
    """The choices of ``MODEL.GFL.DISTILL.TERMS``."""
    return [
        DISTILLATION_REGISTRY.get(name).from_config(cfg) for name in cfg.MODEL.GFL.DISTILL.TERMS
    ]


def _require_distributions(cfg: CfgNode, term: str) -> None:
    name = cfg.MODEL.GFL.BOX_REPRESENTATION
    if name != "general":
        raise InputError(
            "MODEL.GFL.BOX_REPRESENTATION must be 'general' when MODEL.GFL.DISTILL.TERMS has "
            f"{term!r}, got {name!r}"
        )
