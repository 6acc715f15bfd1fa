"""
Adaptive Training Sample Selection: which locations answer for which ground-truth box. The choices
of ``MODEL.GFL.ASSIGNER``.
"""

from __future__ import annotations

import functools
from typing import Callable, NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor

from .box_distribution import aligned_iou, bbox_to_distance
from .locations import Locations, needs_fixed_shapes, to_device

__all__ = ["ATSSAssigner", "Assignment", "DynamicATSSAssigner", "build_assigner"]

# A location is positive only if its distance to every side of the box exceeds this, in pixels.
_MIN_CENTER_DISTANCE = 0.01


class Assignment(NamedTuple):
    """
    The candidates of each ground-truth box of a batch, and which of them are positive. A location
    is positive for one box at most.

    Shapes: M boxes over all images, in their order; K candidates per box; R locations.
    """

    boxes: Tensor  # (M, 4)
    image: Tensor  # (M,), int64, of the box
    location: Tensor  # (M, K), int64 in [0, R)
    is_positive: Tensor  # (M, K), bool
    num_levels: int  # L; the candidates are K / L on each, level by level

    def positives(self) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
        """
        All positives, level by level; on a GPU all candidates, so that no shape depends on a value.

        Returns:
            level (Tensor), box (Tensor), location (Tensor), is_positive (Tensor): shape (P,) each,
            the first two in [0, L) and [0, M).
            counts (list[int]): L, how many of the P are on each level.
        """
        # Shape (L, M, k).
        location, is_positive = (
            x.unflatten(1, (self.num_levels, -1)).transpose(0, 1)
            for x in (self.location, self.is_positive)
        )
        level, box = (
            torch.arange(size, device=location.device).view(shape).expand_as(location)
            for size, shape in zip(location.shape, ((-1, 1, 1), (-1, 1)))
        )
        parts = level, box, location, is_positive
        if needs_fixed_shapes(location):
            return *(x.flatten() for x in parts), [location[0].numel()] * self.num_levels
        counts = is_positive.sum(dim=(1, 2)).tolist()
        return *(x[is_positive] for x in parts), counts


class ATSSAssigner:
    """
    The assignment rule of ATSS (Zhang et al., CVPR 2020). For each ground-truth box,

    1. on every level, the ``topk`` anchors whose centres are nearest to the centre of the box are
       candidates (all of a smaller level), of equals the first;
    2. the threshold is the mean plus the unbiased standard deviation of the candidates' IoUs
       with the box, over all levels;
    3. candidates with IoU >= threshold whose centre is inside the box are positive.

    An anchor that is positive for several boxes goes to the one of highest IoU, the first of
    equals. A box may get no anchor. Padding takes no part.

    Anchors lie on regular grids, so that the nearest are known from arithmetic. Time and memory
    grow with the number of boxes; no shape depends on a value, and nothing waits for a GPU.

    Shapes: N images, M ground-truth boxes over all images, L levels, R anchors over all levels, K
    candidates per box over all levels (at most L * topk).
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
        locations: Locations,
        gt_boxes: list[Tensor],
        predict: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Assignment:
        """
        Args:
            locations: of the batch.
            gt_boxes: N tensors of shape (Mi, 4), in pixels.
            predict: gives the boxes, shape (M, K, 4), that are predicted at locations of given
                image, shape (M, 1), and number, shape (M, K). Not needed here.
        """
        gt = torch.cat(gt_boxes)
        image = torch.arange(len(gt_boxes), device=gt.device).repeat_interleave(
            to_device([len(boxes) for boxes in gt_boxes], gt.device), output_size=len(gt)
        )
        location, centers, sizes, is_candidate = self._candidates(locations, gt, image)
        anchors = torch.cat((centers - sizes / 2, centers + sizes / 2), dim=-1)
        ious = self._ious(anchors, gt[:, None], image[:, None], location, predict)
        iou, threshold = sum(ious), sum(_threshold(x, is_candidate) for x in ious)

        is_inside = bbox_to_distance(centers, gt[:, None]).amin(dim=-1) > _MIN_CENTER_DISTANCE
        is_positive = is_candidate & is_inside & (iou >= threshold)
        num_locations = locations.starts[-1]
        is_best = _is_best(
            image[:, None] * num_locations + location,
            iou,
            is_positive,
            num_places=len(gt_boxes) * num_locations,
        )
        return Assignment(gt, image, location, is_best, len(locations.grids))

    def _candidates(
        self, locations: Locations, gt: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Returns:
            location (Tensor): shape (M, K), int64.
            centers (Tensor): shape (M, K, 2), theirs.
            sizes (Tensor): shape (M, K, 1), sides of their anchors.
            is_candidate (Tensor): shape (M, K), bool. False where a level has fewer than ``topk``
                valid anchors.
        """
        device = gt.device
        # Width and height of what is valid: (N, L, 2).
        limits = to_device([[size[::-1] for size in x] for x in locations.valid_sizes], device)
        stride, first, size = to_device(locations.grids, device, torch.float64).unbind(dim=1)
        widths = to_device([width for _, width in locations.sizes], device)
        starts = to_device(locations.starts[:-1], device)

        largest = [min(max(sides), self.topk) for sides in zip(*locations.sizes)]
        cells, is_candidate = _nearest(
            ((gt[:, :2] + gt[:, 2:]) / 2).double(),
            limits[image],
            stride[:, None],
            first[:, None],
            _offsets(self.topk, *largest, device),
            self.topk,
        )
        columns, rows = cells.long().unbind(dim=-1)
        location = rows * widths[:, None] + columns
        # Where there is no candidate, any location will do.
        location = torch.where(is_candidate, location, 0) + starts[:, None]
        centers = (cells * stride[:, None, None] + first[:, None, None]).to(gt)
        sizes = size[:, None, None].to(gt).expand_as(centers)[..., :1]
        return tuple(x.flatten(1, 2) for x in (location, centers, sizes, is_candidate))

    def _ious(
        self,
        anchors: Tensor,
        gt: Tensor,
        image: Tensor,
        location: Tensor,
        predict: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> list[Tensor]:
        """
        The measures, each of shape (M, K), whose sum candidates are chosen by.

        Args:
            anchors: shape (M, K, 4), of the candidates.
            gt: shape (M, 1, 4).
            image: shape (M, 1).
            location: shape (M, K).
            predict: as in :meth:`__call__`.
        """
        return [aligned_iou(anchors, gt)]


class DynamicATSSAssigner(ATSSAssigner):
    """
    Dynamic ATSS (Zhang et al., J. Imaging 8(7):193, 2022): as :class:`ATSSAssigner`, by the sum of
    two IoUs with the ground truth, the anchor's and the predicted box's. The threshold is the sum
    of their means and standard deviations.
    """

    def _ious(self, anchors, gt, image, location, predict):
        if predict is None:
            raise ValueError("DynamicATSSAssigner needs `predict`, which gives predicted boxes")
        return [aligned_iou(anchors, gt), aligned_iou(predict(image, location), gt)]


def build_assigner(cfg: CfgNode) -> ATSSAssigner:
    """The choice of ``MODEL.GFL.ASSIGNER``."""
    assigners = {"atss": ATSSAssigner, "dynamic_atss": DynamicATSSAssigner}
    return assigners[cfg.MODEL.GFL.ASSIGNER](topk=cfg.MODEL.GFL.ATSS_TOPK)


@functools.lru_cache(maxsize=64)
def _offsets(topk: int, height: int, width: int, device: torch.device) -> Tensor:
    """
    Steps (x, y) from the cell nearest to a point, within which its ``topk`` nearest cells lie, on
    whatever part of a grid of no more than this size: shape (O, 2), in the order of the grid.

    All cells of the rectangle between the nearest cell and another are nearer than the other, or
    as near and earlier. So that one, to be among the topk nearest, spans a rectangle of at most
    topk cells.
    """
    steps = [
        (x, y)
        for y in range(1 - height, height)
        for x in range(1 - width, width)
        if (abs(x) + 1) * (abs(y) + 1) <= topk
    ]
    return to_device(steps, device, torch.float64)


def _nearest(
    points: Tensor, limits: Tensor, stride: Tensor, first: Tensor, offsets: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """
    Args:
        points: shape (M, 2), x and y in pixels, float64.
        limits: shape (M, L, 2), columns and rows that are valid on each level.
        stride, first: shape (L, 1), of the levels.
        offsets: see :func:`_offsets`.
        topk: how many cells are looked for.

    Returns:
        cells (Tensor): shape (M, L, k, 2), column and row, float64, of the nearest, by distance
            and then by their order in the grid; k = min(topk, number of offsets).
        is_found (Tensor): shape (M, L, k), False where there are fewer.
    """
    points = points[:, None]
    # The nearest cell; of two, the first.
    nearest = ((points - first) / stride - 0.5).ceil()
    nearest = torch.minimum(nearest.clamp(min=0), limits - 1)
    cells = nearest[:, :, None] + offsets  # (M, L, O, 2)
    is_outside = ((cells < 0) | (cells >= limits[:, :, None])).any(dim=-1)
    # Exact in float64: ties are ties.
    away = (cells * stride[:, None]).add_(first[:, None]).sub_(points[:, :, None])
    distance = away.square_().sum(dim=-1).masked_fill_(is_outside, float("inf"))
    distance, order = distance.sort(dim=-1, stable=True)
    distance, order = distance[..., :topk], order[..., :topk]
    return cells.gather(2, order[..., None].expand(*order.shape, 2)), distance.isfinite()


def _threshold(iou: Tensor, is_candidate: Tensor) -> Tensor:
    """Mean + unbiased standard deviation of each row's candidates, shape (M, K) -> (M, 1)."""
    count = is_candidate.sum(dim=1, keepdim=True)
    # The floors matter to boxes with at most one candidate: no spread.
    mean = (iou * is_candidate).sum(dim=1, keepdim=True) / count.clamp(min=1)
    squares = ((iou - mean).square() * is_candidate).sum(dim=1, keepdim=True)
    return mean + (squares / (count - 1).clamp(min=1)).sqrt()


def _is_best(place: Tensor, iou: Tensor, is_positive: Tensor, num_places: int) -> Tensor:
    """
    Resolve conflicts: of the positive pairs of one place, that with the highest IoU, of equals that
    of the first box.

    Args:
        place: shape (M, K), int64 in [0, num_places), the anchor of each (box, candidate) pair.
        iou, is_positive: shape (M, K).

    Returns:
        Tensor: shape (M, K), bool.
    """
    iou = torch.where(is_positive, iou, -1)
    best_iou = iou.new_full((num_places,), -1)
    best_iou.scatter_reduce_(0, place.flatten(), iou.flatten(), "amax")
    is_best = is_positive & (iou == best_iou[place])
    box = torch.arange(len(place), device=place.device)[:, None]
    box = torch.where(is_best, box, len(place))
    first_box = box.new_full((num_places,), len(place))
    first_box.scatter_reduce_(0, place.flatten(), box.flatten(), "amin")
    return is_best & (box == first_box[place])
