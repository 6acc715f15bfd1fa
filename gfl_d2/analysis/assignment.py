"""Which anchors the boxes of a dataset get at the input size, which get none, and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch import Tensor
from tqdm import tqdm

from ..modeling import ATSSAssigner, GroundTruth, LocationGrid, Matches, bbox_to_distance
from ..modeling.gfl import head_input_shapes
from .boxes import BoxTable, InputSize, boxes_at, input_shapes

__all__ = ["REASONS", "Assignment", "AssignmentRule", "assign_boxes"]

# Why a box has no anchor, by the number in Assignment.reason; 0 where it has one.
REASONS = ("", "no candidate's centre inside", "IoUs below the threshold", "lost to other boxes")
_BATCH = 16
# Targets are counted in whole bins, up to this many.
_MAX_BINS = 2048


@dataclass(frozen=True)
class AssignmentRule:
    """How a model of a config assigns anchors to boxes, without its weights."""

    level_names: list[str]
    grid: LocationGrid
    assigner: ATSSAssigner
    divisibility: int  # of the input's sides
    bin_width: float  # in strides

    @classmethod
    def from_config(cls, cfg: CfgNode) -> AssignmentRule:
        """
        Also of "dynamic_atss", as if all predicted boxes were equal: it needs a trained model.

        Raises:
            InputError: the backbone does not fit ``MODEL.GFL.IN_FEATURES``.
        """
        with torch.device("meta"):  # only its shapes are needed
            backbone = build_backbone(cfg)
        strides = [shape.stride for shape in head_input_shapes(cfg, backbone)]
        return cls(
            level_names=list(cfg.MODEL.GFL.IN_FEATURES),
            grid=LocationGrid.from_config(cfg, strides),
            assigner=ATSSAssigner.from_config(cfg),
            divisibility=backbone.size_divisibility,
            bin_width=cfg.MODEL.GFL.BIN_WIDTH,
        )

    @property
    def strides(self) -> list[int]:
        return self.grid.strides.tolist()


@dataclass(frozen=True)
class Assignment:
    """
    What boxes get. Shapes: K boxes, each at each input size; L levels; B bins.
    """

    box: np.ndarray  # (K,), int64, row of the table
    boxes: np.ndarray  # (K, 4), XYXY at the input size, in pixels
    positives: np.ndarray  # (K, L), int64, anchors of each level
    reason: np.ndarray  # (K,), int64, of REASONS
    # Sides of positives' targets by their length: [level, i] counts those in (i - 1, i] bins.
    targets: np.ndarray  # (L, B), int64
    longest_target: np.ndarray  # (L,), in bins

    @property
    def share_without(self) -> float:
        """The share of boxes that have no anchor."""
        return float((self.reason > 0).mean()) if len(self.reason) else 0.0


def assign_boxes(
    table: BoxTable,
    images: np.ndarray,
    size: InputSize,
    rule: AssignmentRule,
    label: str = "",
) -> Assignment:
    """
    Assign anchors to the boxes of some images, as training does. Boxes without area at the input
    size, and crowds, which do not take part in training, must not be in the table.

    Args:
        images: rows of the table's images.
        label: of the progress bar; none without.
    """
    by_image = np.argsort(table.image, kind="stable")
    bounds = np.searchsorted(table.image[by_image], np.arange(len(table.files) + 1))
    parts = []
    total = len(images) * len(size.short)
    with tqdm(total=total, desc=label, unit="image", disable=not label, leave=False) as progress:
        for short in size.short:
            shapes = input_shapes(table.sizes, short, size.longest)
            boxes = boxes_at(table, shapes)
            # Images of like shape together: a batch has the shape of its largest.
            ordered = images[np.lexsort(shapes[images].T)]
            for start in range(0, len(ordered), _BATCH):
                batch = ordered[start : start + _BATCH]
                rows = [by_image[bounds[i] : bounds[i + 1]] for i in batch]
                image = np.repeat(np.arange(len(batch)), [len(x) for x in rows])
                rows = np.concatenate(rows)
                parts.append(_assign_batch(rows, boxes[rows], image, shapes[batch], rule))
                progress.update(len(batch))
    levels = len(rule.level_names)
    return Assignment(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in _BY_BOX),
        targets=sum((part.targets for part in parts), np.zeros((levels, _MAX_BINS), np.int64)),
        longest_target=np.max([part.longest_target for part in parts], axis=0),
    )


_BY_BOX = ("box", "boxes", "positives", "reason")


def _assign_batch(
    rows: np.ndarray, boxes: np.ndarray, image: np.ndarray, shapes: np.ndarray, rule: AssignmentRule
) -> Assignment:
    """Of the images of one batch: boxes (K, 4), and which of the shapes (N, 2) each is in."""
    gt = GroundTruth(
        torch.as_tensor(boxes, dtype=torch.float32),
        torch.zeros(len(boxes), dtype=torch.int64),
        torch.as_tensor(image),
    )
    sizes = torch.as_tensor(shapes)
    matches, distances = _match(gt, sizes, rule)
    is_positive = matches.is_positive
    positives = is_positive.sum(dim=-1)
    reason = torch.zeros(len(boxes), dtype=torch.int64)
    lost = (positives.sum(dim=-1) == 0).nonzero().flatten()
    for some in lost.split(_BATCH) if len(lost) else ():
        # Each alone in an image of its own: would it get an anchor?
        alone = GroundTruth(gt.boxes[some], gt.classes[some], torch.arange(len(some)))
        alone_matches, alone_distances = _match(alone, sizes[gt.image[some]], rule)
        has_centre = (alone_distances.amin(dim=-1) > 0).flatten(1).any(dim=1)
        has_anchor = alone_matches.is_positive.flatten(1).any(dim=1)
        reason[some] = torch.where(has_anchor, 3, torch.where(has_centre, 2, 1))

    bins = distances / rule.bin_width
    targets, longest = [], []
    for level in range(len(rule.level_names)):
        sides = bins[:, level][is_positive[:, level]].flatten()
        whole = sides.ceil().long().clamp(max=_MAX_BINS - 1)
        targets.append(torch.bincount(whole, minlength=_MAX_BINS))
        longest.append(sides.max() if len(sides) else sides.new_zeros(()))
    return Assignment(
        rows, boxes, positives.numpy(), reason.numpy(), torch.stack(targets).numpy(),
        torch.stack(longest).numpy(),
    )  # fmt: skip


def _match(gt: GroundTruth, sizes: Tensor, rule: AssignmentRule) -> tuple[Matches, Tensor]:
    """
    Returns:
        Matches: of the assigner.
        Tensor: shape (M, L, k, 4), in strides, from candidates to the sides of their box. Where a
        level has fewer than k cells, all are candidates, and the first is there again.
    """
    divisibility = max(rule.divisibility, 1)
    height, width = (sizes.amax(dim=0) / divisibility).ceil().mul(divisibility).long().tolist()
    shapes = [(-(-height // stride), -(-width // stride)) for stride in rule.strides]
    levels = rule.grid(shapes, sizes, rule.divisibility)
    matches = rule.assigner(levels, gt)
    centers = levels.centers(matches.row, matches.column)
    distances = bbox_to_distance(centers, gt.boxes[:, None, None])
    return matches, distances / levels.strides[:, None, None]
