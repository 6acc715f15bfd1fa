from .assigner import ATSSAssigner
from .backbone import build_gfl_resnet_fpn_backbone
from .box_distribution import aligned_iou, bbox_to_distance, distance_to_bbox, integral
from .criterion import GFLCriterion
from .gfl import GFL
from .head import GFLHead
from .losses import distribution_focal_loss, giou_loss, quality_focal_loss

__all__ = [
    "GFL",
    "ATSSAssigner",
    "GFLCriterion",
    "GFLHead",
    "aligned_iou",
    "bbox_to_distance",
    "build_gfl_resnet_fpn_backbone",
    "distance_to_bbox",
    "distribution_focal_loss",
    "giou_loss",
    "integral",
    "quality_focal_loss",
]
