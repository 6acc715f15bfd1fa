from __future__ import annotations

import json

import cv2

from gfl_d2.metrics import read_metrics
from scripts import load_script

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
