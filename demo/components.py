"""
GFL's losses and box distributions in Detectron2's own detectors: RetinaNet and FCOS. Copy what you
need; docs/components.md explains it.
"""

import torch
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes
from torch import nn

from gfl_d2.modeling import GeneralDistribution, aligned_iou, giou_loss, quality_focal_loss


class WithGFL:
    """
    A detector with RetinaNet's methods, trained by Quality Focal Loss and Distribution Focal Loss.
    ``head.box`` is what the head predicts of a box, here in sizes of the anchor. Shapes: N images,
    R anchors of an image, P positives, C classes, V numbers a box side.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Between boxes and distances from the centre of an anchor to their sides, in pixels.
        self.box2box_transform = Box2BoxTransformLinear(normalize_by_size=False)

    def forward_training(self, images, features, predictions, gt_instances):
        anchors = self.anchor_generator(features)
        labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        gt_boxes = [getattr(boxes, "tensor", boxes) for boxes in gt_boxes]  # FCOS of Detectron2 0.6
        anchors = Boxes.cat(anchors).tensor.repeat(len(labels), 1)  # (N * R, 4)
        logits, values = (torch.cat(x, dim=1).flatten(0, 1) for x in self.split(predictions))
        return self.losses(anchors, torch.cat(labels), torch.cat(gt_boxes), logits, values)

    def losses(self, anchors, labels, gt_boxes, logits, values):
        """Of N * R anchors. A label of C is background, -1 is none."""
        is_positive = (labels >= 0) & (labels < self.num_classes)
        anchors, gt_boxes, values = (x[is_positive] for x in (anchors, gt_boxes, values))
        boxes = self.box2box_transform.apply_deltas(self.distances(values, anchors), anchors)
        quality = torch.zeros_like(labels, dtype=boxes.dtype)
        quality[is_positive] = aligned_iou(boxes.detach(), gt_boxes)
        used = labels >= 0
        qfl = quality_focal_loss(logits[used], labels[used], quality[used], reduction="sum")

        target = self.box2box_transform.get_deltas(anchors, gt_boxes) / size(anchors)
        weights = logits[is_positive].detach().sigmoid().amax(dim=1)  # the best score
        box_losses = {"loss_bbox": 2.0 * giou_loss(boxes, gt_boxes)}
        box_losses.update(self.head.box.losses(values, target))  # loss_dfl
        norm = weights.sum().clamp(min=1)
        box_losses = {name: (weights * x).sum() / norm for name, x in box_losses.items()}
        return {"loss_qfl": qfl / is_positive.sum().clamp(min=1), **box_losses}

    def forward_inference(self, images, features, predictions):
        anchors = self.anchor_generator(features)
        logits, values = self.split(predictions)
        deltas = [self.distances(v, a.tensor) for v, a in zip(values, anchors)]
        return [
            self.inference_single_image(anchors, [x[i].sigmoid() for x in logits], boxes, size)
            for i, size in enumerate(images.image_sizes)
            for boxes in [[x[i] for x in deltas]]
        ]

    def split(self, predictions):
        """Level by level, logits of shape (N, R, C) and box values of shape (N, R, 4 * V)."""
        channels = [self.num_classes, 4 * self.head.box.num_values]
        return self._transpose_dense_predictions(predictions, channels)

    def distances(self, values, anchors):
        """In pixels, shape (..., 4), from the centre of each anchor to the sides of its box."""
        return self.head.box.decode(values) * size(anchors)


def size(anchors):
    return Boxes(anchors).area().sqrt()[:, None]


class DistributionHead(RetinaNetHead):
    """RetinaNet's head, whose box predictor gives ``box``."""

    def __init__(self, *, box, num_anchors, **kwargs):
        super().__init__(num_anchors=num_anchors, **kwargs)
        self.box = box
        channels = 4 * box.num_values * num_anchors
        self.bbox_pred = nn.Conv2d(self.bbox_pred.in_channels, channels, kernel_size=3, padding=1)
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        nn.init.zeros_(self.bbox_pred.bias)


@META_ARCH_REGISTRY.register()
class GFLRetinaNet(WithGFL, RetinaNet):
    """RetinaNet with its anchors and its matcher. A side is at most two anchor sizes away."""

    @classmethod
    def from_config(cls, cfg):
        ret = super().from_config(cfg)
        shapes = [ret["backbone"].output_shape()[name] for name in ret["head_in_features"]]
        box = GeneralDistribution(reg_max=16, bin_width=1 / 8)
        ret["head"] = DistributionHead(box=box, **RetinaNetHead.from_config(cfg, shapes))
        return ret


class GFLFCOS(WithGFL, FCOS):
    """FCOS with its assignment. The head is GFL's own; there is no centerness."""
