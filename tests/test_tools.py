from __future__ import annotations

import json
import shutil

import cv2
import pytest

from gfl_d2 import load_config
from gfl_d2.engine import read_metrics
from scripts import ROOT, load_script

run_ablations = load_script("tools/run_ablations.py")
overfit = load_script("tools/overfit.py")
plot_metrics = load_script("tools/plot_metrics.py")


def test_overfit_takes_annotated_images():
    data = {
        "info": {"year": 2017},
        "images": [{"id": i} for i in (5, 6, 7, 8)],
        "annotations": [{"id": k, "image_id": i} for k, i in enumerate((8, 6, 7, 6))],
        "categories": [{"id": 1}],
    }
    subset = overfit.take_images(data, 2)
    assert [image["id"] for image in subset["images"]] == [6, 7]
    assert [a["id"] for a in subset["annotations"]] == [1, 2, 3]
    assert subset["categories"] == data["categories"]
    assert subset["info"] == data["info"]


def test_plot_metrics(tmp_path, monkeypatch):
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

    output = tmp_path / "curves.png"
    monkeypatch.setattr("sys.argv", ["plot", f"GFL={','.join(runs)}", "--output", str(output)])
    plot_metrics.main()
    assert cv2.imread(str(output)).shape[1] > 500


class TestRunAblations:
    ROWS = tuple(str(ROOT / "configs" / "ablations" / f"table_3_{x}.yaml") for x in ("atss", "qfl"))
    CONFIG = str(ROOT / "configs" / "gfl_R_18_FPN_demo.yaml")

    def run(self, monkeypatch, folder, *opts):
        """The grid with a training that writes its metrics at once; its runs, in order."""
        runs = []

        def train(config_file, opts, seed, output):
            runs.append((output.parent.name, seed, opts))
            ap = {"bbox/AP": 40.0 + seed, "bbox/AP50": 60.0, "bbox/AP75": 41.0}
            (output / "metrics.json").write_text(json.dumps({"iteration": 1000, **ap}))

        monkeypatch.setattr(run_ablations, "train", train)
        arguments = [*self.ROWS, "--config-file", self.CONFIG, "--seeds", "0", "1"]
        monkeypatch.setattr("sys.argv", ["run", *arguments, "--output", str(folder), *opts])
        run_ablations.main()
        return runs

    def test_every_row_with_every_seed(self, monkeypatch, tmp_path, capsys):
        runs = self.run(monkeypatch, tmp_path, "--", "MODEL.DEVICE", "cpu")
        names = [(name, seed) for name, seed, _ in runs]
        assert names == [(f"table_3_{x}", seed) for seed in (0, 1) for x in ("atss", "qfl")]
        for (_, _, opts), quality in zip(runs, ("centerness", "joint")):
            opts = dict(zip(opts[::2], opts[1::2]))
            assert opts["MODEL.GFL.QUALITY"] == quality
            assert opts["MODEL.GFL.BOX_REPRESENTATION"] == "dirac"
            assert opts["MODEL.DEVICE"] == "cpu"
            assert "MODEL.GFL.NUM_CLASSES" not in opts
            load_config(self.CONFIG, [x for pair in opts.items() for x in pair])
        assert "| table_3_qfl | 40.5 | 0.7 | 60.0 | 41.0 | 40.0, 41.0 |" in capsys.readouterr().out

    def test_goes_on_where_it_stopped(self, monkeypatch, tmp_path):
        self.run(monkeypatch, tmp_path)
        shutil.rmtree(tmp_path / "table_3_qfl" / "1")
        runs = self.run(monkeypatch, tmp_path)
        assert [(name, seed) for name, seed, _ in runs] == [("table_3_qfl", 1)]

    def test_training_that_is_not_done_has_no_result(self, tmp_path):
        record = {"iteration": 499, "bbox/AP": 1.0, "bbox/AP50": 2.0, "bbox/AP75": 3.0}
        (tmp_path / "metrics.json").write_text(json.dumps(record))
        assert run_ablations.read_result(tmp_path, 1000) is None
        assert run_ablations.read_result(tmp_path / "absent", 1000) is None
        assert run_ablations.read_result(tmp_path, 500) == {"AP": 1.0, "AP50": 2.0, "AP75": 3.0}

    def test_a_mistake_is_found_before_any_training(self, monkeypatch, tmp_path):
        with pytest.raises(SystemExit, match=r"MODEL\.GFL\.REG_MAX"):
            self.run(monkeypatch, tmp_path, "--", "MODEL.GFL.REG_MAX", "0")
        assert list(tmp_path.iterdir()) == []

    def test_runs_of_other_settings_are_not_taken(self, monkeypatch, tmp_path):
        self.run(monkeypatch, tmp_path)
        with pytest.raises(SystemExit, match=r"other settings: see .*settings\.json"):
            self.run(monkeypatch, tmp_path, "--", "SOLVER.MAX_ITER", "500")
