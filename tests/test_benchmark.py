"""The benchmark measures what it says; how long things take is no test's business."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from gfl_d2.deploy import has_fast_bfloat16
from scripts import ROOT, load_script

benchmarking = load_script("benchmarks/benchmarking.py")
benchmark = load_script("benchmarks/benchmark.py")
benchmark_export = load_script("benchmarks/benchmark_export.py")
OTHERS = ("retinanet", "fcos")
SMALL = str(ROOT / "configs" / "gfl_R_18_FPN_demo.yaml")


def run(monkeypatch, tmp_path, *args):
    path = tmp_path / "results.json"
    arguments = [
        *("--size", "64", "96", "--boxes", "3", "--classes", "7", "--candidates", "20"),
        *("--repeats", "2", "--warmup", "1", "--config-file", SMALL, "--device", "cpu"),
        *("--json", str(path)),
    ]
    monkeypatch.setattr("sys.argv", ["benchmark.py", args[0], *arguments, *args[1:]])
    benchmark.main()
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["infer", "train", "loss", "post"])
def test_models_side_by_side(monkeypatch, tmp_path, capsys, mode):
    report = run(monkeypatch, tmp_path, mode)
    assert list(report["results"]) == ["GFL", "RetinaNet", "FCOS"]
    for result in report["results"].values():
        assert len(result["times_ms"]) == 2
        assert 0 < result["q1_ms"] <= result["median_ms"] <= result["q3_ms"]
    assert report["settings"]["size"] == [64, 96]
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "RetinaNet" in printed


@pytest.mark.skipif(not has_fast_bfloat16("cpu"), reason="a processor without bfloat16")
@pytest.mark.parametrize("mode", ["infer", "train", "loss"])
def test_precisions_side_by_side(monkeypatch, tmp_path, mode):
    dtypes = []
    forward = benchmarking.GFL.forward_training, benchmarking.GFL.forward_inference
    for method in forward:

        def spy(self, images, features, predictions, *args, method=method):
            dtypes.append(predictions[0][0].dtype)
            return method(self, images, features, predictions, *args)

        monkeypatch.setattr(benchmarking.GFL, method.__name__, spy)
    report = run(monkeypatch, tmp_path, mode, "--precision", "fp32", "bf16", "--skip", "FCOS")
    assert list(report["results"]) == ["GFL fp32", "RetinaNet fp32", "GFL bf16", "RetinaNet bf16"]
    assert set(dtypes) == {torch.float32, torch.bfloat16}


@pytest.mark.slow
def test_growth(monkeypatch, tmp_path):
    skip = ["--skip", "RetinaNet", "FCOS"]
    sizes = []
    make_inputs = benchmark.make_inputs
    monkeypatch.setattr(
        benchmark, "make_inputs", lambda work: sizes.append(work.size) or make_inputs(work)
    )
    report = run(monkeypatch, tmp_path, "loss", *skip, "--vary", "size", "64", "128")
    assert list(report["results"]) == ["GFL, size 64", "GFL, size 128"]
    assert sizes == [(64, 64), (128, 128)]
    report = run(monkeypatch, tmp_path, "loss", *skip, "--vary", "boxes", "0", "2")
    assert list(report["results"]) == ["GFL, boxes 0", "GFL, boxes 2"]


@pytest.mark.parametrize("vary", [["boxes"], ["colour", "1"]])
def test_what_cannot_be_varied(monkeypatch, tmp_path, capsys, vary):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "loss", "--vary", *vary)
    assert "--vary takes one of size, batch, boxes" in capsys.readouterr().err


def test_what_does_not_run_is_left_out(monkeypatch, tmp_path, capsys):
    def fail(*args):
        raise RuntimeError("not in this precision")

    monkeypatch.setattr(benchmarking.FCOS, "forward_training", fail)
    report = run(monkeypatch, tmp_path, "train", "--skip", "RetinaNet")
    assert list(report["results"]) == ["GFL"]
    assert report["left_out"] == {"FCOS": "RuntimeError: not in this precision"}
    assert "FCOS is left out: RuntimeError: not in this precision" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_models(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compiled.append((type(self).__name__, mode))
    )
    skip = ["--skip", "RetinaNet", "FCOS"]
    report = run(monkeypatch, tmp_path, "train", *skip, "--compile", "default")
    assert list(report["results"]) == ["GFL", "GFL compiled"]
    assert compiled == [("FPN", "default"), ("GFLHead", "default")]


def test_changed_options(monkeypatch, tmp_path):
    skip = ["--skip", "RetinaNet", "FCOS"]
    report = run(monkeypatch, tmp_path, "train", *skip, "--opts", "MODEL.GFL.NUM_CONVS", "0")
    changed = "GFL MODEL.GFL.NUM_CONVS 0"
    assert list(report["results"]) == ["GFL", changed]


def test_assignment(monkeypatch, tmp_path):
    report = run(monkeypatch, tmp_path, "assign", "--batch", "2")
    assert list(report["results"]) == ["arithmetic", "plain"]


def test_skip_and_others(monkeypatch, tmp_path):
    report = run(monkeypatch, tmp_path, "loss", "--skip", "FCOS", "RetinaNet", "--others", SMALL)
    assert list(report["results"]) == ["GFL", "gfl_R_18_FPN_demo"]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "build",
    [
        lambda work: benchmarking.build_gfl(work, SMALL, is_training=False),
        lambda work: benchmarking.build_gfl(work, SMALL, opts=["MODEL.GFL.QUALITY", "dgqp"]),
        lambda work: benchmarking.build_gfl(work, SMALL, opts=["MODEL.GFL.QUALITY", "iou"]),
        benchmarking.build_retinanet,
        benchmarking.build_fcos,
    ],
)
def test_as_many_candidates_as_asked_for(monkeypatch, build, batch):
    """What passes the threshold in the very run that is timed."""
    counts = []
    others = map("detectron2.modeling.meta_arch.{}".format, OTHERS)
    for module in ("gfl_d2.modeling.post_processing", *others):
        nms = importlib.import_module(module).batched_nms

        def spy(boxes, *args, nms=nms):
            counts.append(len(boxes))
            return nms(boxes, *args)

        monkeypatch.setattr(f"{module}.batched_nms", spy)
    work = benchmarking.Workload(size=(64, 96), batch=batch, boxes=0, classes=5, candidates=37)
    model, inputs = build(work), benchmarking.make_inputs(work)
    for mode in ("infer", "post"):
        step = benchmarking.MODES[mode](model, inputs, work)
        for _ in range(2):  # the first run has changed nothing
            benchmarking.prepare(step)
            counts.clear()
            step()
            # GFL drops boxes that lie outside of the image; rounding may add one or two.
            assert len(counts) == batch
            assert 30 * batch <= sum(counts) <= 37 * batch + 2


def test_both_assignments_are_the_same():
    work = benchmarking.Workload(size=(160, 224), boxes=15, classes=5)
    inputs = benchmarking.make_inputs(work)
    steps = benchmarking.assign_steps(benchmarking.build_gfl(work, SMALL), inputs)
    (plain,) = steps["plain"]()
    matches = steps["arithmetic"]()
    assert (plain >= 0).any()
    counts = (plain == torch.arange(work.boxes)[:, None]).sum(dim=1)
    assert torch.equal(matches.is_positive.sum(dim=(1, 2)), counts)


@pytest.mark.slow
def test_exported_files(monkeypatch, tmp_path, capsys):
    """Each subject gives the same boxes, and a second run exports nothing anew."""
    steps = {}
    monkeypatch.setattr(
        benchmark_export, "measure", lambda makers, *args: ([steps.update(makers), {}][1], {})
    )
    skip = ["model compiled", "model bfloat16", "openvino", "openvino bfloat16", "openvino int8"]
    arguments = [
        *(str(tmp_path), "--config-file", SMALL, "--size", "160", "192", "--classes", "3"),
        *("--candidates", "50", "--skip", *skip, "torch-export"),
    ]
    monkeypatch.setattr("sys.argv", ["benchmark_export.py", *arguments])
    benchmark_export.main()
    assert list(steps) == ["model", "onnx", "onnx int8", "torchscript"]
    outputs = {name: make()() for name, make in steps.items()}
    expected = outputs.pop("model")[0]["instances"]
    assert len(expected) > 0
    for name in ("onnx", "torchscript"):
        boxes = torch.as_tensor(outputs[name][0][0, : len(expected)])
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor, atol=0.1, rtol=0)
    assert capsys.readouterr().out.count("Exporting") == 3
    steps["onnx"]()
    assert "Exporting" not in capsys.readouterr().out
