"""The tool that judges results: its files, pages and messages."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from coco_set import BOXES, SOUND_BOXES, CocoSet
from gfl_d2.calibration import Calibration, Curve, load_calibration, save_calibration
from scripts import load_script

analyze_results = load_script("tools/analyze_results.py")

pytestmark = pytest.mark.usefixtures("clean_catalogs")

PICTURES = ["confusion_matrix.png", "errors.png", "precision_recall.png", "reliability.png"]
SHEETS = ["best.jpg", "worst.jpg"]


def detection(i, score, shift=0, **changes):
    """Of the annotation i: a cat, then a dog, on each of four images."""
    x, y, w, h = SOUND_BOXES[i]
    box = [x + shift, y, w, h]
    return {"image_id": i // 2 + 1, "category_id": i % 2 + 1, "bbox": box, "score": score} | changes


FOUND = [detection(i, 0.5 + i / 20, shift=i % 3) for i in BOXES]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the tool on "pets", with what is given as results."""
    data = CocoSet(tmp_path / "pets")
    data.write()
    config = tmp_path / "config.yaml"
    entry = ["pets", str(data.json_file), str(data.image_root)]
    config.write_text(json.dumps({"DATASETS": {"REGISTER": [entry], "TEST": ["pets"]}}))

    def run(*arguments, results=FOUND):
        command = ["--config-file", config, *arguments]
        if results is not None:
            (tmp_path / "results.json").write_text(json.dumps(results))
            command += ["--results", tmp_path / "results.json"]
        monkeypatch.setattr("sys.argv", ["analyze_results", *map(str, command)])
        analyze_results.main()

    return run


def refuse(run, *arguments, **options) -> str:
    """The message, which is one line."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments, **options)
    message = str(caught.value)
    assert message.startswith("Error: ")
    assert "\n" not in message
    return message


@pytest.mark.slow
def test_all_that_it_writes(run, tmp_path, capsys):
    """With a class whose name is no HTML and no mathematics."""
    path, name = tmp_path / "pets" / "a.json", "<script>alert(1)</script> & $x^2"
    data = json.loads(path.read_text())
    data["categories"][0]["name"] = name
    path.write_text(json.dumps(data))
    folder = tmp_path / "a" / "report"
    run("--output", folder)
    assert sorted(x.name for x in folder.iterdir()) == sorted(
        ["report.html", "report.json", *PICTURES, *SHEETS]
    )
    facts = json.loads((folder / "report.json").read_text())
    assert (facts["dataset"], facts["images"], facts["objects"]) == ("pets", 4, 8)
    assert [row["class"] for row in facts["classes"]] == [name, "dog"]
    assert facts["overall"]["AP50"] == pytest.approx(100)
    assert facts["overall"]["APl"] is None  # no object is large
    assert facts["confusion"]["matrix"] == [[4, 0, 0], [0, 4, 0], [0, 0, 0]]
    assert len(facts["ranked_images"]["worst"]) == 4
    for file in (*PICTURES, *SHEETS):
        with Image.open(folder / file) as picture:
            assert min(picture.size) > 300
            assert np.ptp(np.asarray(picture.convert("L"))) > 100
    text = capsys.readouterr().out
    assert "| dog " in text
    assert "| background " in text

    page = (folder / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x^2" in page
    assert "$BODY" not in page
    assert "$TITLE" not in page
    # It needs no network.
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]{0,30})""", page)
    assert len(sources) == len(PICTURES) + len(SHEETS)
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)


def test_without_images_there_are_no_sheets(run, tmp_path, caplog):
    for file in (tmp_path / "pets" / "images").iterdir():
        file.unlink()
    run("--output", tmp_path / "report")
    assert sorted(x.name for x in (tmp_path / "report").glob("*.*g")) == PICTURES
    assert "No picture of images of 'pets'" in caplog.text
    assert "The worst images" not in (tmp_path / "report" / "report.html").read_text()


def test_thresholds_of_the_matrix(run, tmp_path):
    options = ("--score-thr", 0.6, "--tp-iou-thr", 0.95, "--num-images", 0)
    run("--output", tmp_path, *options)
    facts = json.loads((tmp_path / "report.json").read_text())
    # The scores are 0.5, 0.55 ... 0.85. Near enough are those that are not shifted: annotations 3
    # and 6, a dog and a cat.
    assert facts["confusion"]["matrix"] == [[1, 0, 3], [0, 1, 3], [2, 2, 0]]
    assert not list(tmp_path.glob("*.jpg"))


def test_several_results_are_compared(run, tmp_path, capsys):
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps(FOUND[:4]))
    run("--results", worse)
    rows = [line for line in capsys.readouterr().out.splitlines() if ".json" in line]
    ap50 = {row.split("|")[1].strip(): float(row.split("|")[3]) for row in rows}
    # Half of each class: precision 1 at 51 of 101 recalls.
    expected = {str(worse): 50.5, str(tmp_path / "results.json"): 100.0}
    assert ap50 == pytest.approx(expected)


@pytest.mark.slow
def test_fitted_and_applied(run, tmp_path, capsys):
    pytest.importorskip("sklearn")
    # Twelve more cats and dogs, above the others. Cats are found with an IoU of 1, dogs of 0.5.
    file = tmp_path / "pets" / "a.json"
    data, results = json.loads(file.read_text()), []
    for i in range(24):
        box = {"image_id": i % 4 + 1, "category_id": i // 12 + 1, "bbox": [1 + 4 * i, 1, 3, 8]}
        data["annotations"].append(box | {"id": 100 + i, "area": 24, "iscrowd": 0})
        results.append(box | {"bbox": [1 + 4 * i + i // 12, 1, 3, 8], "score": 0.6})
    file.write_text(json.dumps(data))
    path = tmp_path / "calibration.json"
    run("--fit", path, results=results)
    assert "curves of 2 classes" in capsys.readouterr().out
    calibration = load_calibration(path)
    assert calibration.thing_classes == ["cat", "dog"]
    assert calibration.fitted_on == "pets"
    assert calibration.apply(np.array([0.6, 0.6]), np.array([0, 1])) == pytest.approx([1, 0.5])
    run("--calibration", path, results=results)
    row = capsys.readouterr().out.splitlines()[2].split("|")
    assert float(row[8]) == 0  # LaECE0
    assert "has 10 detections" in refuse(run, "--half", "first", "--fit", path, results=results)


def test_halves(run, capsys):
    counts = []
    for half in ("first", "second"):
        run("--half", half)
        text = capsys.readouterr().out
        cells = re.search(r"\| cat +\| +(\d+) \| +(\d+) \|", text)
        objects, detections = map(int, cells.groups())
        assert objects == detections > 0
        counts.append(objects)
    assert sum(counts) == 4


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "no detections: nothing to analyze"),
        ({"a": 1}, "not a list of detections"),
        ([{"image_id": 1}], "item 0 is not a detection"),
        ([detection(0, 0.5, image_id=77)], "image_id 77, which dataset 'pets' does not have"),
        ([detection(0, 0.5, category_id=9)], "category_id 9, which dataset 'pets' does not have"),
        ([detection(0, float("nan"))], "item 0 is not a detection"),
    ],
)
def test_other_results_are_refused(run, results, message):
    assert message in refuse(run, results=results)


def test_wrong_arguments(run, tmp_path):
    output = str(tmp_path / "report")
    absent = str(tmp_path / "absent")
    assert "does not exist" in refuse(run, "--results", absent, results=None)
    assert "--score-thr must be from 0 to 1" in refuse(run, "--score-thr", "1.5")
    assert "--tp-iou-thr must be from 0 to 1" in refuse(run, "--tp-iou-thr", "nan")
    assert "--num-images must be 0 or more" in refuse(run, "--num-images", "-1")
    twice = ("--results", absent)
    assert "one file of results" in refuse(run, *twice, "--output", output)
    assert "names no dataset" in refuse(run, "DATASETS.TEST", "()")
    assert "'other' is not registered" in refuse(run, "DATASETS.TEST", "('other',)")
    (tmp_path / "file").touch()
    assert "cannot be made" in refuse(run, "--output", str(tmp_path / "file"))
    assert "cannot be read" in refuse(run, "--calibration", absent)
    save_calibration(absent, Calibration(["eel"], "sea", {"eel": Curve(np.ones(1), np.ones(1))}))
    assert "fitted on 'sea' with the classes eel" in refuse(run, "--calibration", absent)


def test_wrong_arguments_of_a_fit(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    path = str(tmp_path / "calibration.json")
    assert "pip install scikit-learn" in refuse(run, "--fit", path)
    assert "--fit goes without" in refuse(run, "--fit", path, "--calibration", path)
    monkeypatch.undo()
    pytest.importorskip("sklearn")
    assert "there is no folder" in refuse(run, "--fit", str(tmp_path / "absent" / "c.json"))
    assert "has 10 detections" in refuse(run, "--fit", path)


def test_a_dataset_without_annotations(run, tmp_path):
    path = tmp_path / "pets" / "a.json"
    data = json.loads(path.read_text())
    for box in data["annotations"]:
        box["iscrowd"] = 1
    path.write_text(json.dumps(data))
    message = refuse(run)
    assert "has no annotated boxes" in message
