"""The benchmark measures what it says; how long things take is no test's business."""

from __future__ import annotations

import json

import pytest
import torch

from plain_assigner import dense
from scripts import ROOT, load_script

benchmark = load_script("tools/benchmark.py")
SMALL = str(ROOT / "configs" / "gfl_R_18_FPN_demo.yaml")


def run(monkeypatch, tmp_path, *args):
    path = tmp_path / "results.json"
    arguments = [
        *args,
        "--size",
        "64",
        "96",
        "--boxes",
        "3",
        "--classes",
        "7",
        "--repeats",
        "2",
        "--warmup",
        "1",
    ]
    arguments += ["--config-file", SMALL, "--device", "cpu", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    benchmark.main()
    return json.loads(path.read_text())


@pytest.mark.parametrize("mode", ["infer", "train", "loss", "post"])
def test_models_side_by_side(monkeypatch, tmp_path, capsys, mode):
    report = run(monkeypatch, tmp_path, mode, "--candidates", "20")
    assert list(report["results"]) == ["GFL", "RetinaNet", "FCOS"]
    for name, result in report["results"].items():
        assert len(report["times_ms"][name]) == 2
        assert 0 < result["q1_ms"] <= result["median_ms"] <= result["q3_ms"]
    assert report["settings"]["size"] == [64, 96]
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "RetinaNet" in printed


def test_what_does_not_run_is_left_out(monkeypatch, tmp_path, capsys):
    def fail(*args):
        raise RuntimeError("not in this precision")

    monkeypatch.setattr(benchmark.FCOS, "forward_training", fail)
    report = run(monkeypatch, tmp_path, "train", "--precision", "bf16", "--skip", "RetinaNet")
    assert list(report["results"]) == ["GFL"]
    assert "FCOS is left out: not in this precision" in capsys.readouterr().out


def test_assignment(monkeypatch, tmp_path):
    report = run(monkeypatch, tmp_path, "assign", "--batch", "2")
    assert list(report["results"]) == ["arithmetic", "plain"]


def test_skip_and_others(monkeypatch, tmp_path):
    report = run(monkeypatch, tmp_path, "loss", "--skip", "FCOS", "RetinaNet", "--others", SMALL)
    assert list(report["results"]) == ["GFL", "gfl_R_18_FPN_demo"]


def test_threshold_lets_as_many_candidates_pass_as_asked_for():
    args = benchmark.argparse.Namespace(size=(64, 96), batch=1, boxes=0, classes=5, device="cpu")
    inputs = benchmark.make_inputs(args)
    model = benchmark.build_gfl(SMALL, "cpu", 5).eval()
    torch.manual_seed(0)
    benchmark.set_threshold(model, inputs, 37)
    torch.manual_seed(0)
    logits = benchmark.predict(model, inputs)[2][0]
    scores = torch.cat([maps.flatten() for maps in logits]).sigmoid()
    assert (scores > model.test_score_thresh).sum() == 37


def test_both_assignments_are_the_same():
    args = benchmark.argparse.Namespace(size=(160, 224), batch=1, boxes=15, classes=5, device="cpu")
    inputs = benchmark.make_inputs(args)
    steps = benchmark.assign_steps(benchmark.build_gfl(SMALL, "cpu", 5), inputs)
    (plain,) = steps["plain"]()
    (matched,) = dense(steps["arithmetic"](), 1, len(plain))
    assert (plain >= 0).any()
    assert torch.equal(matched, plain)
