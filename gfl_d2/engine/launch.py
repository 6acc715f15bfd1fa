"""The processes of a training or an evaluation: started here, or by torchrun."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.engine.launch import launch as launch_on_gpus
from detectron2.utils import comm

from ..errors import InputError
from .preemption import SIGNALS, Preempted

__all__ = [
    "Processes", "add_arguments", "find_processes", "hide_mistakes_from_log", "joined", "launch",
    "said_once",
]  # fmt: skip

_OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
# A failed process stays so long, in seconds: one that was killed is seen before those that miss it.
_STAY = 2
# Under torchrun the first process that leaves ends the others: it is to be the one that speaks.
_STAY_SILENT = 30
_LONGEST = 10_000  # letters of a failure: more would block the pipe that it is sent through


class Processes(NamedTuple):
    """``local`` of them on each of the machines."""

    local: int = 1
    machines: int = 1
    machine_rank: int = 0
    device: str | None = None  # "cpu" or "cuda" by the command line, None if only the config says
    local_rank: int | None = None  # of this process, if it is one of them

    @property
    def total(self) -> int:
        return self.local * self.machines

    @property
    def rank(self) -> int:
        """Of the process ``local_rank``, or else of the first one of this machine."""
        return self.local * self.machine_rank + (self.local_rank or 0)

    def choose_device(self, configured: str) -> str:
        """Raises InputError if ``MODEL.DEVICE``, ``configured``, contradicts the command line."""
        kind = configured.partition(":")[0]
        if self.total > 1 and self.device not in (None, kind):
            option = {"cpu": "--num-processes is for CPUs", "cuda": "--num-gpus is for GPUs"}
            raise InputError(
                f"{option[self.device]}, but MODEL.DEVICE is {configured!r}: set MODEL.DEVICE "
                f"{self.device}, or use {'--num-gpus' if kind == 'cuda' else '--num-processes'}"
            )
        if self.total > 1 and kind == "cuda" and self.local > torch.cuda.device_count():
            raise InputError(
                f"{self.local} processes of a machine need a GPU each, but this machine has "
                f"{torch.cuda.device_count()}: start fewer, or set MODEL.DEVICE cpu"
            )
        return kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--num-processes`` to Detectron2's parser; it then tells if --num-gpus is given."""
    parser.add_argument(
        "--num-processes", type=int, help="processes on CPUs *per machine*, in place of --num-gpus"
    )
    parser.set_defaults(num_gpus=None)


def find_processes(args: argparse.Namespace) -> Processes:
    """
    Those that the command line asks for, or else that torchrun has started, of which this is one.
    Raises InputError if options contradict each other.
    """
    if _is_started_by_torchrun():
        return _of_torchrun(args)
    # Detectron2's own parser will do.
    gpus, processes = args.num_gpus, vars(args).get("num_processes")
    machines = args.num_machines
    if processes is not None and gpus:
        raise InputError(
            f"--num-processes {processes} is for CPUs and --num-gpus {gpus} for GPUs: give one"
        )
    for name, value in (("--num-processes", processes), ("--num-machines", machines)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not 0 <= args.machine_rank < machines:
        raise InputError(
            f"--machine-rank must be in [0, {machines}), by --num-machines, got {args.machine_rank}"
        )
    if processes is not None:
        return Processes(processes, machines, args.machine_rank, "cpu")
    if gpus is not None and (gpus < 0 or (gpus == 0 and machines > 1)):
        raise InputError(
            f"--num-gpus {gpus} on {machines} machines: on CPUs say how many --num-processes"
        )
    return Processes(1 if gpus is None else max(gpus, 1), machines, args.machine_rank, "cuda")


def _is_started_by_torchrun() -> bool:
    return all(name in os.environ for name in _OF_TORCHRUN[:3])


def _of_torchrun(args: argparse.Namespace) -> Processes:
    missing = [name for name in (*_OF_TORCHRUN, *_ADDRESS) if name not in os.environ]
    if missing:
        raise InputError(
            f"RANK, LOCAL_RANK and WORLD_SIZE are set, as by torchrun, but not {missing}: set "
            "these too, or unset RANK"
        )
    given = {
        "--num-gpus": args.num_gpus,
        "--num-processes": vars(args).get("num_processes"),
        "--num-machines": args.num_machines != 1,
        "--machine-rank": args.machine_rank,
    }
    for option, is_given in given.items():
        if is_given:
            raise InputError(
                f"{option} and torchrun (RANK is set) both start processes: leave it out"
            )
    try:
        rank, local_rank, total, local = (int(os.environ[name]) for name in _OF_TORCHRUN)
    except ValueError:
        values = ", ".join(f"{name}={os.environ[name]}" for name in _OF_TORCHRUN)
        raise InputError(f"Environment of torchrun: whole numbers, got {values}") from None
    if local < 1 or total % local or rank % local != local_rank:
        raise InputError(
            f"Each machine must have as many processes as the others, got RANK={rank}, LOCAL_RANK="
            f"{local_rank}, WORLD_SIZE={total}, LOCAL_WORLD_SIZE={local}"
        )
    return Processes(local, total // local, rank // local, None, local_rank)


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Within it all processes of a machine find the same mistakes, which the first one says."""
    try:
        yield
    except InputError:
        if _is_started_by_torchrun() and os.environ["LOCAL_RANK"] != "0":
            time.sleep(_STAY_SILENT)
            raise SystemExit(1) from None
        raise


def launch(
    function: Callable, args: tuple, processes: Processes, device: str, dist_url: str
) -> None:
    """
    Call ``function(*args)`` in new processes on this machine, and wait for them. SIGTERM and
    SIGUSR1 go on to them. When one fails the others are ended.

    Args:
        function: of a module, so that new processes find it.
        device: "cpu" or "cuda", see :meth:`Processes.choose_device`.
        dist_url: where machines meet; several on one machine have no need of it on CPUs.

    Raises:
        InputError: what a process raised first.
        SystemExit: with the stack trace that a process failed with first, or its status.
    """
    failures = mp.get_context("spawn").SimpleQueue()
    call = (function, args, failures)
    try:
        with _signals_passed_on(), tempfile.TemporaryDirectory() as folder:
            if device == "cuda":
                layout = (processes.local, processes.machines, processes.machine_rank, dist_url)
                launch_on_gpus(_call, *layout, args=call)
            else:
                url = dist_url if processes.machines > 1 else f"file://{folder}/rendezvous"
                mp.spawn(_call_on_cpu, (processes, url, *call), processes.local)
    except mp.ProcessExitedException as error:
        if error.exit_code < 0:
            print(f"Error: {error}", file=sys.stderr)
        status = error.exit_code if error.exit_code > 0 else 128 - error.exit_code
        raise SystemExit(status) from None
    except mp.ProcessRaisedException as error:
        if failures.empty():
            raise SystemExit(str(error)) from None
        is_mistake, message = failures.get()
        raise InputError(message) if is_mistake else SystemExit(message) from None


def _call_on_cpu(local_rank: int, processes: Processes, url: str, *call) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes.local))
    with joined(processes._replace(local_rank=local_rank), "cpu", url):
        _call(*call)


def _call(function: Callable, args: tuple, failures: mp.SimpleQueue) -> None:
    # When one process has failed the others lose the connection to it: that is no news.
    hide_mistakes_from_log(lambda: not failures.empty())
    try:
        function(*args)
    except InputError as error:
        failures.put((True, str(error)[:_LONGEST]))
        raise
    except Exception:
        time.sleep(_STAY)
        trace = traceback.format_exc()[-_LONGEST:]
        failures.put((False, f"Process {comm.get_rank()} failed:\n{trace}"))
        raise


@contextlib.contextmanager
def joined(processes: Processes, device: str, url: str = "env://") -> Iterator[None]:
    """
    Make this process one of the group. An error leaves it as it is, as others may wait in it.

    Args:
        processes: with the ``local_rank`` of this process.
        device: "cpu" for gloo, "cuda" for NCCL.
        url: where they meet; by default as torchrun says.
    """
    if device == "cuda":
        torch.cuda.set_device(processes.local_rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=url,
        world_size=processes.total,
        rank=processes.rank,
        # While the first process computes the metrics of an evaluation the others wait.
        timeout=DEFAULT_TIMEOUT,
    )
    _group_machines(processes)
    yield
    dist.destroy_process_group()


def _group_machines(processes: Processes) -> None:
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes.local)
        return
    # Detectron2 0.6 has it in a function that asks for GPUs.
    for machine in range(processes.machines):
        first = machine * processes.local
        group = dist.new_group(list(range(first, first + processes.local)))
        if machine == processes.machine_rank:
            comm._LOCAL_PROCESS_GROUP = group


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        processes = mp.active_children()
        if not processes:  # none has started yet
            raise Preempted
        for process in processes:
            os.kill(process.pid, number)

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def hide_mistakes_from_log(hides_all: Callable[[], bool] = lambda: False) -> None:
    """
    Detectron2 logs what ends a training with its stack trace. A user's mistake, and a loss that is
    NaN, need none; ``hides_all`` says whether anything else does at the time.
    """

    def is_shown(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        is_mistake = isinstance(error, (InputError, FloatingPointError))
        return error is None or not (is_mistake or hides_all())

    logging.getLogger("detectron2.engine.train_loop").addFilter(is_shown)
