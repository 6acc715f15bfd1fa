"""demo/demo.py, as a user calls it."""

from __future__ import annotations

import csv
import json
import os
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image

from gfl_d2.calibration import Calibration, save_calibration
from gfl_d2.checkpoint import describe_model, load_checkpoint_config
from gfl_d2.deploy import Predictor
from gfl_d2.errors import InputError
from gfl_d2.results import load_results
from models import WITH_RESNET, small_config
from scripts import load_script

demo = load_script("demo/demo.py")
sources, outputs = sys.modules["sources"], sys.modules["outputs"]

NAMES = ["cat", "dog", "Vogel"]
THRESHOLD = "0.02"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    cfg = small_config(
        *("joint", "general", "atss", *WITH_RESNET, "MODEL.RESNETS.DEPTH", 18),
        *("INPUT.MIN_SIZE_TEST", 64, "TEST.DETECTIONS_PER_IMAGE", 6, "MODEL.WEIGHTS", ""),
        *("MODEL.GFL.PRIOR_PROB", 0.03),
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model_final.pth"
    torch.save({"model": build_model(cfg).state_dict(), **describe_model(cfg, NAMES)}, path)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    """Four photographs, one of them hidden, and a text, in two folders."""
    generator = np.random.default_rng(0)
    for name in ("photos/a.png", "photos/deep/a.jpg", "photos/deep/b.pcx", "photos/.hidden.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (70, 90, 3), np.uint8)).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


@pytest.fixture
def video(tmp_path):
    path = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 12.5, (96, 64))
    for shade in range(0, 200, 20):
        writer.write(np.full((64, 96, 3), shade, np.uint8))
    writer.release()
    return path


def run(monkeypatch, weights, *arguments) -> int:
    opts = ["--opts", "MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu"]
    command = ["demo.py", *map(str, arguments), "--confidence-threshold", THRESHOLD, *opts]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as exit:
        demo.main()
    return exit.value.code


def read_csv(path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_photographs(monkeypatch, weights, photos, tmp_path, capsys):
    output, results, table = (tmp_path / name for name in ("out", "new/r.json", "new/r.csv"))
    (photos / "broken.jpg").write_text("no image")
    written = ["--output", output, "--json", results, "--csv", table]
    inputs = ["--input", photos, photos / "gone.jpg", photos / "deep" / "b.pcx"]
    assert run(monkeypatch, weights, *inputs, *written) == 1
    shown = capsys.readouterr().err
    assert "images/s" in shown
    problems = shown[shown.index("Not done:") :].splitlines()[1:]
    assert [line.split(str(photos))[1] for line in problems] == [
        "/broken.jpg: it is not an image",
        "/gone.jpg: no such file",
    ]
    pictures = {"a.png", "deep/a.jpg", "deep/b.pcx.png"}
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert found == pictures
    assert all(cv2.imread(str(output / name)).shape == (70, 90, 3) for name in pictures)

    names = ["a.png", "deep/a.jpg", "deep/b.pcx"]
    by_image = load_results(results, "photos", names, range(3))
    rows = read_csv(table)
    assert set(by_image) == {row["image"] for row in rows} == set(names)
    cfg = load_checkpoint_config(weights, ["MODEL.GFL.SCORE_THRESH_TEST", THRESHOLD])
    kept = Predictor(cfg)(photos / "deep" / "a.jpg")["instances"]
    assert len(kept) > 0
    assert [x["score"] for x in by_image["deep/a.jpg"]] == pytest.approx(kept.scores.tolist())
    rows = [row for row in rows if row["image"] == "deep/a.jpg"]
    assert [row["class"] for row in rows] == [NAMES[i] for i in kept.pred_classes]
    for row, result, box in zip(rows, by_image["deep/a.jpg"], kept.pred_boxes.tensor.tolist()):
        assert [float(row[key]) for key in ("x0", "y0", "x1", "y1")] == pytest.approx(box, abs=0.01)
        x, y, width, height = result["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(box)


def test_one_picture_is_drawn(monkeypatch, weights, photos, tmp_path):
    picture = tmp_path / "new" / "picture.png"
    assert run(monkeypatch, weights, "--input", photos / "a.png", "--output", picture) == 0
    changed = (cv2.imread(str(picture)) != cv2.imread(str(photos / "a.png"))).any(axis=2)
    assert 0.01 < changed.mean() < 0.9


def test_files_patterns_and_folders(monkeypatch, photos, tmp_path):
    monkeypatch.chdir(photos)
    assert sources.find_files(["deep/*", "a.png", ".", "gone.jpg"], None) == [
        "deep/a.jpg", "deep/b.pcx", "a.png", "gone.jpg",
    ]  # fmt: skip
    # What an earlier run wrote is no input.
    assert sources.find_files(["."], str(photos / "deep")) == ["./a.png"]
    (photos / "a[1].png").write_bytes((photos / "a.png").read_bytes())
    assert sources.find_files(["a[1].png"], None) == ["a[1].png"]


def test_devices_are_written_to_where_no_file_can_be(monkeypatch, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writable = {str(tmp_path / "pipe")}
    monkeypatch.setattr(os, "access", lambda path, mode: path in writable)
    outputs.check_file(str(tmp_path / "pipe"))
    with pytest.raises(InputError, match="file: its folder cannot be written to"):
        outputs.check_file(str(tmp_path / "file"))
    writable.clear()
    with pytest.raises(InputError, match="pipe cannot be written to"):
        outputs.check_file(str(tmp_path / "pipe"))


def test_names_do_not_collide(tmp_path):
    assert sources.name_files(["/x/a/1.jpg", "/x/b/1.jpg"]) == ["a/1.jpg", "b/1.jpg"]
    assert sources.name_files(["/x/a/1.jpg"]) == ["1.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none*.jpg", "--json", "r.json"], r"--input none\*\.jpg: no images there"),
        (["--input", "empty", "--json", "r.json"], "--input empty: no images there"),
        (["--input", "photos", "--output", "photos"], "would replace photos/a.png"),
        (
            ["--input", "photos", "--output", "x.png"],
            "x.png is one picture, but there are 2 images",
        ),
        (["--input", "photos", "--output", "x.mp4"], "x.mp4 is a video"),
        (["--input", "photos", "--output", "x.mpeg"], "x.mpeg is a video"),
        (["--input", "photos", "--json", "photos"], "photos: there is a folder of this name"),
        (["--input", "photos", "--csv", "film.avi/x.csv"], "film.avi/x.csv: its folder cannot"),
        (["--input", "photos", "--json", "r", "--csv", "./r"], "must name different files"),
        (["--video-input", "gone.mp4", "--json", "r.json"], "Video gone.mp4 does not exist"),
        (["--video-input", "text.mp4", "--json", "r.json"], "text.mp4 cannot be opened by OpenCV"),
        (["--video-input", "film.avi", "--output", "film.avi"], "would replace film.avi"),
        (["--video-input", "film.avi", "--output", "x.jpg"], "x.jpg is a picture"),
        (["--video-input", "film.avi", "--output", "x.mpeg"], "x.mpeg: name a video of .avi, .mkv"),
        (["--input", "photos", "--json", "r.json", "--batch-size", "0"], "--batch-size must be 1"),
        (["--input", "photos"], "There is no screen to show a window on"),
    ],
)
def test_mistakes(monkeypatch, weights, photos, video, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    before = (photos / "a.png").read_bytes()
    error = run(monkeypatch, weights, *arguments)
    assert error.startswith("Error: ")
    assert message.replace("\\", "") in error
    assert len(error.splitlines()) == 1
    assert (photos / "a.png").read_bytes() == before
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--confidence-threshold", "1.0"], "--confidence-threshold must be in [0, 1), not 1.0"),
        ([], "Give --config-file. Only with MODEL.WEIGHTS"),
        (["--opts", "MODEL.WEIGHTS", "gone.pth"], "Weights file gone.pth does not exist"),
    ],
)
def test_mistakes_about_the_model(monkeypatch, photos, tmp_path, arguments, message):
    command = ["demo.py", "--input", str(photos), "--json", str(tmp_path / "r.json"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as exit:
        demo.main()
    assert exit.value.code.startswith("Error: ")
    assert message in exit.value.code


def test_precision_and_options_reach_the_model(monkeypatch, weights):
    arguments = ["--input", "x", "--precision", "bfloat16", "--confidence-threshold", "0.3"]
    opts = ["--opts", "MODEL.WEIGHTS", weights, "MODEL.GFL.NMS_CLASS_AGNOSTIC", "True"]
    predictor = demo.make_predictor(demo.get_parser().parse_args([*arguments, *opts]))
    assert predictor.cfg.TEST.PRECISION == "bfloat16"
    assert predictor.model.test_score_thresh == 0.3
    assert predictor.model.test_nms_class_agnostic


def test_names_of_classes_are_those_of_the_checkpoint(weights):
    """Many configs have COCO as their test set."""
    cfg = load_checkpoint_config(weights).clone()
    cfg.defrost()
    cfg.DATASETS.TEST = ("coco_2017_val",)
    assert Predictor(cfg).metadata.thing_classes == NAMES


def test_with_a_calibration_the_threshold_is_for_its_scores(monkeypatch, weights, tmp_path):
    save_calibration(tmp_path / "c.json", Calibration(NAMES, "set", {}))
    given = ["--input", "x", "--confidence-threshold", "0.3", "--opts", "MODEL.WEIGHTS", weights]
    monkeypatch.setattr(demo, "Predictor", lambda cfg: cfg)
    cfgs = [
        demo.make_predictor(demo.get_parser().parse_args([*given, "TEST.CALIBRATION", path]))
        for path in ("", str(tmp_path / "c.json"))
    ]
    own = load_checkpoint_config(weights).MODEL.GFL.SCORE_THRESH_TEST
    assert [cfg.MODEL.GFL.SCORE_THRESH_TEST for cfg in cfgs] == [0.3, own]
    scores = torch.tensor([0.2, 0.3, 0.4])
    instances = Instances((9, 9), scores=scores)
    written = []
    writer = lambda name, image, detections: written.append(detections.scores)  # noqa: E731
    demo.write_all([("a", None, {"instances": instances})], [writer], 0.3, False)
    assert torch.equal(written[0], scores[2:])


@pytest.mark.parametrize(
    ("output", "written"),
    [("out", "out/film.mp4"), ("out/new.avi", "out/new.avi"), ("new.webm", "new.webm")],
)
def test_video(monkeypatch, weights, video, tmp_path, output, written):
    results = tmp_path / "r.json"
    arguments = ["--video-input", video, "--output", tmp_path / output, "--json", results]
    assert run(monkeypatch, weights, *arguments, "--batch-size", 4) == 0
    capture = cv2.VideoCapture(str(tmp_path / written))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12.5)
    frames = []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame)
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 10
    assert np.all(np.diff([np.median(frame) for frame in frames]) > 10)  # in order
    by_frame = load_results(results, "film", range(10), range(3))
    assert set(by_frame) == set(range(10))


def test_interrupted(monkeypatch, weights, photos, tmp_path, capsys):
    """What is done by then is written."""
    (photos / "deep" / "c.jpg").write_bytes((photos / "deep" / "a.jpg").read_bytes())
    (photos / "deep" / "d.jpg").write_bytes((photos / "deep" / "a.jpg").read_bytes())
    real = Predictor._read

    def read(predictor, image):
        if str(image).endswith("c.jpg"):  # Ctrl-C at the third image
            raise KeyboardInterrupt
        return real(predictor, image)

    monkeypatch.setattr(Predictor, "_read", read)
    monkeypatch.setattr("gfl_d2.deploy.predictor._READ_AHEAD", 1)
    arguments = ["--input", photos, "--json", tmp_path / "r.json"]
    assert run(monkeypatch, weights, *arguments) == 1
    done = {result["image_id"] for result in json.loads((tmp_path / "r.json").read_text())}
    assert done == {"a.png", "deep/a.jpg"}
    assert "Interrupted: what comes after deep/a.jpg" in capsys.readouterr().err


def test_webcam_in_a_window(monkeypatch, weights, video):
    """Escape at the third frame ends it. No frame is read before the one ahead has been shown."""
    shown, frames, film = [], [], cv2.VideoCapture(video)

    class Camera:
        """Not a subclass: those of OpenCV's classes crash Python when they are collected."""

        def __init__(self, source):
            assert source == 0

        def __getattr__(self, name):
            return getattr(film, name)

        def read(self):
            assert len(frames) == len(shown)
            frames.append(0)
            return film.read()

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    monkeypatch.setattr(cv2, "imshow", lambda _, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda wait: 27 if len(shown) == 3 else -1)
    assert run(monkeypatch, weights, "--webcam") == 0
    assert [picture.shape for picture in shown] == [(64, 96, 3)] * 3
