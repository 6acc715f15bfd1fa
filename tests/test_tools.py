from __future__ import annotations

import argparse
import json
import shutil
import sys

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from gfl_d2 import load_config
from gfl_d2.data import read_coco
from gfl_d2.engine import read_metrics
from gfl_d2.engine.runs import make_fresh_folder, parse_arguments, run_training
from gfl_d2.errors import InputError
from scripts import ROOT, load_script

run_ablations = load_script("tools/run_ablations.py")
overfit = load_script("tools/overfit.py")
plot_metrics = load_script("tools/plot_metrics.py")
run_demo = load_script("demo/run_demo.py")

# Stands for train_net.py: adds the last of the records in $RECORDS, a list, to metrics.json, as a
# training would, and writes results without any detection.
FAKE_TRAINING = """
import json, os, pathlib, sys
opts = dict(zip(sys.argv[-2::-2], sys.argv[:0:-2]))
folder = pathlib.Path(opts.get("OUTPUT_DIR", "output/demo/train"))
(folder / "inference").mkdir(parents=True, exist_ok=True)
(folder / "inference" / "coco_instances_results.json").write_text("[]")
with open(folder / "metrics.json", "a") as file:
    file.writelines(json.dumps(r) + "\\n" for r in json.loads(os.environ["RECORDS"]))
with open(pathlib.Path(__file__).with_name("runs.txt"), "a") as file:
    file.write(json.dumps(opts) + "\\n")
sys.exit(int(os.environ.get("STATUS", 0)))
"""


def evaluation(ap: float, iteration: int = 300) -> dict:
    metrics = {"AP": ap, "AP50": 60.0, "AP75": 41.0, "AP-cell": ap}
    return {"iteration": iteration, **{f"bbox/{name}": value for name, value in metrics.items()}}


@pytest.fixture
def set_training(monkeypatch, tmp_path):
    """Lets the scripts run FAKE_TRAINING. Called with what it writes and how it ends."""
    (tmp_path / "train_net.py").write_text(FAKE_TRAINING)
    monkeypatch.chdir(tmp_path)
    for script in (overfit, run_ablations, run_demo):
        monkeypatch.setattr(script, "ROOT", tmp_path)

    def set_training(*records, status=0):
        monkeypatch.setenv("RECORDS", json.dumps(records))
        monkeypatch.setenv("STATUS", str(status))

    return set_training


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a b", ("a", "b", 1, [])),
        ("--number 2 a b K v", ("a", "b", 2, ["K", "v"])),
        ("a b K v --number 2", ("a", "b", 2, ["K", "v"])),
        ("a --number 2 b K -0.5", ("a", "b", 2, ["K", "-0.5"])),
        ("a b --number 2 -- K --v", ("a", "b", 2, ["K", "--v"])),
        ("a b K v --number=2 -- L -1e-3 -- x", ("a", "b", 2, ["K", "v", "L", "-1e-3", "--", "x"])),
    ],
)
def test_order_of_arguments(monkeypatch, line, expected):
    parser = argparse.ArgumentParser()
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--number", type=int, default=1)
    monkeypatch.setattr("sys.argv", ["script", *line.split()])
    args = parse_arguments(parser)
    assert (args.first, args.second, args.number, args.opts) == expected


class TestRuns:
    COMMAND = (sys.executable, "train_net.py")

    def test_fresh_folder(self, tmp_path):
        folder = tmp_path / "a" / "b"
        for _ in range(2):
            make_fresh_folder(folder, "me")
            assert len(list(folder.iterdir())) == 1  # the mark
            (folder / "metrics.json").touch()

    @pytest.mark.parametrize("maker", [None, "another"])
    def test_files_of_others_stay(self, tmp_path, maker):
        folder = tmp_path / "folder"
        if maker:
            make_fresh_folder(folder, maker)
        else:
            folder.mkdir()
        (folder / "metrics.json").touch()
        for place in (folder, folder / "metrics.json"):
            with pytest.raises(InputError, match="me did not make it: delete it, or name another"):
                make_fresh_folder(place, "me")
        assert (folder / "metrics.json").exists()

    def test_metrics_of_a_training(self, set_training, tmp_path):
        set_training(evaluation(10.0, 99), {"iteration": 299, "total_loss": 1.0}, evaluation(20.0))
        metrics = run_training(self.COMMAND, tmp_path / "run")
        assert metrics == {"AP": 20.0, "AP50": 60.0, "AP75": 41.0, "AP-cell": 20.0}

    @pytest.mark.parametrize(
        ("records", "status", "message"),
        [
            ([evaluation(50.0)], 3, "ended with status 3"),
            ([], 0, "no metrics.json with bbox/AP"),
            ([evaluation(float("nan"))], 0, "is NaN"),
            (
                [evaluation(50.0, 99), {"iteration": 299, "total_loss": 1.0}],
                0,
                "no metrics.json with bbox/AP",
            ),
            (
                [{"iteration": 300, "a/bbox/AP": 50.0, "b/bbox/AP": 50.0}],
                0,
                "no metrics.json with bbox/AP",
            ),
        ],
    )
    def test_training_without_result(self, set_training, tmp_path, records, status, message):
        set_training(*records, status=status)
        with pytest.raises(InputError, match=message):
            run_training(self.COMMAND, tmp_path / "run")

    def test_folder_is_the_scripts_choice(self):
        with pytest.raises(InputError, match="OUTPUT_DIR cannot be changed"):
            run_training([*self.COMMAND, "OUTPUT_DIR", "elsewhere"], "run")


@pytest.fixture
def cells(tmp_path):
    """A dataset of one picture with one box: its annotations and its folder."""
    cv2.imwrite(str(tmp_path / "1.png"), np.full((60, 80, 3), 90, np.uint8))
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 9, 9], "area": 81, "iscrowd": 0}
    data = {
        "images": [{"id": 1, "file_name": "1.png", "height": 60, "width": 80}],
        "annotations": [box],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "cells.json").write_text(json.dumps(data))
    yield [str(tmp_path / "cells.json"), str(tmp_path)]
    for name in {"overfit", "demo_val"} & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class TestOverfit:
    def run(self, monkeypatch, *arguments):
        monkeypatch.setattr("sys.argv", ["overfit", *arguments])
        overfit.main()

    def test_only_this_run_counts(self, monkeypatch, set_training, cells, tmp_path, capsys):
        set_training(evaluation(90.0))
        self.run(monkeypatch, *cells)
        assert "AP on the images trained on: 90.0" in capsys.readouterr().out
        assert cv2.imread(str(tmp_path / "output" / "overfit" / "detections.jpg")) is not None
        DatasetCatalog.remove("overfit")
        MetadataCatalog.remove("overfit")
        set_training(evaluation(float("nan"), 6))  # fewer iterations than before
        with pytest.raises(SystemExit, match=r"AP .*NaN"):
            self.run(monkeypatch, *cells)

    @pytest.mark.parametrize("dashes", [(), ("--",)])
    def test_options_for_the_training(self, monkeypatch, set_training, cells, tmp_path, dashes):
        set_training(evaluation(90.0))
        self.run(monkeypatch, *cells, "--num-images", "1", *dashes, "SOLVER.MAX_ITER", "6")
        opts = json.loads((tmp_path / "runs.txt").read_text())
        assert (opts["SOLVER.MAX_ITER"], opts["MODEL.GFL.NUM_CLASSES"]) == ("6", "1")
        assert opts["OUTPUT_DIR"] == str(tmp_path / "output" / "overfit")

    def test_low_ap(self, monkeypatch, set_training, cells):
        set_training(evaluation(59.0))
        with pytest.raises(SystemExit, match=r"AP is 59\.0, and at least 60 was expected"):
            self.run(monkeypatch, *cells)

    @pytest.mark.parametrize("number", ["0", "-1"])
    def test_no_images_asked_for(self, monkeypatch, cells, tmp_path, number):
        with pytest.raises(
            SystemExit, match=f"Error: --num-images must be 1 or more, not {number}"
        ):
            self.run(monkeypatch, *cells, "--num-images", number)
        assert not (tmp_path / "output").exists()

    def test_no_boxes(self, monkeypatch, cells, tmp_path):
        path = tmp_path / "cells.json"
        path.write_text(path.read_text().replace('"iscrowd": 0', '"iscrowd": 1'))
        with pytest.raises(SystemExit, match=r"Error: .*cells\.json has no image with a box"):
            self.run(monkeypatch, *cells)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"annotations": [1]}', None])
    def test_file_that_is_no_dataset(self, monkeypatch, tmp_path, text):
        path = tmp_path / "cells.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(SystemExit, match=r"Error: .*cells\.json"):
            self.run(monkeypatch, str(path), str(tmp_path), "--output", str(tmp_path / "output"))
        assert not (tmp_path / "output").exists()


def test_only_this_run_of_the_demo_counts(monkeypatch, set_training, cells, tmp_path, capsys):
    content = json.loads((tmp_path / "cells.json").read_text())
    box = content["annotations"][0]
    content["annotations"] = [{**box, "id": i} for i in range(1, 8)]
    (tmp_path / "val.json").write_text(json.dumps(content))
    (tmp_path / "val").mkdir()
    shutil.copy(tmp_path / "1.png", tmp_path / "val")
    monkeypatch.setattr(run_demo, "prepare_data", lambda: None)
    monkeypatch.setattr(run_demo, "DATA", tmp_path)
    monkeypatch.setattr(run_demo, "TRAINING", tmp_path / "output" / "demo" / "train")
    monkeypatch.setattr(run_demo, "PICTURE", tmp_path / "picture.png")
    monkeypatch.setattr("sys.argv", ["run_demo"])
    set_training(evaluation(56.0, 1000))
    run_demo.main()
    assert "    56.0" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "picture.png")) is not None
    set_training(evaluation(float("nan"), 6))
    with pytest.raises(SystemExit, match=r"The demo failed: AP .*NaN"):
        run_demo.main()
    set_training(evaluation(49.0, 1000))
    with pytest.raises(SystemExit, match=r"The demo failed: AP is 49\.0, and 50 is required"):
        run_demo.main()


def test_overfit_takes_images_with_boxes(tmp_path, caplog):
    """Of the images 5, 6, 7, 8 and 9: the first has no box, the second a crowd."""
    ids = (5, 6, 7, 8, 9)
    for id in ids:
        cv2.imwrite(str(tmp_path / f"{id}.png"), np.full((60, 80, 3), 90, np.uint8))
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:-40])
    size = {"height": 60, "width": 80}
    boxes = [{"id": 70 + i, "image_id": id, "category_id": 3, "bbox": [5, 6, 7, 8], "area": 56}
             for i, id in enumerate((9, 8, 7, 8, 6))]  # fmt: skip
    data = {
        "images": [{"id": id, "file_name": f"{id}.png", **size} for id in ids],
        "annotations": [{**box, "iscrowd": int(box["image_id"] == 6)} for box in boxes],
        "categories": [{"id": 3, "name": "cell"}, {"id": 9, "name": "none"}],
    }
    (tmp_path / "data.json").write_text(json.dumps(data))
    subset = overfit.take_images(read_coco(tmp_path / "data.json", tmp_path), 1)
    assert subset["images"] == [{"id": 8, "file_name": str(tmp_path / "8.png"), **size}]
    box = {"image_id": 8, "category_id": 3, "bbox": [5, 6, 7, 8], "area": 56, "iscrowd": 0}
    assert subset["annotations"] == [{"id": 1, **box}, {"id": 2, **box}]
    assert subset["categories"] == data["categories"]
    assert "Left out: 1 of 2 images cannot be read" in caplog.text
    subset = overfit.take_images(read_coco(tmp_path / "data.json", tmp_path), 9)
    assert [image["id"] for image in subset["images"]] == [8, 9]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_metrics(tmp_path, monkeypatch, ending):
    runs = []
    for seed in range(2):
        run = tmp_path / str(seed)
        run.mkdir()
        records = [{"iteration": i, "total_loss": 2.0 - seed, "bbox/AP": i} for i in range(5)]
        records.append({"iteration": 9, "total_loss": 1.0})
        (run / "metrics.json").write_text("\n".join(map(json.dumps, records)))
        runs.append(str(run))
    metrics = read_metrics(tmp_path / "0")
    assert {i: record["bbox/AP"] for i, record in metrics.items()} == {i + 1: i for i in range(5)}

    output = tmp_path / f"curves.{ending}"
    monkeypatch.setattr("sys.argv", ["plot", f"GFL={','.join(runs)}", "--output", str(output)])
    plot_metrics.main()
    if ending == "png":
        assert cv2.imread(str(output)).shape[1] > 500
    else:
        assert "<svg" in output.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("GFL=absent", r"GFL: a metrics\.json cannot be read: .*absent"),
        ("GFL={}", r"GFL: no iteration at which all of .* have bbox/AP"),
        ("folder", "'folder' is not LABEL=FOLDER"),
    ],
)
def test_nothing_to_plot(monkeypatch, tmp_path, run, message):
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "total_loss": 2.0}')
    output = str(tmp_path / "curves.png")
    monkeypatch.setattr("sys.argv", ["plot", run.format(tmp_path), "--output", output])
    with pytest.raises(SystemExit, match=message):
        plot_metrics.main()


class TestRunAblations:
    ROWS = tuple(str(ROOT / "configs" / "ablations" / f"table_3_{x}.yaml") for x in ("atss", "qfl"))
    CONFIG = str(ROOT / "configs" / "gfl_R_18_FPN_demo.yaml")

    def run(self, monkeypatch, tmp_path, *opts):
        """Run the grid. Returns the options of the trainings that it started, in order."""
        log = tmp_path / "runs.txt"
        log.unlink(missing_ok=True)
        arguments = [*self.ROWS, "--config-file", self.CONFIG, "--seeds", "0", "1"]
        arguments += ["--output", str(tmp_path / "grid")]
        monkeypatch.setattr("sys.argv", ["run", *arguments, *opts])
        run_ablations.main()
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def test_options_without_dashes(self, monkeypatch, set_training, tmp_path):
        set_training(evaluation(40.0))
        output = str(tmp_path / "grid")
        arguments = ["--seeds", "0", "--output", output, "--config-file", self.CONFIG]
        opts = ["SOLVER.MAX_ITER", "6"]
        monkeypatch.setattr("sys.argv", ["run", *self.ROWS, *opts, *arguments, "--", "SEED", "3"])
        run_ablations.main()
        runs = [json.loads(line) for line in (tmp_path / "runs.txt").read_text().splitlines()]
        assert [run["SOLVER.MAX_ITER"] for run in runs] == ["6", "6"]
        monkeypatch.setattr("sys.argv", ["run", *opts, *arguments])
        with pytest.raises(SystemExit):
            run_ablations.main()

    def test_every_row_with_every_seed(self, monkeypatch, set_training, tmp_path, capsys):
        set_training(evaluation(40.0))
        runs = self.run(monkeypatch, tmp_path, "--", "MODEL.DEVICE", "cpu")
        expected = [(x, seed) for seed in "01" for x in ("centerness", "joint")]
        assert [(run["MODEL.GFL.QUALITY"], run["SEED"]) for run in runs] == expected
        for run in runs:
            assert run["MODEL.GFL.BOX_REPRESENTATION"] == "dirac"
            assert run["MODEL.DEVICE"] == "cpu"
            assert "MODEL.GFL.NUM_CLASSES" not in run
            assert run["MODEL.GFL.DISTILL.TERMS"] == "[]"
            del run["--config-file"]
            load_config(self.CONFIG, [x for pair in run.items() for x in pair])
        assert "| table_3_qfl | 40.0 | 0.0 | 60.0 | 41.0 | 40.0, 40.0 |" in capsys.readouterr().out

    def test_goes_on_where_it_stopped(self, monkeypatch, set_training, tmp_path, capsys):
        set_training(evaluation(40.0))
        self.run(monkeypatch, tmp_path)
        (tmp_path / "grid" / "table_3_qfl" / "1" / "result.json").unlink()
        set_training(evaluation(44.0, 6))
        (run,) = self.run(monkeypatch, tmp_path)
        assert (run["MODEL.GFL.QUALITY"], run["SEED"]) == ("joint", "1")
        # Not the 40.0, which is of a higher iteration in the folder of the unfinished run.
        assert "40.0, 44.0 |" in capsys.readouterr().out

    def test_nan_is_no_result(self, monkeypatch, set_training, tmp_path):
        set_training(evaluation(float("nan")))
        for _ in range(2):
            with pytest.raises(SystemExit, match=r"AP .*table_3_atss/0 is NaN"):
                self.run(monkeypatch, tmp_path)

    def test_a_mistake_is_found_before_any_training(self, monkeypatch, set_training, tmp_path):
        with pytest.raises(SystemExit, match=r"MODEL\.GFL\.REG_MAX"):
            self.run(monkeypatch, tmp_path, "--", "MODEL.GFL.REG_MAX", "0")
        assert not (tmp_path / "grid").exists()

    def test_runs_of_other_settings_are_not_taken(self, monkeypatch, set_training, tmp_path):
        set_training(evaluation(40.0))
        self.run(monkeypatch, tmp_path)
        with pytest.raises(SystemExit, match=r"other settings.* MAX_ITER: 1000, MAX_ITER: 500"):
            self.run(monkeypatch, tmp_path, "--", "SOLVER.MAX_ITER", "500")
        assert self.run(monkeypatch, tmp_path) == []
