"""Augmentations of single images, by the config: Detectron2's."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import BlendTransform

__all__ = ["OpenCVResizeTransform", "adapt_augmentations", "choose_filter"]

# Detectron2 has AlexNet's axes for values in [0, 1], and images are in [0, 255].
_LIGHTING_UNIT = 255.0


class OpenCVResizeTransform(T.ResizeTransform):
    """
    :class:`ResizeTransform` by OpenCV's bilinear interpolation, which takes four pixels for a new
    one, however much the image shrinks. Pillow's filter takes all that the new one covers.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """``img``: shape (H, W) or (H, W, C). ``interp``, of Pillow, is for segmentations."""
        if interp is not None:
            return super().apply_image(img, interp)
        resized = cv2.resize(img, (int(self.new_w), int(self.new_h)))
        return resized.reshape(*resized.shape[:2], *img.shape[2:])  # OpenCV drops a single channel

    def inverse(self) -> OpenCVResizeTransform:
        return OpenCVResizeTransform(self.new_h, self.new_w, self.h, self.w)


class _ResizeByOpenCV(T.Augmentation):
    """Resizes to the size that another augmentation chooses."""

    def __init__(self, resize: T.Augmentation):
        self.resize = resize

    def get_transform(self, image: np.ndarray) -> T.Transform:
        chosen = self.resize.get_transform(image)
        if not isinstance(chosen, T.ResizeTransform):  # MIN_SIZE 0: no resizing
            return chosen
        return OpenCVResizeTransform(chosen.h, chosen.w, chosen.new_h, chosen.new_w)


class _ForBGR(T.Augmentation):
    """Another augmentation, which blends RGB images, for BGR."""

    def __init__(self, blend: T.Augmentation):
        self.blend = blend

    def get_transform(self, image: np.ndarray) -> T.Transform:
        chosen = self.blend.get_transform(image[:, :, ::-1])
        # Of shape (3,), or (H, W, 1).
        return BlendTransform(chosen.src_image[..., ::-1], chosen.src_weight, chosen.dst_weight)


def choose_filter(resize: T.Augmentation, name: str) -> T.Augmentation:
    """``resize``, an augmentation that resizes by Pillow, by the filter of INPUT.RESIZE_FILTER."""
    return _ResizeByOpenCV(resize) if name == "opencv" else resize


def adapt_augmentations(
    augmentations: Sequence[T.Augmentation], cfg: CfgNode, is_train: bool
) -> list[T.Augmentation]:
    """
    Detectron2's augmentations, as its ``build_augmentation`` and :class:`DatasetMapper` choose
    them, changed by the keys ``INPUT.RESIZE_FILTER``, and in training ``LSJ`` and ``COLOR``.
    """
    ret = []
    for augmentation in augmentations:
        is_resize = isinstance(augmentation, T.ResizeShortestEdge)
        lsj = cfg.INPUT.LSJ
        if is_resize and is_train and lsj.ENABLED:
            resize = T.ResizeScale(lsj.MIN_SCALE, lsj.MAX_SCALE, *lsj.SIZE)
            # No padding: smaller images get that of their batch, where nothing is learned.
            crop = T.FixedSizeCrop(tuple(lsj.SIZE), pad=False)
            ret += [choose_filter(resize, cfg.INPUT.RESIZE_FILTER), crop]
        elif is_resize:
            ret.append(choose_filter(augmentation, cfg.INPUT.RESIZE_FILTER))
        else:
            ret.append(augmentation)
    return ret + (_build_colors(cfg) if is_train else [])


def _build_colors(cfg: CfgNode) -> list[T.Augmentation]:
    colors = cfg.INPUT.COLOR
    adapt = _ForBGR if cfg.INPUT.FORMAT == "BGR" else lambda blend: blend
    ret = []
    if colors.BRIGHTNESS:
        ret.append(T.RandomBrightness(1 - colors.BRIGHTNESS, 1 + colors.BRIGHTNESS))
    if colors.CONTRAST:
        ret.append(T.RandomContrast(1 - colors.CONTRAST, 1 + colors.CONTRAST))
    if colors.SATURATION:
        ret.append(adapt(T.RandomSaturation(1 - colors.SATURATION, 1 + colors.SATURATION)))
    if colors.LIGHTING:
        ret.append(adapt(T.RandomLighting(colors.LIGHTING * _LIGHTING_UNIT)))
    return ret
