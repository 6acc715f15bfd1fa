"""Files of detections that an evaluation wrote."""

from __future__ import annotations

import collections
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

from .errors import InputError, name_some

__all__ = ["DATASET_FILE", "find_results", "load_results"]

# The file that Detectron2's COCOEvaluator writes, and what each of its detections has.
_RESULTS_FILE = "coco_instances_results.json"
DATASET_FILE = "dataset.txt"  # beside it: the name of the dataset
_RESULT_KEYS = {"image_id", "category_id", "bbox", "score"}


def find_results(path: str | Path, dataset: str) -> Path:
    """
    The file with the results of a registered dataset. ``path`` is the file itself, an
    ``OUTPUT_DIR``, or its folder ``inference``, which has a folder for each of several datasets.

    Raises:
        InputError: there are none, or they are in the folder of another dataset.
    """
    path = Path(path)
    if path.is_file():
        evaluated = _evaluated_dataset(path) or dataset
        if evaluated != dataset:
            raise InputError(f"{path} has the results of '{evaluated}', not of '{dataset}'")
        return path
    if not path.exists():
        raise InputError(
            f"{path}, for the results of dataset '{dataset}', does not exist: evaluate it first, "
            "by train_net.py --eval-only"
        )
    for folder in (path / "inference", path):
        files = [folder / dataset / _RESULTS_FILE, folder / _RESULTS_FILE]
        files = [file for file in files if file.is_file()]
        known = [file for file in files if _evaluated_dataset(file) == dataset]
        unknown = [file for file in files if _evaluated_dataset(file) is None]
        if known or unknown:
            return max(known, key=lambda file: file.stat().st_mtime_ns) if known else unknown[0]
    there = name_some(sorted(path.rglob(_RESULTS_FILE))) or "nothing"
    raise InputError(
        f"{path} has no results of dataset '{dataset}': evaluate it first, by train_net.py "
        f"--eval-only. What is there: {there}"
    )


def _evaluated_dataset(results: Path) -> str | None:
    """The name of the dataset, unless the file is of an evaluator that does not say."""
    if results.parent.name in DatasetCatalog:
        return results.parent.name
    try:
        return (results.parent / DATASET_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def load_results(
    path: str | Path, dataset: str, images: Collection, categories: Collection
) -> dict[Any, list[dict]]:
    """
    Read detections in COCO's result format.

    Args:
        path: of a ``coco_instances_results.json``.
        dataset: its name, for messages.
        images, categories: the ids that it has.

    Returns:
        dict: image id -> its detections; an empty list for an image without any.

    Raises:
        InputError: the file cannot be read, or its detections do not fit the dataset.
    """
    path = Path(path)
    try:
        results = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(results, list):
        raise InputError(f"{path} is not a list of detections with {sorted(_RESULT_KEYS)}")
    for index, result in enumerate(results):
        if not _is_detection(result):
            raise InputError(
                f"{path}: item {index} is not a detection with {sorted(_RESULT_KEYS)}, where bbox "
                f"has four finite numbers x, y, width, height: {str(result)[:200]}"
            )
    for key, known in {"image_id": images, "category_id": categories}.items():
        unknown = dict.fromkeys(r[key] for r in results if r[key] not in known)
        if unknown:
            reason = "they are of another dataset"
            if set(map(str, unknown)) <= set(map(str, known)):
                reason = f"write them as there, such as {next(iter(known))!r}"
            raise InputError(
                f"{path} has detections with {key} {name_some(map(repr, unknown))}, which dataset "
                f"'{dataset}' does not have: {reason}"
            )
    by_image = collections.defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    return by_image


def _is_detection(result: Any) -> bool:
    if not isinstance(result, dict) or not result.keys() >= _RESULT_KEYS:
        return False
    bbox, score = result["bbox"], result["score"]
    ids = (result["image_id"], result["category_id"])
    if any(isinstance(id, (list, dict)) for id in ids) or not isinstance(bbox, list):
        return False
    # False for NaN, and no error for an integer that no float can hold.
    numbers = (type(x) in (int, float) and abs(x) < 1e9 for x in (*bbox, score))
    return len(bbox) == 4 and all(numbers)
