from .coco_format import CocoData
from .dataset_mapper import GFLDatasetMapper
from .from_config import (
    check_datasets,
    check_registered,
    compare_classes,
    load_training_dicts,
    loading,
    register_datasets,
    resolve_num_classes,
)
from .images import read_image
from .registration import read_coco, register_coco_format
