"""Several processes of a test."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# In seconds: a process that waits for another one in vain fails, and so does the test. Seconds are
# enough for it, but not on a machine that has other things to do.
_WATCHDOG = 1200


def run_processes(function: Callable[[int], object], number: int, folder: Path) -> list:
    """What a function of a module returns for the rank of each process of a gloo group."""
    context = mp.spawn(_run, (function, number, str(folder)), number, join=False)
    end = time.monotonic() + _WATCHDOG
    try:
        while not context.join(max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]


def _run(rank: int, function: Callable[[int], object], number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=number,
        timeout=datetime.timedelta(seconds=_WATCHDOG / 2),
    )
    torch.save(function(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
