"""Exported files beside the model that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from detectron2.data.transforms import ResizeTransform
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ...data import OpenCVResizeTransform
from ...modeling import GFL
from ...modeling.post_processing import Candidates
from .graph import DetectorGraph
from .running import ExportedModel

__all__ = ["Check", "check_export", "make_batch", "resize_pictures"]

# Sides of the pictures in a check with free sizes, relative to those of evaluation.
_SCALES = (1.0, 0.75, 0.5)
# Of two boxes' IoU, by which the same NMS in other rounding may decide otherwise.
_IOU_TOLERANCE = 0.02


@dataclass
class Check:
    """Differences of detections to those of the model, over all pictures."""

    box_tolerance: float  # in pixels
    score_tolerance: float
    nms_thresh: float
    class_agnostic: bool
    detections: int = 0  # that were compared
    box_difference: float = 0.0  # the largest, in pixels, of those that agree
    score_difference: float = 0.0
    unmatched: int = 0  # detections of one that the other should have, within the tolerances
    ties: int = 0  # detections without one, where NMS kept another box as rounding decides
    lines: list[str] = field(default_factory=list)  # the same, batch by batch

    def __str__(self) -> str:
        return (
            f"{self.detections} detections compared, {self.unmatched} without a counterpart within "
            f"{self.box_tolerance:g} px and a score of {self.score_tolerance:g}, {self.ties} where "
            "NMS kept another of almost the same score; of the others the largest difference is "
            f"{self.box_difference:.2g} px, of scores {self.score_difference:.2g}"
        )

    def compare(
        self,
        expected: Instances,
        actual: Instances,
        least: float,
        candidates: Instances,
    ) -> None:
        """
        Args:
            expected: detections of the model.
            actual: those of the file.
            least: a detection that scores less needs no counterpart: rounding decides it.
            candidates: of the model, before NMS.
        """
        for one, other in ((expected, actual), (actual, expected)):
            compared = one[one.scores >= least]
            self.detections += len(compared) if one is expected else 0
            differences = _differences(compared, other)
            agrees = self._agrees(differences)
            missing = compared[~agrees.any(dim=1)]
            if len(missing):
                num_ties = int(self._are_ties(missing, one, other, candidates).sum())
                self.ties += num_ties
                self.unmatched += len(missing) - num_ties
            if agrees.any():
                nearest = differences[..., 0].masked_fill(~agrees, np.inf).min(dim=1)
                found = nearest.values.isfinite()
                scores = differences[..., 1].gather(1, nearest.indices[:, None])[:, 0]
                self.box_difference = max(self.box_difference, float(nearest.values[found].max()))
                self.score_difference = max(self.score_difference, float(scores[found].max()))

    def _agrees(self, differences: Tensor) -> Tensor:
        tolerances = differences.new_tensor([self.box_tolerance, self.score_tolerance])
        return (differences <= tolerances).all(dim=-1)

    def _are_ties(
        self, missing: Instances, one: Instances, other: Instances, candidates: Instances
    ) -> Tensor:
        """
        Shape (D,): which of ``missing``, detections of one, the other had too, but its NMS kept
        another box instead. Where two scores are almost equal, rounding decides which.
        """

        def is_candidate(detections: Instances) -> Tensor:
            return self._agrees(_differences(detections, candidates)).any(dim=1)

        kept = other[is_candidate(other)]
        is_dropped = self._ious(missing, kept) > self.nms_thresh - _IOU_TOLERANCE
        is_dropped &= kept.scores >= missing.scores[:, None] - self.score_tolerance
        should_drop = self._ious(missing, one) > self.nms_thresh + _IOU_TOLERANCE
        should_drop &= one.scores > missing.scores[:, None]
        return is_candidate(missing) & is_dropped.any(dim=1) & ~should_drop.any(dim=1)

    def _ious(self, one: Instances, other: Instances) -> Tensor:
        """Shape (D, E); 0 of boxes that NMS does not compare."""
        ious = pairwise_iou(one.pred_boxes, other.pred_boxes)
        if self.class_agnostic:
            return ious
        return ious * (one.pred_classes[:, None] == other.pred_classes[None])


def _differences(one: Instances, other: Instances) -> Tensor:
    """Shape (D, E, 2): largest of the four sides, in pixels, and score; inf of two classes."""
    boxes = one.pred_boxes.tensor[:, None] - other.pred_boxes.tensor[None]
    scores = one.scores[:, None] - other.scores[None]
    differences = torch.stack((boxes.abs().amax(dim=-1), scores.abs()), dim=-1)
    is_other = one.pred_classes[:, None] != other.pred_classes[None]
    return differences.masked_fill(is_other[..., None], np.inf)


@torch.no_grad()
def check_export(
    exported: ExportedModel,
    model: GFL,
    pictures: Sequence[np.ndarray],
    box_tolerance: float,
    score_tolerance: float,
) -> Check:
    """
    Run both on the pictures: one by one and two at a time, in three sizes; or one by one in the
    export's own size.

    Args:
        exported: the file.
        model: in eval mode, in float32, on the CPU.
        pictures: arrays (H, W, 3), uint8, with channels as the model takes them.
    """
    nms = model.test_nms_thresh, model.test_nms_class_agnostic
    check = Check(box_tolerance, score_tolerance, *nms)
    graph = DetectorGraph(model, with_nms=False)
    info = exported.metadata
    for pixels in _batches(pictures, info):
        images, sizes = make_batch(pixels, info)
        found = exported(images, sizes)
        expected = _detect(model, pixels, info)
        before = check.detections, check.unmatched
        before_nms = graph(torch.from_numpy(images), torch.from_numpy(sizes))
        for i, one in enumerate(expected):
            candidates = _instances(model, [x[i].numpy() for x in before_nms], one.image_size, True)
            actual = _instances(model, [x[i] for x in found], one.image_size, info["nms"])
            least = model.test_score_thresh + score_tolerance
            if len(one) == model.max_detections_per_image:
                least = max(least, float(one.scores.min()) + score_tolerance)
            check.compare(one, actual, least, candidates)
        height, width = images.shape[-2:]
        check.lines.append(
            f"batch {len(pixels)}, {height} x {width}: {check.detections - before[0]} detections, "
            f"{check.unmatched - before[1]} without counterpart"
        )
    return check


def _batches(pictures: Sequence[np.ndarray], info: dict) -> list[list[np.ndarray]]:
    if info["size"]:
        return [[x] for x in resize_pictures(pictures, info)]
    batches = []
    for scale in _SCALES:
        resized = resize_pictures(pictures, info, scale)
        batches += [[x] for x in resized]
        # The next picture beside each, or a part of itself.
        batches += [
            [x, resized[i + 1] if i + 1 < len(resized) else x[: len(x) - len(x) // 8]]
            for i, x in enumerate(resized)
        ]
    return batches


def resize_pictures(
    pictures: Sequence[np.ndarray], info: dict, scale: float = 1.0
) -> list[np.ndarray]:
    """
    As in evaluation, or smaller by ``scale``, but not below the least size that the file takes; or
    as large as fits in the size of the file.
    """
    resized = []
    # Files of earlier versions do not say.
    is_opencv = info.get("resize_filter") == "opencv"
    make_resize = OpenCVResizeTransform if is_opencv else ResizeTransform
    for picture in pictures:
        height, width = picture.shape[:2]
        if info["size"]:
            factor = min(info["size"][0] / height, info["size"][1] / width)
        else:
            short, long = min(height, width), max(height, width)
            factor = 1.0  # MIN_SIZE_TEST 0: as they are
            if info["min_size"]:
                factor = min(info["min_size"] / short, info["max_size"] / long)
            factor = max(scale * factor, min(factor, info["min_side"] / short))
        new_size = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
        resized.append(make_resize(height, width, *new_size).apply_image(picture))
    return resized


def make_batch(pixels: Sequence[np.ndarray], info: dict) -> tuple[np.ndarray, np.ndarray]:
    """
    What an exported file takes.

    Args:
        pixels: arrays (h, w, 3).
        info: the metadata of the file.
    """
    sizes = np.array([x.shape[:2] for x in pixels], dtype=np.int64)
    height, width = info["size"] or np.maximum(_round_up(sizes.max(axis=0), info), info["min_side"])
    images = np.zeros((len(pixels), info["channels"], height, width), dtype=info["input_type"])
    for image, x in zip(images, pixels):
        image[:, : x.shape[0], : x.shape[1]] = x.transpose(2, 0, 1)
    return images, sizes


def _round_up(size: np.ndarray, info: dict) -> np.ndarray:
    divisibility = info["size_divisibility"]
    return -(-size // divisibility) * divisibility


def _detect(model: GFL, pixels: Sequence[np.ndarray], info: dict) -> list[Instances]:
    """By the model, with images padded as those of the file."""
    images, sizes = make_batch(pixels, info)
    inputs = [
        {"image": torch.from_numpy(np.array(x.transpose(2, 0, 1), order="C"))} for x in pixels
    ]
    if np.any(_round_up(sizes.max(axis=0), info) != images.shape[-2:]):
        # An image of the whole size beside them makes the model pad likewise.
        inputs.append({"image": torch.zeros(images.shape[1:], dtype=torch.uint8)})
    return [x["instances"] for x in model(inputs)[: len(pixels)]]


def _instances(
    model: GFL, found: Sequence[np.ndarray], size: tuple[int, int], after_nms: bool
) -> Instances:
    boxes, scores, labels = (torch.from_numpy(np.array(x)) for x in found)
    if not after_nms:
        (result,) = model.suppress(Candidates(boxes[None], scores[None], labels[None]), [size])
        return result
    kept = scores > 0
    return Instances(
        size, pred_boxes=Boxes(boxes[kept]), scores=scores[kept], pred_classes=labels[kept]
    )
