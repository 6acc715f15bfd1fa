"""demo/onnx_demo.py and demo/openvino_demo.py, where there is neither PyTorch nor Detectron2."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from gfl_d2.deploy import Predictor
from gfl_d2.deploy.export import load_exported
from scripts import ROOT, load_script
from test_export import export, make_config

# Imports of these fail as where they are not installed.
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "detectron2", "gfl_d2", "PIL")))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RUNTIMES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "openvino")}


@pytest.fixture(params=RUNTIMES)
def file_format(request):
    for package in RUNTIMES[request.param]:
        pytest.importorskip(package)
    return request.param


@pytest.fixture
def pictures(tmp_path):
    """Of two sizes, which the model sees smaller, and padded to 160 x 256 pixels."""
    generator, paths = np.random.default_rng(0), []
    for name, (height, width) in {"a.png": (330, 480), "b.png": (340, 500)}.items():
        pixels = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        paths.append(str(tmp_path / name))
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(paths[-1], pixels)
    return paths


def run(demo, *arguments):
    command = [sys.executable, "-c", WITHOUT, str(ROOT / "demo" / demo), *map(str, arguments)]
    # OpenVINO quotes the beginning of a file that it does not know.
    return subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")


def find_gap(scores: np.ndarray) -> float:
    """A threshold near which there is no score, and above which there are some."""
    scores = np.sort(scores)[::-1]
    i = 5 + np.argmax(scores[5:40] - scores[6:41])
    return float(scores[i] + scores[i + 1]) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "opts"),
    [({}, ()), ({"size": (160, 256), "uint8": True}, ("INPUT.FORMAT", "RGB"))],
    ids=["any size", "one size, bytes, RGB"],
)
def test_same_detections(file_format, options, opts, tmp_path, pictures):
    cfg = make_config(tmp_path, "joint", "general", "INPUT.MIN_SIZE_TEST", 160, *opts)
    path, _ = export(cfg, tmp_path, pictures[0], format=file_format, **options)
    predictor = Predictor(cfg)
    expected = [x["instances"] for x in predictor(pictures)]
    threshold = find_gap(np.concatenate([x.scores.numpy() for x in expected]))
    output, demo = tmp_path / "drawn", f"{file_format}_demo.py"
    result = run(demo, path, *pictures, "--threshold", threshold, "--output", output)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    for picture, instances in zip(pictures, expected):
        instances = instances[instances.scores > threshold]
        found = [x for x in lines if x[0] == picture]
        assert len(found) == len(instances) > 0
        numbers = np.array([[float(x) for x in line[2:]] for line in found])
        for box, score, label in zip(
            instances.pred_boxes.tensor.numpy(), instances.scores, instances.pred_classes
        ):
            difference = np.abs(numbers - [float(score), *box])
            # It prints three digits of scores, and tenths of pixels.
            (near,) = np.nonzero((difference < [0.002, *[0.2] * 4]).all(axis=1))
            assert predictor.metadata.thing_classes[label] in [found[i][1] for i in near]
        drawn = cv2.imread(str(output / picture.split("/")[-1]))
        assert (drawn != cv2.imread(picture)).any()
    _check_refusals(demo, path, pictures)


def _check_refusals(demo, path, pictures):
    """Of what is no picture, and of a file without NMS; in one line."""
    for arguments, message in (
        ((path, pictures[0], "--output", Path(pictures[0]).parent), "is one of the images"),
        ((path, path), "is no image that OpenCV reads"),
        ((pictures[0], pictures[0]), "Error: "),
        ((_without_nms(path), pictures[0]), "is no file of tools/export_model.py with NMS"),
    ):
        result = run(demo, *arguments)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert message in result.stderr.splitlines()[-1]


def _without_nms(path):
    """A file that says so of itself; its parts have the same lengths."""
    content, number = re.subn(rb'(nms(?:"|&quot;): )true', rb"\1null", path.read_bytes())
    assert number >= 1
    other = path.with_stem("other")
    other.write_bytes(content)
    if path.suffix == ".xml":
        other.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes())
    return other


@pytest.mark.parametrize("new", [(240, 320), (301, 451), (640, 480), (1000, 1500), (33, 7), (1, 1)])
def test_resize_as_pillow(file_format, new):
    demo = load_script(f"demo/{file_format}_demo.py")
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize(new[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(demo.resize(image, *new), expected)


@pytest.mark.parametrize("name", [None, "pillow", "opencv"])
def test_the_filter_that_the_file_names(file_format, name):
    """Files of earlier versions name none."""
    demo, seen = load_script(f"demo/{file_format}_demo.py"), []
    detector = demo.Detector.__new__(demo.Detector)
    detector.info = {
        "min_size": 60, "max_size": 90, "size": None, "size_divisibility": 32, "min_side": 32,
        "input_format": "BGR", "input_type": "uint8", **({"resize_filter": name} if name else {}),
    }  # fmt: skip
    nothing = [np.zeros((1, 1, 4)), np.zeros((1, 1)), np.zeros((1, 1))]

    class Session:
        def run(self, names, inputs):
            seen.append(inputs["images"])
            return nothing

        def __call__(self, inputs):
            return dict(zip(("boxes", "scores", "labels"), self.run(None, inputs)))

    detector.session = detector.model = Session()
    image = np.random.default_rng(0).integers(0, 256, (180, 240, 3), dtype=np.uint8)
    detector(image)
    new = cv2.resize(image, (80, 60)) if name == "opencv" else demo.resize(image, 60, 80)
    np.testing.assert_array_equal(seen[0][0, :, :60, :80], new.transpose(2, 0, 1))


# What a user of PyTorch alone writes.
PYTORCH = """
import sys
sys.modules.update(dict.fromkeys(("detectron2", "fvcore", "gfl_d2", "pycocotools")))
import numpy, torch, torchvision
path, inputs, outputs = sys.argv[1:]
module = torch.jit.load(path) if path.endswith(".ts") else torch.export.load(path).module()
with torch.inference_mode():
    found = module(*(torch.from_numpy(x) for x in numpy.load(inputs).values()))
numpy.savez(outputs, *found)
"""


@pytest.mark.slow
@pytest.mark.parametrize("torch_format", ["torchscript", "torch-export"])
def test_pytorch_alone(torch_format, tmp_path, pictures):
    """The export compares the detections with those of the model, by this function."""
    path, check = export(make_config(tmp_path), tmp_path, pictures[0], format=torch_format)
    assert check.detections > 10 and check.unmatched == 0
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 160, 192)).astype(np.float32)
    sizes = np.array([[150, 170], [160, 192]])
    np.savez(tmp_path / "inputs.npz", pixels, sizes)
    files = map(str, (path, tmp_path / "inputs.npz", tmp_path / "outputs.npz"))
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", PYTORCH, *files], check=True)
    found = list(np.load(tmp_path / "outputs.npz").values())
    assert len(found) == 3
    for expected, actual in zip(load_exported(path)(pixels, sizes), found):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)
