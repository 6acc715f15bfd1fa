"""Detections of one image with the distributions of their sides, and what they should have been."""

from __future__ import annotations

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from torch import Tensor

from ..errors import InputError
from ..modeling import GFL, GeneralDistribution, Predictions
from ..modeling.precision import full_precision
from ..modeling.uncertainty import image_sides, measure_uncertainty, scale_uncertainty

__all__ = ["SIDES", "detect_with_distributions", "ground_truth", "match_ground_truth"]

SIDES = ("left", "top", "right", "bottom")


@torch.no_grad()
def detect_with_distributions(model: GFL, inputs: dict) -> Instances:
    """
    Args:
        model: in eval mode.
        inputs: one image as Detectron2's mapper gives it: ``image``, ``height`` and ``width``.

    Returns:
        Instances: D detections as of the model, on the CPU, in pixels of ``height`` and ``width``,
        with ``box_std`` and ``box_entropy``, ``side_probs``, shape (D, 4, n + 1), and
        ``side_places``, likewise, the x (left, right) or y (top, bottom) of each bin.

    Raises:
        InputError: the model predicts no distributions of n + 1 bins.
    """
    box = getattr(getattr(model, "head", None), "box", None)
    if not isinstance(box, GeneralDistribution):
        raise InputError(
            "MODEL.GFL.BOX_REPRESENTATION must be 'general' to draw distributions: this model "
            f"predicts {type(box).__name__ if box else 'none'}"
        )
    images, _, predictions = model.predict([inputs])
    predictions = Predictions(*predictions)
    sizes = torch.tensor(images.image_sizes, device=model.device)
    candidates, sides = model.candidates_and_sides(predictions, sizes)
    (found,) = model.suppress(candidates, images.image_sizes, sides)

    values = full_precision(found.box_values).unflatten(1, (4, box.num_values))
    found.side_probs = values.softmax(dim=-1)
    bins = torch.arange(box.num_values, device=values.device) * box.bin_width
    direction = bins.new_tensor([-1, -1, 1, 1])
    distances = found.box_strides[..., None] * direction[:, None] * bins  # (D, 4, n + 1)
    places = found.box_centers.repeat(1, 2)[..., None] + distances
    # Detectron2 scales boxes only: all else is in widths and heights until then.
    found.side_places = places / image_sides(found)[:, None]
    measure_uncertainty(found, box)
    found = detector_postprocess(found, inputs["height"], inputs["width"])
    scale_uncertainty(found)
    found.side_places = found.side_places * image_sides(found)[:, None]
    return found.to("cpu")


def ground_truth(record: dict) -> tuple[Tensor, Tensor]:
    """Boxes, shape (M, 4), and classes, (M,), of a record in Detectron2's format; no crowds."""
    annotations = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), classes


def match_ground_truth(
    detections: Instances, gt_boxes: Tensor, gt_classes: Tensor, iou_thresh: float = 0.5
) -> Tensor:
    """
    Give each detection the ground-truth box of its class that overlaps it most and that no
    detection with a higher score has.

    Args:
        detections: D of them, with ``pred_boxes``, ``scores`` and ``pred_classes``.
        gt_boxes, gt_classes: shape (M, 4), XYXY, and (M,).
        iou_thresh: the lowest IoU of a match.

    Returns:
        Tensor: shape (D,), int64, index of the box, -1 where there is none.
    """
    matches = torch.full((len(detections),), -1)
    if not len(gt_boxes):
        return matches
    iou = pairwise_iou(detections.pred_boxes, Boxes(gt_boxes))
    iou[detections.pred_classes[:, None] != gt_classes] = -1
    for i in detections.scores.argsort(descending=True, stable=True).tolist():
        best, index = iou[i].max(dim=0)
        if best >= iou_thresh:
            matches[i] = index
            iou[:, index] = -1
    return matches
