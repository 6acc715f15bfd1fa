"""Evaluators by the type of a dataset."""

import importlib.util
from collections.abc import Iterable

from detectron2 import evaluation
from detectron2.data import MetadataCatalog

from ..errors import InputError

__all__ = ["build_evaluator", "check_evaluators"]

# What "coco" evaluates is boxes and their classes alone, and so for the others. Those of Cityscapes
# and of panoptic segmentation evaluate masks.
_KNOWN = ("coco", "lvis", "pascal_voc")


def check_evaluators(names: Iterable[str]) -> None:
    """
    Raises:
        InputError: the ``evaluator_type`` in a dataset's metadata is unknown here, or what it needs
            is not installed.
    """
    for name in names:
        kind = _evaluator_type(name)
        if kind not in _KNOWN:
            raise InputError(
                f"Dataset '{name}' has the evaluator_type {kind!r}, and boxes are evaluated for "
                f"{', '.join(map(repr, _KNOWN))} only: set MetadataCatalog.get('{name}')."
                "evaluator_type to one of them, or override Trainer.build_evaluator"
            )
        if kind == "lvis" and importlib.util.find_spec("lvis") is None:
            raise InputError(f"Evaluation of dataset '{name}' needs LVIS' API: pip install lvis")


def build_evaluator(name: str, output_folder: str) -> evaluation.DatasetEvaluator:
    """
    Detectron2's evaluator for a registered dataset, by the ``evaluator_type`` in its metadata:
    COCO's where there is none. It raises what :func:`check_evaluators` does.
    """
    check_evaluators([name])
    kind = _evaluator_type(name)
    if kind == "lvis":
        return evaluation.LVISEvaluator(name, output_dir=output_folder)
    if kind == "pascal_voc":
        return evaluation.PascalVOCDetectionEvaluator(name)
    fast = _has_fast_coco_eval()
    return evaluation.COCOEvaluator(name, output_dir=output_folder, use_fast_impl=fast)


def _evaluator_type(name: str) -> str:
    return MetadataCatalog.get(name).get("evaluator_type", "coco")


def _has_fast_coco_eval() -> bool:
    """Whether Detectron2's C++ COCO evaluation is there; pycocotools is what replaces it."""
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return hasattr(_C, "COCOevalEvaluateImages")
