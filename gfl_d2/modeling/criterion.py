"""The training objective of GFL: what the head should have predicted, and the losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor

from .box_distribution import aligned_iou, bbox_to_distance, distance_to_bbox
from .box_representation import BoxRepresentation, GeneralDistribution
from .distributed import all_reduce_mean
from .losses import giou_loss
from .quality import JointQuality, Quality

__all__ = ["GFLCriterion", "Predictions", "Targets"]


class Predictions(NamedTuple):
    """
    What the head predicts for a batch.

    Shapes: N images, R locations over all levels, C classes, V numbers a box side.
    """

    logits: Tensor  # (N, R, C)
    boxes: Tensor  # (N, R, 4 * V)
    quality: Tensor | None = None  # (N, R, 1), logits


class Targets(NamedTuple):
    """
    What the predictions of a batch are compared with, see :meth:`GFLCriterion.targets`.

    Shapes: N images, R locations over all levels, P positive locations over all images, in the
    order of images, then locations. Boxes and distances are in strides of the level.
    """

    labels: Tensor  # (N, R), int64 in [0, C]; C is background
    valid: Tensor  # (N, R), bool
    image: Tensor  # (P,), int64 in [0, N)
    location: Tensor  # (P,), int64 in [0, R)
    predictions: Tensor  # (P, 4 * V), of the boxes
    boxes: Tensor  # (P, 4), predicted
    gt_boxes: Tensor  # (P, 4)
    gt_distances: Tensor  # (P, 4), to the sides of gt_boxes
    iou: Tensor  # (P,), of predicted and ground-truth box, no gradient

    def spread(self, values: Tensor, background: float = 0.0) -> Tensor:
        """Values of the positives, shape (P,), among all locations, shape (N, R)."""
        spread = values.new_full(self.labels.shape, background)
        spread[self.image, self.location] = values
        return spread


class GFLCriterion:
    """
    The loss of the scores over all valid locations, divided by the number of positives; GIoU loss
    and the losses of the box representation over the positives, weighted and divided by the sum of
    these weights. Both divisors are averaged over the processes.

    Shapes: N images, R locations over all levels.
    """

    def __init__(
        self,
        *,
        box: BoxRepresentation = GeneralDistribution(),
        quality: Quality = JointQuality(),
        bbox_weight: float = 2.0,
        box_normalizer_min: float = 1.0,
    ):
        """
        Args:
            box, quality: those of the head.
            bbox_weight: weight of the GIoU loss.
            box_normalizer_min: lower bound of the divisor of the box losses.
        """
        self.box = box
        self.quality = quality
        self.bbox_weight = bbox_weight
        self.box_normalizer_min = box_normalizer_min

    def __call__(
        self,
        predictions: Predictions,
        centers: Tensor,
        strides: Tensor,
        gt_instances: list[Instances],
        matched: Tensor,
        valid: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Args:
            predictions: of the head, in float32 or better.
            centers: shape (R, 2), x and y of the locations, in pixels.
            strides: shape (R,), of their levels, in pixels.
            gt_instances: N Instances with ``gt_boxes`` (pixels) and ``gt_classes``.
            matched: shape (N, R), int64, index of the ground-truth box of each location, or -1.
            valid: shape (N, R), bool. Other locations have no loss.

        Returns:
            losses (dict[str, Tensor]): weighted scalars: ``loss_bbox`` and those of ``quality`` and
            ``box``. They are finite, and connected to every prediction, also where there is no
            positive or no ground truth at all.
            diagnostics (dict[str, Tensor]): scalars that tell whether training goes well: positives
            per image, their mean IoU, and the fraction of their box sides farther away than can be
            predicted. If the last is not small, objects are too large for n strides.
        """
        targets = self.targets(predictions, centers, strides, gt_instances, matched, valid)
        # A mask picks the valid locations, rather than multiplies: an infinite logit in the
        # padding times zero would be NaN.
        score_losses, weights = self.quality.losses(
            predictions.logits, predictions.quality, targets
        )
        box_losses = {
            "loss_bbox": self.bbox_weight * giou_loss(targets.boxes, targets.gt_boxes),
            **self.box.losses(targets.predictions, targets.gt_distances),
        }

        num_pos = (matched >= 0).sum(dim=1).to(weights)
        score_norm, box_norm = all_reduce_mean(
            torch.stack((num_pos.clamp(min=1).sum(), weights.sum()))
        ).unbind()
        box_norm = box_norm.clamp(min=self.box_normalizer_min)
        losses = {name: loss / score_norm for name, loss in score_losses.items()}
        for name, loss in box_losses.items():
            losses[name] = (weights * loss).sum() / box_norm

        is_beyond = (targets.gt_distances > self.box.max_distance).to(weights)
        num_pos_total = num_pos.sum().clamp(min=1)
        diagnostics = {
            "num_pos_per_image": num_pos.mean(),
            "pos_quality": targets.iou.sum() / num_pos_total,
            "frac_sides_beyond_reg_max": is_beyond.sum() / (4 * num_pos_total),
        }
        return losses, diagnostics

    def targets(
        self,
        predictions: Predictions,
        centers: Tensor,
        strides: Tensor,
        gt_instances: list[Instances],
        matched: Tensor,
        valid: Tensor,
    ) -> Targets:
        """
        Args:
            See :meth:`__call__`.

        Returns:
            Targets: gradients flow through ``predictions`` and ``boxes`` only.
        """
        image, location = (matched >= 0).nonzero(as_tuple=True)
        gt_boxes, gt_classes = _matched_ground_truth(gt_instances, matched, image, location)
        pos_strides = strides[location, None]
        pos_centers, gt_boxes = centers[location] / pos_strides, gt_boxes / pos_strides
        pos_predictions = predictions.boxes[image, location]
        boxes = distance_to_bbox(pos_centers, self.box.decode(pos_predictions))

        labels = torch.full_like(matched, predictions.logits.shape[-1])
        labels[image, location] = gt_classes
        return Targets(
            labels=labels,
            valid=valid,
            image=image,
            location=location,
            predictions=pos_predictions,
            boxes=boxes,
            gt_boxes=gt_boxes,
            gt_distances=bbox_to_distance(pos_centers, gt_boxes),
            iou=aligned_iou(boxes.detach(), gt_boxes),
        )


def _matched_ground_truth(
    gt_instances: list[Instances], matched: Tensor, image: Tensor, location: Tensor
) -> tuple[Tensor, Tensor]:
    """Boxes (P, 4) and classes (P,) of the ground truth matched to the positives."""
    boxes = torch.cat([gt.gt_boxes.tensor for gt in gt_instances])
    classes = torch.cat([gt.gt_classes for gt in gt_instances])
    counts = torch.tensor([len(gt) for gt in gt_instances], device=matched.device)
    first = counts.cumsum(dim=0) - counts  # of each image, in the concatenated ground truth
    index = first[image] + matched[image, location]
    return boxes[index], classes[index]
