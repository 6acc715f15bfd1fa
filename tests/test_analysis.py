"""The analysis of a dataset as a whole, and the command that writes it."""

from __future__ import annotations

import json
import re
import shlex
import warnings

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from box_tables import CONFIG, make_config, random_boxes
from gfl_d2 import load_config
from gfl_d2.analysis import analyze, format_report, save_picture
from gfl_d2.analysis.boxes import read_boxes
from gfl_d2.data import register_datasets
from gfl_d2.errors import InputError
from scripts import ROOT, load_script

analyze_dataset = load_script("tools/analyze_dataset.py")


@pytest.fixture
def register(clean_catalogs):
    """Registers records as a dataset of Python code. Called with its name and records."""

    def register(name: str, records: list[dict], classes: tuple[str, ...] = ("a", "b")):
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=list(classes))

    return register


def make_record(index: int, boxes=(), classes=(), crowd: int = 0, file: str = "absent") -> dict:
    annotations = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": c, "iscrowd": crowd}
        for box, c in zip(boxes, classes)
    ]
    record = {"file_name": f"{file}{index}.png", "image_id": index, "annotations": annotations}
    return {**record, "height": 192, "width": 256}


class TestAnalyze:
    def config(self, *opts):
        return make_config("DATASETS.TRAIN", "('one', 'two')", "DATASETS.TEST", "('test',)", *opts)

    def test_counts(self, register):
        one = [make_record(0, [[10, 10, 50, 60]] * 2, [0, 1]), make_record(1)]
        one.append(make_record(2, [[0, 0, 200, 100]], [1], crowd=1))
        two = [make_record(3, [[5, 5, 40, 30], [60, 60, 50, 50]], [0, 0])]
        register("one", one, ("a", "b", "c"))
        register("two", two, ("a", "b", "c"))
        register("test", [{**make_record(0), "annotations": []}], ("a", "b", "c"))
        analysis = analyze(self.config())
        train, test = analysis.facts["images"]
        assert (train["images"], train["images_without_boxes"]) == (4, 2)
        assert (train["boxes"], train["crowds"]) == (4, 1)
        names = ("class", "train_boxes", "train_images", "test_boxes")
        counts = [tuple(row[name] for name in names) for row in analysis.facts["classes"]]
        assert counts == [("a", 3, 2, 0), ("b", 1, 1, 0), ("c", 0, 0, 0)]
        assert test["boxes"] == 0
        assert analysis.facts["duplicate_boxes"]["train"]["other_class"] == 1
        assert analysis.facts["anchors"]["without_anchor"]["lost to other boxes"] == 1
        assert analysis.facts["anchors"]["without_anchor_by_class"] == {"b": 1}
        assert len(analysis.facts["files"]["unreadable"]) == 4
        # Of 40 x 30 and 50 x 50 pixels and so on: the input is as large as the images.
        roots = np.sqrt([50 * 60, 50 * 60, 40 * 30, 50 * 50])
        assert train["size_50"] == pytest.approx(np.median(roots))
        assert analysis.opts == {}
        json.loads(json.dumps(analysis.facts, allow_nan=False))

    def test_reg_max(self, register):
        """Of a box of 250 x 24 pixels most anchors are on the finest level: it needs many bins."""
        records = [make_record(i, [[2, 40 + i, 250, 24]], [0]) for i in range(20)]
        for name in ("one", "two", "test"):
            register(name, records)
        analysis = analyze(self.config("MODEL.GFL.REG_MAX", 16))
        level = analysis.facts["levels"][0]
        assert level["longest_target"] > 16
        assert analysis.opts["MODEL.GFL.REG_MAX"] == level["reg_max_needed"]
        analysis = analyze(self.config("MODEL.GFL.REG_MAX", 40))
        assert analysis.opts == {}
        dirac = ["MODEL.GFL.BOX_REPRESENTATION", "dirac"]
        assert analyze(self.config("MODEL.GFL.REG_MAX", 16, *dirac)).opts == {}

    def test_some_images(self, register):
        rng = np.random.default_rng(0)
        for name in ("one", "two", "test"):
            boxes = [random_boxes(rng, 3, 190, 90).tolist() for _ in range(15)]
            register(name, [make_record(i, x, [0, 1, 0]) for i, x in enumerate(boxes)])
        analyses = [analyze(self.config(), max_images=n) for n in (0, 8, 8, 100)]
        used = [x.facts["anchors"]["images"] for x in analyses]
        assert used == [30, 8, 8, 30]
        assert analyses[1].facts == analyses[2].facts
        assert "| 8 of 30 " in format_report(analyses[1])

    @pytest.mark.slow
    def test_class_names_of_any_script_in_the_picture(self, register, tmp_path):
        for name in ("one", "two", "test"):
            register(name, [make_record(0, [[9, 9, 40, 40]] * 2, [0, 1])], ("\u732b", "$x^$"))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # matplotlib's, of a missing glyph
            save_picture(tmp_path / "a.png", analyze(self.config()))
        assert cv2.imread(str(tmp_path / "a.png")).std() > 20

    @pytest.mark.slow
    def test_a_box_far_larger_than_its_image_in_the_picture(self, register, tmp_path):
        cv2.imwrite(str(tmp_path / "0.png"), np.zeros((192, 256, 3), np.uint8))
        boxes = [[0, 0, 90000, 10], [9, 9, 40, 40], [-90000, 9, 40, 40]]
        for name in ("one", "two", "test"):
            register(name, [make_record(0, boxes, [0, 1, 1], file=f"{tmp_path}/")])
        save_picture(tmp_path / "a.png", analyze(self.config()))
        assert cv2.imread(str(tmp_path / "a.png")).std() > 20

    @pytest.mark.parametrize(
        ("records", "message"),
        [
            ([], "Dataset one, two is empty"),
            ([make_record(0)], "has no box to learn: 0 boxes"),
            ([make_record(0, [[1, 1, 9, 9]], [0], crowd=1)], "has no box to learn: 2 boxes, 2 of"),
            ([make_record(0, [[1, 1, 9, 9]], [7])], "category_id 7 to 7, but 2 classes"),
            ([make_record(0, [[1, 1, 9]], [0])], "are not in Detectron2's format"),
        ],
    )
    def test_mistakes(self, register, records, message):
        for name in ("one", "two", "test"):
            register(name, records)
        with pytest.raises(InputError, match=message):
            analyze(self.config())

    def test_other_box_modes_and_unknown_sizes(self, register, tmp_path):
        cv2.imwrite(str(tmp_path / "0.png"), np.zeros((30, 40, 3), np.uint8))
        record = make_record(0, [[1, 2, 10, 20]], [0], file=f"{tmp_path}/")
        record["annotations"].append({**record["annotations"][0], "bbox_mode": BoxMode.XYXY_ABS})
        del record["height"], record["width"], record["annotations"][0]["iscrowd"]
        register("one", [record])
        table = read_boxes(["one"])
        assert table.boxes.tolist() == [[1, 2, 11, 22], [1, 2, 10, 20]]
        assert table.sizes.tolist() == [[30, 40]]
        record["file_name"] = "absent.png"
        with pytest.raises(InputError, match=r"Cannot read image absent\.png: no such file"):
            read_boxes(["one"])


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

    @pytest.mark.slow
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
        assert re.search(r"\| images in train and test +\| 1 ", text)
        assert re.search(r"\| images that cannot be read +\| \S*00002.jpg ", text)
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
    (images,) = facts["images"]
    assert images["boxes"] == len(content["annotations"])
    rows = {row["class"]: row for row in facts["classes"]}
    for category in content["categories"]:
        areas = [
            a["bbox"][2] * a["bbox"][3] / 4  # at half size
            for a in content["annotations"]
            if a["category_id"] == category["id"]
        ]
        found = rows[category["name"]]
        assert found["train_boxes"] == len(areas)
        assert found["train_median_size"] == pytest.approx(np.median(np.sqrt(areas)), rel=1e-6)
