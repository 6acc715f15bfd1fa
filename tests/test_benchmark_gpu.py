"""The benchmark for GPUs: all of it on a CPU, and its checks where there is a GPU."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from gfl_d2.deploy import has_fast_bfloat16
from gfl_d2.modeling import GFL
from scripts import ROOT, load_script

benchmarking = load_script("benchmarks/benchmarking.py")
gpu = load_script("benchmarks/benchmark_gpu.py")
SMALL = gpu.Workload(size=(96, 128), batch=2, boxes=3, classes=7)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def run_once(makers, *_, **__):
    """In the place of many times: the clocks are those of the other benchmark, and tested there."""
    for make in makers.values():
        step = make()
        gpu.prepare(step)
        step()
    return {name: {"peak_mib": None, **benchmarking.summarize([1.0])} for name in makers}, {}


@pytest.fixture
def small_models(monkeypatch):
    config = str(ROOT / "configs" / "gfl_R_18_FPN_demo.yaml")
    build = functools.partial(gpu.build_gfl, config_file=config)
    for name in ("build_gfl", "build_retinanet", "build_fcos"):
        monkeypatch.setattr(gpu, name, build)


@pytest.mark.slow
def test_everything_runs(monkeypatch, tmp_path, capsys, small_models):
    path = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--size", "64", "96", "--batch", "2", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["benchmark_gpu.py", *arguments])
    monkeypatch.setattr(gpu, "measure", run_once)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: None)
    gpu.main()
    report = json.loads(path.read_text())
    # Not for a CPU. The others all ran.
    lower = (", float16", *(() if has_fast_bfloat16("cpu") else ("bfloat16",)))
    assert all(any(name in x for name in lower) for x in report["left_out"])
    for title in ("Inference, batch 1, TF32", "Loss, batch 2, bfloat16"):
        assert report[title]
    parts = report["Parts of training, batch 2, bfloat16"]
    assert list(parts) == ["ResNet", "ResNet and FPN", "head", "loss", "all, with optimizer"]
    assert parts["head"]["TFLOP/s"] > 0
    assert parts["loss"]["TFLOP/s"] == 0  # no convolution
    printed = capsys.readouterr().out
    assert "RetinaNet" in printed
    assert "error of gradients" in printed


@pytest.mark.slow
def test_what_fails_or_is_late_is_named(tmp_path, capsys):
    def fail():
        raise RuntimeError("out of memory")

    report = gpu.Report({"device": "d"}, tmp_path / "gpu.json", limit=1000)
    report.add("one", fail)
    report.add("two", lambda: {"x": 1.5})
    report.deadline = 0
    report.add("three", lambda: {"x": 1.5})
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["left_out"] == [
        "one: RuntimeError: out of memory",
        "three: TimeoutError: the time is over",
    ]
    assert saved["two"] == {"x": 1.5}


@pytest.mark.slow
def test_check_of_inference_finds_errors(monkeypatch, small_models):
    result = gpu.check_inference(SMALL)
    assert result["float32"]["error of logits"] == 0
    assert result["float32"]["detections found"] == 1
    build = gpu.build_gfl

    def build_another(work, weights=None, **options):
        if work.precision == "bf16":
            weights = {**weights, "head.bbox_pred.bias": weights["head.bbox_pred.bias"] + 1}
            weights["head.scales"] = weights["head.scales"] * 2
        return build(work, weights=weights, **options)

    monkeypatch.setattr(gpu, "build_gfl", build_another)
    result = gpu.check_inference(SMALL)
    assert result["bfloat16"]["error of boxes"] > 0.5
    assert result["bfloat16"]["error of logits"] < 0.1


@pytest.mark.slow
def test_check_of_training(small_models):
    result = gpu.check_training(SMALL)
    assert result == {"error of losses": 0, "error of gradients": 0}


@needs_gpu
class TestGPU:
    work = gpu.replace(SMALL, device="cuda")

    def test_inference(self):
        result = gpu.check_inference(self.work)
        assert result["float32"]["error of logits"] < 1e-4
        assert result["float32"]["error of boxes"] < 1e-4
        assert result["float32"]["detections found"] > 0.98
        for name, limit in (("TF32", 0.01), ("float16", 0.01), ("bfloat16", 0.05)):
            assert result[name]["error of logits"] < limit
            assert result[name]["error of boxes"] < limit

    def test_training(self):
        result = gpu.check_training(self.work)
        assert result["error of losses"] < 1e-4
        # Maps of few places: on a CPU, float32 is 6e-4 from float64.
        assert result["error of gradients"] < 1e-2

    def test_nothing_waits(self, monkeypatch):
        gpu.check_synchronization(self.work)
        # The check would find it.
        loss = GFL.forward_training

        def wait(self, images, features, predictions, *args):
            (predictions[0][0] > 0).nonzero()
            return loss(self, images, features, predictions, *args)

        monkeypatch.setattr(GFL, "forward_training", wait)
        with pytest.raises(RuntimeError, match="synchroniz"):
            gpu.check_synchronization(self.work)
