from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem, ResNet

from gfl_d2.modeling import (
    GFL,
    ATSSAssigner,
    GeneralDistribution,
    GFLCriterion,
    GFLHead,
    JointQuality,
    LocationGrid,
)
from gfl_d2.modeling.backbone import LastLevelP6P7OnP5

_STRIDES = [8, 16, 32, 64, 128]

model = L(GFL)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(
                depth=50, stride_in_1x1=False, norm="${..stem.norm}"
            ),
            out_features=["res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=256,
        top_block=L(LastLevelP6P7OnP5)(channels="${..out_channels}"),
    ),
    head=L(GFLHead)(
        input_shape=[
            L(ShapeSpec)(channels="${....backbone.out_channels}", stride=stride)
            for stride in _STRIDES
        ],
        num_classes=80,
        num_convs=4,
        conv_dim=256,
        norm="GN",
        prior_prob=0.01,
        box=L(GeneralDistribution)(reg_max=16, bin_width=1.0, dfl_weight=0.25),
        quality=L(JointQuality)(beta=2.0, weight=1.0),
    ),
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    grid=L(LocationGrid)(strides=_STRIDES, offset=0.0, anchor_scale=8.0),
    assigner=L(ATSSAssigner)(topk=9),
    criterion=L(GFLCriterion)(
        box="${..head.box}",
        quality="${..head.quality}",
        bbox_loss="giou",
        bbox_weight=2.0,
        box_normalizer_min=1.0,
        box_weight_min=0.0,
    ),
    test_score_thresh=0.05,
    test_topk_candidates=1000,
    test_nms_thresh=0.6,
    max_detections_per_image=100,
    # RGB
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
)
