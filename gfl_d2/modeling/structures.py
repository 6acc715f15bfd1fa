"""
The data that flows from the head to the losses and detections. It has look-ups only.

Shapes: N images, L levels, Ri = Hi * Wi locations on level i, C classes, V numbers a box side, M
ground-truth boxes over all images, k candidates per box and level, P = M * L * k samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor

__all__ = [
    "GroundTruth",
    "Levels",
    "Matches",
    "Outputs",
    "Predictions",
    "Samples",
    "flatten_map",
    "take_places",
]


class Predictions(NamedTuple):
    """What the head predicts for a batch, level by level."""

    class_logits: Sequence[Tensor]  # (N, C, Hi, Wi)
    box_values: Sequence[Tensor]  # (N, 4 * V, Hi, Wi)
    quality_logits: Sequence[Tensor] | None = None  # (N, 1, Hi, Wi)


class GroundTruth(NamedTuple):
    """The ground-truth boxes of a batch, image by image."""

    boxes: Tensor  # (M, 4), XYXY in pixels
    classes: Tensor  # (M,), int64 in [0, C)
    image: Tensor  # (M,), int64 in [0, N)

    @classmethod
    def from_instances(cls, instances: Sequence[Instances]) -> GroundTruth:
        """From N Instances with ``gt_boxes`` and ``gt_classes``."""
        classes = [x.gt_classes for x in instances]
        image = [torch.full_like(x, i) for i, x in enumerate(classes)]
        boxes = torch.cat([x.gt_boxes.tensor for x in instances])
        return cls(boxes, torch.cat(classes), torch.cat(image))


class Levels(NamedTuple):
    """
    Where the locations of a batch are. The location in row i, column j of a level is at
    ``(j * stride + first, i * stride + first)``, in pixels, and has one square anchor.
    """

    shapes: Sequence[tuple[int, int]]  # L times (Hi, Wi)
    strides: Tensor  # (L,), in pixels
    first: Tensor  # (L,), in pixels
    anchor_sizes: Tensor  # (L,), sides of the anchors, in pixels
    # Height and width of the part of a map that belongs to the image. The rest is padding.
    valid_sizes: Tensor  # (N, L, 2), int64

    def centers(self, row: Tensor, column: Tensor) -> Tensor:
        """
        Args:
            row, column: shape (..., L, k).

        Returns:
            Tensor: shape (..., L, k, 2), x and y in pixels.
        """
        cells = torch.stack((column, row), dim=-1)
        return cells * self.strides[:, None, None] + self.first[:, None, None]

    def anchors(self, level: int) -> Tensor:
        """Shape (Hi * Wi, 4), XYXY in pixels, row by row."""
        ends = (torch.arange(x, device=self.strides.device) for x in self.shapes[level])
        row, column = torch.meshgrid(*ends, indexing="ij")
        cells = torch.stack((column, row), dim=-1).flatten(0, 1)
        centers = cells * self.strides[level] + self.first[level]
        half = self.anchor_sizes[level] / 2
        return torch.cat((centers - half, centers + half), dim=1)

    def valid_mask(self, level: int) -> Tensor:
        """Shape (N, 1, Hi, Wi), False in the padding."""
        height, width = self.shapes[level]
        limits = self.valid_sizes[:, level, :, None]
        rows = torch.arange(height, device=limits.device) < limits[:, 0]
        columns = torch.arange(width, device=limits.device) < limits[:, 1]
        return (rows[:, :, None] & columns[:, None, :])[:, None]


class Matches(NamedTuple):
    """
    The candidates of each ground-truth box on each level, and which of them are positive. All
    candidates are carried along, so that no shape depends on a value. A location is positive for
    one box at most.
    """

    image: Tensor  # (M,), int64, of the box
    row: Tensor  # (M, L, k), int64
    column: Tensor  # (M, L, k), int64
    is_positive: Tensor  # (M, L, k), bool
    weight: Tensor | None = None  # (M, L, k), of the positives in the losses, >= 0; None for 1
    losses: dict[str, Tensor] | None = None  # the assigner's own, weighted scalars by name
    # (M,), that of ATSS for the IoU of an anchor with the box. Only distillation asks for it.
    iou_threshold: Tensor | None = None

    def places(self, level: int, shape: Sequence[int]) -> Tensor:
        """
        Args:
            level: in [0, L).
            shape: (..., Hi, Wi), of its maps.

        Returns:
            Tensor: shape (M, k), int64, the candidates' places in :func:`flatten_map` of the maps.
        """
        height, width = shape[-2:]
        return (self.image[:, None] * height + self.row[:, level]) * width + self.column[:, level]

    def take(self, maps: Sequence[Tensor]) -> Tensor:
        """Values at the candidates: from L maps of shape (N, X, Hi, Wi) to (M, L, k, X)."""
        values = [take_places(x, self.places(i, x.shape)) for i, x in enumerate(maps)]
        return torch.stack(values, dim=1)

    def weight_map(self, level: int, shape: Sequence[int]) -> Tensor | None:
        """
        Args:
            level: in [0, L).
            shape: (N, ..., Hi, Wi), of its maps.

        Returns:
            Tensor: shape (N * Hi * Wi,), the weight of each location in the losses, which is 1
            where nothing is positive. None if all are 1.
        """
        if self.weight is None:
            return None
        size = shape[0] * shape[-2] * shape[-1]
        # Candidates that are not positive have a place of their own, behind the map.
        places = torch.where(self.is_positive[:, level], self.places(level, shape), size)
        weights = self.weight.new_ones(size + 1)
        return weights.scatter(0, places.flatten(), self.weight[:, level].flatten())[:size]


class Outputs(NamedTuple):
    """What the network gives for a batch in training, for assigners whose choice depends on it."""

    features: Sequence[Tensor]  # (N, channels, Hi, Wi)
    predictions: Predictions
    # The boxes that are predicted at candidates: (M, L, k, 4), in pixels. No gradient.
    predict: Callable[[Matches], Tensor]
    iteration: int  # of the training, from 0


def flatten_map(x: Tensor) -> Tensor:
    """From shape (N, X, H, W) to (N * H * W, X). A view, if the memory format is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def take_places(x: Tensor, places: Tensor) -> Tensor:
    """From a map of shape (N, X, H, W), at places in :func:`flatten_map` of it, to (..., X)."""
    values = flatten_map(x).gather(0, places.reshape(-1, 1).expand(-1, x.shape[1]))
    return values.unflatten(0, places.shape)


class Samples(NamedTuple):
    """
    The predictions at the candidates, beside what they should have been. Candidates that are not
    positive are there too, with predictions of 0, and must not count. Boxes and distances are in
    strides of the level.
    """

    matches: Matches
    gt: GroundTruth
    is_positive: Tensor  # (P,), bool
    image: Tensor  # (P,), int64 in [0, N)
    classes: Tensor  # (P,), int64 in [0, C), of the ground-truth box
    quality_logits: Tensor | None  # (P,)
    box_values: Tensor  # (P, 4 * V)
    boxes: Tensor  # (P, 4), XYXY, decoded from box_values
    gt_boxes: Tensor  # (P, 4), XYXY
    gt_distances: Tensor  # (P, 4), from the location to the sides of gt_boxes
    iou: Tensor  # (P,), of boxes and gt_boxes. No gradient
    weight: Tensor | None = None  # (P,), of the positives in the losses; None for 1

    def mask(self, values: Tensor) -> Tensor:
        """Values of shape (P,) with 0 for what is not positive."""
        return torch.where(self.is_positive, values, 0)

    def weigh(self, values: Tensor) -> Tensor:
        """As :meth:`mask`, times the weights in the losses."""
        values = self.mask(values)
        return values if self.weight is None else self.weight * values
