"""Generalized Focal Loss for Detectron2."""

from ._dependencies import check_dependencies

check_dependencies()

from . import modeling  # noqa: E402 (registers what configs name)
from .config import add_gfl_config, load_config  # noqa: E402

__version__ = "0.1.0"

__all__ = ["add_gfl_config", "load_config"]
