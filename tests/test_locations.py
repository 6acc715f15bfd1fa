"""Locations against Detectron2's anchors."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch.testing import assert_close

from gfl_d2.modeling import LocationGrid

STRIDES = (8, 16, 20)
SHAPES = [(4, 5), (2, 3), (1, 1)]


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_centers_and_anchors_are_detectron2s(offset):
    generator = DefaultAnchorGenerator(
        sizes=[[6 * s] for s in STRIDES], aspect_ratios=[1.0], strides=STRIDES, offset=offset
    )
    anchors = generator([torch.zeros(1, 1, *shape) for shape in SHAPES])
    grid = LocationGrid(STRIDES, offset=offset, anchor_scale=6.0)
    levels = grid(SHAPES, torch.tensor([(32, 40)]))
    for i, (height, width) in enumerate(SHAPES):
        row, column = torch.cartesian_prod(torch.arange(height), torch.arange(width)).T
        # Of every level, at the cells of this one.
        cells = row.expand(3, -1), column.expand(3, -1)
        assert_close(levels.centers(*cells)[i], anchors[i].get_centers())
        sides = anchors[i].tensor[:, 2:] - anchors[i].tensor[:, :2]
        assert_close(levels.anchor_sizes[i].expand_as(sides), sides)


def test_legacy_centers():
    """In the middle of a cell whose pixels have whole coordinates."""
    levels = LocationGrid((8, 128), legacy_centers=True)(SHAPES[:2], torch.tensor([(32, 40)]))
    assert levels.first.tolist() == [3.5, 63.5]


def test_padding_to_the_divisibility_is_the_images_own():
    grid, shapes = LocationGrid((8, 64)), [(20, 20), (3, 3)]
    sizes = grid(shapes, torch.tensor([(33, 100), (64, 64)]), divisibility=32).valid_sizes
    assert sizes.tolist() == [[[8, 16], [1, 2]], [[8, 8], [1, 1]]]
    sizes = grid(shapes, torch.tensor([(33, 100)]), divisibility=0).valid_sizes
    assert sizes.tolist() == [[[5, 13], [1, 2]]]


def test_valid_mask():
    levels = LocationGrid((8,))([(2, 3)], torch.tensor([(16, 8), (8, 24)]))
    assert levels.valid_mask(0).long().tolist() == [
        [[[1, 0, 0], [1, 0, 0]]],
        [[[1, 1, 1], [0, 0, 0]]],
    ]


def test_no_location_is_beyond_the_map():
    """Of a backbone that rounds sizes down."""
    levels = LocationGrid((8, 16))([(10, 10), (5, 5)], torch.tensor([(86, 86), (40, 86)]))
    assert levels.valid_mask(0).sum(dim=(1, 2, 3)).tolist() == [100, 50]
    assert levels.valid_mask(1).sum(dim=(1, 2, 3)).tolist() == [25, 15]
