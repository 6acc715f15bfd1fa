"""What the analysis of a dataset says about boxes and files, and the command that writes it."""

from __future__ import annotations

import json
import re
import shlex

import cv2
import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from gfl_d2 import load_config
from gfl_d2.analysis import analyze
from gfl_d2.analysis.checks import check_files, find_duplicates, find_suspicious
from gfl_d2.data import register_datasets
from scripts import ROOT, load_script
from test_analysis import CONFIG, make_config, make_table, random_boxes

analyze_dataset = load_script("tools/analyze_dataset.py")


class TestDuplicates:
    def test_as_all_pairs(self):
        rng = np.random.default_rng(1)
        boxes = np.repeat(random_boxes(rng, 40, side=400, largest=200), 3, axis=0)
        boxes[1::3] += (
            rng.normal(0, 1, (40, 4)) * 0.02 * (boxes[1::3, 2:] - boxes[1::3, :2]).repeat(2, 1)
        )
        image = rng.integers(0, 2, len(boxes))
        found = find_duplicates(make_table(boxes, image, sizes=[(400, 400)] * 2))
        iou = box_iou(torch.tensor(boxes), torch.tensor(boxes)).numpy()
        expected = np.argwhere(np.triu(iou > 0.95, 1) & (image[:, None] == image))
        assert len(expected) > 20
        assert sorted(map(tuple, found.pairs)) == sorted(map(tuple, expected))

    def test_kinds(self):
        box = [10.0, 10, 110, 110]
        boxes = [box, box, [10, 10, 110, 111], box]
        found = find_duplicates(make_table(boxes, classes=[0, 0, 0, 1]))
        assert found.counts() == {"exact": 1, "near": 2, "other_class": 3}

    def test_none(self):
        for boxes in ([], [[0, 0, 5, 5]], [[0, 0, 0, 0]] * 2):
            assert len(find_duplicates(make_table(boxes)).pairs) == 0


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
        found = find_suspicious(table, table.boxes, find_duplicates(table))
        assert {x.row for x in found} == {30}
        assert reason in found[0].reasons
        assert found[0].score >= 1

    def test_what_the_border_cuts_off_is_usual(self):
        table = make_table([*self.USUAL, [0, 200, 6, 240]])
        assert find_suspicious(table, table.boxes, find_duplicates(table)) == []

    def test_worst_first(self):
        table = make_table([*self.USUAL, [100, 200, 108, 208], [100, 300, 102, 302]])
        found = find_suspicious(table, table.boxes, find_duplicates(table))
        assert [x.row for x in found] == [31, 30]


def test_files(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        cv2.imwrite(str(tmp_path / f"{name}.jpg"), rng.integers(0, 255, (60, 80, 3), np.uint8))
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-1500])
    (tmp_path / "text.jpg").write_text("no image")
    files = [str(tmp_path / f"{name}.jpg") for name in ("a", "b", "copy", "cut", "text", "absent")]
    hashes, problems = check_files(files)
    a, b, copy, *broken = files
    assert hashes[a] == hashes[copy] != hashes[b]
    assert set(problems) == set(broken)
    assert problems[broken[-1]] == "No such file or directory"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The demo's, some of it: one image of train is in val too."""
    folder = tmp_path_factory.mktemp("data")
    load_script("demo/make_dataset.py").make_dataset(str(folder), num_train=12, num_val=4)
    copied = (folder / "train" / "00003.jpg").read_bytes()
    (folder / "val" / "00001.jpg").write_bytes(copied)
    (folder / "val" / "00002.jpg").write_bytes(copied[:900])
    return folder


class TestCommand:
    def run(self, monkeypatch, data, output, *arguments):
        sets = [[f"demo_{x}", f"{data}/{x}.json", f"{data}/{x}"] for x in ("train", "val")]
        common = ["--config-file", CONFIG, "--output", str(output)]
        opts = ["DATASETS.REGISTER", str(sets), *map(str, arguments)]
        monkeypatch.setattr("sys.argv", ["analyze_dataset", *common, *opts])
        analyze_dataset.main()

    def test_all_it_writes(self, monkeypatch, clean_catalogs, data, tmp_path, capsys):
        opts = ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64)
        self.run(monkeypatch, data, tmp_path / "a" / "b", *opts)
        facts = json.loads((tmp_path / "a" / "b" / "analysis.json").read_text())
        assert facts["files"]["in_train_and_test"] == 1
        assert facts["files"]["several_times_in_train"] == 0
        (unreadable,) = facts["files"]["unreadable"]
        assert unreadable.endswith("00002.jpg")
        picture = cv2.imread(str(tmp_path / "a" / "b" / "analysis.png"))
        assert picture.shape[1] > 1000
        assert picture.std() > 20
        text = capsys.readouterr().out
        assert "1 are in train and test" in text
        assert "Images that cannot be read: 1" in text
        # Images of 192 pixels at 64: a larger input, in lines that can be pasted.
        line = re.search(r"^INPUT\.MIN_SIZE_TRAIN .*$", text, flags=re.MULTILINE)[0]
        cfg = make_config(*shlex.split(line))
        assert cfg.INPUT.MIN_SIZE_TRAIN[0] > 64
        lines = text.split("in a config file:\n\n")[1].split("\n\nWritten")[0]
        (tmp_path / "config.yaml").write_text(f'_BASE_: "{CONFIG}"\n{lines}\n')
        pasted = load_config(str(tmp_path / "config.yaml"), ["MODEL.DEVICE", "cpu"])
        assert pasted.INPUT == cfg.INPUT

    def test_one_line_for_mistakes(self, monkeypatch, clean_catalogs, data, tmp_path):
        (tmp_path / "file").touch()
        for output, arguments, message in (
            (tmp_path / "file", (), "file"),
            (tmp_path, ("DATASETS.TRAIN", "('absent',)"), "'absent' is not registered"),
            (tmp_path, ("--max-images", "-1"), "0, for all, or more, got -1"),
            (tmp_path, ("INPUT.NONE", "1"), "INPUT.NONE"),
        ):
            with pytest.raises(SystemExit) as exit:
                self.run(monkeypatch, data, output, *arguments)
            text = str(exit.value)
            assert text.startswith("Error: ")
            assert message in text
            assert "\n" not in text


def test_real_photographs(real_data, clean_catalogs):
    """Against counts of the file itself."""
    folder = real_data / "bccd"
    content = json.loads((folder / "instances_train.json").read_text())
    sets = [["bccd", str(folder / "instances_train.json"), str(folder / "images")]]
    opts = ["DATASETS.REGISTER", str(sets), "DATASETS.TRAIN", "('bccd',)", "DATASETS.TEST", "()"]
    config = str(ROOT / "configs" / "gfl_R_18_FPN_bccd.yaml")
    cfg = load_config(config, ["MODEL.DEVICE", "cpu", *opts])
    register_datasets(cfg)
    facts = analyze(cfg).facts
    assert facts["test"] is None
    assert facts["train"]["boxes"] == len(content["annotations"])
    for category in content["categories"]:
        areas = [
            a["bbox"][2] * a["bbox"][3] / 4  # at half size
            for a in content["annotations"]
            if a["category_id"] == category["id"]
        ]
        found = facts["train"]["classes"][category["name"]]
        assert found["boxes"] == len(areas)
        assert found["median_size"] == pytest.approx(np.median(np.sqrt(areas)), rel=1e-6)
