"""ATSS assignment against the reference implementation: exactly equal."""

import pytest
import torch
from detectron2.structures import Boxes
from torch.testing import assert_close

from gfl_d2.modeling import ATSSAssigner, GroundTruth, LocationGrid, aligned_iou
from plain_assigner import dense, plain_atss
from reference_data import case, load

STRIDES = (8, 16, 32, 64, 128)
CASES = [
    "border",
    "crowded",
    "duplicate",
    "empty",
    "huge",
    "mid_mixed",
    "normal",
    "padded",
    "padded_crowded",
    "small_crowded",
    "small_mixed",
    "thin",
    "tiny",
    "very_small",
]


@pytest.mark.parametrize("name", CASES)
def test_assignment(name):
    arrays = load("atss_assigner")
    ref = case(arrays, name)
    height, width = ref["padded_size"].tolist()
    anchors = case(arrays, f"anchors/{height}x{width}")
    anchors = [Boxes(anchors[f"l{i}"]) for i in range(len(anchors))]

    shapes = [tuple(size) for size in ref["featmap_sizes"].tolist()]
    levels = LocationGrid(STRIDES)(shapes, ref["image_size"][None], divisibility=32)
    zeros = torch.zeros(len(ref["gt_boxes"]), dtype=torch.int64)
    matches = ATSSAssigner(topk=9)(levels, GroundTruth(ref["gt_boxes"], zeros, zeros))
    (assigned,) = dense(matches, levels)
    plain = plain_atss(anchors, Boxes(ref["gt_boxes"]), ref["valid"])
    assert torch.equal(plain, ref["assigned_gt"].clamp(min=-1))

    assert assigned.dtype == torch.int64
    # The reference writes -2 where an anchor is not valid.
    assert torch.equal(assigned, ref["assigned_gt"].clamp(min=-1))
    positive = assigned >= 0
    iou = torch.zeros(len(assigned))
    iou[positive] = aligned_iou(
        Boxes.cat(anchors).tensor[positive], ref["gt_boxes"][assigned[positive]]
    )
    assert_close(iou, ref["assigned_iou"], rtol=1e-5, atol=1e-6)
    counts = torch.bincount(assigned[assigned >= 0], minlength=len(ref["gt_boxes"]))
    assert torch.equal(counts, ref["num_pos_per_gt"])


def test_cases_are_complete():
    names = {key.split("/")[0] for key in load("atss_assigner")} - {"anchors"}
    assert names == set(CASES)
