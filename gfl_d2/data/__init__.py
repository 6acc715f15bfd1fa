from .coco_format import register_coco_format
from .dataset_mapper import GFLDatasetMapper
from .from_config import check_datasets, load_training_dicts, loading, register_datasets
