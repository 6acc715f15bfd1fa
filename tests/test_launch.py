"""Processes that train_net.py starts, or torchrun: which there are, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from gfl_d2.engine.launch import Processes, add_arguments, find_processes, launch, said_once
from gfl_d2.errors import InputError

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture(autouse=True)
def of_no_launcher(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


JOIN = f"""
import sys
from gfl_d2.engine.launch import joined
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_launch import end, find
with joined(find(), "cpu"):
    end(sys.argv[1])
"""


def find(*options) -> Processes:
    parser = default_argument_parser()
    add_arguments(parser)
    return find_processes(parser.parse_args(list(map(str, options))))


def test_number_of_processes():
    assert find().total == 1
    assert find("--num-gpus", 0).total == 1
    assert find("--num-gpus", 8) == (8, 1, 0, "cuda", None)
    machines = ("--num-machines", 2, "--machine-rank", 1)
    assert find("--num-processes", 4, *machines) == (4, 2, 1, "cpu", None)
    assert find("--num-processes", 4, *machines).rank == 4
    assert find("--num-gpus", 0, "--num-processes", 2).total == 2
    # Detectron2's own parser has no --num-processes.
    assert find_processes(default_argument_parser().parse_args([])).total == 1


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--num-processes", 0], "--num-processes must be at least 1, got 0"),
        (["--num-processes", 2, "--num-gpus", 2], "--num-gpus 2 for GPUs: give one"),
        (["--num-gpus", -1], "--num-gpus -1"),
        (["--num-gpus", 0, "--num-machines", 2], "--num-processes"),
        (["--num-machines", 0], "--num-machines must be at least 1"),
        (["--num-machines", 2, "--machine-rank", 2], r"--machine-rank must be in \[0, 2\)"),
    ],
)
def test_contradictions(options, pattern):
    with pytest.raises(InputError, match=pattern):
        find(*options)


def test_processes_of_torchrun(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    processes = find()
    assert processes == (4, 2, 1, None, 1)
    assert (processes.rank, processes.total) == (5, 8)
    for options in (["--num-gpus", 4], ["--num-processes", 4], ["--num-machines", 2]):
        with pytest.raises(InputError, match=f"{options[0]} and torchrun"):
            find(*options)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="as many processes as the others"):
        find()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "four")
    with pytest.raises(InputError, match="LOCAL_WORLD_SIZE=four"):
        find()
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(InputError, match=r"not \['MASTER_PORT'\]"):
        find()
    # The first process of the machine says it.
    stays = []
    monkeypatch.setattr("gfl_d2.engine.launch.time.sleep", stays.append)
    with pytest.raises(SystemExit) as caught, said_once():
        find()
    assert caught.value.code == 1
    assert len(stays) == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError), said_once():
        find()


def test_device():
    assert find().choose_device("cpu") == "cpu"
    assert find("--num-processes", 2).choose_device("cpu") == "cpu"
    assert Processes(2, local_rank=1).choose_device("cpu") == "cpu"  # of torchrun
    with pytest.raises(InputError, match=r"set MODEL\.DEVICE cpu"):
        find("--num-processes", 2).choose_device("cuda")
    with pytest.raises(InputError, match="use --num-processes"):
        find("--num-gpus", 2).choose_device("cpu")
    number = torch.cuda.device_count() + 2
    for processes in (Processes(number, local_rank=0), find("--num-gpus", number)):
        with pytest.raises(InputError, match=f"this machine has {number - 2}"):
            processes.choose_device("cuda:0")


def end(how: str) -> None:
    """All that the first process does is to wait for the second."""
    dist.all_reduce(torch.zeros(1))
    if comm.get_rank() == 1:
        if how == "mistake":
            raise InputError("photo.png is damaged")
        if how == "bug":
            raise KeyError("of the second process")
        if how == "long":
            raise InputError("long" * 100_000)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "terminated":
            os.kill(os.getppid(), signal.SIGTERM)
    dist.all_reduce(torch.zeros(1))


@pytest.mark.slow
def test_a_mistake_of_one_process():
    with pytest.raises(InputError) as caught:
        launch(end, ("mistake",), Processes(2), "cpu", "")
    assert str(caught.value) == "photo.png is damaged"


@pytest.mark.slow
def test_a_long_message():
    """More than a pipe holds."""
    with pytest.raises(InputError, match="longlong"):
        launch(end, ("long",), Processes(2), "cpu", "")


@pytest.mark.slow
def test_a_failure_of_one_process():
    with pytest.raises(SystemExit, match=r"Process 1 failed:(.|\n)*KeyError: 'of the second"):
        launch(end, ("bug",), Processes(2), "cpu", "")


@pytest.mark.slow
def test_a_process_that_is_killed(capfd):
    with pytest.raises(SystemExit) as caught:
        launch(end, ("killed",), Processes(2), "cpu", "")
    assert caught.value.code == 128 + signal.SIGKILL
    assert "Error: process 1 terminated with signal SIGKILL" in capfd.readouterr().err


@pytest.mark.slow
def test_a_signal_goes_on_to_the_processes():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        launch(end, ("terminated",), Processes(2), "cpu", "")
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("mistake", "InputError: photo.png is damaged"),
        ("bug", "KeyError: 'of the second process'"),
        ("killed", "Signal 9 (SIGKILL) received"),
    ],
)
def test_torchrun_ends_the_others(tmp_path, how, message):
    script = tmp_path / "script.py"
    script.write_text(JOIN)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600
    )
    assert found.returncode != 0
    assert message in found.stderr
