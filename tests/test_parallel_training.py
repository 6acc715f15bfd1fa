"""train_net.py in several processes: trainings and evaluations are those of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from detectron2.engine import default_argument_parser

from gfl_d2.engine import launch, read_metrics, trainer
from scripts import ROOT, load_script
from toy_training import CONFIG, options, write_dataset

train_net = load_script("train_net.py")


def command(folder, *args, opts=()) -> list[str]:
    """
    Statistics of BatchNorm are not among what processes share, and the floor of the box losses is
    one of each process.
    """
    given = [
        *("MODEL.GFL.BOX_NORMALIZER_MIN", 1e-3),
        *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.ZERO_INIT_RESIDUAL", False),
        *("INPUT.RANDOM_FLIP", "none", "SEED", 1),
        *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE", 2, "SOLVER.MAX_ITER", 2),
        *("MODEL_EMA.ENABLED", True, "MODEL_EMA.WARMUP", 1, "TEST.EVAL_LOSS", True),
    ]
    return ["--config-file", CONFIG, *map(str, args), *options(folder, *given, *opts)]


def run(folder, *args, opts=()):
    parser = default_argument_parser()
    launch.add_arguments(parser)
    return train_net.main(parser.parse_args(command(folder, *args, opts=opts)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clean_catalogs_of_module):
    """A dataset of five images, and the same training in one process and in two."""
    folder = tmp_path_factory.mktemp("toy")
    write_dataset(folder)
    data = json.loads((folder / "instances.json").read_text())
    data["images"] = data["images"][:5]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] <= 5]
    (folder / "instances.json").write_text(json.dumps(data))
    run(folder, opts=["OUTPUT_DIR", folder / "one"])
    run(folder, "--num-processes", 2, opts=["OUTPUT_DIR", folder / "two"])
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one(trained):
    """With averages of weights and batches in parts; losses of the evaluation too."""
    one, two = (
        torch.load(trained / name / "model_final.pth", weights_only=False)
        for name in ("one", "two")
    )
    for part in ("model", "ema"):
        for name, expected in one[part].items():
            error = (two[part][name] - expected).abs().max()
            assert error <= 1e-5 * expected.abs().max().clamp(min=0.1), name
    one, two = (read_metrics(trained / name, "iteration") for name in ("one", "two"))
    # Detectron2 counts the evaluation after the last iteration as one more.
    one, two = ({**run[2], **run[3]} for run in (one, two))
    names = {name for name in one if "loss" in name}
    assert {"total_loss", "val/total_loss"} <= names
    for name in names:
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(*program) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *map(str, program)], env=environment)


def evaluate(folder, how: str) -> list[subprocess.Popen]:
    opts = ["MODEL.WEIGHTS", folder / "one" / "model_final.pth", "OUTPUT_DIR", folder / how]
    arguments = [ROOT / "train_net.py", *command(folder, "--eval-only", opts=opts)]
    port = free_port()
    if how == "torchrun":
        launcher = ("--nnodes", 1, "--nproc-per-node", 2, "--master-port", port)
        return [start("-m", "torch.distributed.run", *launcher, *arguments)]
    machines = ("--num-processes", 1, "--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{port}")
    return [
        start(arguments[0], *machines, "--machine-rank", rank, *arguments[1:]) for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "machines"])
def test_two_processes_evaluate_as_one(trained, how):
    """Exactly, and the number of images is odd."""
    for process in evaluate(trained, how):
        assert process.wait() == 0
    opts = ["MODEL.WEIGHTS", trained / "one" / "model_final.pth", "OUTPUT_DIR", trained / "alone"]
    # Each process above has one thread, and sums of more are rounded elsewhere.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(trained, "--eval-only", opts=opts)
    torch.set_num_threads(num_threads)
    results = [
        json.loads((trained / name / "inference" / "coco_instances_results.json").read_text())
        for name in ("alone", how)
    ]
    assert {result["image_id"] for result in results[0]} == {1, 2, 3, 4, 5}
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opts", "pattern"),
    [
        (["SOLVER.IMS_PER_BATCH", 3], "SOLVER.IMS_PER_BATCH must be a multiple of .* 2, got 3"),
        (["SOLVER.IMS_PER_BATCH", 2], "SOLVER.ACCUMULATE must be a divisor of .*, 2 / 2 processes"),
        (["MODEL.FPN.NORM", "SyncBN"], "MODEL.FPN.NORM must be another one for several processes"),
    ],
)
def test_mistakes(trained, opts, pattern):
    folder = trained / "none"
    with pytest.raises(SystemExit, match=f"^Error: {pattern}") as caught:
        run(trained, "--num-processes", 2, opts=[*opts, "OUTPUT_DIR", folder])
    assert len(caught.value.code.splitlines()) == 1
    assert not folder.exists()


@pytest.mark.slow
def test_machines_with_other_checkpoints(trained, monkeypatch):
    """As where each has its own disk."""
    gather = trainer.comm.all_gather
    monkeypatch.setattr(trainer.comm, "all_gather", lambda x: [*gather(x), 0])
    with pytest.raises(SystemExit, match=r"\[2, 0\].*must be the same folder on all machines"):
        run(trained, "--resume", opts=["OUTPUT_DIR", trained / "one"])
