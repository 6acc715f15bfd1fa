"""The training objective of GFL: what the head should have predicted, and the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .assigner import Assignment
from .box_distribution import aligned_iou, bbox_to_distance, distance_to_bbox
from .box_representation import BoxRepresentation, GeneralDistribution
from .distributed import all_reduce_mean
from .locations import Locations, Positives, fill_padding, to_device
from .losses import giou_loss
from .quality import JointQuality, Quality

__all__ = ["GFLCriterion", "Predictions", "Targets"]


class Predictions(NamedTuple):
    """
    What the head predicts for a batch, level by level.

    Shapes: N images, C classes, V numbers a box side.
    """

    logits: Sequence[Tensor]  # (N, C, Hi, Wi)
    boxes: Sequence[Tensor]  # (N, 4 * V, Hi, Wi)
    quality: Sequence[Tensor] | None = None  # (N, 1, Hi, Wi), logits


class Targets(NamedTuple):
    """
    What the predictions of a batch are compared with, see :meth:`GFLCriterion.targets`.

    Shapes: N images, P positive locations over all images, level by level. Boxes and distances are
    in strides of the level.
    """

    positives: Sequence[Positives]  # of each level
    valid_sizes: Sequence[Sequence[tuple[int, int]]]  # of each level, of each image
    is_real: Tensor  # (P,), bool; others are there to keep shapes fixed, and count for nothing
    labels: Tensor  # (P,), int64 in [0, C)
    predictions: Tensor  # (P, 4 * V), of the boxes
    boxes: Tensor  # (P, 4), predicted
    gt_boxes: Tensor  # (P, 4)
    gt_distances: Tensor  # (P, 4), to the sides of gt_boxes
    iou: Tensor  # (P,), of predicted and ground-truth box, no gradient

    def take(self, levels: Sequence[Tensor]) -> Tensor:
        """Values of the positives: from maps of shape (N, X, Hi, Wi) to (P, X)."""
        return torch.cat([p.take(maps) for p, maps in zip(self.positives, levels)])

    def without_padding(self, levels: Sequence[Tensor], value: float) -> list[Tensor]:
        """Maps of shape (N, X, Hi, Wi) with ``value`` in the padding, and no gradient there."""
        return [fill_padding(*level, value) for level in zip(levels, self.valid_sizes)]

    def mask(self, values: Tensor) -> Tensor:
        """Values of shape (P,) with 0 for what is not real."""
        return torch.where(self.is_real, values, 0)


class GFLCriterion:
    """
    The loss of the scores over all valid locations, divided by the number of positives; GIoU loss
    and the losses of the box representation over the positives, weighted and divided by the sum of
    these weights. Both divisors are averaged over the processes.

    Shapes: N images, C classes, M ground-truth boxes over all images.
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
        locations: Locations,
        assignment: Assignment,
        gt_classes: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Args:
            predictions: of the head.
            locations: where they are.
            assignment: which of them answer for which of the M ground-truth boxes.
            gt_classes: shape (M,), int64 in [0, C).

        Returns:
            losses (dict[str, Tensor]): weighted scalars: ``loss_bbox`` and those of ``quality`` and
            ``box``. They are finite, and connected to every prediction, also where there is no
            positive or no ground truth at all.
            diagnostics (dict[str, Tensor]): scalars that tell whether training goes well: positives
            per image, their mean IoU, and the fraction of their box sides farther away than can be
            predicted. If the last is not small, objects are too large for n strides.
        """
        targets = self.targets(predictions, locations, assignment, gt_classes)
        score_losses, weights = self.quality.losses(predictions, targets)
        weights = targets.mask(weights)
        box_losses = {
            "loss_bbox": self.bbox_weight * giou_loss(targets.boxes, targets.gt_boxes),
            **self.box.losses(targets.predictions, targets.gt_distances),
        }

        num_images = len(locations.valid_sizes)
        num_pos = weights.new_zeros(num_images).index_add_(
            0, assignment.image, assignment.is_positive.sum(dim=1).to(weights)
        )
        score_norm, box_norm = all_reduce_mean(
            torch.stack((num_pos.clamp(min=1).sum(), weights.sum()))
        ).unbind()
        box_norm = box_norm.clamp(min=self.box_normalizer_min)
        losses = {name: loss / score_norm for name, loss in score_losses.items()}
        for name, loss in box_losses.items():
            losses[name] = (weights * targets.mask(loss)).sum() / box_norm

        is_beyond = (targets.gt_distances > self.box.max_distance).sum(dim=1)
        num_pos_total = num_pos.sum().clamp(min=1)
        diagnostics = {
            "num_pos_per_image": num_pos.mean(),
            "pos_quality": targets.mask(targets.iou).sum() / num_pos_total,
            "frac_sides_beyond_reg_max": targets.mask(is_beyond).sum() / (4 * num_pos_total),
        }
        return losses, diagnostics

    def targets(
        self,
        predictions: Predictions,
        locations: Locations,
        assignment: Assignment,
        gt_classes: Tensor,
    ) -> Targets:
        """
        Args:
            See :meth:`__call__`.

        Returns:
            Targets: gradients flow through ``predictions`` and ``boxes`` only.
        """
        level, box, location, is_real, counts = assignment.positives()
        # What the level of each has.
        widths = [width for _, width in locations.sizes]
        strides = [(grid.stride, grid.first) for grid in locations.grids]
        device, dtype = location.device, assignment.boxes.dtype
        width, start = to_device(list(zip(widths, locations.starts)), device)[level].unbind(dim=1)
        stride, first = to_device(strides, device, dtype)[level].split(1, dim=1)

        location = location - start
        row = location.div(width, rounding_mode="floor")
        column = location - row * width
        parts = (x.split(counts) for x in (assignment.image[box], row, column, is_real))
        positives = [Positives(*of_level) for of_level in zip(*parts)]
        centers = (torch.stack((column, row), dim=1) * stride + first) / stride
        gt_boxes = assignment.boxes[box] / stride
        pos_predictions = torch.cat([p.take(x) for p, x in zip(positives, predictions.boxes)])
        boxes = distance_to_bbox(centers, self.box.decode(pos_predictions))
        return Targets(
            positives=positives,
            valid_sizes=list(zip(*locations.valid_sizes)),
            is_real=is_real,
            labels=gt_classes[box],
            predictions=pos_predictions,
            boxes=boxes,
            gt_boxes=gt_boxes,
            gt_distances=bbox_to_distance(centers, gt_boxes),
            iou=aligned_iou(boxes.detach(), gt_boxes),
        )
