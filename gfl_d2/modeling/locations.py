"""The regular grids of locations that the head predicts at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from .structures import Levels

__all__ = ["LocationGrid"]


class LocationGrid(nn.Module):
    """
    Where the locations of each level are, and how large their anchors. It has no parameters.

    Shapes: N images, L levels.
    """

    def __init__(
        self,
        strides: Sequence[int],
        *,
        offset: float = 0.0,
        legacy_centers: bool = False,
        anchor_scale: float = 8.0,
    ):
        """
        Args:
            strides: L, in pixels.
            offset: of the first location, in strides.
            legacy_centers: put the first location at (stride - 1) / 2 instead: the middle of a cell
                whose pixels have whole coordinates.
            anchor_scale: side of the anchors, in strides.
        """
        super().__init__()
        self.register_buffer("strides", torch.tensor(strides), persistent=False)
        self.offset = 0.5 if legacy_centers else offset  # in strides
        self.shift = -0.5 if legacy_centers else 0.0  # in pixels
        self.anchor_scale = anchor_scale

    @classmethod
    def from_config(cls, cfg: CfgNode, strides: Sequence[int]) -> LocationGrid:
        return cls(
            strides,
            offset=cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
            legacy_centers=cfg.MODEL.GFL.LEGACY_ANCHOR_CENTERS,
            anchor_scale=cfg.MODEL.GFL.ANCHOR_SCALE,
        )

    def forward(
        self, shapes: Sequence[tuple[int, int]], image_sizes: Tensor, divisibility: int = 0
    ) -> Levels:
        """
        Args:
            shapes: L times (height, width) of the maps.
            image_sizes: shape (N, 2), int64, height and width in pixels, without padding.
            divisibility: of the backbone's input; 0 for any. Padding up to a multiple of it counts
                as the image's own, since it is there whatever the batch.
        """
        strides = self.strides
        if divisibility > 1:
            image_sizes = _ceil_div(image_sizes, divisibility) * divisibility
        return Levels(
            shapes=shapes,
            strides=strides.float(),
            first=strides * self.offset + self.shift,
            anchor_sizes=strides * self.anchor_scale,
            valid_sizes=_ceil_div(image_sizes[:, None], strides[:, None]),
        )


def _ceil_div(x: Tensor, y: Tensor | int) -> Tensor:
    return -torch.div(-x, y, rounding_mode="floor")
