"""Anchors: one square per location."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor

__all__ = ["LegacyAnchorGenerator", "build_anchor_generator"]


class LegacyAnchorGenerator(DefaultAnchorGenerator):
    """
    :class:`DefaultAnchorGenerator` with the first centre at (stride - 1) / 2: the middle of a cell
    whose pixels have whole coordinates, as in the authors' first code base.
    """

    def __init__(self, *, sizes: list[list[float]], aspect_ratios: list[float], strides: list[int]):
        super().__init__(sizes=sizes, aspect_ratios=aspect_ratios, strides=strides, offset=0.5)

    def generate_cell_anchors(self, *args, **kwargs) -> Tensor:
        return super().generate_cell_anchors(*args, **kwargs) - 0.5


def build_anchor_generator(cfg: CfgNode, strides: list[int]) -> DefaultAnchorGenerator:
    """
    Args:
        cfg: ``MODEL.GFL.ANCHOR_SCALE``, ``MODEL.GFL.LEGACY_ANCHOR_CENTERS`` and
            ``MODEL.ANCHOR_GENERATOR.OFFSET``.
        strides: of the levels, in pixels.
    """
    sizes = [[cfg.MODEL.GFL.ANCHOR_SCALE * stride] for stride in strides]
    if cfg.MODEL.GFL.LEGACY_ANCHOR_CENTERS:
        return LegacyAnchorGenerator(sizes=sizes, aspect_ratios=[1.0], strides=strides)
    return DefaultAnchorGenerator(
        sizes=sizes,
        aspect_ratios=[1.0],
        strides=strides,
        offset=cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
    )
