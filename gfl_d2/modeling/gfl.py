"""The GFL meta-architecture: assignment, criterion and post-processing around the dense head."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..config import check_gfl_config
from ..errors import InputError
from .assigner import ATSSAssigner, build_assigner
from .box_distribution import distance_to_bbox
from .criterion import GFLCriterion, Predictions
from .head import GFLHead
from .locations import (
    LevelGrid,
    Locations,
    build_grids,
    needs_fixed_shapes,
    to_device,
    valid_sizes,
)
from .precision import full_precision

__all__ = ["GFL"]


@META_ARCH_REGISTRY.register()
class GFL(DenseDetector):
    """
    Generalized Focal Loss (Li et al., NeurIPS 2020): a dense detector whose class scores are
    trained to be the IoU of the predicted box (QFL), and whose box sides are predicted as
    distributions (DFL).

    Both are choices, ``head.quality`` and ``head.box``: others make it ATSS, GFLv2 and what lies
    between.

    Shapes: N images, L levels, Ri locations on level i, R over all levels, C classes, V numbers a
    box side. Boxes are XYXY in pixels of the network input, distances in strides.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: GFLHead,
        head_in_features: list[str],
        grids: list[LevelGrid],
        assigner: ATSSAssigner,
        criterion: GFLCriterion,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        pixel_mean: list[float],
        pixel_std: list[float],
    ):
        """
        Args:
            backbone: gives the feature pyramid.
            head: predicts class logits and boxes on each level.
            head_in_features: names of the backbone's features that the head takes, from high to
                low resolution.
            grids: where the locations of each level are.
            assigner: called as :class:`ATSSAssigner` is.
            criterion: computes the losses, for the same representation of box and quality as the
                head's.
            test_score_thresh: only (location, class) pairs that score higher are kept.
            test_topk_candidates: best pairs kept on each level before NMS.
            test_nms_thresh: IoU above which NMS suppresses a box of the same class.
            max_detections_per_image: best detections kept after NMS.
            pixel_mean, pixel_std: per channel, in the order of the input images.

        Raises:
            ValueError: head and criterion differ in what is predicted.
        """
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        if (head.box, head.quality) != (criterion.box, criterion.quality):
            raise ValueError(
                f"The head is for {head.box} and {head.quality}, the criterion for "
                f"{criterion.box} and {criterion.quality}"
            )
        self.num_classes = head.num_classes
        self.grids = grids
        self.assigner = assigner
        self.criterion = criterion
        self._pending: _Pending | None = None

        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    @classmethod
    def from_config(cls, cfg):
        check_gfl_config(cfg)
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        missing = [name for name in cfg.MODEL.GFL.IN_FEATURES if name not in shapes]
        if missing:
            raise InputError(
                f"MODEL.GFL.IN_FEATURES names {missing}, but MODEL.BACKBONE.NAME "
                f"{cfg.MODEL.BACKBONE.NAME!r} gives {sorted(shapes)}"
            )
        feature_shapes = [shapes[name] for name in cfg.MODEL.GFL.IN_FEATURES]
        strides = [shape.stride for shape in feature_shapes]
        if strides != sorted(set(strides)):
            raise InputError(
                "MODEL.GFL.IN_FEATURES must go from high to low resolution, got "
                f"{list(cfg.MODEL.GFL.IN_FEATURES)} of strides {strides}"
            )
        if len({shape.channels for shape in feature_shapes}) > 1:
            raise InputError(
                "The features of MODEL.GFL.IN_FEATURES need the same number of channels, got "
                f"{[shape.channels for shape in feature_shapes]}"
            )
        head = GFLHead(cfg, feature_shapes)
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": list(cfg.MODEL.GFL.IN_FEATURES),
            "grids": build_grids(cfg, strides),
            "assigner": build_assigner(cfg),
            "criterion": GFLCriterion(
                box=head.box,
                quality=head.quality,
                bbox_weight=cfg.MODEL.GFL.LOSS_BBOX_WEIGHT,
                box_normalizer_min=cfg.MODEL.GFL.BOX_NORMALIZER_MIN,
            ),
            "test_score_thresh": cfg.MODEL.GFL.SCORE_THRESH_TEST,
            "test_topk_candidates": cfg.MODEL.GFL.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": cfg.MODEL.GFL.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], ...],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """
        Args:
            images: the batch.
            features: L feature maps.
            predictions: of :class:`GFLHead` for them.
            gt_instances: N Instances with ``gt_boxes`` and ``gt_classes``.

        Returns:
            dict[str, Tensor]: weighted scalars: ``loss_bbox`` and those of the representations,
            in GFL ``loss_qfl`` and ``loss_dfl``.
        """
        predictions = Predictions(*predictions)
        locations = self._locations(features, images.image_sizes)
        assignment = self.assigner(
            locations,
            [gt.gt_boxes.tensor for gt in gt_instances],
            functools.partial(self._decode, predictions.boxes, locations),
        )
        gt_classes = torch.cat([gt.gt_classes for gt in gt_instances])
        losses, diagnostics = self.criterion(predictions, locations, assignment, gt_classes)
        self._log(diagnostics)
        return losses

    def _locations(self, features: list[Tensor], image_sizes: list[tuple[int, int]]) -> Locations:
        sizes = [tuple(feature.shape[-2:]) for feature in features]
        divisibility = self.backbone.size_divisibility
        return Locations(
            self.grids, sizes, valid_sizes(image_sizes, self.grids, sizes, divisibility)
        )

    @torch.no_grad()
    def _decode(
        self, maps: list[Tensor], locations: Locations, image: Tensor, location: Tensor
    ) -> Tensor:
        """
        Args:
            maps: of each level, shape (N, 4 * V, Hi, Wi), predictions of boxes.
            locations: of the batch.
            image: int64 in [0, N), broadcastable to ``location``.
            location: shape (...), int64 in [0, R).

        Returns:
            Tensor: shape (..., 4), boxes.
        """
        predictions = torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)
        distances = self.head.box.decode(predictions[image, location])
        strides = locations.strides(location.device)[location, None]
        centers = locations.centers(location.device)[location]
        return distance_to_bbox(centers, distances * strides)

    def _log(self, diagnostics: dict[str, Tensor]) -> None:
        """
        Put scalars into the event storage. A GPU is not waited for: its scalars come one iteration
        late, or not at all if it is even later. What is captured in a CUDA graph logs nothing.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        values = torch.stack(list(diagnostics.values()))
        if values.is_cuda:
            values, self._pending = self._pending, _Pending(values)
            values = values.get() if values is not None else None
        if values is not None:
            for name, value in zip(diagnostics, values.tolist()):
                get_event_storage().put_scalar(f"gfl/{name}", value)

    def forward_inference(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], ...],
    ) -> list[Instances]:
        """
        Args:
            images: the batch.
            features: L feature maps.
            predictions: of :class:`GFLHead` for them.

        Returns:
            list[Instances]: per image ``pred_boxes`` (pixels of the network input), ``scores`` and
            ``pred_classes``, by descending score.
        """
        candidates = self._candidates(Predictions(*predictions), images.image_sizes)
        # Boxes that lay in the padding have no area left, when they are clipped.
        keep = (candidates.scores > 0) & Boxes(candidates.boxes).nonempty()
        (kept,) = keep.nonzero(as_tuple=True)
        # Image by image, in the same order.
        image, order = candidates.image[kept].sort(stable=True)
        numbers = torch.arange(len(images), device=image.device)[:, None]
        counts = (image == numbers).sum(dim=1).tolist()
        parts = (x[kept[order]].split(counts) for x in candidates[:3])
        return [
            self._suppress(Instances(size, pred_boxes=Boxes(b), scores=s, pred_classes=c))
            for size, b, s, c in zip(images.image_sizes, *parts)
        ]

    def _suppress(self, instances: Instances) -> Instances:
        """The best of an image, after NMS."""
        keep = batched_nms(
            instances.pred_boxes.tensor,
            instances.scores,
            instances.pred_classes,
            self.test_nms_thresh,
        )
        return instances[keep[: self.max_detections_per_image]]

    def _candidates(
        self, predictions: Predictions, image_sizes: list[tuple[int, int]]
    ) -> _Candidates:
        """Level by level, image by image and by descending score, clipped to the image."""
        quality = predictions.quality or [None] * len(predictions.logits)
        logits = map(self.head.quality.score_logits, predictions.logits, quality)
        levels = []
        for grid, maps, boxes in zip(self.grids, logits, predictions.boxes):
            width = maps.shape[-1]
            image, index, best = self._select(maps.permute(0, 2, 3, 1).flatten(1))
            location = index.div(self.num_classes, rounding_mode="floor")
            row = location.div(width, rounding_mode="floor")
            column = location - row * width
            distances = self.head.box.decode(boxes.permute(0, 2, 3, 1)[image, row, column])
            centers = grid.centers(torch.stack((column, row), dim=1))
            boxes = distance_to_bbox(centers, distances * grid.stride)
            classes = index - location * self.num_classes
            levels.append((boxes, best.sigmoid(), classes, image))
        boxes, scores, classes, image = (torch.cat(parts) for parts in zip(*levels))
        limits = to_device([(w, h, w, h) for h, w in image_sizes], boxes.device)[image]
        return _Candidates(boxes.clamp(min=0).minimum(limits), scores, classes, image)

    def _select(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        The best (location, class) pairs of one level that are above the threshold. On a GPU, which
        would have to be waited for to learn how many these are, others are among them.

        Args:
            logits: shape (N, Ri * C), of the scores.

        Returns:
            image (Tensor), index (Tensor), best (Tensor): shape (K,), of each the image, the place
            in it and the logit, -inf for the others; image by image, by descending logit.
        """
        # Of few pairs the score is needed: the threshold is one of logits.
        logits, threshold = full_precision(logits), _logit(self.test_score_thresh)
        if needs_fixed_shapes(logits):
            best, index = logits.topk(min(self.test_topk_candidates, logits.shape[1]), dim=1)
            best = torch.where(best > threshold, best, -torch.inf)
            image = torch.arange(len(logits), device=logits.device)[:, None].expand_as(index)
            return image.flatten(), index.flatten(), best.flatten()
        images = []
        for i, x in enumerate(logits):
            (index,) = (x > threshold).nonzero(as_tuple=True)
            best, order = x[index].topk(min(len(index), self.test_topk_candidates))
            images.append((torch.full_like(index, i)[: len(best)], index[order], best))
        return tuple(torch.cat(parts) for parts in zip(*images))


class _Candidates(NamedTuple):
    """What may be detected in a batch. Shapes: K candidates, of which those of score 0 are none."""

    boxes: Tensor  # (K, 4)
    scores: Tensor  # (K,)
    classes: Tensor  # (K,), int64 in [0, C)
    image: Tensor  # (K,), int64 in [0, N)


class _Pending:
    """Values on their way from a GPU."""

    def __init__(self, values: Tensor):
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(values.device))

    def __reduce__(self):
        # Not to be copied or saved with the model.
        return type(None), ()

    def get(self) -> Tensor | None:
        """The values, or None if they have not arrived."""
        return self._values if self._done.query() else None


def _logit(score: float) -> float:
    return math.log(score / (1 - score)) if score > 0 else -math.inf
