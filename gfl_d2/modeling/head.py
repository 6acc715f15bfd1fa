"""The dense head of GFL."""

import math

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from ..errors import InputError
from .box_representation import BoxRepresentation, GeneralDistribution, build_box_representation
from .quality import JointQuality, Quality, build_quality

__all__ = ["GFLHead", "head_input_shapes"]


class GFLHead(nn.Module):
    """
    Two towers of 3x3 convolutions, shared by all levels, that predict for each location C class
    logits, V numbers for the distance to each of the four sides of a box, and, if ``quality`` asks
    for it, a logit of the localization quality. In GFL, V = n + 1 logits of a distribution, and
    the class scores stand for class and quality at once.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_convs: int = 4,
        conv_dim: int = 256,
        norm: str = "GN",
        prior_prob: float = 0.01,
        box: BoxRepresentation = GeneralDistribution(),
        quality: Quality = JointQuality(),
    ):
        """
        Args:
            input_shape: the feature of each level. ValueError if their channels differ.
            num_classes: C.
            num_convs, conv_dim: convolutions per tower, and their channels.
            norm: normalization in the towers, see :func:`detectron2.layers.get_norm`.
            prior_prob: score of every class at initialization.
            box: what is predicted of a box.
            quality: what scores stand for beside the class, and what predicts it.
        """
        super().__init__()
        in_channels = {shape.channels for shape in input_shape}
        if len(in_channels) != 1:
            raise ValueError(f"All levels need the same number of channels, got {in_channels}")
        self.num_classes = num_classes
        self.box = box
        self.quality = quality

        dims = [in_channels.pop()] + [conv_dim] * num_convs
        self.cls_subnet = _tower(dims, norm)
        self.bbox_subnet = _tower(dims, norm)
        self.cls_score = nn.Conv2d(dims[-1], num_classes, kernel_size=3, padding=1)
        self.bbox_pred = nn.Conv2d(dims[-1], 4 * box.num_values, kernel_size=3, padding=1)
        self.quality_pred = quality.build_predictor(dims[-1], box)
        # One factor per level, on the box values.
        self.scales = nn.Parameter(torch.ones(len(input_shape)))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.GFL.NUM_CLASSES,
            "num_convs": cfg.MODEL.GFL.NUM_CONVS,
            "conv_dim": cfg.MODEL.GFL.CONV_DIM,
            "norm": cfg.MODEL.GFL.NORM,
            "prior_prob": cfg.MODEL.GFL.PRIOR_PROB,
            "box": build_box_representation(cfg),
            "quality": build_quality(cfg),
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], ...]:
        """
        Args:
            features: one tensor of shape (N, channels, Hi, Wi) per level.

        Returns:
            class_logits (list[Tensor]): per level, shape (N, C, Hi, Wi).
            box_values (list[Tensor]): per level, shape (N, 4 * V, Hi, Wi); the V numbers of left
                come first, then top, right, bottom.
            quality_logits (list[Tensor]): per level, shape (N, 1, Hi, Wi). Only where ``quality``
                has a predictor.

        Raises:
            ValueError: the head was built for another number of levels.
        """
        if len(features) != len(self.scales):
            raise ValueError(f"Expected {len(self.scales)} levels, got {len(features)}")
        predictions = [self._forward_level(*level) for level in zip(features, self.scales)]
        return tuple(list(maps) for maps in zip(*predictions))

    def _forward_level(self, feature: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        class_logits = self.cls_score(self.cls_subnet(feature))
        bbox_feature = self.bbox_subnet(feature)
        box_values = self.bbox_pred(bbox_feature) * scale
        if self.quality_pred is None:
            return class_logits, box_values
        return class_logits, box_values, self.quality_pred(bbox_feature, box_values)


def head_input_shapes(cfg, backbone: Backbone) -> list[ShapeSpec]:
    """
    Returns:
        list[ShapeSpec]: of the features in ``MODEL.GFL.IN_FEATURES``.

    Raises:
        InputError: the backbone does not give them, or they do not fit together.
    """
    names, shapes = list(cfg.MODEL.GFL.IN_FEATURES), backbone.output_shape()
    missing = [name for name in names if name not in shapes]
    if missing:
        raise InputError(
            f"MODEL.GFL.IN_FEATURES names {missing}, but MODEL.BACKBONE.NAME "
            f"{cfg.MODEL.BACKBONE.NAME!r} gives {sorted(shapes)}"
        )
    strides = [shapes[name].stride for name in names]
    if strides != sorted(set(strides)):
        raise InputError(
            f"MODEL.GFL.IN_FEATURES must go from high to low resolution, got {names} of strides "
            f"{strides}"
        )
    channels = [shapes[name].channels for name in names]
    if len(set(channels)) > 1:
        raise InputError(
            "The features of MODEL.GFL.IN_FEATURES need the same number of channels, got "
            f"{channels}"
        )
    return [shapes[name] for name in names]


def _tower(dims: list[int], norm: str) -> nn.Sequential:
    """3x3 convolution, normalization and ReLU for each consecutive pair of ``dims``."""
    layers = []
    for dim_in, dim_out in zip(dims, dims[1:]):
        extra = {"norm": get_norm(norm, dim_out), "activation": nn.ReLU(inplace=True)}
        layers.append(Conv2d(dim_in, dim_out, 3, padding=1, bias=not norm, **extra))
    return nn.Sequential(*layers)
