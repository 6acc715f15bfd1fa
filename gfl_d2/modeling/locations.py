"""Where the head predicts: regular grids of locations, on which nothing has to be searched."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor

__all__ = [
    "LevelGrid",
    "Locations",
    "Positives",
    "build_grids",
    "fill_padding",
    "needs_fixed_shapes",
    "to_device",
    "valid_mask",
    "valid_sizes",
]


class LevelGrid(NamedTuple):
    """
    The locations of one level: the centre of that in row i, column j is at
    ``(j * stride + first, i * stride + first)``, in pixels.
    """

    stride: int
    first: float
    anchor_size: float  # side of the square anchor of each location, in pixels

    def centers(self, cells: Tensor) -> Tensor:
        """From columns and rows, shape (..., 2), to x and y in pixels."""
        return cells * self.stride + self.first


class Locations(NamedTuple):
    """
    The locations of a batch, numbered row by row and level by level.

    Shapes: N images, L levels, R locations over all levels.
    """

    grids: Sequence[LevelGrid]  # L
    sizes: Sequence[tuple[int, int]]  # L, (height, width) of the maps
    # N * L, the (height, width) of the part of a map that belongs to an image. The rest is padding.
    valid_sizes: Sequence[Sequence[tuple[int, int]]]

    @property
    def starts(self) -> list[int]:
        """The number of the first location of each level, and R."""
        starts = [0]
        for height, width in self.sizes:
            starts.append(starts[-1] + height * width)
        return starts

    def strides(self, device: torch.device) -> Tensor:
        """Shape (R,), in pixels."""
        levels = [
            torch.full((height * width,), grid.stride, device=device)
            for (height, width), grid in zip(self.sizes, self.grids)
        ]
        return torch.cat(levels)

    def centers(self, device: torch.device) -> Tensor:
        """Shape (R, 2), x and y in pixels."""
        levels = []
        for (height, width), grid in zip(self.sizes, self.grids):
            row, column = (torch.arange(size, device=device) for size in (height, width))
            row, column = row[:, None].expand(height, width), column.expand(height, width)
            levels.append(grid.centers(torch.stack((column, row), dim=-1).flatten(0, 1).float()))
        return torch.cat(levels)


class Positives(NamedTuple):
    """
    Locations of a level that answer for a ground-truth box. On a GPU other candidates are among
    them, so that no shape depends on a value: they count for nothing.

    Shapes: P locations.
    """

    image: Tensor  # (P,), int64
    row: Tensor  # (P,), int64
    column: Tensor  # (P,), int64
    is_real: Tensor  # (P,), bool

    def take(self, maps: Tensor) -> Tensor:
        """Values at the locations: from (N, C, H, W) to (P, C)."""
        return maps.permute(0, 2, 3, 1)[self.image, self.row, self.column]


def build_grids(cfg: CfgNode, strides: Sequence[int]) -> list[LevelGrid]:
    """
    Args:
        cfg: ``MODEL.GFL.ANCHOR_SCALE``, ``MODEL.GFL.LEGACY_ANCHOR_CENTERS`` and
            ``MODEL.ANCHOR_GENERATOR.OFFSET``.
        strides: of the levels, in pixels.
    """
    grids = []
    for stride in strides:
        first = cfg.MODEL.ANCHOR_GENERATOR.OFFSET * stride
        if cfg.MODEL.GFL.LEGACY_ANCHOR_CENTERS:
            # The middle of a cell whose pixels have whole coordinates.
            first = (stride - 1) / 2
        grids.append(LevelGrid(stride, first, cfg.MODEL.GFL.ANCHOR_SCALE * stride))
    return grids


def valid_sizes(
    image_sizes: Sequence[tuple[int, int]],
    grids: Sequence[LevelGrid],
    sizes: Sequence[tuple[int, int]],
    divisibility: int,
) -> list[list[tuple[int, int]]]:
    """
    The part of each level that belongs to an image, rather than to what pads it to the size of the
    batch. Padding up to a multiple of ``divisibility`` counts as the image's own, as it is there
    whatever the batch.

    Args:
        image_sizes: N times (height, width), in pixels.
        grids: of the L levels.
        sizes: L times (height, width), of the maps.
        divisibility: of the backbone's input; 0 for any.

    Returns:
        list[list[tuple[int, int]]]: N * L, (height, width).
    """
    multiple = max(divisibility, 1)
    padded = [tuple(math.ceil(side / multiple) * multiple for side in size) for size in image_sizes]
    # A map may have a row or column less, where the backbone rounds down.
    return [
        [
            tuple(min(math.ceil(x / grid.stride), y) for x, y in zip(image, size))
            for grid, size in zip(grids, sizes)
        ]
        for image in padded
    ]


def valid_mask(
    sizes: Sequence[tuple[int, int]], height: int, width: int, device: torch.device
) -> Tensor:
    """
    Args:
        sizes: N times (height, width), what is valid of a map.
        height, width: of the map.

    Returns:
        Tensor: shape (N, height, width), bool.
    """
    limits = to_device(sizes, device)
    rows = torch.arange(height, device=device) < limits[:, :1]
    columns = torch.arange(width, device=device) < limits[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def fill_padding(maps: Tensor, sizes: Sequence[tuple[int, int]], value: float) -> Tensor:
    """
    Args:
        maps: shape (N, X, H, W).
        sizes: N times (height, width), what is valid of them.
        value: for the rest, where there is then no gradient.

    Returns:
        Tensor: shape (N, X, H, W); ``maps`` itself if there is no padding.
    """
    height, width = maps.shape[2:]
    if all(tuple(size) == (height, width) for size in sizes):
        return maps
    return torch.where(valid_mask(sizes, height, width, maps.device)[:, None], maps, value)


def needs_fixed_shapes(x: Tensor) -> bool:
    """
    Whether to work on more than is needed rather than on what a mask selects: on a GPU, which would
    have to be waited for to learn how much that is.
    """
    return x.is_cuda


def to_device(values: Sequence, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """
    Numbers as a tensor, not to be changed; on a GPU without waiting for it. The last thousand are
    kept, so that a step that is captured in a CUDA graph, after others with the same numbers,
    copies nothing. Its replays need them: not after a thousand others.
    """
    return _to_device(_as_tuple(values), device, dtype)


@functools.lru_cache(maxsize=1024)
def _to_device(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # it will be used elsewhere, too
        values = torch.tensor(values, dtype=dtype)
        if device.type != "cuda":
            return values.to(device)
        return values.pin_memory().to(device, non_blocking=True)


def _as_tuple(values: Sequence | float) -> tuple | float:
    return values if isinstance(values, (int, float)) else tuple(map(_as_tuple, values))
