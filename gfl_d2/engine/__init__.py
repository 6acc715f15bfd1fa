from .hooks import BestCheckpointer
from .metrics import read_metrics
from .solver import build_optimizer
from .trainer import Trainer

__all__ = ["BestCheckpointer", "Trainer", "build_optimizer", "read_metrics"]
