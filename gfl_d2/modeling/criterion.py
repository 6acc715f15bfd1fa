"""The training objective of GFL: what the head should have predicted, and the losses."""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch import Tensor

from .box_distribution import bbox_to_distance, distance_to_bbox, integral
from .distributed import all_reduce_mean
from .losses import aligned_iou, distribution_focal_loss, giou_loss, quality_focal_loss

__all__ = ["GFLCriterion"]

# How far DFL targets stay below the last bin, as in the reference implementation.
_DFL_TARGET_MARGIN = 0.1


class GFLCriterion:
    """
    QFL over all valid locations, divided by the number of positives; GIoU loss and DFL over the
    positives, weighted by their best score and divided by the sum of these weights. Both divisors
    are averaged over the processes.

    Shapes: N images, R locations over all levels, C classes, n = ``reg_max``, P positive locations
    over all images.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        reg_max: int,
        qfl_beta: float = 2.0,
        qfl_weight: float = 1.0,
        bbox_weight: float = 2.0,
        dfl_weight: float = 0.25,
        box_normalizer_min: float = 1.0,
    ):
        """
        Args:
            num_classes: C.
            reg_max: n.
            qfl_beta: exponent of the modulating factor of QFL.
            qfl_weight, bbox_weight, dfl_weight: weights of the three losses.
            box_normalizer_min: lower bound of the divisor of the box losses.
        """
        self.num_classes = num_classes
        self.reg_max = reg_max
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
        image, location = (matched >= 0).nonzero(as_tuple=True)  # (P,) each
        gt_boxes, gt_classes = _matched_ground_truth(gt_instances, matched, image, location)

        # From here on boxes are in strides of their level.
        pos_centers = centers[location] / strides[location, None]
        pos_gt_boxes = gt_boxes / strides[location, None]
        pos_distributions = distributions[image, location]
        pos_boxes = distance_to_bbox(pos_centers, integral(pos_distributions, self.reg_max))
        pos_distances = bbox_to_distance(pos_centers, pos_gt_boxes)
        pos_quality = aligned_iou(pos_boxes.detach(), pos_gt_boxes)
        pos_weights = logits.detach()[image, location].amax(dim=1).sigmoid()

        labels = torch.full_like(matched, self.num_classes)
        labels[image, location] = gt_classes
        quality = torch.zeros_like(logits[..., 0])
        quality[image, location] = pos_quality

        num_pos = (matched >= 0).sum(dim=1).to(pos_weights)
        qfl_norm, box_norm = all_reduce_mean(
            torch.stack((num_pos.clamp(min=1).sum(), pos_weights.sum()))
        ).unbind()
        box_norm = box_norm.clamp(min=self.box_normalizer_min)

        # Indexing by the mask, not multiplying with it: an infinite logit in the padding times
        # zero would be NaN.
        loss_qfl = quality_focal_loss(
            logits[valid], labels[valid], quality[valid], beta=self.qfl_beta, reduction="sum"
        )
        loss_bbox = pos_weights * giou_loss(pos_boxes, pos_gt_boxes)
        loss_dfl = distribution_focal_loss(
            pos_distributions.reshape(-1, self.reg_max + 1),
            pos_distances.clamp(min=0, max=self.reg_max - _DFL_TARGET_MARGIN).flatten(),
        )
        loss_dfl = pos_weights * loss_dfl.view(-1, 4).mean(dim=1)
        losses = {
            "loss_qfl": self.qfl_weight * loss_qfl / qfl_norm,
            "loss_bbox": self.bbox_weight * loss_bbox.sum() / box_norm,
            "loss_dfl": self.dfl_weight * loss_dfl.sum() / box_norm,
        }

        is_beyond = (pos_distances > self.reg_max).to(pos_quality)
        diagnostics = {
            "num_pos_per_image": num_pos.mean(),
            "pos_quality": pos_quality.sum() / max(len(pos_quality), 1),
            "frac_sides_beyond_reg_max": is_beyond.sum() / max(is_beyond.numel(), 1),
        }
        return losses, diagnostics


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
