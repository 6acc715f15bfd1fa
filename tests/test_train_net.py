"""train_net.py from the command line: training, resuming, evaluation, and users' mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.engine import default_argument_parser

from gfl_d2.engine import trainer
from gfl_d2.errors import InputError
from gfl_d2.modeling import GFLHead
from gfl_d2.results import find_results
from scripts import load_script
from toy_training import CONFIG, options, write_dataset

train_net = load_script("train_net.py")


@pytest.fixture
def dataset(tmp_path, clean_catalogs):
    write_dataset(tmp_path)
    return tmp_path


def run(folder, *args, opts=()):
    command = ["--config-file", CONFIG, *args, *options(folder, *opts)]
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
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    for name in ("model_0000001.pth", "model_final.pth", "model_best.pth"):
        content = torch.load(output / name, weights_only=True)
        assert content["class_names"] == ["cat", "dog"]
        assert "META_ARCHITECTURE: GFL" in content["config"]
    logged = set().union(*read_metrics(output))
    assert {"loss_qfl", "loss_bbox", "loss_dfl", "bbox/AP"} <= logged

    files = {name: (output / name).read_bytes() for name in ("config.yaml", "metrics.json")}
    # Evaluation needs no training data.
    entries = [["toy_val", str(dataset / "instances.json"), str(dataset / "images")],
               ["other_train", str(dataset / "absent.json"), str(dataset / "images")]]  # fmt: skip
    opts = ["MODEL.WEIGHTS", output / "model_best.pth", "DATASETS.REGISTER", entries]
    results = run(dataset, "--eval-only", opts=[*opts, "DATASETS.TRAIN", "('other_train',)"])
    assert 0 <= results["bbox"]["AP"] <= 100
    assert (output / "inference" / "coco_instances_results.json").is_file()
    assert (output / "inference" / "config.yaml").is_file()
    assert {name: (output / name).read_bytes() for name in files} == files


def main_error(*args) -> str:
    with pytest.raises(SystemExit) as caught:
        train_net.main(default_argument_parser().parse_args(list(map(str, args))))
    return caught.value.code


@pytest.mark.slow
def test_evaluation_of_a_checkpoint_alone(dataset):
    run(dataset)
    weights = ["MODEL.WEIGHTS", str(dataset / "output" / "model_final.pth")]
    run(dataset, "--eval-only", opts=weights)
    folder = dataset / "elsewhere"
    opts = [*weights, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder)]
    args = default_argument_parser().parse_args(["--eval-only", *opts])
    assert 0 <= train_net.main(args)["bbox"]["AP"] <= 100
    assert find_results(folder, "toy_val").parent == folder / "inference"
    with pytest.raises(InputError, match="no results of dataset 'toy_train'"):
        find_results(folder, "toy_train")
    results = [output / "inference" / "coco_instances_results.json"
               for output in (dataset / "output", folder)]  # fmt: skip
    assert results[0].read_text() == results[1].read_text() != "[]"
    assert "REGMAX" in main_error("--eval-only", *weights, "MODEL.GFL.REGMAX", 3)


def test_neither_config_nor_checkpoint(dataset):
    weights = ["MODEL.WEIGHTS", dataset / "old.pth"]
    torch.save({"model": {}}, dataset / "old.pth")
    for args in (["--eval-only"], ["--eval-only", "SEED", 1], [], weights):
        message = main_error(*args)
        assert message.startswith("Error: Give --config-file.")
        assert len(message.splitlines()) == 1
    assert "old.pth carries no config" in main_error("--eval-only", *weights)


@pytest.mark.slow
def test_diagnostics_are_logged_with_the_losses(dataset):
    run(dataset, opts=["SOLVER.MAX_ITER", 20, "TEST.EVAL_PERIOD", 0])
    names = {"total_loss", "gfl/pos_quality", "gfl/num_pos_per_image"}
    assert any(names <= set(record) for record in read_metrics(dataset / "output"))


def test_several_datasets_to_test(dataset):
    test = ["DATASETS.TEST", "('toy_train', 'toy_val')", "SOLVER.MAX_ITER", 1]
    message = error_of(dataset, opts=test)
    assert "TEST.BEST_CHECKPOINT_METRIC" in message
    assert "'toy_train/bbox/AP'" in message
    assert not (dataset / "output").exists()

    run(dataset, opts=[*test, "TEST.BEST_CHECKPOINT_METRIC", "toy_val/bbox/AP"])
    best = torch.load(dataset / "output" / "model_best.pth", weights_only=True)
    assert set(best["metrics"]) == {"toy_val/bbox/AP"}
    for name in ("toy_train", "toy_val"):
        folder = dataset / "output" / "inference" / name
        assert (folder / "coco_instances_results.json").is_file()


@pytest.mark.slow
def test_resumed_training_is_uninterrupted_training(dataset):
    """Weights and momentum, on a single image so that the order is the same."""
    data = json.loads((dataset / "instances.json").read_text())
    data["images"] = data["images"][2:3]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] == 3]
    (dataset / "instances.json").write_text(json.dumps(data))
    opts = ["INPUT.RANDOM_FLIP", "none", "SEED", 1, "SOLVER.STEPS", "(3,)", "SOLVER.MAX_ITER"]
    run(dataset, opts=[*opts, 4, "OUTPUT_DIR", dataset / "whole"])
    run(dataset, opts=[*opts, 2, "OUTPUT_DIR", dataset / "parts"])
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


@pytest.mark.slow
def test_bfloat16_training(dataset, monkeypatch):
    dtypes = set()
    forward = GFLHead.forward

    def spy(self, features):
        logits, distributions = forward(self, features)
        dtypes.add((self.training, logits[0].dtype))
        return logits, distributions

    monkeypatch.setattr(GFLHead, "forward", spy)
    monkeypatch.setattr(trainer, "has_fast_bfloat16", lambda device_type: True)
    run(dataset, opts=["SOLVER.BF16", True])
    assert dtypes == {(True, torch.bfloat16), (False, torch.float32)}
    weights = read_checkpoint(dataset / "output" / "model_final.pth")["model"]
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}
    assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.slow
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


@pytest.mark.slow
def test_compiled_training(dataset, monkeypatch):
    """Compilation itself is PyTorch's; here the parts run as they are."""
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compiled.append((type(self).__name__, mode))
    )
    run(dataset, opts=["SOLVER.COMPILE", "reduce-overhead"])
    assert compiled == [("FPN", "reduce-overhead"), ("GFLHead", "reduce-overhead")]


@pytest.mark.slow
def test_clipping_of_the_whole_gradient(dataset):
    """With a tiny limit, weights hardly move; momentum and decay are off."""
    opts = ["SOLVER.BASE_LR", 1.0, "SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0,
            "SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", 1,
            "TEST.EVAL_PERIOD", 0, "SEED", 1, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE"]  # fmt: skip
    weights = []
    for limit in (1e-6, 1e-3):
        run(dataset, opts=[*opts, limit, "OUTPUT_DIR", dataset / str(limit)])
        state = read_checkpoint(dataset / str(limit) / "model_final.pth")["model"]
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


def test_number_of_classes(dataset):
    message = error_of(dataset, opts=["MODEL.GFL.NUM_CLASSES", 80])
    assert "80" in message
    assert "2 classes" in message
    assert not (dataset / "output").exists()


@pytest.mark.slow
def test_a_failed_start_overwrites_nothing(dataset):
    run(dataset)
    output = dataset / "output"

    def files():
        paths = [path for path in output.rglob("*") if path.is_file()]
        # The log goes on to the end of this process.
        return {path: path.read_bytes() for path in paths if path.name != "log.txt"}

    before = files()
    error_of(dataset, opts=["MODEL.GFL.REG_MAX", 0])
    # A new training would be mixed with the one that is there.
    message = error_of(dataset, opts=["SOLVER.MAX_ITER", 1])
    assert "--resume" in message
    assert "OUTPUT_DIR" in message
    wrong = ["MODEL.WEIGHTS", output / "model_final.pth", "MODEL.FPN.OUT_CHANNELS", 64]
    elsewhere = ["OUTPUT_DIR", dataset / "other"]
    assert "model_final.pth" in error_of(dataset, opts=[*wrong, *elsewhere])
    assert files() == before
    # What failed before it began is no training.
    run(dataset, opts=[*elsewhere, "SOLVER.MAX_ITER", 1])


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
