#!/usr/bin/env python3
"""
Kill a small training on a CPU again and again, resume it, and compare it with one that was left
alone. A third of the kills comes at any moment, from the start of the process on; a third while
a checkpoint is written, a third while `last_checkpoint` is.

    PYTHONPATH=. python dev/survive_kills.py --kills 50

It ends with status 1 if --resume ever meets a file that it cannot load, if a training goes back
by more than what it did since its last checkpoint, or if weights differ by a bit.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from detectron2.engine import default_argument_parser  # noqa: E402

import models  # noqa: E402, F401  (registers the tiny backbone)
from scripts import load_script  # noqa: E402
from toy_training import CONFIG, options, write_dataset  # noqa: E402

train_net = load_script("train_net.py")

KINDS = ("any moment", "checkpoint", "last_checkpoint")
_OPTIONS = (
    *("MODEL.BACKBONE.NAME", "build_tiny_backbone", "MODEL.RESNETS.ZERO_INIT_RESIDUAL", False),
    *("DATASETS.TEST", "()", "TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 1, "SEED", 3),
    *("MODEL_EMA.ENABLED", True, "INPUT.MIN_SIZE_TRAIN", "(48, 64)"),
)


def start(folder: Path, name: str, num_iterations: int, *args: str) -> int:
    """Train in a process of its own, which need not import anything; gives its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        # The threads of OpenMP are not forked, and it would wait for them.
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = (folder / f"{name}.txt").open("a", buffering=1)
        opts = (*_OPTIONS, "SOLVER.MAX_ITER", num_iterations, "OUTPUT_DIR", folder / name)
        command = ["--config-file", CONFIG, *args, *options(folder, *opts)]
        train_net.main(default_argument_parser().parse_args(command))
        status = 0
    except SystemExit as end:
        print(end)
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill(process: int, folder: Path, kind: str, longest: float) -> bool:
    """At a random moment, or the next one of this kind; False if the process ended before."""
    end = time.monotonic() + random.uniform(0, longest)
    prefix = {"checkpoint": ".model_", "last_checkpoint": ".last_checkpoint"}.get(kind)
    while time.monotonic() < end or (prefix and not _unfinished(folder, prefix)):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            assert status == 0, (folder.parent / f"{folder.name}.txt").read_text()
            return False
        time.sleep(0.0001)
    if kind == "checkpoint":
        time.sleep(random.uniform(0, 0.01))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def _unfinished(folder: Path, prefix: str = ".") -> list[str]:
    names = os.listdir(folder) if folder.is_dir() else []
    return [name for name in names if name.startswith(prefix) and name.endswith(".tmp")]


def last_iteration(folder: Path) -> int:
    """Of the checkpoint that --resume takes, -1 for none. All checkpoints are loaded."""
    saved = {
        path.name: torch.load(path, map_location="cpu", weights_only=True)["iteration"]
        for path in folder.glob("model_*.pth")
    }
    tag = folder / "last_checkpoint"
    last = saved[tag.read_text()] if tag.is_file() else -1
    if saved and last < max(saved.values()) - 1:
        raise AssertionError(f"{tag} is more than one checkpoint back: {last}, of {saved}")
    return last


def survive(folder: Path, num_kills: int, num_iterations: int) -> dict[str, int]:
    """
    Returns:
        dict: how many kills hit what: "checkpoint" and "last_checkpoint" where a half written one
        was left, else "start" before the first checkpoint and "step".
    """
    write_dataset(folder)
    begin = time.monotonic()
    _, status = os.waitpid(start(folder, "whole", num_iterations), 0)
    longest = time.monotonic() - begin
    assert status == 0, (folder / "whole.txt").read_text()
    expected, output = weights(folder / "whole"), folder / "parts"
    hits, last, number = collections.Counter(), -1, 0
    while number < num_kills:
        process = start(folder, "parts", num_iterations, "--resume")
        kind = KINDS[number % len(KINDS)]
        if not kill(process, output, kind, longest):
            compare(output, expected)
            shutil.rmtree(output)
            last = -1
            continue
        number += 1
        before, last = last, last_iteration(output)
        assert last >= before, f"from {before} back to {last}"
        left = [name for name in _unfinished(output) if not name.startswith(".config")]
        where = left[0].split(".")[1] if left else ("step" if last > before else "start")
        hits["checkpoint" if where.startswith("model_") else where] += 1
        print(f"kill {number}: {kind}, after iteration {last}", flush=True)
    _, status = os.waitpid(start(folder, "parts", num_iterations, "--resume"), 0)
    assert status == 0, (folder / "parts.txt").read_text()
    compare(output, expected)
    assert not _unfinished(output)
    return dict(hits)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "model_final.pth", map_location="cpu", weights_only=True)
    return {f"{part}/{k}": v for part in ("model", "ema") for k, v in content[part].items()}


def compare(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    actual = weights(folder)
    assert actual.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert not different, f"{folder} has other weights: {different}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        hits = survive(Path(folder), args.kills, args.iterations)
    counts = ", ".join(f"{number} in {name}" for name, number in sorted(hits.items()))
    print(f"{args.kills} kills survived ({counts}); the weights are those of no kill")


if __name__ == "__main__":
    main()
