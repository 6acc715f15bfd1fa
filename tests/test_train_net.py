"""train_net.py from the command line: training, resuming, evaluation, and users' mistakes."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import default_argument_parser

from gfl_d2.deploy.precision import has_fast_bfloat16
from gfl_d2.modeling import GFLHead
from scripts import ROOT, load_script

train_net = load_script("train_net.py")


@pytest.fixture
def dataset(tmp_path, clean_catalogs):
    """Six images of 64x96 with two boxes each, but for an empty one and one with a crowd."""
    images, annotations = [], []
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(1, 7):
        pixels = generator.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"{i}.png"), pixels)
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 96})
        for k in range(0 if i == 1 else 2):
            x, y, w, h = generator.uniform([0, 0, 8, 8], [40, 20, 50, 40]).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": k + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(i == 2 and k == 1),
                }
            )
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(data))
    return tmp_path


def run(folder, *args, opts=()):
    entries = [
        [name, str(folder / "instances.json"), str(folder / "images")]
        for name in ("toy_train", "toy_val")
    ]
    command = [
        *("--config-file", str(ROOT / "configs" / "gfl_R_18_FPN_bccd_reference.yaml"), *args),
        *("DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "('toy_train',)"),
        *("DATASETS.TEST", "('toy_val',)", "MODEL.GFL.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu"),
        *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.GFL.CONV_DIM", "64", "MODEL.GFL.NUM_CONVS", "1"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False", "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()"),
        *("SOLVER.WARMUP_ITERS", "1", "TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "2"),
        # Untrained scores are low, and without detections there is no AP.
        *("MODEL.GFL.SCORE_THRESH_TEST", "0.0"),
        *("OUTPUT_DIR", str(folder / "output"), *map(str, opts)),
    ]
    return train_net.main(default_argument_parser().parse_args(command))


def error_of(*args, **kwargs) -> str:
    """The message of a run that fails, which is all that the user sees of it."""
    with pytest.raises(SystemExit) as caught:
        run(*args, **kwargs)
    message = caught.value.code
    assert message.startswith("Error: ")
    assert "Traceback" not in message
    return message


@pytest.fixture(autouse=True)
def no_stack_trace(capfd):
    yield
    output = capfd.readouterr()
    assert "Exception during training" not in output.out + output.err


def read_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def read_checkpoint(path) -> dict:
    return torch.load(path, weights_only=False)


def test_train_and_evaluate(dataset):
    run(dataset)
    output = dataset / "output"
    names = {path.name for path in output.iterdir()}
    assert {"model_0000001.pth", "model_final.pth", "model_best.pth", "log.txt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    logged = set().union(*read_metrics(output))
    assert {"loss_qfl", "loss_bbox", "loss_dfl", "gfl/pos_quality", "bbox/AP"} <= logged

    # Evaluation needs no training data.
    entries = [["toy_val", str(dataset / "instances.json"), str(dataset / "images")],
               ["other_train", str(dataset / "absent.json"), str(dataset / "images")]]  # fmt: skip
    opts = ["MODEL.WEIGHTS", output / "model_final.pth", "DATASETS.REGISTER", entries]
    results = run(dataset, "--eval-only", opts=[*opts, "DATASETS.TRAIN", "('other_train',)"])
    assert 0 <= results["bbox"]["AP"] <= 100
    assert (output / "inference" / "coco_instances_results.json").is_file()


def test_resumed_training_is_uninterrupted_training(dataset):
    """Weights and momentum, on a single image so that the order is the same."""
    data = json.loads((dataset / "instances.json").read_text())
    data["images"] = data["images"][2:3]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] == 3]
    (dataset / "instances.json").write_text(json.dumps(data))
    opts = ["INPUT.RANDOM_FLIP", "none", "SEED", 1, "SOLVER.STEPS", "(3,)", "SOLVER.MAX_ITER"]
    run(dataset, opts=[*opts, 4, "OUTPUT_DIR", dataset / "whole"])
    run(dataset, opts=[*opts, 2, "OUTPUT_DIR", dataset / "parts"])
    state = read_checkpoint(dataset / "parts" / "model_0000001.pth")["trainer"]
    assert "best_metric" in state["hooks"]["BestCheckpointer"]
    run(dataset, "--resume", opts=[*opts, 4, "OUTPUT_DIR", dataset / "parts"])

    whole, parts = (
        read_checkpoint(dataset / name / "model_final.pth") for name in ("whole", "parts")
    )
    assert parts["iteration"] == 3
    weights, momenta = [], []
    for checkpoint in (whole, parts):
        weights.append(flatten(checkpoint["model"].values()))
        state = checkpoint["trainer"]["_trainer"]["optimizer"]["state"]
        momenta.append(flatten(state[index]["momentum_buffer"] for index in sorted(state)))
    assert relative_difference(*weights) < 1e-3
    # Half of it would be missing, had it started anew.
    assert relative_difference(*momenta) < 0.02


def flatten(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def relative_difference(expected, actual) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.skipif(not has_fast_bfloat16("cpu"), reason="the CPU has no bfloat16")
def test_bfloat16_training(dataset, monkeypatch):
    dtypes = set()
    forward = GFLHead.forward

    def spy(self, features):
        logits, distributions = forward(self, features)
        dtypes.add((self.training, logits[0].dtype))
        return logits, distributions

    monkeypatch.setattr(GFLHead, "forward", spy)
    run(dataset, opts=["SOLVER.BF16", True])
    assert dtypes == {(True, torch.bfloat16), (False, torch.float32)}
    weights = read_checkpoint(dataset / "output" / "model_final.pth")["model"]
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}
    assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize("is_channels_last", [False, True])
def test_memory_format_in_training(dataset, monkeypatch, is_channels_last):
    formats = set()
    forward = GFLHead.forward

    def spy(self, features):
        formats.add(features[0].is_contiguous(memory_format=torch.channels_last))
        return forward(self, features)

    monkeypatch.setattr(GFLHead, "forward", spy)
    opts = ["SOLVER.CHANNELS_LAST", is_channels_last, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", "()"]
    run(dataset, opts=opts)
    assert formats == {is_channels_last}


def test_compiled_training(dataset, monkeypatch):
    """Compilation itself is PyTorch's; here the parts run as they are."""
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compiled.append((type(self).__name__, mode))
    )
    run(dataset, opts=["SOLVER.COMPILE", "reduce-overhead"])
    assert compiled == [("FPN", "reduce-overhead"), ("GFLHead", "reduce-overhead")]


def test_clipping_of_the_whole_gradient(dataset):
    """With a tiny limit, weights hardly move; momentum and decay are off."""
    opts = ["SOLVER.BASE_LR", 1.0, "SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0,
            "SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", 1,
            "TEST.EVAL_PERIOD", 0, "SEED", 1, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE"]  # fmt: skip
    weights = []
    for limit in (1e-6, 1e-3):
        run(dataset, opts=[*opts, limit])
        state = read_checkpoint(dataset / "output" / "model_final.pth")["model"]
        trained = [w for name, w in state.items() if "running" not in name and "num_b" not in name]
        weights.append(flatten(trained))
    # Both start from the same weights, so their distance is at most the sum of the two steps.
    distance = (weights[1] - weights[0]).norm()
    assert 0.9e-3 < distance < 1.1e-3


def test_missing_config_file():
    args = default_argument_parser().parse_args(["--config-file", "configs/absent.yaml"])
    with pytest.raises(SystemExit) as caught:
        train_net.main(args)
    assert "configs/absent.yaml" in caught.value.code


def test_unknown_key(dataset):
    assert "MODEL.GFL.REGMAX" in error_of(dataset, opts=["MODEL.GFL.REGMAX", 3])


def test_more_processes_than_gpus():
    args = ["--config-file", "absent.yaml", "--num-gpus", str(torch.cuda.device_count() + 2)]
    with pytest.raises(SystemExit) as caught:
        train_net.launch_processes(default_argument_parser().parse_args(args))
    assert caught.value.code.startswith("Error: --num-gpus")


def test_number_of_classes(dataset):
    message = error_of(dataset, opts=["MODEL.GFL.NUM_CLASSES", 80])
    assert "80" in message
    assert "2 classes" in message
    assert not (dataset / "output").exists()


def test_a_failed_start_overwrites_nothing(dataset):
    run(dataset)
    output = dataset / "output"
    before = {path: path.read_bytes() for path in output.glob("*.pth")}
    config = (output / "config.yaml").read_bytes()
    error_of(dataset, opts=["MODEL.GFL.REG_MAX", 0])
    assert (output / "config.yaml").read_bytes() == config
    error_of(dataset, opts=["MODEL.WEIGHTS", dataset / "absent.pth"])
    wrong = ["MODEL.WEIGHTS", output / "model_final.pth", "MODEL.FPN.OUT_CHANNELS", 64]
    assert "model_final.pth" in error_of(dataset, opts=wrong)
    assert {path: path.read_bytes() for path in output.glob("*.pth")} == before


def test_truncated_image(dataset):
    path = dataset / "images" / "3.png"
    path.write_bytes(path.read_bytes()[:2000])
    message = error_of(dataset, opts=["SOLVER.MAX_ITER", 9])
    assert "3.png" in message


def test_truncated_image_in_a_worker_process(dataset):
    for path in (dataset / "images").iterdir():
        path.write_bytes(path.read_bytes()[:2000])
    message = error_of(dataset, opts=["DATALOADER.NUM_WORKERS", 1])
    assert ".png" in message
    assert len(message.splitlines()) == 1
