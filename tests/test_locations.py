"""Locations against Detectron2's anchors."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch.testing import assert_close

from gfl_d2.modeling import LevelGrid, Locations
from gfl_d2.modeling.locations import valid_mask, valid_sizes

STRIDES = (8, 16, 20)
SIZES = [(4, 5), (2, 3), (1, 1)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_centers_are_detectron2s(offset):
    generator = DefaultAnchorGenerator(
        sizes=[[8 * s] for s in STRIDES], aspect_ratios=[1.0], strides=STRIDES, offset=offset
    )
    levels = generator([torch.zeros(1, 1, *size) for size in SIZES])
    grids = [LevelGrid(s, offset * s, 8 * s) for s in STRIDES]
    locations = Locations(grids, SIZES, [])
    assert_close(locations.centers(CPU), torch.cat([level.get_centers() for level in levels]))
    assert locations.starts == [0, 20, 26, 27]
    assert locations.strides(CPU).tolist() == [8] * 20 + [16] * 6 + [20]


def test_padding_to_the_divisibility_is_the_images_own():
    grids = [LevelGrid(8, 0.0, 64), LevelGrid(64, 0.0, 512)]
    maps = [(20, 20), (3, 3)]
    sizes = valid_sizes([(33, 100), (64, 64)], grids, maps, divisibility=32)
    assert sizes == [[(8, 16), (1, 2)], [(8, 8), (1, 1)]]
    assert valid_sizes([(33, 100)], grids, maps, divisibility=0) == [[(5, 13), (1, 2)]]


def test_no_location_is_beyond_the_map():
    """Of a backbone that rounds sizes down."""
    grids = [LevelGrid(8, 0.0, 64), LevelGrid(16, 0.0, 128)]
    sizes = valid_sizes([(86, 86), (40, 86)], grids, [(10, 10), (5, 5)], divisibility=0)
    assert sizes == [[(10, 10), (5, 5)], [(5, 10), (3, 5)]]


def test_valid_mask():
    mask = valid_mask([(2, 1), (1, 3)], 2, 3, CPU)
    assert mask.long().tolist() == [[[1, 0, 0], [1, 0, 0]], [[1, 1, 1], [0, 0, 0]]]
