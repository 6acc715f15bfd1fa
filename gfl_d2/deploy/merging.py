"""Detections of several views of an image made one."""

import torch
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou
from torch import Tensor

from ..modeling.post_processing import Candidates, suppress

__all__ = ["merge_detections"]

_CHUNK = 1000  # boxes that are compared with all others at a time, to bound the memory


def merge_detections(
    detections: Instances,
    *,
    how: str,
    nms_thresh: float,
    max_detections: int,
    class_agnostic: bool = False,
) -> Instances:
    """
    Args:
        detections: of all views, in pixels of one image: ``pred_boxes``, ``scores`` and
            ``pred_classes``; and ``is_cut``, bool, if some may be parts of objects. A cut box is
            dropped if one of its class that is not covers more than ``nms_thresh`` of its area,
            whatever their scores: so it is never kept in place of the whole.
        how: "nms": NMS of each class. "vote": then each side of a box that is left is the mean over
            the boxes of its class that overlap it by more than ``nms_thresh``, itself among them,
            weighted by their scores (Gidaris and Komodakis, ICCV 2015). Its score stays.
        nms_thresh: IoU above which the lower of two boxes of a class is dropped.
        max_detections: the best that are kept.
        class_agnostic: NMS also drops it if the two are of different classes.

    Returns:
        Instances: ``pred_boxes``, ``scores`` and ``pred_classes``, by descending score.
    """
    if detections.has("is_cut"):
        detections = detections[~_is_covered(detections, nms_thresh)]
    boxes, scores, classes = detections.pred_boxes, detections.scores, detections.pred_classes
    candidates = Candidates(boxes.tensor[None], scores[None], classes[None])
    (merged,) = suppress(
        candidates,
        [detections.image_size],
        nms_thresh=nms_thresh,
        max_detections=max_detections,
        class_agnostic=class_agnostic,
    )
    if how == "vote" and len(merged):
        # Each box agrees with itself, if the threshold is 1 too.
        agrees = pairwise_iou(merged.pred_boxes, boxes) >= nms_thresh
        agrees &= merged.pred_classes[:, None] == classes
        weights = (agrees * scores).double()
        mean = weights @ boxes.tensor.double() / weights.sum(dim=1, keepdim=True)
        merged.pred_boxes = Boxes(mean.to(boxes.tensor.dtype))
    return merged


def _is_covered(detections: Instances, threshold: float) -> Tensor:
    """Shape (R,), bool: the boxes that are cut, and covered by one of their class that is not."""
    is_covered = torch.zeros_like(detections.is_cut)
    whole = detections[~detections.is_cut]
    if len(whole) == 0:
        return is_covered
    for numbers in detections.is_cut.nonzero()[:, 0].split(_CHUNK):
        cut = detections[numbers]
        covers = pairwise_ioa(whole.pred_boxes, cut.pred_boxes) > threshold
        covers &= whole.pred_classes[:, None] == cut.pred_classes
        is_covered[numbers] = covers.any(dim=0)
    return is_covered
