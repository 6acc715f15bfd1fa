from .coco_format import register_coco_format
from .dataset_mapper import GFLDatasetMapper
from .from_config import check_datasets, load_training_dicts, loading, register_datasets

__all__ = [
    "GFLDatasetMapper",
    "check_datasets",
    "load_training_dicts",
    "loading",
    "register_coco_format",
    "register_datasets",
]
