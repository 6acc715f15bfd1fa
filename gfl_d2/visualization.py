"""Pictures of ground truth beside detections."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer

__all__ = ["draw_comparison", "results_to_instances", "stack_rows"]

# Small images are enlarged until their shorter side has this many pixels, so that labels fit.
_MIN_SIDE = 400
_GAP = 8
_WHITE = 255


def draw_comparison(
    image_rgb: np.ndarray,
    ground_truth: Instances | dict,
    predictions: Instances,
    metadata: Metadata,
    score_thresh: float = 0.5,
) -> np.ndarray:
    """
    Draw ground truth, on the left, beside detections with their scores, on the right. A class has
    the same colour on both sides.

    Args:
        image_rgb: shape (H, W, 3), uint8.
        ground_truth: Instances with ``gt_boxes`` and ``gt_classes``, or an image in Detectron2's
            dataset format, in pixels of ``image_rgb``.
        predictions: Instances with ``pred_boxes``, ``scores`` and ``pred_classes``, likewise.
        metadata: its ``thing_classes`` name the classes; without them they are numbered.
        score_thresh: detections that score lower are left out.

    Returns:
        ndarray: RGB, uint8, shape (H', W', 3). Small images are enlarged.
    """
    names = metadata.get("thing_classes")
    boxes, classes, is_crowd = _unpack_ground_truth(ground_truth)
    labels = [
        _class_name(c, names) + (" (crowd)" if crowd else "") for c, crowd in zip(classes, is_crowd)
    ]
    left = _draw_boxes(image_rgb, "ground truth", boxes, classes, labels, metadata)

    kept = predictions[predictions.scores >= score_thresh].to("cpu")
    classes = kept.pred_classes.tolist()
    labels = [
        f"{_class_name(c, names)} {score:.2f}" for c, score in zip(classes, kept.scores.tolist())
    ]
    title = f"detections that score {score_thresh:g} or more"
    right = _draw_boxes(image_rgb, title, kept.pred_boxes.tensor.numpy(), classes, labels, metadata)
    gap = np.full((left.shape[0], _GAP, 3), _WHITE, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def results_to_instances(
    results: Sequence[dict], image_size: tuple[int, int], metadata: Metadata
) -> Instances:
    """
    Detections of one image from ``coco_instances_results.json``, which COCOEvaluator writes.

    Args:
        results: of this image, in COCO's result format.
        image_size: (height, width) in pixels.
        metadata: of the dataset; its ``thing_dataset_id_to_contiguous_id`` maps category ids.

    Returns:
        Instances: with ``pred_boxes``, ``scores`` and ``pred_classes``.
    """
    boxes = torch.tensor([result["bbox"] for result in results]).reshape(-1, 4)
    contiguous_id = metadata.thing_dataset_id_to_contiguous_id
    return Instances(
        image_size,
        pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
        scores=torch.tensor([result["score"] for result in results]),
        pred_classes=torch.tensor([contiguous_id[r["category_id"]] for r in results]),
    )


def stack_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """
    Put pictures below each other, the narrower ones filled up with white.

    Args:
        rows: at least one, each RGB, uint8, shape (Hi, Wi, 3).

    Returns:
        ndarray: RGB, uint8.
    """
    width = max(row.shape[1] for row in rows)
    padded = [
        np.pad(
            row,
            ((0, _GAP if i < len(rows) - 1 else 0), (0, width - row.shape[1]), (0, 0)),
            constant_values=_WHITE,
        )
        for i, row in enumerate(rows)
    ]
    return np.concatenate(padded)


def _unpack_ground_truth(
    ground_truth: Instances | dict,
) -> tuple[np.ndarray, list[int], list[bool]]:
    """Boxes, shape (M, 4), x0, y0, x1, y1 in pixels, classes, and whether they are of a crowd."""
    if isinstance(ground_truth, Instances):
        boxes = ground_truth.gt_boxes.tensor.cpu().numpy()
        return boxes, ground_truth.gt_classes.tolist(), [False] * len(boxes)
    annotations = ground_truth.get("annotations", [])
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return (
        np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        [a["category_id"] for a in annotations],
        [bool(a.get("iscrowd", 0)) for a in annotations],
    )


def _draw_boxes(
    image_rgb: np.ndarray,
    title: str,
    boxes: np.ndarray,
    classes: list[int],
    labels: list[str],
    metadata: Metadata,
) -> np.ndarray:
    """The image, enlarged if it is small, with boxes, and a title above it."""
    scale = max(1.0, _MIN_SIDE / min(image_rgb.shape[:2]))
    visualizer = Visualizer(_enlarge(image_rgb, scale), metadata)
    drawn = visualizer.overlay_instances(
        boxes=boxes * scale, labels=labels, assigned_colors=[_color(c) for c in classes]
    ).get_image()
    bar = np.full((28, drawn.shape[1], 3), _WHITE, dtype=np.uint8)
    cv2.putText(
        bar, title, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), lineType=cv2.LINE_AA
    )
    return np.concatenate([bar, drawn])


def _enlarge(image: np.ndarray, scale: float) -> np.ndarray:
    size = [round(scale * side) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)


def _class_name(index: int, names: Sequence[str] | None) -> str:
    return names[index] if names else str(index)


def _color(index: int) -> tuple[float, float, float]:
    """RGB in [0, 1]: neighbours in index are far apart in hue, and all are bright."""
    golden_ratio = 0.618034
    return colorsys.hsv_to_rgb((index * golden_ratio) % 1, 0.75, 1.0)
