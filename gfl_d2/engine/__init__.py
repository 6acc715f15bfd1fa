from .bfloat16 import BFloat16Trainer
from .evaluation import build_evaluator, check_evaluators
from .hooks import BestModelSaver
from .metrics import read_metrics
from .output import check_output_folder, inference_folder
from .solver import build_optimizer
from .trainer import Trainer

__all__ = [
    "BFloat16Trainer",
    "BestModelSaver",
    "Trainer",
    "build_evaluator",
    "build_optimizer",
    "check_evaluators",
    "check_output_folder",
    "inference_folder",
    "read_metrics",
]
