"""Test-time augmentation, and tiles of large images: views of an image, detected and merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import (
    Augmentation,
    CropTransform,
    RandomFlip,
    ResizeShortestEdge,
    TransformList,
    apply_augmentations,
)
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..data import choose_filter
from ..errors import InputError
from .merging import merge_detections

__all__ = ["DenseDetectorWithTTA", "input_config", "uses_views"]

# A box ends at the border of its tile if it comes as near as this, in sides of the tile.
_BORDER = 0.01


def uses_views(cfg: CfgNode) -> bool:
    """Whether ``TEST.AUG`` or ``TEST.TILES`` asks for :class:`DenseDetectorWithTTA`."""
    return cfg.TEST.AUG.ENABLED or cfg.TEST.TILES.SIZE > 0


def input_config(cfg: CfgNode) -> CfgNode:
    """
    The config by which images are read for what :func:`prepare_for_inference` returns:
    :class:`DenseDetectorWithTTA` resizes them by itself, so it is given them in full size.
    """
    if not uses_views(cfg):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0  # Detectron2's value for no resizing
    return cfg


class _View(NamedTuple):
    image: Tensor  # (C, h, w)
    transforms: TransformList  # from the whole image to this view
    tile: CropTransform


class DenseDetectorWithTTA(nn.Module):
    """
    A dense detector that looks at several views of an image, as Detectron2's
    :class:`GeneralizedRCNNWithTTA` does for R-CNN: the same inputs and outputs as the detector's.

    Views are the image in several sizes, each also flipped (``TEST.AUG``), and tiles of it, each of
    which is treated as an image of its own (``TEST.TILES``). The detector selects boxes in each
    view by its own thresholds. They are merged in the pixels of the image.

    A box that ends at the border of its tile, but not of the image, may be a part of an object, and
    has perhaps a higher score than the whole of it. It is dropped where another view has a box that
    covers it and is not cut. Objects up to the width of the overlap are whole in one tile at least.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, batch_size: int = 4):
        """
        Args:
            cfg: with the keys of this project.
            model: a :class:`DenseDetector` in eval mode.
            batch_size: views of equal size that are detected at a time. No others are kept in
                memory. Views of different sizes are never padded to one.

        Raises:
            InputError: the model is no dense detector.
        """
        super().__init__()
        if not isinstance(model, DenseDetector):
            raise InputError(
                "TEST.AUG.ENABLED and TEST.TILES.SIZE need a dense detector, got "
                f"MODEL.META_ARCHITECTURE {type(model).__name__!r}"
            )
        self.model = model
        self.batch_size = batch_size
        self.merge = cfg.TEST.AUG.MERGE
        self.tile_size, self.overlap = cfg.TEST.TILES.SIZE, cfg.TEST.TILES.OVERLAP
        sizes, max_size, flip = (cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST, False
        if cfg.TEST.AUG.ENABLED:
            aug = cfg.TEST.AUG
            sizes, max_size, flip = aug.MIN_SIZES, aug.MAX_SIZE, aug.FLIP
        resizes = [ResizeShortestEdge(size, max_size) for size in sizes]
        self.resizes = [choose_filter(resize, cfg.INPUT.RESIZE_FILTER) for resize in resizes]
        self.flips: list[list[Augmentation]] = [[], [RandomFlip(prob=1.0)]] if flip else [[]]

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """
        Args:
            batched_inputs: as of the detector: ``image``, (C, H, W), and ``height`` and ``width``
                of the output, those of the image if missing. Images should be in full size.

        Returns:
            list[dict]: ``instances`` with ``pred_boxes``, ``scores`` and ``pred_classes``, by
            descending score.
        """
        return [{"instances": self._detect(inputs)} for inputs in batched_inputs]

    def _detect(self, inputs: dict) -> Instances:
        size = tuple(inputs["image"].shape[-2:])
        found = []
        for batch in self._batches(inputs["image"]):
            outputs = self.model([{"image": view.image} for view in batch])
            found += [
                _to_image(output["instances"], view, size) for output, view in zip(outputs, batch)
            ]
        merged = merge_detections(
            Instances.cat(found),
            how=self.merge,
            nms_thresh=self.model.test_nms_thresh,
            max_detections=self.model.max_detections_per_image,
            # Detectron2's own dense detectors lack it.
            class_agnostic=getattr(self.model, "test_nms_class_agnostic", False),
        )
        calibration = getattr(self.model, "test_calibration", None)
        if calibration is not None:
            merged = calibration.calibrate(merged)
        height, width = inputs.get("height", size[0]), inputs.get("width", size[1])
        return detector_postprocess(merged, height, width)

    def _batches(self, image: Tensor) -> Iterator[list[_View]]:
        batch = []
        for view in self._views(_as_bytes(image.cpu())):
            fits = not batch or batch[0].image.shape == view.image.shape
            if not fits or len(batch) == self.batch_size:
                yield batch
                batch = []
            batch.append(view)
        yield batch

    def _views(self, image: Tensor) -> Iterator[_View]:
        """Those of one size after another, as far as tiles are."""
        tiles = self._tiles(*image.shape[-2:])
        pixels = image.permute(1, 2, 0).numpy()
        for resize in self.resizes:
            for tile in tiles:
                for flip in self.flips:
                    part = tile.apply_image(pixels)
                    view, transforms = apply_augmentations([resize, *flip], part)
                    view = np.array(view.transpose(2, 0, 1), order="C")  # a copy
                    yield _View(torch.from_numpy(view), TransformList([tile]) + transforms, tile)

    def _tiles(self, height: int, width: int) -> list[CropTransform]:
        """The whole image first. It is the only one if no side is longer than a tile's."""
        boxes = [(0, 0, width, height)]
        if 0 < self.tile_size < max(height, width):
            h, w = min(self.tile_size, height), min(self.tile_size, width)
            boxes += [
                (x, y, w, h)
                for y in _starts(height, h, self.overlap)
                for x in _starts(width, w, self.overlap)
            ]
        return [CropTransform(*box, orig_w=width, orig_h=height) for box in boxes]


def _starts(length: int, size: int, overlap: float) -> list[int]:
    """Where tiles begin, evenly, that overlap by ``overlap * size`` pixels or more."""
    step = max(1, int(size * (1 - overlap)))
    steps = -(-(length - size) // step)
    return [(length - size) * i // max(1, steps) for i in range(steps + 1)]


def _as_bytes(image: Tensor) -> Tensor:
    """
    In uint8 if that has the same values. Detectron2 resizes other types by another method, which
    does not smooth.
    """
    as_bytes = image.to(torch.uint8)
    return as_bytes if torch.equal(as_bytes.to(image.dtype), image) else image


def _to_image(found: Instances, view: _View, size: tuple[int, int]) -> Instances:
    """Detections of a view in pixels of the image; ``is_cut``: by the border of their tile."""
    boxes = found.pred_boxes.tensor
    moved = view.transforms.inverse().apply_box(boxes.cpu().numpy().astype(np.float32))
    moved = torch.from_numpy(moved).to(boxes)
    x0, y0, w, h = view.tile.x0, view.tile.y0, view.tile.w, view.tile.h
    height, width = size
    left, top, right, bottom = moved.unbind(dim=1)
    is_cut = (left < x0 + _BORDER * w) & (x0 > 0)
    is_cut |= (top < y0 + _BORDER * h) & (y0 > 0)
    is_cut |= (right > x0 + w - _BORDER * w) & (x0 + w < width)
    is_cut |= (bottom > y0 + h - _BORDER * h) & (y0 + h < height)
    return Instances(
        size,
        pred_boxes=Boxes(moved),
        # Those of a calibration come when all views are merged: among equal ones NMS has no order.
        scores=found.raw_scores if found.has("raw_scores") else found.scores,
        pred_classes=found.pred_classes,
        is_cut=is_cut,
    )
