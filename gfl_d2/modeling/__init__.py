from .assigner import Assignment, ATSSAssigner, DynamicATSSAssigner
from .backbone import build_gfl_res2net_fpn_backbone, build_gfl_resnet_fpn_backbone
from .box_distribution import aligned_iou, bbox_to_distance, distance_to_bbox, integral
from .box_representation import BoxRepresentation, DiracDelta, Gaussian, GeneralDistribution
from .criterion import GFLCriterion, Predictions, Targets
from .fused_qfl import quality_focal_loss_sum
from .gfl import GFL
from .head import GFLHead
from .locations import LevelGrid, Locations, Positives
from .losses import (
    distribution_focal_loss,
    gaussian_kl_loss,
    giou_loss,
    quality_focal_loss,
)
from .quality import (
    DistributionGuidedQuality,
    JointQuality,
    NoQuality,
    Quality,
    QualityBranch,
    QualityGuided,
    centerness,
    joint_logits,
)

__all__ = [
    "GFL",
    "ATSSAssigner",
    "Assignment",
    "BoxRepresentation",
    "DiracDelta",
    "DistributionGuidedQuality",
    "DynamicATSSAssigner",
    "GFLCriterion",
    "GFLHead",
    "Gaussian",
    "GeneralDistribution",
    "JointQuality",
    "LevelGrid",
    "Locations",
    "NoQuality",
    "Positives",
    "Predictions",
    "Quality",
    "QualityBranch",
    "QualityGuided",
    "Targets",
    "aligned_iou",
    "bbox_to_distance",
    "build_gfl_res2net_fpn_backbone",
    "build_gfl_resnet_fpn_backbone",
    "centerness",
    "distance_to_bbox",
    "distribution_focal_loss",
    "gaussian_kl_loss",
    "giou_loss",
    "integral",
    "joint_logits",
    "quality_focal_loss",
    "quality_focal_loss_sum",
]
