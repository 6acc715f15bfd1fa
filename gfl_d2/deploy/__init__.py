from .compilation import compile_parts
from .fusing import fuse_norms
from .predictor import Predictor, has_fast_bfloat16, prepare_for_inference
from .tta import DenseDetectorWithTTA, input_config
