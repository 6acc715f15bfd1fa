"""Soft Anchor-Point Detector: the choice "sapd" of ``MODEL.GFL.ASSIGNER``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from ..registry import ASSIGNER_REGISTRY
from .assigner import MIN_CENTER_DISTANCE, resolve_conflicts
from .background_loss import background_terms
from .box_ops import bbox_to_distance, centerness
from .distributed import all_reduce_mean
from .losses import iou_loss
from .precision import full_precision
from .structures import GroundTruth, Levels, Matches, Outputs, flatten_map

__all__ = ["LevelSelector", "SAPDAssigner"]

_POOLED = 7  # cells of a box, each way
_SAMPLES = 2  # of a cell, each way


@ASSIGNER_REGISTRY.register("sapd")
class SAPDAssigner(nn.Module):
    """
    The training strategy of SAPD (Zhu et al., ECCV 2020). For each ground-truth box and level,

    1. the locations in the box shrunk about its centre by ``shrink`` are positive; if there is
       none, the nearest to the centre, by row and by column, that the box contains. Of several
       boxes the smallest takes a location, of equals the first;
    2. a positive weighs ``min(l, r) * min(t, b) / (max(l, r) * max(t, b))``, of the distances to
       the sides of the box (the square of the centerness),
    3. times the weight of the level: the probability that ``selector`` gives it, on the
       ``num_levels`` most probable levels, 0 on others. In the first ``hard_iterations`` it is 1 on
       the best level alone: the one where the box's own loss is smallest.

    The box's own loss is the mean of focal loss and -ln IoU over its positives on the level. The
    selector learns by cross-entropy, the ``loss_level``, to choose the best level. The weights have
    no gradient.

    A positive of weight 0 has no loss, not that of background either. No shape depends on a value:
    the candidates are as many as the largest shrunk box of an image has.

    Shapes: as in :class:`ATSSAssigner`.
    """

    # Losses of the parts of a batch do not add up to those of the batch.
    adds_up = False

    def __init__(
        self,
        selector: LevelSelector,
        *,
        hard_iterations: int,
        shrink: float = 0.2,
        num_levels: int = 3,
        level_weight: float = 0.1,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
    ):
        """
        Args:
            selector: scores the levels of each box.
            hard_iterations: how many begin the training with one level for each box.
            shrink: side of the shrunk box, in sides of the box, in (0, 1].
            num_levels: how many levels a box learns on, after that.
            level_weight: weight of the selector's loss.
            focal_loss_alpha, focal_loss_gamma: of the loss by which levels are compared. A negative
                alpha is none.
        """
        super().__init__()
        self.selector = selector
        self.hard_iterations = hard_iterations
        self.shrink = shrink
        self.num_levels = num_levels
        self.level_weight = level_weight
        self.alpha = focal_loss_alpha
        self.gamma = focal_loss_gamma

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> SAPDAssigner:
        gfl = cfg.MODEL.GFL
        return cls(
            LevelSelector(input_shape),
            hard_iterations=cfg.SOLVER.MAX_ITER // 2,
            shrink=gfl.SAPD_SHRINK,
            num_levels=gfl.SAPD_LEVELS,
            level_weight=gfl.LOSS_LEVEL_WEIGHT,
            focal_loss_alpha=gfl.FOCAL_LOSS_ALPHA,
            focal_loss_gamma=gfl.FOCAL_LOSS_GAMMA,
        )

    def forward(self, levels: Levels, gt: GroundTruth, outputs: Outputs | None = None) -> Matches:
        """
        Args:
            levels: where the locations are.
            gt: the boxes to assign them to.
            outputs: of the network, for the same batch.

        Returns:
            Matches: with weights, and the loss of the selector, a mean over the boxes of all
            processes that have a location.

        Raises:
            ValueError: no outputs.
        """
        if outputs is None:
            raise ValueError("SAPDAssigner needs the `outputs` of the network")
        matches = self._candidates(levels, gt)
        losses = self._level_losses(matches, gt, outputs)
        has_positives = losses.isfinite()
        is_learned, best = has_positives.any(dim=1), losses.argmin(dim=1)

        logits = full_precision(self.selector(outputs.features, gt))
        loss = F.cross_entropy(logits, best, reduction="none")
        count = all_reduce_mean(is_learned.sum().to(loss)).clamp(min=1 / comm.get_world_size())
        loss = self.level_weight * torch.where(is_learned, loss, 0).sum() / count

        if outputs.iteration < self.hard_iterations:
            level_weight = F.one_hot(best, logits.shape[1]) * is_learned[:, None]
        else:
            probs = torch.where(has_positives, logits.detach().softmax(dim=1), 0)
            top = probs.topk(min(self.num_levels, logits.shape[1]), dim=1)
            level_weight = torch.zeros_like(probs).scatter(1, top.indices, top.values)
        centers = levels.centers(matches.row, matches.column)
        weight = centerness(bbox_to_distance(centers, gt.boxes[:, None, None])).square()
        return matches._replace(
            weight=weight * level_weight[:, :, None], losses={"loss_level": loss}
        )

    @torch.no_grad()
    def _candidates(self, levels: Levels, gt: GroundTruth) -> Matches:
        """The cells around the centres of the boxes, and which of them are positive."""
        shapes = torch.tensor(levels.shapes).to(gt.boxes.device, non_blocking=True)
        limits = torch.minimum(levels.valid_sizes, shapes).flip(-1)[gt.image]  # (M, L, 2)
        strides = levels.strides[:, None]
        # What of a box lies outside the image has no locations.
        end = (limits * strides).amin(dim=1).repeat(1, 2)
        boxes = gt.boxes.clamp(min=0).minimum(end)[:, None]  # (M, 1, 4)
        center, side = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
        half = torch.maximum(self.shrink * side, strides) / 2  # (M, L, 2)
        # Rounding must not leave out a location on the border.
        first = ((center - half - levels.first[:, None]) / strides - 1e-3).ceil().clamp(min=0)

        # The most columns and rows that a shrunk box can have on any level, and one for rounding.
        width, height = (
            max(int(max(self.shrink * shape[axis], 1)) + 2 for shape in levels.shapes)
            for axis in (1, 0)
        )
        steps = torch.arange(width * height, device=first.device)
        row = torch.div(steps, width, rounding_mode="floor")
        steps = torch.stack((steps - row * width, row), dim=-1)  # (k, 2)
        cells = first[:, :, None].long() + steps  # (M, L, k, 2)
        column, row = cells.unbind(dim=-1)
        centers = levels.centers(row, column)
        is_inside = bbox_to_distance(centers, gt.boxes[:, None, None]).amin(dim=-1)
        is_inside = (is_inside > MIN_CENTER_DISTANCE) & (cells < limits[:, :, None]).all(dim=-1)
        is_near = ((centers - center[:, :, None]).abs() <= half[:, :, None]).all(dim=-1)
        is_positive = is_near & is_inside
        # Cell (0, 0) where there is none.
        row, column = torch.where(is_positive, row, 0), torch.where(is_positive, column, 0)
        matches = Matches(gt.image, row, column, is_positive)
        area = (gt.boxes[:, 2:] - gt.boxes[:, :2]).prod(dim=1)
        order = area.sort(stable=True).indices.argsort()
        rank = (len(area) - order).to(area)[:, None, None].expand(is_positive.shape)
        return matches._replace(is_positive=resolve_conflicts(matches, rank, levels))

    @torch.no_grad()
    def _level_losses(self, matches: Matches, gt: GroundTruth, outputs: Outputs) -> Tensor:
        """Shape (M, L): the mean loss of each box's positives, infinite where it has none."""
        boxes = outputs.predict(matches)
        target = gt.boxes[:, None, None].expand_as(boxes)
        loss = iou_loss(boxes.flatten(0, 2), target.flatten(0, 2)).view(matches.row.shape)
        focal_losses = [
            self._focal_loss(x, matches.places(i, x.shape), gt.classes[:, None])
            for i, x in enumerate(outputs.predictions.class_logits)
        ]
        loss = loss + torch.stack(focal_losses, dim=1)
        count = matches.is_positive.sum(dim=2)
        mean = torch.where(matches.is_positive, loss, 0).sum(dim=2) / count
        return torch.where(count > 0, mean, torch.inf)

    def _focal_loss(self, logits: Tensor, places: Tensor, classes: Tensor) -> Tensor:
        """
        Shape (M, k), the sum over all classes, of a map of shape (N, C, H, W), at places in
        :func:`flatten_map` of it, for boxes of these classes, (M, 1).
        """
        # Of the whole map, since boxes have many candidates in common.
        logits = full_precision(flatten_map(logits))
        background = background_terms(logits, self.gamma).sum(dim=1)
        own = logits[places, classes]
        others = background[places] - background_terms(own, self.gamma)
        negative_weight = 1 - self.alpha if self.alpha >= 0 else 1.0
        own = sigmoid_focal_loss(own, torch.ones_like(own), alpha=self.alpha, gamma=self.gamma)
        return own + negative_weight * others


class LevelSelector(nn.Module):
    """
    The meta-selection network of SAPD: scores the levels of the pyramid for each box, from what
    RoIAlign gives of it on all of them.
    """

    def __init__(self, input_shape: Sequence[ShapeSpec], channels: int = 256):
        """
        Args:
            input_shape: the feature of each level, all with the same number of channels.
            channels: of the convolutions.
        """
        super().__init__()
        self.poolers = nn.ModuleList(
            ROIAlign((_POOLED, _POOLED), 1 / shape.stride, _SAMPLES) for shape in input_shape
        )
        dims = [sum(shape.channels for shape in input_shape), channels, channels, channels]
        layers = []
        for dim_in, dim_out in zip(dims, dims[1:]):
            # Without padding: 7x7, 5x5, 3x3, 1x1.
            layers += [nn.Conv2d(dim_in, dim_out, kernel_size=3), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, len(input_shape)))
        for layer in self.layers:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], gt: GroundTruth) -> Tensor:
        """
        Args:
            features: L maps of shape (N, channels, Hi, Wi).
            gt: the boxes.

        Returns:
            Tensor: shape (M, L), logits.
        """
        rois = torch.cat((gt.image[:, None].to(gt.boxes), gt.boxes), dim=1)
        pooled = [
            pool(full_precision(feature), rois.to(full_precision(feature)))
            for pool, feature in zip(self.poolers, features)
        ]
        return self.layers(torch.cat(pooled, dim=1))
