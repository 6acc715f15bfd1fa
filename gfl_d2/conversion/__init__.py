"""
Weights of other code bases: detectors of MMDetection and of the GFL authors' releases, there and
back, and ImageNet backbones with torchvision's names or of timm.

Names and shapes alone say what a file holds. The model that they describe is then built without
memory for its values, and has to have exactly the parameters that the file has.
"""

from .facts import check_config, describe, find_configs, find_differences
from .files import Checkpoint, check_output, read_checkpoint, write_checkpoint
from .mmdet import Conversion, from_mmdet, to_mmdet
from .timm_models import BUILDER as TIMM_BUILDER
from .timm_models import find_timm_model, from_timm
