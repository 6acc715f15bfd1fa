"""Distributions of box sides, as pictures, as a page, and against their errors."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from torch.testing import assert_close

from gfl_d2.checkpoint import describe_model
from gfl_d2.distributions import (
    detect_with_distributions,
    draw_distributions,
    make_page,
    match_ground_truth,
)
from gfl_d2.distributions.measures import collect_errors, plot_errors, rank_correlation, summarize
from gfl_d2.errors import InputError
from models import build_gfl, make_input, small_config
from scripts import load_script
from test_uncertainty import KEY, build

visualize = load_script("tools/visualize_distributions.py")
measure = load_script("tools/measure_uncertainty.py")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
# A class whose name would end the script, and another that would be an element.
NAMES = ["</script><script>document.title='hacked'</script>", "<img src=x>", "cell & co"]
IMAGE = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)


def detections(boxes, scores, classes, std=2.0):
    """Distributions of three bins, 8 pixels apart, the middle one at the side."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    number = len(boxes)
    found = Instances((80, 100), pred_boxes=Boxes(boxes), scores=torch.tensor(scores))
    found.pred_classes = torch.tensor(classes, dtype=torch.int64)
    found.box_std = torch.full((number, 4), std)
    found.box_entropy = torch.ones(number, 4)
    found.side_probs = torch.tensor([0.1, 0.8, 0.1]).expand(number, 4, 3)
    found.side_places = boxes[..., None] + torch.tensor([-8.0, 0.0, 8.0])
    return found


TWO = detections([[10, 10, 60, 50], [20, 20, 40, 40]], [0.9, 0.35], [0, 1])


def test_bins_are_where_the_box_comes_from():
    """The mean of each distribution is the side of the box, in pixels of the resized image."""
    model = build("joint", "general", *KEY)
    inputs = {"image": make_input(size=(320, 384))["image"], "height": 640, "width": 384}
    found = detect_with_distributions(model, inputs)
    with torch.no_grad():
        expected = model([inputs])[0]["instances"]
    for name in ("box_std", "box_entropy", "scores"):
        assert torch.equal(found.get(name), expected.get(name))
    mean = (found.side_probs * found.side_places).sum(dim=-1)
    limit = torch.tensor([384.0, 640.0, 384.0, 640.0])
    assert_close(mean.clamp(min=0).minimum(limit), found.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
    spread = found.side_probs * (found.side_places - mean[..., None]) ** 2
    assert_close(spread.sum(dim=-1).sqrt(), found.box_std, rtol=1e-3, atol=1e-2)


def test_only_general_distributions_can_be_drawn():
    with pytest.raises(InputError, match=r"must be 'general' .* this model predicts DiracDelta"):
        detect_with_distributions(build_gfl("none", "dirac", "atss"), make_input())


def test_matches():
    """By score; each box once; the class counts, and an IoU of at least 1/2."""
    box = [0.0, 0.0, 10.0, 10.0]
    found = detections([box, box, box, [0, 0, 10, 4]], [0.5, 0.9, 0.8, 0.7], [0, 0, 1, 1])
    gt = torch.tensor([box, [0.0, 0.0, 10.0, 9.0], box])
    assert match_ground_truth(found, gt, torch.tensor([0, 0, 2])).tolist() == [1, 0, -1, -1]
    assert match_ground_truth(found, torch.empty(0, 4), torch.empty(0)).tolist() == [-1] * 4


def read_data(page: str) -> dict:
    return json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])


def test_page():
    targets = torch.tensor([[12.0, 9.0, 61.0, 50.0], [torch.nan] * 4])
    page = make_page(IMAGE, TWO, NAMES, "<b>.jpg", targets, targets[:1], 0.3)
    assert "<b>" not in page
    assert page.count("<script") == 2
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    data = read_data(page)
    assert data["classes"] == NAMES
    first, second = data["detections"]
    assert (first["target"], second["target"]) == ([12.0, 9.0, 61.0, 50.0], None)
    assert first["places"][2] == [52.0, 60.0, 68.0]
    assert first["probs"][2] == pytest.approx([0.1, 0.8, 0.1])


def test_page_without_detections():
    page = make_page(IMAGE, detections([], [], []), NAMES, "empty.jpg")
    assert read_data(page)["detections"] == []


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_page_in_a_browser(tmp_path):
    """The slider, the classes and clicks, by events as a user causes them."""
    targets = torch.tensor([[12.0, 9.0, 61.0, 50.0], [torch.nan] * 4])
    page = make_page(IMAGE, TWO, NAMES, "image.jpg", targets, targets[:1])
    script = """<script>
      const seen = [], find = (id, what) => [...document.getElementById(id).querySelectorAll(what)];
      const picture = $("picture"), frame = picture.getBoundingClientRect();
      const point = {
        clientX: frame.left + 0.3 * frame.width, clientY: frame.top + 0.4 * frame.height
      };
      const note = () => seen.push([find("picture", ".box").length, find("charts", "svg").length,
                                    $("name").textContent]);
      const click = () => { picture.dispatchEvent(new MouseEvent("click", point)); note(); };
      const slide = x => {
        $("threshold").value = x;
        $("threshold").dispatchEvent(new Event("input"));
        note();
      };
      note(); click(); click(); slide(0.5); click(); slide(0);
      find("classes", "input")[0].click(); note(); click();
      const result = document.createElement("pre");
      result.id = "result";
      result.textContent = JSON.stringify(seen);
      document.body.append(result);
    </script></body>"""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", script), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    command = [CHROMIUM, *flags, "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom)[1]))
    large, small = f"{NAMES[0]} 0.90", f"{NAMES[1]} 0.35"
    assert seen == [
        [2, 0, "no box chosen"],
        [2, 4, small],  # the smaller one first, then the one below it
        [2, 4, large],
        [1, 4, large],
        [1, 4, large],
        [2, 4, large],
        [1, 4, large],  # without the first class
        [1, 4, small],
    ]
    assert "<title>Distributions: image.jpg</title>" in dom


@pytest.mark.slow
def test_picture():
    """One detection in detail makes it higher, and what is drawn changes it."""
    targets = torch.full((2, 4), torch.nan)
    plain = draw_distributions(IMAGE, TWO, NAMES, [])
    one = draw_distributions(IMAGE, TWO, NAMES, [1])
    assert one.shape[0] > plain.shape[0] + 300
    same = draw_distributions(IMAGE, TWO, NAMES, [1], targets)
    targets[1] = torch.tensor([22.0, 20.0, 40.0, 40.0])
    with_target = draw_distributions(IMAGE, TWO, NAMES, [1], targets)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, with_target)
    assert draw_distributions(IMAGE, detections([], [], []), NAMES, []).dtype == np.uint8


def test_rank_correlation():
    """Ranks 1.5, 1.5, 3, 4 against 2, 1, 3, 4: by the formula of Pearson's correlation."""
    x, y = np.array([5.0, 5.0, 7.0, 100.0]), np.array([0.2, 0.1, 0.3, 0.4])
    assert rank_correlation(x, y) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1)


def test_measures(tmp_path):
    """Sides whose error is half their std; the last detection is of another class."""
    pairs = []
    for i in range(1, 31):
        found = detections([[10, 10, 60, 50], [10, 10, 60, 50]], [0.9, 0.2], [0, 1], std=i / 10)
        gt = torch.tensor([[10, 10, 60, 50.0]]) + torch.tensor([-1, -1, 1, 1]) * i / 20
        pairs.append((found, gt, torch.tensor([0])))
    errors = collect_errors(pairs)
    figures = summarize(errors)
    assert (figures["detections"], figures["matched"]) == (60, 30)
    assert figures["correlation of std and error"] == pytest.approx(1, abs=1e-3)
    assert figures["mean error"] == pytest.approx(figures["mean std"] / 2)
    assert figures["share of errors within one std"] == 1
    areas = [figures[f"matched ones: area by {name}"] for name in ("-std / size", "IoU", "chance")]
    assert areas[0] == pytest.approx(areas[1])
    assert areas[1] < areas[2]
    # By score all matched ones come first, whose mean risk is as high as that of their order.
    assert figures["all detections: area by score"] < figures["all detections: area by -entropy"]
    plot_errors(errors, "test").savefig(tmp_path / "x.png")
    with pytest.raises(InputError, match="Fewer than 20 detections match a box"):
        collect_errors(pairs[:5])


@pytest.fixture
def trained(tmp_path, clean_catalogs):
    """A checkpoint that carries its config, and a dataset of one image, by name."""
    cv2.imwrite(str(tmp_path / "1.png"), IMAGE)
    box = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [5, 5, 30, 30], "area": 900}
    data = {
        "images": [{"id": 7, "file_name": "1.png", "height": 80, "width": 100}],
        "annotations": [{**box, "iscrowd": 0}],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)],
    }
    (tmp_path / "data.json").write_text(json.dumps(data))
    register = [["one", str(tmp_path / "data.json"), str(tmp_path)]]
    cfg = small_config("joint", "general", "atss", "DATASETS.REGISTER", register,
                       "DATASETS.TEST", ("one",), "DATASETS.TRAIN", ())  # fmt: skip
    path = tmp_path / "model.pth"
    torch.save({"model": build().state_dict(), **describe_model(cfg, NAMES)}, path)
    return path


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["script", *map(str, arguments)])
    script.main()


def test_images_of_a_dataset(clean_catalogs):
    """By id, or by the end of the path if only one has it."""
    names = ["a/1.png", "b/1.png", "2.png", "c/11.png"]
    records = [{"file_name": f"/data/{name}", "image_id": i} for i, name in enumerate(names)]
    DatasetCatalog.register("four", lambda: records)
    cfg = small_config("joint", "general", "atss")
    for image, index in {"2": 2, "2.png": 2, "b/1.png": 1, "/data/a/1.png": 0}.items():
        assert visualize.find_record(cfg, "four", image) is records[index]
    with pytest.raises(
        InputError, match=r"'four' has several such images: /data/a/1\.png, /data/b"
    ):
        visualize.find_record(cfg, "four", "1.png")


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [(), ("--dataset", "one")])
def test_tool(trained, dataset, monkeypatch, capsys):
    folder = trained.parent
    image = "7" if dataset else folder / "1.png"
    outputs = ("--output", folder / "x.png", "--html", folder / "x.html")
    views = ("TEST.AUG.ENABLED", "True")  # has no influence
    run(visualize, monkeypatch, trained, "--input", image, *dataset, *outputs, *views)
    assert cv2.imread(str(folder / "x.png")).shape[0] > 500
    data = read_data((folder / "x.html").read_text(encoding="utf-8"))
    assert data["truth"] == ([[5.0, 5.0, 35.0, 35.0]] if dataset else [])
    assert data["classes"] == NAMES
    assert len(data["detections"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "8", "--dataset", "one"], r"Error: --input 8: 'one' has no such image; it"),
        (["--input", "absent.png"], r"Error: .*absent\.png"),
        (["--input", "1.png", "--detections", "100"], r"Error: --detections 100: there are"),
        (["--input", "1.png", "--html", "absent/x.html"], r"Error: --html .* does not exist"),
    ],
)
def test_mistakes(trained, arguments, message, monkeypatch):
    monkeypatch.chdir(trained.parent)
    with pytest.raises(SystemExit, match=message):
        run(visualize, monkeypatch, trained, "--output", "x.png", *arguments)


def test_measuring_tool(trained, monkeypatch):
    """One image does not have enough boxes to measure."""
    with pytest.raises(SystemExit, match="Error: Fewer than 20 detections match a box"):
        run(measure, monkeypatch, trained, "--output", trained.parent / "x.png")
    with pytest.raises(SystemExit, match=r"Error: Picture 'x\.bmp': its ending names no format"):
        run(measure, monkeypatch, trained, "--output", "x.bmp")
