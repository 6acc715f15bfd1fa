"""Properties of the ATSS assigner, and the plain algorithm as its oracle."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from gfl_d2.modeling import (
    ATSSAssigner,
    DynamicATSSAssigner,
    GroundTruth,
    Levels,
    LocationGrid,
    Outputs,
    Predictions,
)
from plain_assigner import dense, plain_atss

STRIDES = (8, 16, 32, 64, 128)


def make_levels(
    height, width, valid=None, offset: float = 0.0, strides: tuple[int, ...] = STRIDES
) -> Levels:
    """Of one image, of which ``valid`` (height, width) is not padding."""
    shapes = [(-(-height // s), -(-width // s)) for s in strides]
    return LocationGrid(strides, offset=offset)(shapes, torch.tensor([valid or (height, width)]))


def make_anchors(levels: Levels, offset: float = 0.0) -> list[Boxes]:
    """As Detectron2 has them."""
    strides = levels.strides.tolist()
    generator = DefaultAnchorGenerator(
        sizes=[[8 * s] for s in strides], aspect_ratios=[1.0], strides=strides, offset=offset
    )
    return generator([torch.zeros(1, 1, *shape) for shape in levels.shapes])


def valid_anchors(levels: Levels) -> torch.Tensor:
    """Shape (R,), bool."""
    masks = []
    for (height, width), (rows, columns) in zip(levels.shapes, levels.valid_sizes[0].tolist()):
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[:rows, :columns] = True
        masks.append(mask.flatten())
    return torch.cat(masks)


def ground_truth(*boxes_per_image: Boxes) -> GroundTruth:
    image = torch.cat([torch.full((len(x),), i) for i, x in enumerate(boxes_per_image)])
    return GroundTruth(Boxes.cat(boxes_per_image).tensor, torch.zeros_like(image), image)


def assign(levels, gt, assigner=None, predict=None):
    """Of one image: shape (R,), the number of the box of each anchor, or -1."""
    outputs = None if predict is None else Outputs([], Predictions([], []), predict, 0)
    matches = (assigner or ATSSAssigner())(levels, ground_truth(gt), outputs)
    (matched,) = dense(matches, levels)
    return matched


def predicted_at(levels, boxes):
    """A function that gives, for matches, the boxes of shape (R, 4) at them."""
    maps, first = [], 0
    for shape in levels.shapes:
        last = first + shape[0] * shape[1]
        maps.append(boxes[first:last].T.reshape(1, 4, *shape))
        first = last
    return lambda matches: matches.take(maps)


def num_locations(levels: Levels) -> int:
    return sum(height * width for height, width in levels.shapes)


def random_gt(count: int, height: int, width: int, seed: int) -> Boxes:
    # Odd fractions of a pixel, so that no two distances or IoUs are equal.
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height])
    corner = torch.rand(count, 2, generator=generator) * size * 0.9
    extent = torch.exp(torch.rand(count, 2, generator=generator) * 4.5) + 0.37
    return Boxes(torch.cat((corner, torch.minimum(corner + extent, size.float())), dim=1))


def whole_gt(count: int, height: int, width: int, seed: int) -> Boxes:
    """At whole multiples of 4 pixels: many equal distances and IoUs, some boxes of no area."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([width // 4, height // 4])
    corners = (torch.rand(2, count, 2, generator=generator) * (limit + 1)).floor() * 4
    return Boxes(torch.cat((corners.amin(dim=0), corners.amax(dim=0)), dim=1))


scenes = {
    "seed": st.integers(0, 2**31 - 1),
    "count": st.integers(0, 12),
    "size": st.tuples(st.integers(1, 200), st.integers(1, 260)),
    "padding": st.tuples(st.integers(0, 100), st.integers(0, 100)),
    "topk": st.sampled_from([1, 2, 5, 9, 30]),
    "offset": st.sampled_from([0.0, 0.5]),
    "strides": st.sampled_from([STRIDES, (12, 24, 48), (10, 20, 40, 80), (14, 28)]),
    "make": st.sampled_from([random_gt, whole_gt]),
}


def make_scene(seed, count, size, padding, offset, strides, make):
    batch_size = [side + more for side, more in zip(size, padding)]
    levels = make_levels(*batch_size, valid=size, offset=offset, strides=strides)
    return levels, make_anchors(levels, offset), make(count, *size, seed)


@given(**scenes)
@settings(max_examples=150)
def test_equals_the_plain_algorithm(topk, **scene):
    """Exactly, with ties, padding and levels of few anchors."""
    levels, anchors, gt = make_scene(**scene)
    expected = plain_atss(anchors, gt, valid_anchors(levels), topk)
    assert torch.equal(assign(levels, gt, ATSSAssigner(topk)), expected)


@given(**scenes)
@settings(max_examples=75)
def test_dynamic_equals_the_plain_algorithm(topk, **scene):
    levels, anchors, gt = make_scene(**scene)
    # As a trained model predicts: some boxes are good, whatever the anchor.
    predicted = Boxes.cat(anchors).tensor
    generator = torch.Generator().manual_seed(scene["seed"])
    predicted = predicted + torch.randn(predicted.shape, generator=generator)
    if len(gt) > 0:
        index = torch.arange(len(predicted)) % len(gt)
        predicted = torch.lerp(predicted, gt.tensor[index], 0.7)
    expected = plain_atss(anchors, gt, valid_anchors(levels), topk, predicted)
    assigned = assign(levels, gt, DynamicATSSAssigner(topk), predicted_at(levels, predicted))
    assert torch.equal(assigned, expected)


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=20)
def test_boxes_outside_of_the_image(seed):
    """Centres anywhere, far and near: the nearest anchors are on the border."""
    levels = make_levels(160, 224)
    generator = torch.Generator().manual_seed(seed)
    centers = (torch.rand(20, 2, generator=generator) - 0.3) * 600
    sizes = torch.rand(20, 2, generator=generator) * 400
    gt = Boxes(torch.cat((centers - sizes, centers + sizes), dim=1))
    expected = plain_atss(make_anchors(levels), gt, valid_anchors(levels))
    assert torch.equal(assign(levels, gt), expected)


def test_images_of_a_batch_do_not_mix():
    sizes = [(160, 224), (96, 224), (160, 64)]
    alone = [make_levels(160, 224, valid=size) for size in sizes]
    gt = [random_gt(count, *size, seed=count) for count, size in zip((7, 0, 3), sizes)]
    batch = alone[0]._replace(valid_sizes=torch.cat([x.valid_sizes for x in alone]))
    matched = dense(ATSSAssigner()(batch, ground_truth(*gt)), batch)
    first = 0
    for levels, boxes, together in zip(alone, gt, matched):
        expected = assign(levels, boxes)
        assert torch.equal(together, torch.where(expected >= 0, expected + first, -1))
        first += len(boxes)


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=10)
def test_dynamic_with_predictions_far_from_everything_is_atss(seed):
    """They add an IoU of 0 to every candidate."""
    levels, gt = make_levels(160, 224), random_gt(5, 160, 224, seed)
    far = torch.tensor([-50.0, -50.0, -40.0, -40.0])
    dynamic = assign(
        levels, gt, DynamicATSSAssigner(), lambda matches: far.expand(*matches.row.shape, 4)
    )
    assert torch.equal(dynamic, assign(levels, gt))


def test_dynamic_needs_predictions():
    with pytest.raises(ValueError, match="outputs"):
        assign(make_levels(64, 64), random_gt(2, 64, 64, seed=0), DynamicATSSAssigner())


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=15)
def test_flipped_boxes_give_flipped_targets(seed):
    """On a grid that is symmetrical in the image, so with centres in the middle of cells."""
    height, width = 128, 256
    levels = make_levels(height, width, offset=0.5)
    gt = random_gt(6, height, width, seed)
    flipped = Boxes(torch.stack((width - gt.tensor[:, 2], gt.tensor[:, 1],
                                 width - gt.tensor[:, 0], gt.tensor[:, 3]), dim=1))  # fmt: skip
    sizes = [height * width for height, width in levels.shapes]
    assigned, mirrored = (assign(levels, boxes).split(sizes) for boxes in (gt, flipped))
    for a, b, stride in zip(assigned, mirrored, STRIDES):
        assert torch.equal(a.view(-1, width // stride), b.view(-1, width // stride).flip(1))


def test_no_boxes():
    levels = make_levels(64, 64)
    assigned = assign(levels, Boxes(torch.zeros(0, 4)))
    assert assigned.dtype == torch.int64
    assert assigned.shape == (num_locations(levels),)
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
    levels = make_levels(128, 192)
    gt = Boxes(torch.tensor([box, [30.0, 20.0, 120.0, 90.0]]))
    assigned = assign(levels, gt)
    expected = plain_atss(make_anchors(levels), gt, valid_anchors(levels))
    assert torch.equal(assigned, expected)
    assert (assigned == 1).any()  # the ordinary box does not suffer


def test_of_duplicates_the_first_box_wins():
    levels = make_levels(128, 128)
    box = [30.3, 20.1, 90.7, 80.2]
    once = assign(levels, Boxes(torch.tensor([box])))
    thrice = assign(levels, Boxes(torch.tensor([box, box, box])))
    assert (once == 0).any()
    assert torch.equal(once, thrice)


def test_order_of_boxes_does_not_matter():
    levels, gt = make_levels(160, 160), random_gt(20, 160, 160, seed=3)
    order = torch.randperm(20)
    shuffled = assign(levels, gt[order])
    assert torch.equal(assign(levels, gt), torch.where(shuffled >= 0, order[shuffled], -1))


def test_topk_beyond_the_size_of_every_level():
    levels, gt = make_levels(64, 96), random_gt(4, 64, 96, seed=1)
    expected = plain_atss(make_anchors(levels), gt, valid_anchors(levels), topk=1000)
    assert torch.equal(assign(levels, gt, ATSSAssigner(1000)), expected)


def test_topk_must_be_positive():
    with pytest.raises(ValueError, match="topk"):
        ATSSAssigner(topk=0)


def test_more_boxes_than_anchors():
    levels, gt = make_levels(64, 64), random_gt(200, 64, 64, seed=2)
    assert num_locations(levels) < 200
    expected = plain_atss(make_anchors(levels), gt, valid_anchors(levels))
    assert torch.equal(assign(levels, gt), expected)


@pytest.mark.slow
def test_five_thousand_boxes():
    levels, gt = make_levels(1024, 1024), random_gt(5000, 1024, 1024, seed=0)
    assigned = assign(levels, gt)
    # What few boxes get alone they get among many, unless a better box has taken the place.
    few = assign(levels, gt[:20])
    taken = (few >= 0) & (assigned != few)
    assert (assigned[few >= 0] >= 0).all()
    iou = box_iou(Boxes.cat(make_anchors(levels)).tensor, gt.tensor)
    index = taken.nonzero()[:, 0]
    assert (iou[index, assigned[index]] >= iou[index, few[index]]).all()
