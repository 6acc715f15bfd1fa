"""Properties of the ATSS assigner, and a second computation of it from the paper."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from gfl_d2.modeling import ATSSAssigner, DynamicATSSAssigner, LegacyAnchorGenerator

STRIDES = (8, 16, 32, 64, 128)


def make_anchors(height: int, width: int, offset: float = 0.0) -> list[Boxes]:
    generator = DefaultAnchorGenerator(
        sizes=[[8 * s] for s in STRIDES], aspect_ratios=[1.0], strides=STRIDES, offset=offset
    )
    return generator([torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in STRIDES])


def plain_atss(
    anchors: list[Boxes],
    gt_boxes: Boxes,
    valid: torch.Tensor,
    topk: int = 9,
    predicted: torch.Tensor | None = None,
):
    """
    One box at a time and in float64, with none of the code under test. With ``predicted`` boxes,
    shape (R, 4), dynamic ATSS.
    """
    boxes = Boxes.cat(anchors).tensor.double()
    levels = torch.repeat_interleave(torch.tensor([len(a) for a in anchors]))
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    best_iou = torch.zeros(len(boxes), dtype=torch.float64)
    assigned = torch.full((len(boxes),), -1)
    for m, gt in enumerate(gt_boxes.tensor.double()):
        distance = (centers - (gt[:2] + gt[2:]) / 2).norm(dim=1)
        candidates = []
        for level in levels.unique():
            members = ((levels == level) & valid).nonzero()[:, 0].tolist()
            candidates += sorted(members, key=lambda i: float(distance[i]))[:topk]
        ious = [box_iou(boxes[candidates], gt[None])[:, 0]]
        if predicted is not None:
            ious.append(box_iou(predicted[candidates].double(), gt[None])[:, 0])
        iou = sum(ious)
        spread = sum(x.std() for x in ious) if len(candidates) > 1 else 0
        threshold = iou.mean() + spread
        for i, iou_i in zip(candidates, iou):
            x, y = centers[i]
            inside = min(x - gt[0], y - gt[1], gt[2] - x, gt[3] - y) > 0.01
            if inside and iou_i >= threshold and iou_i > best_iou[i]:
                best_iou[i], assigned[i] = iou_i, m
    return assigned


def random_gt(count: int, height: int, width: int, seed: int) -> Boxes:
    # Odd fractions of a pixel, so that no two distances or IoUs are equal.
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height])
    corner = torch.rand(count, 2, generator=generator) * size * 0.9
    extent = torch.exp(torch.rand(count, 2, generator=generator) * 4.5) + 0.37
    return Boxes(torch.cat((corner, torch.minimum(corner + extent, size.float())), dim=1))


@given(seed=st.integers(0, 2**31 - 1), count=st.integers(1, 12), padded=st.booleans())
@settings(max_examples=25)
def test_equals_the_plain_computation(seed, count, padded):
    anchors = make_anchors(160, 224)
    height, width = (96, 128) if padded else (160, 224)
    gt = random_gt(count, height, width, seed)
    centers = Boxes.cat(anchors).get_centers()
    valid = (centers[:, 0] < width) & (centers[:, 1] < height)
    expected = plain_atss(anchors, gt, valid)
    assert torch.equal(ATSSAssigner()(anchors, gt, valid), expected)


@given(seed=st.integers(0, 2**31 - 1), count=st.integers(1, 12), padded=st.booleans())
@settings(max_examples=25)
def test_dynamic_equals_the_plain_computation(seed, count, padded):
    anchors = make_anchors(160, 224)
    height, width = (96, 128) if padded else (160, 224)
    gt = random_gt(count, height, width, seed)
    centers = Boxes.cat(anchors).get_centers()
    valid = (centers[:, 0] < width) & (centers[:, 1] < height)
    # As a trained model predicts: some boxes are good, whatever the anchor.
    predicted = Boxes.cat(anchors).tensor
    noise = torch.randn(predicted.shape, generator=torch.Generator().manual_seed(seed))
    index = torch.arange(len(predicted)) % count
    predicted = torch.lerp(predicted, gt.tensor[index], 0.7) + noise
    expected = plain_atss(anchors, gt, valid, predicted=predicted)
    assigned = DynamicATSSAssigner()(anchors, gt, valid, lambda i: predicted[i])
    assert torch.equal(assigned, expected)


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=10)
def test_dynamic_with_predictions_far_from_everything_is_atss(seed):
    """They add an IoU of 0 to every candidate."""
    anchors, gt = make_anchors(160, 224), random_gt(5, 160, 224, seed)
    far = torch.tensor([-50.0, -50.0, -40.0, -40.0])
    dynamic = DynamicATSSAssigner()(anchors, gt, None, lambda i: far.expand(*i.shape, 4))
    assert torch.equal(dynamic, ATSSAssigner()(anchors, gt))


def test_dynamic_needs_predictions():
    with pytest.raises(ValueError, match="predict"):
        DynamicATSSAssigner()(make_anchors(64, 64), random_gt(2, 64, 64, seed=0))


def test_legacy_centers():
    """At (stride - 1) / 2 + i * stride on every level."""
    generator = LegacyAnchorGenerator(
        sizes=[[8 * s] for s in STRIDES], aspect_ratios=[1.0], strides=STRIDES
    )
    levels = generator([torch.zeros(1, 1, 2, 3)] * 5)
    for boxes, stride in zip(levels, STRIDES):
        x, y = boxes.get_centers().unbind(dim=1)
        assert x.tolist() == [(stride - 1) / 2 + i * stride for i in (0, 1, 2)] * 2
        assert y.tolist() == [(stride - 1) / 2 + i * stride for i in (0, 0, 0, 1, 1, 1)]
        assert (boxes.tensor[:, 2] - boxes.tensor[:, 0] == 8 * stride).all()


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=15)
def test_flipped_boxes_give_flipped_targets(seed):
    """On a grid that is symmetrical in the image, so with centres in the middle of cells."""
    height, width = 128, 256
    anchors = make_anchors(height, width, offset=0.5)
    gt = random_gt(6, height, width, seed)
    flipped = Boxes(torch.stack((width - gt.tensor[:, 2], gt.tensor[:, 1],
                                 width - gt.tensor[:, 0], gt.tensor[:, 3]), dim=1))  # fmt: skip
    assigned = ATSSAssigner()(anchors, gt).split([len(a) for a in anchors])
    mirrored = ATSSAssigner()(anchors, flipped).split([len(a) for a in anchors])
    for a, b, stride in zip(assigned, mirrored, STRIDES):
        assert torch.equal(a.view(-1, width // stride), b.view(-1, width // stride).flip(1))


def test_no_boxes():
    anchors = make_anchors(64, 64)
    assigned = ATSSAssigner()(anchors, Boxes(torch.zeros(0, 4)))
    assert assigned.dtype == torch.int64
    assert len(assigned) == sum(len(a) for a in anchors)
    assert (assigned == -1).all()


@pytest.mark.parametrize(
    "box",
    [
        [100.2, 60.3, 100.7, 60.9],  # smaller than a pixel
        [-500.0, -300.0, 900.0, 800.0],  # larger than the image
        [50.0, 50.0, 50.0, 90.0],  # no area
        [1000.0, 1000.0, 1100.0, 1100.0],  # outside the image
    ],
)
def test_odd_boxes(box):
    anchors = make_anchors(128, 192)
    gt = Boxes(torch.tensor([box, [30.0, 20.0, 120.0, 90.0]]))
    valid = torch.ones(sum(len(a) for a in anchors), dtype=torch.bool)
    assigned = ATSSAssigner()(anchors, gt, valid)
    assert torch.equal(assigned, plain_atss(anchors, gt, valid))
    assert (assigned == 1).any()  # the ordinary box does not suffer


def test_of_duplicates_the_first_box_wins():
    anchors = make_anchors(128, 128)
    box = [30.3, 20.1, 90.7, 80.2]
    once = ATSSAssigner()(anchors, Boxes(torch.tensor([box])))
    thrice = ATSSAssigner()(anchors, Boxes(torch.tensor([box, box, box])))
    assert (once == 0).any()
    assert torch.equal(once, thrice)


def test_order_of_boxes_does_not_matter():
    anchors, gt = make_anchors(160, 160), random_gt(20, 160, 160, seed=3)
    order = torch.randperm(20)
    assigned = ATSSAssigner()(anchors, gt)
    shuffled = ATSSAssigner()(anchors, gt[order])
    assert torch.equal(assigned, torch.where(shuffled >= 0, order[shuffled], -1))


@pytest.mark.parametrize("topk", [1, 9, 1000])
def test_topk_beyond_the_size_of_a_level(topk):
    anchors, gt = make_anchors(64, 96), random_gt(4, 64, 96, seed=1)
    valid = torch.ones(sum(len(a) for a in anchors), dtype=torch.bool)
    assigned = ATSSAssigner(topk)(anchors, gt, valid)
    assert torch.equal(assigned, plain_atss(anchors, gt, valid, topk))


def test_invalid_anchors_are_never_positive():
    anchors, gt = make_anchors(128, 128), random_gt(10, 128, 128, seed=0)
    valid = torch.rand(sum(len(a) for a in anchors)) < 0.5
    assert (ATSSAssigner()(anchors, gt, valid)[~valid] == -1).all()
    assert (ATSSAssigner()(anchors, gt, torch.zeros_like(valid)) == -1).all()


def test_topk_must_be_positive():
    with pytest.raises(ValueError, match="topk"):
        ATSSAssigner(topk=0)


def test_crowds_are_taken_in_portions(monkeypatch):
    anchors, gt = make_anchors(160, 224), random_gt(50, 160, 224, seed=2)
    expected = ATSSAssigner()(anchors, gt)
    monkeypatch.setattr("gfl_d2.modeling.assigner._MAX_DISTANCES", 2000)
    assert torch.equal(ATSSAssigner()(anchors, gt), expected)


def test_five_thousand_boxes():
    anchors, gt = make_anchors(1024, 1024), random_gt(5000, 1024, 1024, seed=0)
    assigned = ATSSAssigner()(anchors, gt)
    # What few boxes get alone they get among many, unless a better box has taken the place.
    few = ATSSAssigner()(anchors, gt[:20])
    taken = (few >= 0) & (assigned != few)
    assert (assigned[few >= 0] >= 0).all()
    iou = box_iou(Boxes.cat(anchors).tensor, gt.tensor)
    index = taken.nonzero()[:, 0]
    assert (iou[index, assigned[index]] >= iou[index, few[index]]).all()
