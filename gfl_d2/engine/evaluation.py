"""Evaluators by the type of a dataset."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Sequence

from detectron2 import evaluation
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.utils.file_io import PathManager

from ..coco_evaluation import COCOeval, evaluate_boxes, max_detections
from ..errors import InputError
from ..results import DATASET_FILE

__all__ = ["BoxEvaluator", "build_evaluator", "check_evaluators"]

logger = logging.getLogger(__name__)

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


def build_evaluator(
    name: str, output_folder: str, max_dets_per_image: int = 100
) -> evaluation.DatasetEvaluator:
    """
    The evaluator for a registered dataset, by the ``evaluator_type`` in its metadata: COCO's where
    there is none. It raises what :func:`check_evaluators` does.

    Args:
        max_dets_per_image: how many detections of a class the model may have in an image. COCO
            counts the best 100, and so does its evaluator here unless the model may have more.
    """
    check_evaluators([name])
    kind = _evaluator_type(name)
    if kind == "lvis":
        return evaluation.LVISEvaluator(name, output_dir=output_folder)
    if kind == "pascal_voc":
        return evaluation.PascalVOCDetectionEvaluator(name)
    return BoxEvaluator(name, output_folder, max_detections(max_dets_per_image))


class BoxEvaluator(evaluation.COCOEvaluator):
    """
    Detectron2's :class:`COCOEvaluator` for boxes, with its files, tables and metrics. What differs:

    * AP is computed by faster-coco-eval: pycocotools' numbers in a tenth of the time.
    * Image and annotation ids may be anything, image ids of several types too.
    * Data registered as a function is converted to COCO's format each time, as it may have changed.
    """

    def __init__(self, name: str, output_folder: str, max_dets_per_image: int = 100):
        """``max_dets_per_image``: of each class; the best ones count."""
        metadata = MetadataCatalog.get(name)
        options = {"output_dir": output_folder, "max_dets_per_image": max_dets_per_image}
        options["use_fast_impl"] = False
        if metadata.get("json_file"):
            super().__init__(name, **options)
        else:
            path = os.path.join(output_folder, f"{name}_coco_format.json")
            convert_to_coco_json(name, path, allow_cached=False)
            metadata.json_file = path
            try:
                super().__init__(name, **options)
            finally:  # the next evaluation does not take it for the data's own
                del metadata.json_file
        self._use_fast_impl = True  # Detectron2 logs by it whether the API is the official one

    def _tasks_from_predictions(self, predictions: list[dict]) -> list[str]:
        """None, so that Detectron2 writes the predictions, and computes nothing by itself."""
        self._coco_results = predictions
        return []

    def _eval_predictions(self, predictions: list[dict], img_ids: Sequence | None = None) -> None:
        super()._eval_predictions(predictions, img_ids)
        name, folder = self._metadata.name, self._output_dir
        with PathManager.open(os.path.join(folder, DATASET_FILE), "w") as file:
            file.write(name)
        if not self._do_evaluation:
            logger.info(f"'{name}' has no annotations: predictions are in {folder}, without AP.")
            return
        # COCO's API does not take an empty list.
        coco_eval = self._evaluate_boxes(img_ids) if self._coco_results else None
        names = self._metadata.get("thing_classes")
        self._results["bbox"] = self._derive_coco_results(coco_eval, "bbox", class_names=names)

    def _evaluate_boxes(self, img_ids: Sequence | None) -> COCOeval:
        data = self._coco_api.dataset
        classes = self._metadata.get("thing_dataset_id_to_contiguous_id")
        classes = classes or {category["id"]: category["id"] for category in data["categories"]}
        limits = self._max_dets_per_image
        coco_eval = evaluate_boxes(data, self._coco_results, classes, limits, img_ids)
        coco_eval.summarize()
        return coco_eval


def _evaluator_type(name: str) -> str:
    return MetadataCatalog.get(name).get("evaluator_type", "coco")
