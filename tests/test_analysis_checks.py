"""What the analysis of a dataset says about single boxes and files."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from box_tables import make_table, random_boxes
from gfl_d2.analysis.boxes import InputSize
from gfl_d2.analysis.checks import check_files, find_duplicates, find_suspicious

AS_THEY_ARE = InputSize((0,), 0)


class TestDuplicates:
    def test_as_all_pairs(self):
        rng = np.random.default_rng(1)
        boxes = np.repeat(random_boxes(rng, 40, side=400, largest=200), 3, axis=0)
        boxes[1::3] += (
            rng.normal(0, 1, (40, 4)) * 0.02 * (boxes[1::3, 2:] - boxes[1::3, :2]).repeat(2, 1)
        )
        image = rng.integers(0, 2, len(boxes))
        pairs, _ = find_duplicates(make_table(boxes, image, sizes=[(400, 400)] * 2))
        iou = box_iou(torch.tensor(boxes), torch.tensor(boxes)).numpy()
        expected = np.argwhere(np.triu(iou > 0.95, 1) & (image[:, None] == image))
        assert len(expected) > 20
        assert sorted(map(tuple, pairs)) == sorted(map(tuple, expected))

    def test_kinds(self):
        box = [10.0, 10, 110, 110]
        boxes = [box, box, [10, 10, 110, 111], box]
        _, counts = find_suspicious(make_table(boxes, classes=[0, 0, 0, 1]), AS_THEY_ARE)
        assert counts == {"exact": 1, "near": 2, "other_class": 3}

    def test_none(self):
        for boxes in ([], [[0, 0, 5, 5]], [[0, 0, 0, 0]] * 2):
            assert len(find_duplicates(make_table(boxes))[0]) == 0


class TestSuspicious:
    # Thirty boxes of 40 x 40, without any duplicate.
    USUAL = tuple([20.0 + 10 * i, 100, 60 + 10 * i, 140] for i in range(30))

    @pytest.mark.parametrize(
        ("box", "reason"),
        [
            ([100, 300, 101, 340], "1.0 pixels at the input"),
            ([100, 200, 108, 208], "much smaller than its class"),
            ([100, 200, 400, 500], "much larger than its class"),
            ([100, 300, 260, 320], "much wider than its class"),
            ([300, 100, 320, 260], "much taller than its class"),
            ([1, 1, 511, 511], "nearly the whole image"),
            ([-10, 200, 30, 240], "25% outside of the image"),
            ([20, 100, 60, 140], "as another box (class 0)"),
        ],
    )
    def test_reason(self, box, reason):
        table = make_table([*self.USUAL, box])
        ((found,), _) = find_suspicious(table, AS_THEY_ARE)
        x0, y0, x1, y1 = box
        assert found["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert (found["file"], found["class"]) == ("0.png", "class 0")
        assert reason in found["reasons"]
        assert found["score"] >= 1

    def test_what_the_border_cuts_off_is_usual(self):
        table = make_table([*self.USUAL, [0, 200, 6, 240]])
        assert find_suspicious(table, AS_THEY_ARE)[0] == []

    def test_worst_first(self):
        table = make_table([*self.USUAL, [100, 200, 108, 208], [100, 300, 102, 302]])
        found, _ = find_suspicious(table, AS_THEY_ARE)
        assert [x["bbox"][2] for x in found] == [2, 8]


def test_files(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        cv2.imwrite(str(tmp_path / f"{name}.jpg"), rng.integers(0, 255, (60, 80, 3), np.uint8))
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-1500])
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("RGB", (80, 60)).save(tmp_path / "script.jpg", format="EPS")
    names = ("a", "b", "copy", "cut", "text", "script", "absent")
    files = [str(tmp_path / f"{name}.jpg") for name in names]
    a, b, copy, *broken = files
    found = check_files({"train": [*files[:3], *broken], "test": [b, copy]})
    assert found["several_times_in_train_files"] == [[a, copy]]
    expected = [{"train": [a, copy], "test": [copy]}, {"train": [b], "test": [b]}]
    assert found["in_train_and_test_files"] == expected
    assert set(found["unreadable"]) == set(broken)
    assert found["unreadable"][broken[-1]] == "no such file"
    assert "PostScript" in found["unreadable"][broken[-2]]
