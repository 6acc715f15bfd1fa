"""tools/evaluate_export.py: the AP of an exported file is that of the model."""

from __future__ import annotations

import json

import pytest

from gfl_d2.data import register_datasets
from gfl_d2.deploy import Predictor
from gfl_d2.engine import Trainer
from scripts import load_script
from test_export import export, make_config
from toy_training import write_dataset

evaluate_export = load_script("tools/evaluate_export.py")


@pytest.fixture
def cfg(tmp_path, clean_catalogs):
    """Of a model, and a dataset in which every second of its best detections is an object."""
    write_dataset(tmp_path)
    file, images = tmp_path / "instances.json", tmp_path / "images"
    cfg = make_config(
        tmp_path,
        *("joint", "general", "MODEL.GFL.NUM_CLASSES", 2, "INPUT.MIN_SIZE_TEST", 160),
        *("DATASETS.REGISTER", [["toy_val", str(file), str(images)]]),
        *("DATASETS.TEST", ("toy_val",), "DATALOADER.NUM_WORKERS", 0),
        *("OUTPUT_DIR", str(tmp_path / "eager")),
    )
    data = json.loads(file.read_text())
    predictor, annotations = Predictor(cfg), []
    for image in data["images"]:
        found = predictor(str(images / image["file_name"]))["instances"][:20:2]
        for (x0, y0, x1, y1), label in zip(found.pred_boxes.tensor.tolist(), found.pred_classes):
            annotation = {"image_id": image["id"], "category_id": int(label) + 1, "iscrowd": 0}
            annotation["bbox"] = [x0 + 1, y0, x1 - x0, y1 - y0]
            annotations.append({**annotation, "id": len(annotations) + 1, "area": 1000})
    file.write_text(json.dumps({**data, "annotations": annotations}))
    register_datasets(cfg)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"format": "torchscript"},
        {"format": "torch-export", "nms": False, "size": (160, 256), "uint8": True},
    ],
    ids=["any size", "one size, without NMS"],
)
def test_same_ap(cfg, options, tmp_path, capsys):
    path, _ = export(cfg, tmp_path, str(tmp_path / "images" / "1.png"), **options)
    results = evaluate_export.evaluate(str(path), None, ["OUTPUT_DIR", str(tmp_path / "file")])
    assert "images/s" in capsys.readouterr().out.splitlines()[-1]
    expected = Trainer.test(cfg, Predictor(cfg).model)["bbox"]
    assert 5 < expected["AP"] < 95
    assert results["bbox"] == pytest.approx(expected, abs=0.01, nan_ok=True)
    one, other = (
        json.loads((tmp_path / name / "inference" / "coco_instances_results.json").read_text())
        for name in ("eager", "file")
    )
    assert len(one) == len(other) > 0


@pytest.mark.slow
def test_bfloat16(cfg, tmp_path):
    """OpenVINO has it on every processor with AVX512, in software if need be."""
    pytest.importorskip("openvino")
    path, _ = export(cfg, tmp_path, str(tmp_path / "images" / "1.png"), format="openvino")
    opts = ["OUTPUT_DIR", str(tmp_path / "file")]
    expected = evaluate_export.evaluate(str(path), None, opts)["bbox"]
    results = evaluate_export.evaluate(str(path), None, opts, bf16=True)["bbox"]
    assert results["AP"] == pytest.approx(expected["AP"], abs=5)


def test_bfloat16_is_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "model.xml"
    path.write_text("text")
    monkeypatch.setattr(evaluate_export, "load_exported", lambda path, precision: precision)
    assert evaluate_export.load(str(path), bf16=True) == "bf16"
    assert evaluate_export.load(str(path)) == "f32"


def test_bfloat16_of_another_format_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.ts"
    path.write_text("text")
    monkeypatch.setattr("sys.argv", ["evaluate_export.py", str(path), "--bf16"])
    with pytest.raises(SystemExit, match=r"--bf16 is for OpenVINO's files, not for .*model\.ts"):
        evaluate_export.main()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.onnx", "absent.onnx does not exist"),
        ("model.pth", "is no exported file: these end with .onnx, .xml, .ts, .pt2"),
        ("text.ts", "cannot be loaded as a file of tools/export_model.py: "),
    ],
)
def test_refusals(name, message, tmp_path, monkeypatch):
    for there in ("model.pth", "text.ts"):
        (tmp_path / there).write_text("text")
    monkeypatch.setattr("sys.argv", ["evaluate_export.py", str(tmp_path / name)])
    with pytest.raises(SystemExit) as exit:
        evaluate_export.main()
    assert message in exit.value.code and "\n" not in exit.value.code
