from .assigner import ATSSAssigner, DynamicATSSAssigner
from .backbone import build_gfl_res2net_fpn_backbone, build_gfl_resnet_fpn_backbone
from .background_loss import background_loss
from .box_ops import aligned_iou, bbox_to_distance, centerness, distance_to_bbox, integral
from .box_representation import BoxRepresentation, DiracDelta, Gaussian, GeneralDistribution
from .criterion import GFLCriterion, collect_samples
from .distillation import (
    BridgingCrossTask,
    ClassDistillation,
    DistillationTerm,
    LocalizationDistillation,
    ValuableRegionDistillation,
)
from .focal_quality import CenternessBranch, CenternessGuided, IoUBranch, IoUGuided, NoQuality
from .gfl import GFL
from .head import GFLHead
from .iou_aware_quality import MatchabilityAwareQuality, VarifocalQuality
from .locations import LocationGrid
from .losses import (
    distillation_loss,
    distribution_focal_loss,
    gaussian_kl_loss,
    giou_loss,
    iou_loss,
    quality_focal_loss,
)
from .quality import DistributionGuidedQuality, JointQuality, Quality, joint_logits
from .sapd import LevelSelector, SAPDAssigner
from .structures import GroundTruth, Levels, Matches, Outputs, Predictions, Samples
