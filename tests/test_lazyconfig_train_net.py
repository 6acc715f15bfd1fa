"""tools/lazyconfig_train_net.py: training, resuming, evaluation, and users' mistakes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.engine import default_argument_parser

from gfl_d2 import load_config
from gfl_d2.deploy import Predictor
from scripts import ROOT, load_script
from toy_training import CONFIG, options, write_dataset

script = load_script("tools/lazyconfig_train_net.py")
LAZY = str(ROOT / "configs" / "lazy" / "gfl_R_18_FPN_bccd_reference.py")


@pytest.fixture
def dataset(tmp_path, clean_catalogs):
    write_dataset(tmp_path)
    return tmp_path


def overrides(folder, *opts) -> list[str]:
    """As :func:`toy_training.options`."""
    files = f"{folder / 'instances.json'},{folder / 'images'}"
    resize = "mapper.augmentations.0"
    return [
        f"datasets.register=[[toy_train,{files}],[toy_val,{files}]]",
        "dataloader.train.dataset.names=toy_train",
        "dataloader.train.dataset.filter_empty=False",
        "dataloader.test.dataset.names=toy_val",
        *(f"dataloader.{name}.num_workers=0" for name in ("train", "test")),
        f"dataloader.train.{resize}.short_edge_length=[64]",
        f"dataloader.test.{resize}.short_edge_length=64",
        "dataloader.train.total_batch_size=2",
        *("model.backbone.out_channels=32", "model.head.conv_dim=64", "model.head.num_convs=1"),
        *("model.head.num_classes=2", "model.test_score_thresh=0.0"),
        *("train.device=cpu", "train.max_iter=3", "train.eval_period=2", "train.log_period=1"),
        *("train.checkpointer.period=2", f"train.output_dir={folder / 'output'}", *opts),
    ]


def run(folder, *args, opts=(), config=LAZY):
    command = ["--config-file", config, *args, *overrides(folder, *opts)]
    return script.main(default_argument_parser().parse_args(command))


def error_of(*args, **kwargs) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*args, **kwargs)
    message = caught.value.code
    assert message.startswith("Error: ")
    assert len(message.splitlines()) == 1
    return message


def read_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def read_weights(path, key="model") -> dict:
    return torch.load(path, weights_only=False)[key]


@pytest.mark.slow
def test_train_evaluate_and_detect(dataset):
    run(dataset)
    output = dataset / "output"
    names = {path.name for path in output.iterdir()}
    assert {"model_0000001.pth", "model_final.pth", "model_best.pth", "log.txt"} <= names
    logged = set().union(*read_metrics(output))
    assert {"loss_qfl", "loss_bbox", "loss_dfl", "lr", "bbox/AP"} <= logged
    content = torch.load(output / "model_final.pth", weights_only=True)
    assert content["class_names"] == ["cat", "dog"]

    before = (output / "config.yaml").read_bytes()
    weights = f"train.init_checkpoint={output / 'model_final.pth'}"
    results = run(dataset, "--eval-only", opts=[weights])
    assert 0 <= results["bbox"]["AP"] <= 100
    assert (output / "config.yaml").read_bytes() == before
    detections = output / "inference" / "coco_instances_results.json"
    found = detections.read_bytes()
    assert len(json.loads(found)) > 6
    detections.unlink()
    run(dataset, "--eval-only", "--resume")  # the last checkpoint
    assert detections.read_bytes() == found

    # The weights are those of the yaml config's model, which other tools take.
    opts = [*options(dataset), "MODEL.WEIGHTS", str(output / "model_final.pth")]
    image = np.zeros((64, 96, 3), dtype=np.uint8)
    assert len(Predictor(load_config(CONFIG, opts))(image)["instances"]) > 0


@pytest.mark.slow
def test_resumed_training_goes_on(dataset):
    run(dataset, opts=["train.max_iter=2"])
    output = dataset / "output"
    optimizer = read_weights(output / "model_final.pth", "trainer")["optimizer"]
    assert len(optimizer["state"]) > 50  # momenta
    run(dataset, "--resume", opts=["train.max_iter=4"])
    assert [r["iteration"] for r in read_metrics(output) if "total_loss" in r] == [0, 1, 2, 3]
    rates = [r["lr"] for r in read_metrics(output) if "total_loss" in r]
    # Four iterations have the whole schedule: steps after three quarters and 92 percent of it.
    assert rates[2] == pytest.approx(0.01)
    assert rates[3] == pytest.approx(0.001)
    assert "earlier training" in error_of(dataset)
    # Killed between the checkpoint of the last iteration and model_final.pth.
    expected = read_weights(output / "model_final.pth")
    (output / "model_final.pth").rename(output / "model_0000003.pth")
    (output / "last_checkpoint").write_text("model_0000003.pth")
    run(dataset, "--resume", opts=["train.max_iter=4"])
    weights = read_weights(output / "model_final.pth")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_averages_are_evaluated_and_saved(dataset):
    run(dataset, opts=["train.ema.enabled=True", "train.ema.decay=0.5", "train.ema.warmup=0"])
    final, best = (dataset / "output" / f"model_{name}.pth" for name in ("final", "best"))
    key = "head.cls_score.weight"
    assert not torch.equal(read_weights(final)[key], read_weights(final, "ema")[key])
    steps = read_weights(best)[key]
    assert any(
        torch.equal(steps, read_weights(dataset / "output" / name, "ema")[key])
        for name in ("model_0000001.pth", "model_final.pth")
    )


def test_gradients_are_clipped(dataset, monkeypatch):
    norms = []
    original = torch.nn.utils.clip_grad_norm_

    def record(parameters, max_norm, norm_type):
        norms.append(max_norm)
        return original(parameters, max_norm, norm_type)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    run(dataset, opts=["train.max_iter=1", "train.eval_period=0"])
    assert norms == [35.0]


def test_mistakes_are_one_line(dataset):
    assert "train.max_itr=3" in error_of(dataset, opts=["train.max_itr=3"])
    assert "SOLVER.MAX_ITER" in error_of(dataset, opts=["SOLVER.MAX_ITER", "3"])
    assert "Python config" in error_of(dataset, config=CONFIG)
    config = dataset / "of_another_version.py"
    config.write_text("from detectron2.modeling import Absent\n")
    assert f"{config} needs another version" in error_of(dataset, config=str(config))
    message = error_of(dataset, opts=["model.head.num_classes=5"])
    assert "model.head.num_classes is 5" in message
    assert "2 classes" in message
    assert "'absent'" in error_of(dataset, opts=["dataloader.train.dataset.names=absent"])
    both = "dataloader.test.dataset.names=[toy_train,toy_val]"
    assert "must be one dataset" in error_of(dataset, opts=[both])
    assert "float16 for GPUs" in error_of(dataset, opts=["train.amp.enabled=true"])
    message = error_of(dataset, opts=["train.init_checkpoint=absent.pth"])
    assert "absent.pth does not exist" in message
    assert not (dataset / "output" / "model_final.pth").exists()


@pytest.mark.slow
def test_a_key_whose_value_is_none_can_be_set(dataset):
    run(dataset, opts=["train.max_iter=4", "train.eval_period=0", "train.checkpointer.period=1",
                       "train.checkpointer.max_to_keep=1"])  # fmt: skip
    kept = {path.name for path in (dataset / "output").glob("model_*.pth")}
    assert kept == {"model_0000003.pth", "model_final.pth"}


@pytest.mark.slow
def test_a_folder_in_which_a_training_runs(dataset):
    (dataset / "output").mkdir()
    (dataset / "output" / "config.yaml").write_text("that of the other")
    program = "import sys; from gfl_d2.files import lock_folder; lock = lock_folder(sys.argv[1]); "
    program += "print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(dataset / "output")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        message = error_of(dataset)
        other.stdin.close()
    assert "training" in message
    assert {path.name for path in (dataset / "output").iterdir()} == {
        "config.yaml",
        "training.lock",
    }
    assert (dataset / "output" / "config.yaml").read_text() == "that of the other"


@pytest.mark.slow
def test_what_cannot_be_resumed(dataset):
    run(dataset, opts=["train.max_iter=2", "train.eval_period=0"])
    message = error_of(dataset, "--resume", opts=["optimizer.params.weight_decay_bias=0.5"])
    assert "optimizer does not fit" in message and "train.init_checkpoint" in message


@pytest.mark.slow
def test_float16_of_a_training_on_gpus(dataset):
    """Evaluation has no part in it."""
    opts = ["train.amp.enabled=true"]
    run(dataset, opts=["train.max_iter=1", "train.eval_period=0"])
    run(dataset, "--eval-only", "--resume", opts=opts)
    assert "float16 for GPUs" in error_of(dataset, "--resume", opts=opts)


def test_a_loss_that_is_no_number(dataset, logged_by_training):
    message = error_of(dataset, opts=["optimizer.lr=1.0e30", "train.clip_gradients=null"])
    assert "infinite or NaN" in message
    assert not any(record.exc_info for record in logged_by_training)


@pytest.mark.slow
def test_two_processes(dataset):
    program = str(ROOT / "tools" / "lazyconfig_train_net.py")
    command = [sys.executable, program, "--config-file", LAZY, "--num-processes", "2"]
    command += overrides(dataset, "train.max_iter=2")
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stderr": subprocess.PIPE}
    result = subprocess.run(command, text=True, **options)
    assert result.returncode == 0, result.stderr
    assert "bbox/AP" in set().union(*read_metrics(dataset / "output"))
    assert read_weights(dataset / "output" / "model_final.pth", "iteration") == 1
    command.insert(2, "--num-gpus=2")
    result = subprocess.run(command, text=True, **options)
    assert result.returncode == 1
    assert "give one" in result.stderr.splitlines()[-1]


def test_a_signal_saves_first(dataset, monkeypatch):
    step = script.SimpleTrainer.run_step

    def run_step(self):
        step(self)
        if self.iter == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script.SimpleTrainer, "run_step", run_step)
    opts = ["train.eval_period=0", "train.bf16=false", "train.checkpointer.period=100"]
    opts.append("train.log_period=20")
    with pytest.raises(SystemExit) as caught:
        run(dataset, opts=opts)
    assert caught.value.code == 143
    assert (dataset / "output" / "last_checkpoint").read_text() == "model_0000001.pth"


def test_config_is_saved_so_that_it_can_be_read(dataset, caplog):
    with caplog.at_level(logging.WARNING):
        run(dataset, opts=["train.max_iter=1", "train.eval_period=0"])
    assert "serialize" not in caplog.text
    text = (dataset / "output" / "config.yaml").read_text()
    assert "gfl_d2.modeling" in text and "toy_train" in text
