"""
Adaptive Training Sample Selection: which locations answer for which ground-truth box. The choices
of ``MODEL.GFL.ASSIGNER``.
"""

from __future__ import annotations

from typing import Callable

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from torch import Tensor

from .box_distribution import aligned_iou

__all__ = ["ATSSAssigner", "DynamicATSSAssigner", "build_assigner"]

# A location is positive only if its distance to every side of the box exceeds this, in pixels.
_MIN_CENTER_DISTANCE = 0.01
# Distances between boxes and anchors held at a time: 64 MiB. Thousands of boxes in a large image
# would need gigabytes.
_MAX_DISTANCES = 2**24


class ATSSAssigner:
    """
    The assignment rule of ATSS (Zhang et al., CVPR 2020). For each ground-truth box,

    1. on every level, the ``topk`` anchors whose centres are nearest to the centre of the box are
       candidates (all of a smaller level);
    2. the threshold is the mean plus the unbiased standard deviation of the candidates' IoUs
       with the box, over all levels;
    3. candidates with IoU >= threshold whose centre is inside the box are positive.

    An anchor that is positive for several boxes goes to the one of highest IoU, the first of
    equals. A box may get no anchor.

    Shapes: M ground-truth boxes of one image, L levels, R anchors over all levels, K candidates
    per box over all levels (at most L * topk).
    """

    def __init__(self, topk: int = 9):
        """
        Args:
            topk: candidates per level and box.

        Raises:
            ValueError: topk < 1.
        """
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        self.topk = topk

    @torch.no_grad()
    def __call__(
        self,
        anchors: list[Boxes],
        gt_boxes: Boxes,
        valid: Tensor | None = None,
        predict: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """
        Args:
            anchors: L levels of anchors of one image, R in all.
            gt_boxes: the M ground-truth boxes, in the same unit (pixels).
            valid: shape (R,), bool. Other anchors take no part: they are never candidates.
                All by default.
            predict: gives the boxes, shape (..., 4), that are predicted at anchors of given
                indices, shape (...), int64 into the R anchors. Not needed here.

        Returns:
            Tensor: shape (R,), int64: index in [0, M) of the box assigned to each anchor, or -1.
        """
        all_anchors = Boxes.cat(anchors).tensor
        if valid is None:
            valid = all_anchors.new_ones(len(all_anchors), dtype=torch.bool)
        if len(gt_boxes) == 0:
            return torch.full_like(valid, -1, dtype=torch.int64)

        gt = gt_boxes.tensor
        index, is_candidate = self._candidates(anchors, gt_boxes.get_centers(), valid)  # (M, K)
        candidates = all_anchors[index]  # (M, K, 4)
        ious = self._ious(index, candidates, gt[:, None, :], predict)  # of (M, K) each
        iou, threshold = sum(ious), sum(_threshold(x, is_candidate) for x in ious)

        centers = (candidates[..., :2] + candidates[..., 2:]) / 2
        sides = torch.cat((centers - gt[:, None, :2], gt[:, None, 2:] - centers), dim=-1)
        is_inside = sides.amin(dim=-1) > _MIN_CENTER_DISTANCE
        is_positive = is_candidate & is_inside & (iou >= threshold)
        return _best_box(index, iou, is_positive, num_anchors=len(all_anchors))

    def _ious(
        self,
        index: Tensor,
        candidates: Tensor,
        gt: Tensor,
        predict: Callable[[Tensor], Tensor] | None,
    ) -> list[Tensor]:
        """
        The measures, each of shape (M, K), whose sum candidates are chosen by.

        Args:
            index: shape (M, K), int64 into the R anchors.
            candidates: shape (M, K, 4), their boxes.
            gt: shape (M, 1, 4).
            predict: as in :meth:`__call__`.
        """
        return [aligned_iou(candidates, gt)]

    def _candidates(
        self, anchors: list[Boxes], gt_centers: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Returns:
            index (Tensor): shape (M, K), int64 into the R anchors.
            is_candidate (Tensor): shape (M, K), bool. False where a level has fewer than
                ``topk`` valid anchors.
        """
        indices, distances = [], []
        first = 0
        for anchors_i in anchors:
            last = first + len(anchors_i)
            distance, index = self._nearest(gt_centers, anchors_i.get_centers(), valid[first:last])
            indices.append(index + first)
            distances.append(distance)
            first = last
        return torch.cat(indices, dim=1), torch.cat(distances, dim=1).isfinite()

    def _nearest(
        self, gt_centers: Tensor, anchor_centers: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Returns:
            distance (Tensor): shape (M, k), to the k = min(topk, number of anchors) nearest valid
                anchors of one level; infinite where there are fewer.
            index (Tensor): shape (M, k), int64, of these anchors in the level.
        """
        num_anchors = len(anchor_centers)
        nearest = []
        for chunk in gt_centers.split(max(_MAX_DISTANCES // max(num_anchors, 1), 1)):
            # The matrix product that is faster for many points rounds too much.
            mode = "donot_use_mm_for_euclid_dist"
            distance = torch.cdist(chunk, anchor_centers, compute_mode=mode)
            distance.masked_fill_(~valid, float("inf"))
            nearest.append(distance.topk(min(self.topk, num_anchors), dim=1, largest=False))
        distances, indices = zip(*nearest)
        return torch.cat(distances), torch.cat(indices)


class DynamicATSSAssigner(ATSSAssigner):
    """
    Dynamic ATSS (Zhang et al., J. Imaging 8(7):193, 2022): as :class:`ATSSAssigner`, by the sum of
    two IoUs with the ground truth, the anchor's and the predicted box's. The threshold is the sum
    of their means and standard deviations.
    """

    def _ious(self, index, candidates, gt, predict):
        if predict is None:
            raise ValueError("DynamicATSSAssigner needs `predict`, which gives predicted boxes")
        return [aligned_iou(candidates, gt), aligned_iou(predict(index), gt)]


def build_assigner(cfg: CfgNode) -> ATSSAssigner:
    """The choice of ``MODEL.GFL.ASSIGNER``."""
    assigners = {"atss": ATSSAssigner, "dynamic_atss": DynamicATSSAssigner}
    return assigners[cfg.MODEL.GFL.ASSIGNER](topk=cfg.MODEL.GFL.ATSS_TOPK)


def _threshold(iou: Tensor, is_candidate: Tensor) -> Tensor:
    """Mean + unbiased standard deviation of each row's candidates, shape (M, K) -> (M, 1)."""
    count = is_candidate.sum(dim=1, keepdim=True)
    # The floors matter to boxes with at most one candidate: no spread.
    mean = (iou * is_candidate).sum(dim=1, keepdim=True) / count.clamp(min=1)
    squares = ((iou - mean).square() * is_candidate).sum(dim=1, keepdim=True)
    return mean + (squares / (count - 1).clamp(min=1)).sqrt()


def _best_box(index: Tensor, iou: Tensor, is_positive: Tensor, num_anchors: int) -> Tensor:
    """
    Resolve conflicts: the box of highest IoU for each anchor, the first of equals, or -1.

    Args:
        index: shape (M, K), int64 in [0, R), the anchor of each (box, candidate) pair.
        iou, is_positive: shape (M, K).

    Returns:
        Tensor: shape (R,), int64 in [-1, M).
    """
    num_boxes = len(index)
    index, iou, is_positive = index.flatten(), iou.flatten(), is_positive.flatten()
    box = torch.arange(num_boxes, device=index.device).repeat_interleave(len(index) // num_boxes)

    iou = torch.where(is_positive, iou, -torch.ones_like(iou))
    best_iou = iou.new_full((num_anchors,), -1).scatter_reduce(0, index, iou, "amax")
    is_best = is_positive & (iou == best_iou[index])
    box = torch.where(is_best, box, num_boxes)
    first_best = index.new_full((num_anchors,), num_boxes).scatter_reduce(0, index, box, "amin")
    return torch.where(first_best < num_boxes, first_best, -1)
