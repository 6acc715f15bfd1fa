"""
Which locations answer for which ground-truth box: Adaptive Training Sample Selection, the choices
"atss" and "dynamic_atss" of ``MODEL.GFL.ASSIGNER``.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..registry import ASSIGNER_REGISTRY
from .box_ops import aligned_iou, bbox_to_distance
from .structures import GroundTruth, Levels, Matches, Outputs

__all__ = [
    "MIN_CENTER_DISTANCE", "ATSSAssigner", "DynamicATSSAssigner", "build_assigner",
    "resolve_conflicts",
]  # fmt: skip

# A location is positive only if its distance to every side of the box exceeds this, in pixels.
MIN_CENTER_DISTANCE = 0.01


@ASSIGNER_REGISTRY.register("atss")
class ATSSAssigner(nn.Module):
    """
    The assignment rule of ATSS (Zhang et al., CVPR 2020). For each ground-truth box,

    1. on every level, the ``topk`` anchors whose centres are nearest to the centre of the box are
       candidates (all of a smaller level), of equals the first;
    2. the threshold is the mean plus the unbiased standard deviation of the candidates' IoUs
       with the box, over all levels;
    3. candidates with IoU >= threshold whose centre is inside the box are positive.

    An anchor that is positive for several boxes goes to the one of highest IoU, the first of
    equals. A box may get no anchor. Anchors in the padding are never assigned.

    Anchors lie on regular grids, so the nearest are known from arithmetic. Time and memory grow
    with the number of boxes, not with boxes times anchors. No shape depends on a value.

    Shapes: N images, L levels, M ground-truth boxes over all images, k = ``topk`` candidates per
    box and level.
    """

    # Each box has the IoU that its positives exceed (Matches.iou_threshold).
    gives_thresholds = True

    def __init__(self, topk: int = 9):
        """
        Args:
            topk: candidates per level and box.

        Raises:
            ValueError: topk < 1.
        """
        super().__init__()
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        self.topk = topk
        self.register_buffer("offsets", _offsets(topk), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec] | None = None) -> ATSSAssigner:
        return cls(topk=cfg.MODEL.GFL.ATSS_TOPK)

    @torch.no_grad()
    def forward(self, levels: Levels, gt: GroundTruth, outputs: Outputs | None = None) -> Matches:
        """
        Args:
            levels: where the locations are.
            gt: the boxes to assign them to.
            outputs: of the network, for the same batch. Not needed here.
        """
        cells, is_candidate = self._nearest_cells(levels, gt)
        column, row = cells.long().unbind(dim=-1)
        matches = Matches(gt.image, row, column, is_candidate)
        centers = levels.centers(row, column)
        boxes = gt.boxes[:, None, None]
        ious = self._ious(levels, centers, boxes, matches, outputs)
        thresholds = [_threshold(x, is_candidate) for x in ious]
        iou, threshold = sum(ious), sum(thresholds)
        is_inside = bbox_to_distance(centers, boxes).amin(dim=-1) > MIN_CENTER_DISTANCE
        matches = matches._replace(
            is_positive=is_candidate & is_inside & (iou >= threshold),
            iou_threshold=thresholds[0].flatten(),
        )
        return matches._replace(is_positive=resolve_conflicts(matches, iou, levels))

    def _nearest_cells(self, levels: Levels, gt: GroundTruth) -> tuple[Tensor, Tensor]:
        """
        Returns:
            cells (Tensor): shape (M, L, k, 2), column and row of the nearest, by distance and then
                by their order in the grid. Cell (0, 0) where there are fewer.
            is_candidate (Tensor): shape (M, L, k), False where there are fewer.
        """
        # A map may be smaller than what is valid of it, where a backbone rounds down.
        shapes = torch.tensor(levels.shapes).to(gt.boxes.device, non_blocking=True)
        limits = torch.minimum(levels.valid_sizes, shapes).flip(-1)[gt.image]  # (M, L, 2)
        strides = levels.strides[:, None]
        center = (gt.boxes[:, None, :2] + gt.boxes[:, None, 2:]) / 2 - levels.first[:, None]
        nearest = (center / strides - 0.5).ceil().clamp(min=0).minimum(limits - 1)
        cells = nearest[:, :, None] + self.offsets  # (M, L, O, 2)
        is_outside = ((cells < 0) | (cells >= limits[:, :, None])).any(dim=-1)
        # In pixels, and from the nearest cell: so small numbers are exact, and ties are ties.
        away = self.offsets * strides[..., None] - (center - nearest * strides)[:, :, None]
        distance = away.square().sum(dim=-1).masked_fill_(is_outside, torch.inf)
        distance, order = distance.sort(dim=-1, stable=True)
        is_candidate = distance[..., : self.topk].isfinite()
        order = order[..., : self.topk, None].expand(-1, -1, -1, 2)
        return torch.where(is_candidate[..., None], cells.gather(2, order), 0), is_candidate

    def _ious(
        self,
        levels: Levels,
        centers: Tensor,
        boxes: Tensor,
        matches: Matches,
        outputs: Outputs | None,
    ) -> list[Tensor]:
        """
        The measures, each of shape (M, L, k), the anchors' IoU first. Positives are chosen by
        their sum.

        Args:
            centers: shape (M, L, k, 2), of the candidates.
            boxes: shape (M, 1, 1, 4), the ground truth.
            outputs: as in :meth:`forward`.
        """
        half = levels.anchor_sizes[:, None, None] / 2
        return [aligned_iou(torch.cat((centers - half, centers + half), dim=-1), boxes)]


@ASSIGNER_REGISTRY.register("dynamic_atss")
class DynamicATSSAssigner(ATSSAssigner):
    """
    Dynamic ATSS (Zhang et al., J. Imaging 8(7):193, 2022): as :class:`ATSSAssigner`, by the sum of
    two IoUs with the ground truth, the anchor's and the predicted box's. The threshold is the sum
    of their means and standard deviations.
    """

    def _ious(self, levels, centers, boxes, matches, outputs):
        if outputs is None:
            raise ValueError("DynamicATSSAssigner needs the `outputs` of the network")
        ious = super()._ious(levels, centers, boxes, matches, outputs)
        return [*ious, aligned_iou(outputs.predict(matches), boxes)]


def build_assigner(cfg: CfgNode, input_shape: list[ShapeSpec]) -> nn.Module:
    """The choice of ``MODEL.GFL.ASSIGNER``, for features of these shapes, one a level."""
    return ASSIGNER_REGISTRY.get(cfg.MODEL.GFL.ASSIGNER).from_config(cfg, input_shape)


def _offsets(topk: int) -> Tensor:
    """
    Steps (x, y) from the cell nearest to a point, within which its ``topk`` nearest cells lie:
    shape (O, 2), float32, in the order of the grid.

    Take a cell that is x columns and y rows away from the nearest one. The (|x| + 1) * (|y| + 1)
    cells of the rectangle between the two are all as near or nearer. So a cell among the topk
    nearest spans a rectangle of at most topk cells.
    """
    steps = []
    for y in range(1 - topk, topk):
        width = topk // (abs(y) + 1)
        steps += [(x, y) for x in range(1 - width, width)]
    return torch.tensor(steps, dtype=torch.float32)


def _threshold(iou: Tensor, is_candidate: Tensor) -> Tensor:
    """Mean + unbiased standard deviation of each box's candidates: (M, L, k) -> (M, 1, 1)."""
    count = is_candidate.sum(dim=(1, 2), keepdim=True)
    # The floors matter to boxes with at most one candidate: no spread.
    mean = (iou * is_candidate).sum(dim=(1, 2), keepdim=True) / count.clamp(min=1)
    squares = ((iou - mean).square() * is_candidate).sum(dim=(1, 2), keepdim=True)
    return mean + (squares / (count - 1).clamp(min=1)).sqrt()


def resolve_conflicts(matches: Matches, rank: Tensor, levels: Levels) -> Tensor:
    """
    Of the boxes that a location is positive for, it keeps the one of highest rank, of equals the
    first.

    Args:
        matches: ``is_positive`` may have conflicts.
        rank: shape (M, L, k), >= 0, such as an IoU.

    Returns:
        Tensor: shape (M, L, k), bool.
    """
    is_positive = matches.is_positive
    places, num_places = [], 0
    for i, shape in enumerate(levels.shapes):
        places.append(matches.places(i, shape) + num_places)
        num_places += len(levels.valid_sizes) * shape[0] * shape[1]
    place = torch.stack(places, dim=1)  # (M, L, k), one number for each location of the batch
    rank = torch.where(is_positive, rank, -1)
    best = rank.new_full((num_places,), -1)
    best.scatter_reduce_(0, place.flatten(), rank.flatten(), "amax")
    is_best = is_positive & (rank == best[place])
    box = torch.arange(len(place), device=place.device)[:, None, None]
    box = torch.where(is_best, box, len(place))
    first_box = box.new_full((num_places,), len(place))
    first_box.scatter_reduce_(0, place.flatten(), box.flatten(), "amin")
    return is_best & (box == first_box[place])
