from .augmentation import OpenCVResizeTransform, adapt_augmentations, choose_filter
from .checks import (
    check_datasets,
    check_registered,
    compare_classes,
    load_training_dicts,
    loading,
    resolve_num_classes,
)
from .coco_data import CocoData
from .dataset_mapper import GFLDatasetMapper
from .from_config import register_datasets
from .images import read_image, to_array
from .registration import read_coco, register_coco_format
from .workers import naming_images_of_dead_workers
