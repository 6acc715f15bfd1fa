"""What counts as a difference between the detections of a file and those of the model."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from gfl_d2.deploy.export.check import Check

BOX, BESIDE, FAR = [10.0, 10, 50, 50], [14.0, 10, 54, 50], [200.0, 200, 250, 250]
# BOX and BESIDE have an IoU of 0.82. One of them is kept.
CANDIDATES = [(BOX, 0.5001, 0), (BESIDE, 0.5, 0), (FAR, 0.9, 0), (BESIDE, 0.3, 1)]
EXPECTED = [CANDIDATES[2], CANDIDATES[0], CANDIDATES[3]]


def instances(detections):
    boxes, scores, classes = zip(*detections)
    return Instances(
        (300, 300),
        pred_boxes=Boxes(torch.tensor(boxes)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes),
    )


def compare(actual, expected=EXPECTED, least=0.05, agnostic=False):
    check = Check(0.1, 1e-3, nms_thresh=0.6, class_agnostic=agnostic)
    check.compare(*map(instances, (expected, actual)), least, instances(CANDIDATES))
    return check.unmatched, check.ties


def replace(index, detection):
    return [detection if i == index else x for i, x in enumerate(EXPECTED)]


def test_the_same():
    assert compare(EXPECTED) == (0, 0)
    assert compare(replace(0, (FAR, 0.9004, 0))) == (0, 0)


def test_nms_may_keep_the_other_of_two_that_score_the_same():
    """Both are seen from their side: one lacks the first, the other the second."""
    assert compare(replace(1, (BESIDE, 0.5, 0))) == (0, 2)


DIFFERENT = {
    "moved": (replace(1, ([10.0, 10, 50, 50.2], 0.5001, 0)), 2),
    "moved to where it overlaps": (replace(1, ([12.0, 10, 52, 50], 0.5001, 0)), 2),
    "another score": (replace(1, (BOX, 0.503, 0)), 2),
    "another class": (replace(0, (FAR, 0.9, 1)), 2),
    "missing": (EXPECTED[:2], 1),
    "missing, with one of another class in its place": (replace(1, (BESIDE, 0.3, 1)), 1),
    "no NMS": ([*EXPECTED, (BESIDE, 0.5, 0)], 1),
    "one more": ([*EXPECTED, ([100.0, 100, 150, 150], 0.5, 0)], 1),
}


@pytest.mark.parametrize(("actual", "unmatched"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_a_difference_is_seen(actual, unmatched):
    assert compare(actual) == (unmatched, 0)


def test_the_one_kept_must_score_as_much():
    """The model keeps a box of 0.5001, the file one of 0.3 in its place."""
    actual = [EXPECTED[0], CANDIDATES[3]]
    assert compare(actual, EXPECTED[:2], agnostic=True)[0] > 0


def test_below_the_threshold_rounding_decides():
    assert compare(EXPECTED[:2], least=0.4) == (0, 0)
