"""The GFL meta-architecture: assignment, criterion and post-processing around the dense head."""

from __future__ import annotations

import functools
import math

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms, cat
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..config import check_gfl_config
from ..errors import InputError
from ..precision import full_precision
from .anchor_generator import build_anchor_generator
from .assigner import ATSSAssigner, build_assigner
from .box_distribution import distance_to_bbox
from .criterion import GFLCriterion, Predictions
from .head import GFLHead

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
        anchor_generator: DefaultAnchorGenerator,
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
            anchor_generator: one square anchor per location.
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
        self.anchor_generator = anchor_generator
        self.assigner = assigner
        self.criterion = criterion

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
            "anchor_generator": build_anchor_generator(cfg, strides),
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
        anchors = self.anchor_generator(features)
        centers, strides = _centers_and_strides(anchors, self.anchor_generator.strides)
        predictions = Predictions(
            *(full_precision(cat(levels, dim=1)) for levels in self._transpose(predictions))
        )
        valid = self._valid_locations(features, images.image_sizes)
        matched = [
            self.assigner(
                anchors,
                gt.gt_boxes,
                valid_i,
                functools.partial(self._decode, boxes.detach(), centers, strides),
            )
            for gt, valid_i, boxes in zip(gt_instances, valid, predictions.boxes)
        ]
        losses, diagnostics = self.criterion(
            predictions, centers, strides, gt_instances, torch.stack(matched), valid
        )
        # One transfer from the device for all.
        values = torch.stack(list(diagnostics.values())).tolist()
        for name, value in zip(diagnostics, values):
            get_event_storage().put_scalar(f"gfl/{name}", value)
        return losses

    def _decode(self, predictions: Tensor, centers: Tensor, strides: Tensor, index: Tensor):
        """
        Args:
            predictions: shape (R, 4 * V), of boxes.
            centers: shape (R, 2), in pixels.
            strides: shape (R,), in pixels.
            index: shape (...), int64 in [0, R).

        Returns:
            Tensor: shape (..., 4), boxes.
        """
        distances = self.head.box.decode(predictions[index]) * strides[index][..., None]
        return distance_to_bbox(centers[index], distances)

    def _transpose(self, predictions: tuple[list[Tensor], ...]) -> list[list[Tensor]]:
        """Per prediction and level, maps of shape (N, X, Hi, Wi) -> shape (N, Ri, X)."""
        return self._transpose_dense_predictions(
            predictions, [levels[0].shape[1] for levels in predictions]
        )

    def _valid_locations(
        self, features: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> Tensor:
        """
        Locations that belong to an image, rather than to what pads it to the size of the batch.
        Padding up to a multiple of the backbone's size divisibility counts as the image's own,
        as it is there whatever the batch.

        Returns:
            Tensor: shape (N, R), bool.
        """
        multiple = max(self.backbone.size_divisibility, 1)
        masks = []
        for feature, stride in zip(features, self.anchor_generator.strides):
            height, width = feature.shape[-2:]
            mask = torch.zeros(
                (len(image_sizes), height, width), dtype=torch.bool, device=feature.device
            )
            for mask_i, size in zip(mask, image_sizes):
                rows, columns = (
                    math.ceil(math.ceil(side / multiple) * multiple / stride) for side in size
                )
                mask_i[:rows, :columns] = True
            masks.append(mask.flatten(1))
        return torch.cat(masks, dim=1)

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
        anchors = self.anchor_generator(features)
        levels = [Predictions(*level) for level in zip(*self._transpose(predictions))]
        logits = [self.head.quality.score_logits(level.logits, level.quality) for level in levels]
        boxes = [level.boxes for level in levels]
        return [
            self._inference_single_image(
                anchors, [x[i] for x in logits], [x[i] for x in boxes], image_size
            )
            for i, image_size in enumerate(images.image_sizes)
        ]

    def _inference_single_image(
        self,
        anchors: list[Boxes],
        logits: list[Tensor],
        boxes: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """
        Args:
            anchors: per level.
            logits: per level, shape (Ri, C), of the scores.
            boxes: per level, shape (Ri, 4 * V), predictions.
            image_size: (height, width) that boxes are clipped to.
        """
        levels = zip(anchors, self.anchor_generator.strides, logits, boxes)
        candidates = [self._decode_candidates(*level) for level in levels]
        boxes, scores, classes = (cat(parts) for parts in zip(*candidates))
        boxes = Boxes(boxes)
        boxes.clip(image_size)
        # Boxes that lay in the padding have no area left.
        result = Instances(image_size, pred_boxes=boxes, scores=scores, pred_classes=classes)
        result = result[boxes.nonempty()]
        keep = batched_nms(
            result.pred_boxes.tensor, result.scores, result.pred_classes, self.test_nms_thresh
        )
        return result[keep[: self.max_detections_per_image]]

    def _decode_candidates(
        self, anchors: Boxes, stride: int, logits: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Select the best (location, class) pairs of one level and decode their boxes.

        Args:
            logits: shape (Ri, C), of the scores.
            boxes: shape (Ri, 4 * V), predictions.

        Returns:
            boxes (Tensor), scores (Tensor), classes (Tensor): shapes (K, 4), (K,) and (K,), by
            descending score.
        """
        scores = full_precision(logits).sigmoid().flatten()
        (index,) = (scores > self.test_score_thresh).nonzero(as_tuple=True)
        scores, order = scores[index].topk(min(len(index), self.test_topk_candidates))
        index = index[order]
        location = index.div(self.num_classes, rounding_mode="floor")
        distances = self.head.box.decode(boxes[location]) * stride
        boxes = distance_to_bbox(anchors.get_centers()[location], distances)
        return boxes, scores, index % self.num_classes


def _centers_and_strides(anchors: list[Boxes], strides: list[int]) -> tuple[Tensor, Tensor]:
    """Centres (R, 2) and strides (R,) of all locations, in pixels."""
    centers = Boxes.cat(anchors).get_centers()
    per_location = [
        centers.new_full((len(anchors_i),), stride) for anchors_i, stride in zip(anchors, strides)
    ]
    return centers, torch.cat(per_location)
