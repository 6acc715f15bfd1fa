"""The training objective of GFL: what the head should have predicted, and the losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor

from .box_distribution import aligned_iou, bbox_to_distance, distance_to_bbox, integral
from .distributed import all_reduce_mean
from .losses import distribution_focal_loss, giou_loss, quality_focal_loss

__all__ = ["GFLCriterion", "Targets"]

# How far DFL targets stay below the last bin, as in the reference implementation.
_DFL_TARGET_MARGIN = 0.1


class Targets(NamedTuple):
    """
    What the predictions of a batch are compared with, see :meth:`GFLCriterion.targets`.

    Shapes: P positive locations over all images. Boxes and distances are in strides of the level.
    """

    labels: Tensor  # (N, R), int64 in [0, C]; C is background
    quality: Tensor  # (N, R), IoU of the predicted with the ground-truth box, 0 for background
    image: Tensor  # (P,), int64 in [0, N)
    location: Tensor  # (P,), int64 in [0, R)
    distributions: Tensor  # (P, 4 * (n + 1)), predicted logits
    boxes: Tensor  # (P, 4), predicted
    gt_boxes: Tensor  # (P, 4)
    gt_distances: Tensor  # (P, 4), to the sides of gt_boxes, not limited to [0, n]
    weights: Tensor  # (P,), best predicted score


class GFLCriterion:
    """
    QFL over all valid locations, divided by the number of positives; GIoU loss and DFL over the
    positives, weighted by their best score and divided by the sum of these weights. Both divisors
    are averaged over the processes.

    Shapes: N images, R locations over all levels, C classes, n + 1 bins.
    """

    def __init__(
        self,
        *,
        qfl_beta: float = 2.0,
        qfl_weight: float = 1.0,
        bbox_weight: float = 2.0,
        dfl_weight: float = 0.25,
        box_normalizer_min: float = 1.0,
    ):
        """
        Args:
            qfl_beta: exponent of the modulating factor of QFL.
            qfl_weight, bbox_weight, dfl_weight: weights of the three losses.
            box_normalizer_min: lower bound of the divisor of the box losses.
        """
        self.qfl_beta = qfl_beta
        self.qfl_weight = qfl_weight
        self.bbox_weight = bbox_weight
        self.dfl_weight = dfl_weight
        self.box_normalizer_min = box_normalizer_min

    def __call__(
        self,
        logits: Tensor,
        distributions: Tensor,
        centers: Tensor,
        strides: Tensor,
        gt_instances: list[Instances],
        matched: Tensor,
        valid: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Args:
            logits: shape (N, R, C).
            distributions: shape (N, R, 4 * (n + 1)), logits.
            centers: shape (R, 2), x and y of the locations, in pixels.
            strides: shape (R,), of their levels, in pixels.
            gt_instances: N Instances with ``gt_boxes`` (pixels) and ``gt_classes``.
            matched: shape (N, R), int64, index of the ground-truth box of each location, or -1.
            valid: shape (N, R), bool. Other locations have no loss.

        Returns:
            losses (dict[str, Tensor]): ``loss_qfl``, ``loss_bbox``, ``loss_dfl``, weighted scalars.
            They are finite, and connected to every prediction, also where there is no positive
            or no ground truth at all.
            diagnostics (dict[str, Tensor]): scalars that tell whether training goes well: positives
            per image, their mean quality, and the fraction of their box sides beyond the range of
            the distribution. If the last is not small, objects are too large for n strides.
        """
        targets = self.targets(logits, distributions, centers, strides, gt_instances, matched)
        reg_max = _reg_max(distributions)
        num_pos = (matched >= 0).sum(dim=1).to(targets.weights)
        qfl_norm, box_norm = all_reduce_mean(
            torch.stack((num_pos.clamp(min=1).sum(), targets.weights.sum()))
        ).unbind()
        box_norm = box_norm.clamp(min=self.box_normalizer_min)

        # Indexing by the mask, not multiplying with it: an infinite logit in the padding times
        # zero would be NaN.
        loss_qfl = quality_focal_loss(
            logits[valid],
            targets.labels[valid],
            targets.quality[valid],
            beta=self.qfl_beta,
            reduction="sum",
        )
        loss_bbox = targets.weights * giou_loss(targets.boxes, targets.gt_boxes)
        loss_dfl = distribution_focal_loss(
            targets.distributions.reshape(-1, reg_max + 1),
            targets.gt_distances.clamp(min=0, max=reg_max - _DFL_TARGET_MARGIN).flatten(),
        )
        loss_dfl = targets.weights * loss_dfl.view(-1, 4).mean(dim=1)
        losses = {
            "loss_qfl": self.qfl_weight * loss_qfl / qfl_norm,
            "loss_bbox": self.bbox_weight * loss_bbox.sum() / box_norm,
            "loss_dfl": self.dfl_weight * loss_dfl.sum() / box_norm,
        }

        is_beyond = (targets.gt_distances > reg_max).to(targets.quality)
        num_pos_total = num_pos.sum().clamp(min=1)
        diagnostics = {
            "num_pos_per_image": num_pos.mean(),
            "pos_quality": targets.quality.sum() / num_pos_total,
            "frac_sides_beyond_reg_max": is_beyond.sum() / (4 * num_pos_total),
        }
        return losses, diagnostics

    def targets(
        self,
        logits: Tensor,
        distributions: Tensor,
        centers: Tensor,
        strides: Tensor,
        gt_instances: list[Instances],
        matched: Tensor,
    ) -> Targets:
        """
        Args:
            See :meth:`__call__`.

        Returns:
            Targets: positives in the order of images, then locations. Gradients flow through
            ``distributions`` and ``boxes`` only.
        """
        image, location = (matched >= 0).nonzero(as_tuple=True)
        gt_boxes, gt_classes = _matched_ground_truth(gt_instances, matched, image, location)
        pos_strides = strides[location, None]
        pos_centers, gt_boxes = centers[location] / pos_strides, gt_boxes / pos_strides
        pos_distributions = distributions[image, location]
        boxes = distance_to_bbox(pos_centers, integral(pos_distributions, _reg_max(distributions)))

        labels = torch.full_like(matched, logits.shape[-1])
        labels[image, location] = gt_classes
        quality = torch.zeros_like(logits[..., 0])
        quality[image, location] = aligned_iou(boxes.detach(), gt_boxes)
        return Targets(
            labels=labels,
            quality=quality,
            image=image,
            location=location,
            distributions=pos_distributions,
            boxes=boxes,
            gt_boxes=gt_boxes,
            gt_distances=bbox_to_distance(pos_centers, gt_boxes),
            weights=logits.detach()[image, location].amax(dim=1).sigmoid(),
        )


def _reg_max(distributions: Tensor) -> int:
    return distributions.shape[-1] // 4 - 1


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
