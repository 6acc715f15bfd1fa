"""Small models for tests."""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone

from gfl_d2.modeling import (
    GFL,
    ATSSAssigner,
    BoxRepresentation,
    GeneralDistribution,
    GFLCriterion,
    GFLHead,
    JointQuality,
    LocationGrid,
    Quality,
)

STRIDES = (8, 16, 32, 64, 128)
NAMES = tuple(f"p{i}" for i in range(3, 8))


class GivenFeatures(Backbone):
    """A backbone that gives the features it was made with, whatever the image."""

    def __init__(self, features: list[torch.Tensor], size_divisibility: int = 32):
        super().__init__()
        self.features = features
        self._size_divisibility = size_divisibility

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def output_shape(self):
        return {
            name: ShapeSpec(channels=feature.shape[1], stride=stride)
            for name, feature, stride in zip(NAMES, self.features, STRIDES)
        }

    def forward(self, x):
        return dict(zip(NAMES, self.features))


def gfl_on_features(
    features: list[torch.Tensor],
    *,
    num_classes: int,
    num_convs: int = 4,
    conv_dim: int = 64,
    box: BoxRepresentation = GeneralDistribution(),
    quality: Quality = JointQuality(),
    criterion: dict | None = None,
    size_divisibility: int = 32,
    **kwargs,
) -> GFL:
    """
    GFL on given features; ``criterion`` has arguments of :class:`GFLCriterion`, ``kwargs`` go to
    :class:`GFL`.
    """
    backbone = GivenFeatures(features, size_divisibility)
    shapes = backbone.output_shape()
    names = list(shapes)
    return GFL(
        backbone=backbone,
        head=GFLHead(
            input_shape=[shapes[name] for name in names],
            num_classes=num_classes,
            num_convs=num_convs,
            conv_dim=conv_dim,
            box=box,
            quality=quality,
        ),
        head_in_features=names,
        grid=LocationGrid([shapes[name].stride for name in names]),
        assigner=kwargs.pop("assigner", ATSSAssigner(topk=9)),
        criterion=GFLCriterion(box=box, quality=quality, **(criterion or {})),
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
        **kwargs,
    )


def randomize_norms(model: torch.nn.Module) -> torch.nn.Module:
    """In eval mode, with statistics and affine parameters of BatchNorms as of a trained model."""
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model.eval()
