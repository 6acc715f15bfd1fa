from .compilation import compile_parts
from .fusing import fuse_norms
from .precision import has_fast_bfloat16
from .predictor import Predictor, prepare_for_inference

__all__ = [
    "Predictor",
    "compile_parts",
    "fuse_norms",
    "has_fast_bfloat16",
    "prepare_for_inference",
]
