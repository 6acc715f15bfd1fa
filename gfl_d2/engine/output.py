"""The output folder of a training, which belongs to one training alone."""

from __future__ import annotations

import os

from detectron2.config import CfgNode

from ..errors import InputError
from .hooks import BestModelSaver

__all__ = ["check_output_folder", "inference_folder"]

# What a later training would be mixed with.
_OF_A_TRAINING = ("last_checkpoint", BestModelSaver.FILE_NAME, "metrics.json")


def check_output_folder(folder: str) -> None:
    """
    Check that a new training, which does not resume an earlier one, has the folder for itself.

    Raises:
        InputError: there are files of an earlier training.
    """
    paths = [os.path.join(folder, name) for name in _OF_A_TRAINING]
    # A training that came to nothing leaves an empty file of metrics.
    found = [path for path in paths if os.path.isfile(path) and os.path.getsize(path)]
    if found:
        raise InputError(
            f"OUTPUT_DIR {folder} holds an earlier training ({os.path.basename(found[0])}): go on "
            "with it by --resume, name another OUTPUT_DIR, or delete it"
        )


def inference_folder(cfg: CfgNode, dataset: str = "") -> str:
    """The folder of evaluation results; one of several datasets in DATASETS.TEST has its own."""
    has_own = dataset and len(cfg.DATASETS.TEST) > 1
    return os.path.join(cfg.OUTPUT_DIR, "inference", *([dataset] if has_own else []))
