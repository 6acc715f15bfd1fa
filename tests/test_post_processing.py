"""Detections from predictions, against every step done for all locations and classes."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import ImageList
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import nms

from gfl_d2.modeling.post_processing import Candidates, suppress
from models import STRIDES, gfl_on_features

NUM_CLASSES = 3


def plain_detections(model, logits, distributions, image, image_size):
    """Boxes, scores and classes of one image, by descending score."""
    parts = []
    for stride, maps, bins in zip(STRIDES, logits, distributions):
        scores = maps[image].sigmoid().flatten(1).T  # (Ri, C)
        height, width = maps.shape[2:]
        probs = bins[image].flatten(1).T.reshape(-1, 4, 17).softmax(dim=-1)
        left, top, right, bottom = (probs * torch.arange(17.0)).sum(dim=-1).T * stride
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        x, y = (cells.flatten() * stride for cells in (x, y))
        boxes = torch.stack((x - left, y - top, x + right, y + bottom), dim=1)
        # Only what belongs to the image, whose sides count up to a multiple of 32.
        valid_y, valid_x = (-(-(-(-side // 32) * 32) // stride) for side in image_size)
        kept = [
            (float(scores[i, c]), c, boxes[i])
            for i, c in (scores > model.test_score_thresh).nonzero().tolist()
            if i // width < valid_y and i % width < valid_x
        ]
        parts += sorted(kept, key=lambda x: -x[0])[: model.test_topk_candidates]
    height, width = image_size
    limit = torch.tensor([width, height, width, height])
    parts = [(score, c, box.clamp(min=0).minimum(limit)) for score, c, box in parts]
    parts = [x for x in parts if (x[2][2:] > x[2][:2]).all()]
    found = []
    for c in range(NUM_CLASSES):
        of_class = [x for x in parts if x[1] == c]
        if of_class:
            boxes = torch.stack([x[2] for x in of_class])
            keep = nms(boxes, torch.tensor([x[0] for x in of_class]), model.test_nms_thresh)
            found += [of_class[i] for i in keep.tolist()]
    return sorted(found, key=lambda x: -x[0])[: model.max_detections_per_image]


@given(
    seed=st.integers(0, 2**31 - 1),
    size=st.tuples(st.integers(1, 100), st.integers(1, 130)),  # from one location a level
    thresh=st.sampled_from([0.0, 0.05, 0.3, 0.9]),
    topk=st.sampled_from([1, 7, 1000]),
    limit=st.sampled_from([1, 20, 1000]),
    bias=st.sampled_from([-8.0, -2.0, 1.0]),
)
@settings(max_examples=60)
@torch.no_grad()
def test_equals_the_plain_form(seed, size, thresh, topk, limit, bias):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    logits, distributions = (
        [torch.randn(2, channels, *x, generator=generator) * 2 for x in sizes]
        for channels in (NUM_CLASSES, 4 * 17)
    )
    logits = [x + bias for x in logits]
    model = gfl_on_features(
        [torch.zeros(2, 32, *x) for x in sizes],
        num_classes=NUM_CLASSES,
        conv_dim=32,
        test_score_thresh=thresh,
        test_topk_candidates=topk,
        max_detections_per_image=limit,
    )
    # The second image is smaller than the batch.
    image_sizes = [size, (-(-size[0] // 2), -(-size[1] // 2))]
    images = ImageList(torch.zeros(2, 3, *size), image_sizes)
    results = model.forward_inference(images, [], (logits, distributions))
    for i, detections in enumerate(results):
        expected = plain_detections(model, logits, distributions, i, image_sizes[i])
        assert detections.pred_classes.tolist() == [c for _, c, _ in expected]
        assert_close(detections.scores, torch.tensor([score for score, *_ in expected]))
        boxes = torch.stack([box for *_, box in expected]) if expected else torch.empty(0, 4)
        assert_close(detections.pred_boxes.tensor, boxes, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("class_agnostic", "kept"), [(False, [0, 1, 3]), (True, [0, 3])])
def test_boxes_of_other_classes(class_agnostic, kept):
    """Boxes 0, 1 and 2 overlap by an IoU of 0.9. Box 0 is of another class than 1 and 2."""
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 9, 10], [20, 0, 30, 10]]
    scores, classes = [0.9, 0.8, 0.7, 0.6], [0, 1, 1, 1]
    candidates = Candidates(
        torch.tensor([boxes], dtype=torch.float32), torch.tensor([scores]), torch.tensor([classes])
    )
    (detections,) = suppress(
        candidates, [(20, 40)], nms_thresh=0.6, max_detections=9, class_agnostic=class_agnostic
    )
    assert detections.pred_boxes.tensor.tolist() == [boxes[i] for i in kept]
    assert detections.pred_classes.tolist() == [classes[i] for i in kept]


@torch.no_grad()
def test_padding_is_not_searched():
    """A sure location there, whose box reaches into the image."""
    sizes = [(-(-256 // s), -(-256 // s)) for s in STRIDES]
    logits, distributions = (
        [torch.full((2, channels, *x), -10.0) for x in sizes] for channels in (NUM_CLASSES, 68)
    )
    logits[0][:, 0, 20, 20] = 4.0  # at (160, 160)
    distributions[0][:, 16::17] = 10.0  # sides are 16 strides away
    model = gfl_on_features([torch.zeros(2, 32, *x) for x in sizes], num_classes=NUM_CLASSES)
    images = ImageList(torch.zeros(2, 3, 256, 256), [(256, 256), (128, 128)])
    whole, padded = model.forward_inference(images, [], (logits, distributions))
    assert len(whole) == 1
    assert len(padded) == 0
