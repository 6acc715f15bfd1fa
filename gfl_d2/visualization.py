"""Pictures of ground truth beside detections."""

from __future__ import annotations

import collections
import colorsys
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer

from .errors import InputError, name_some

__all__ = ["draw_comparison", "draw_results", "find_results", "save_picture"]

# The file that Detectron2's COCOEvaluator writes, and what each of its detections has.
_RESULTS_FILE = "coco_instances_results.json"
_RESULT_KEYS = {"image_id", "category_id", "bbox", "score"}
# Small images are enlarged until their shorter side has this many pixels, so that labels fit.
_MIN_SIDE = 400
_GAP = 8
_WHITE = 255


def draw_results(
    dataset: str,
    results: str | Path,
    num_images: int = 4,
    skip: int = 0,
    min_boxes: int = 0,
    score_thresh: float = 0.4,
) -> np.ndarray:
    """
    Draw images of a dataset below each other: ground truth on the left, detections on the right.

    Args:
        dataset: a registered name.
        results: a ``coco_instances_results.json`` of this dataset.
        num_images, skip: how many images, at most, and how many to leave out first.
        min_boxes, score_thresh: images with fewer annotated boxes are left out, and detections that
            score lower.

    Returns:
        ndarray: RGB, uint8, shape (H, W, 3).

    Raises:
        InputError: the results are of another dataset or cannot be read, or no image is left.
    """
    records = DatasetCatalog.get(dataset)
    metadata = MetadataCatalog.get(dataset)
    # The same in the results where the dataset has no ids of its own.
    same = {index: index for index in range(len(metadata.get("thing_classes", ())))}
    ids = metadata.get("thing_dataset_id_to_contiguous_id", same)
    by_image = _load_results(Path(results), dataset, records, ids)
    records = [r for r in records if len(r.get("annotations", [])) >= min_boxes]
    chosen = records[skip : skip + num_images]
    if not chosen:
        raise InputError(
            f"Nothing to draw: '{dataset}' has {len(records)} images of {min_boxes} boxes or more, "
            f"{skip} of them are left out, and {num_images} are asked for"
        )
    rows = []
    for record in chosen:
        image = read_image(record["file_name"], format="RGB")
        detections = _to_instances(by_image[record["image_id"]], image.shape[:2], ids)
        rows.append(draw_comparison(image, record, detections, metadata, score_thresh))
    return _stack_rows(rows)


def find_results(path: str | Path, dataset: str) -> Path:
    """
    The file with the results of a registered dataset. ``path`` is the file itself, an
    ``OUTPUT_DIR``, or its folder ``inference``, which has a folder for each of several datasets.

    Raises:
        InputError: there are none, or they are in the folder of another dataset.
    """
    path = Path(path)
    if path.is_file():
        if path.parent.name != dataset and path.parent.name in DatasetCatalog:
            raise InputError(f"{path} has the results of '{path.parent.name}', not of '{dataset}'")
        return path
    for folder in ("inference", "."):
        for file in (path / folder / dataset / _RESULTS_FILE, path / folder / _RESULTS_FILE):
            if file.is_file():
                return file
    there = name_some(sorted(path.rglob(_RESULTS_FILE))) or "nothing"
    raise InputError(f"{path} has no results of dataset '{dataset}'. What is there: {there}")


def save_picture(path: str | Path, picture: np.ndarray) -> None:
    """
    Write a picture, RGB, uint8, shape (H, W, 3). The path's ending says in which format; its folder
    is made if needed.

    Raises:
        InputError: it cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if cv2.imwrite(str(path), picture[:, :, ::-1]):
            return
        reason = "OpenCV could not write it"
    except (OSError, cv2.error) as error:
        reason = " ".join(str(error).split())
    raise InputError(f"Picture '{path}': {reason}")


def draw_comparison(
    image_rgb: np.ndarray,
    ground_truth: dict,
    predictions: Instances,
    metadata: Metadata,
    score_thresh: float = 0.5,
) -> np.ndarray:
    """
    Draw ground truth, on the left, beside detections with their scores, on the right. A class has
    the same colour on both sides.

    Args:
        image_rgb: shape (H, W, 3), uint8.
        ground_truth: an image in Detectron2's dataset format, boxes in pixels of ``image_rgb``.
        predictions: Instances with ``pred_boxes``, ``scores`` and ``pred_classes``, likewise.
        metadata: its ``thing_classes`` name the classes; without them they are numbered.
        score_thresh: detections that score lower are left out.

    Returns:
        ndarray: as ``image_rgb``, of another size. Small images are enlarged.
    """
    annotations = ground_truth.get("annotations", [])
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    classes = [a["category_id"] for a in annotations]
    notes = [" (crowd)" if a.get("iscrowd", 0) else "" for a in annotations]
    left = _draw_boxes(image_rgb, "ground truth", boxes, classes, notes, metadata)

    kept = predictions[predictions.scores >= score_thresh].to("cpu")
    boxes, classes = kept.pred_boxes.tensor.tolist(), kept.pred_classes.tolist()
    notes = [f" {score:.2f}" for score in kept.scores.tolist()]
    title = f"detections that score {score_thresh:g} or more"
    right = _draw_boxes(image_rgb, title, boxes, classes, notes, metadata)
    gap = np.full((left.shape[0], _GAP, 3), _WHITE, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def _load_results(path: Path, dataset: str, records: list[dict], ids: dict) -> dict:
    """Detections by image id, in COCO's result format; they must fit the dataset."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(results, list) or not all(
        isinstance(result, dict) and result.keys() >= _RESULT_KEYS for result in results
    ):
        raise InputError(f"{path} is not a list of detections with {sorted(_RESULT_KEYS)}")
    images = {record["image_id"] for record in records}
    for key, known in {"image_id": images, "category_id": ids}.items():
        unknown = dict.fromkeys(r[key] for r in results if r[key] not in known)
        if unknown:
            raise InputError(
                f"{path} has detections with {key} {name_some(unknown)}, which dataset "
                f"'{dataset}' does not have: they are of another dataset"
            )
    by_image = collections.defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    return by_image


def _to_instances(results: list[dict], image_size: tuple[int, int], ids: dict) -> Instances:
    """
    Detections of one image, from COCO's result format. ``image_size`` is (height, width), ``ids``
    has the class index for each category id.
    """
    boxes = torch.tensor([result["bbox"] for result in results]).reshape(-1, 4)
    return Instances(
        image_size,
        pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
        scores=torch.tensor([result["score"] for result in results]),
        pred_classes=torch.tensor([ids[result["category_id"]] for result in results]),
    )


def _stack_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures, (Hi, Wi, 3), below each other, the narrower ones filled up with white."""
    width = max(row.shape[1] for row in rows)
    margins = [((0, _GAP), (0, width - row.shape[1]), (0, 0)) for row in rows]
    padded = [np.pad(row, m, constant_values=_WHITE) for row, m in zip(rows, margins)]
    return np.concatenate(padded)[:-_GAP]


def _draw_boxes(
    image_rgb: np.ndarray,
    title: str,
    boxes: list[list[float]],
    classes: list[int],
    notes: list[str],
    metadata: Metadata,
) -> np.ndarray:
    """
    The image, enlarged if it is small, with boxes (x0, y0, x1, y1), and a title above it. A note
    stands behind the class of each box.
    """
    names = metadata.get("thing_classes")
    scale = max(1.0, _MIN_SIDE / min(image_rgb.shape[:2]))
    size = [round(scale * side) for side in image_rgb.shape[1::-1]]
    image = cv2.resize(image_rgb, size, interpolation=cv2.INTER_CUBIC)
    visualizer = Visualizer(image, metadata)
    visualizer.overlay_instances(
        boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale,
        labels=[f"{names[c] if names else c}{note}" for c, note in zip(classes, notes)],
        assigned_colors=[_color(c) for c in classes],
    )
    drawn = visualizer.output.get_image()
    bar = np.full((28, drawn.shape[1], 3), _WHITE, dtype=np.uint8)
    cv2.putText(bar, title, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([bar, drawn])


def _color(index: int) -> tuple[float, float, float]:
    """RGB in [0, 1], always bright; neighbouring indices are far apart in hue."""
    golden_ratio = 0.618034
    return colorsys.hsv_to_rgb((index * golden_ratio) % 1, 0.75, 1.0)
