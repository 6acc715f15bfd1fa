"""Small models for tests."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from gfl_d2 import load_config
from gfl_d2.config import check_config
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
from gfl_d2.modeling.assigner import build_assigner
from gfl_d2.modeling.box_representation import build_box_representation
from gfl_d2.modeling.distillation import build_distillation
from gfl_d2.modeling.quality import build_quality

STRIDES = (8, 16, 32, 64, 128)
NAMES = tuple(f"p{i}" for i in range(3, 8))

QUALITIES = (
    "joint", "dgqp", "vfl", "mal", "none", "centerness", "iou", "centerness_guided", "iou_guided"
)  # fmt: skip
# Some for the assigner "sapd", the first those of the paper.
OF_SAPD = (("none", "dirac"), ("dgqp", "general"), ("iou_guided", "gaussian"), ("mal", "dirac"))
# Combinations of MODEL.GFL.QUALITY, BOX_REPRESENTATION and ASSIGNER: every one but of "sapd".
CHOICES = [
    (quality, box, assigner)
    for quality in QUALITIES
    for box in ("general", "dirac", "gaussian")
    for assigner in ("atss", "dynamic_atss")
    if quality != "dgqp" or box == "general"
] + [(quality, box, "sapd") for quality, box in OF_SAPD]


# Every term of distillation, for those that take one combination.
DISTILLED = ("joint", "general", "atss", "MODEL.GFL.DISTILL.TERMS", "['ld','ld_vlr','kd','bckd']")


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


class TinyBackbone(Backbone):
    """P3 to P7 by one convolution each: what is tested comes after it."""

    size_divisibility = 32

    def __init__(self, channels: int = 32):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(3, channels, kernel_size=8, stride=8),
                *(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(4)),
            ]
        )

    def output_shape(self):
        channels = self.convs[0].out_channels
        return {n: ShapeSpec(channels=channels, stride=s) for n, s in zip(NAMES, STRIDES)}

    def forward(self, x):
        features = {}
        for name, conv in zip(NAMES, self.convs):
            features[name] = x = conv(x)
        return features


@BACKBONE_REGISTRY.register()
def build_tiny_backbone(cfg, input_shape: ShapeSpec) -> TinyBackbone:
    return TinyBackbone()


# Options of :func:`build_gfl` for a whole ResNet and FPN, small ones.
WITH_RESNET = ("MODEL.BACKBONE.NAME", "build_gfl_resnet_fpn_backbone")


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


def gfl_of_choices(features: list[torch.Tensor], *choices: str) -> GFL:
    """GFL on given features: a small head with three classes, and these choices and options."""
    cfg = small_config(*choices)
    return gfl_on_features(
        features,
        num_classes=3,
        num_convs=1,
        conv_dim=64,
        box=build_box_representation(cfg),
        quality=build_quality(cfg),
        assigner=build_assigner(cfg, list(GivenFeatures(features).output_shape().values())),
        criterion={"distillation": build_distillation(cfg)},
    )


def small_config(
    quality: str = "joint", box: str = "general", assigner: str = "atss", *opts
) -> CfgNode:
    """Of a small GFL of these choices, with three classes; ``opts`` are keys and values."""
    cfg = _read_config("gfl_R_18_FPN_bccd_reference.yaml").clone()
    cfg.defrost()
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_tiny_backbone"),
            *("MODEL.RESNETS.ZERO_INIT_RESIDUAL", False, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.GFL.CONV_DIM", 64, "MODEL.GFL.NUM_CONVS", 1),
            *("MODEL.GFL.QUALITY", quality, "MODEL.GFL.BOX_REPRESENTATION", box),
            *("MODEL.GFL.ASSIGNER", assigner, *opts),
        ]
    )
    check_config(cfg)
    cfg.freeze()
    return cfg


@functools.cache
def _read_config(name: str) -> CfgNode:
    """Parsing takes longer than a small model."""
    return load_config(str(Path(__file__).parent.parent / "configs" / name))


def build_gfl(*args) -> GFL:
    """The model of :func:`small_config`."""
    torch.manual_seed(0)
    return build_model(small_config(*args))


def make_input(boxes=((10.0, 8.0, 70.0, 60.0), (30.0, 20.0, 90.0, 50.0)), size=(64, 96)) -> dict:
    """An image of random pixels, always the same, with boxes of classes 0, 1, 2, 0, ..."""
    gt = Instances(size)
    gt.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    gt.gt_classes = torch.arange(len(boxes)) % 3
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 255
    return {"image": pixels, "instances": gt}


def train_step(model: nn.Module, inputs: list[dict]) -> dict[str, torch.Tensor]:
    """One of SGD. The losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with EventStorage():
        losses = model.train()(inputs)
    sum(losses.values()).backward()
    optimizer.step()
    return losses


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
