"""Trainings: their output folders and metrics, and those that scripts start."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from ..checkpoint import BEST_MODEL, GFLCheckpointer
from ..errors import InputError
from ..files import lock_folder, remove_unfinished

__all__ = [
    "check_output_folder", "check_space", "claim_output_folder", "inference_folder",
    "make_fresh_folder", "parse_arguments", "read_metrics", "run_training",
]  # fmt: skip

logger = logging.getLogger(__name__)

# What a later training would be mixed with.
_OF_A_TRAINING = ("last_checkpoint", BEST_MODEL, "metrics.json")
# Names the script that made a folder, which may delete it.
_MARK = "made_by.txt"


def check_output_folder(folder: str) -> None:
    """Raise InputError if a new training would be mixed with an earlier one in its folder."""
    for name in _OF_A_TRAINING:
        path = os.path.join(folder, name)
        # A training that came to nothing leaves an empty file of metrics.
        if os.path.isfile(path) and os.path.getsize(path):
            raise InputError(
                f"OUTPUT_DIR {folder} holds an earlier training ({name}): go on with it by "
                "--resume, name another OUTPUT_DIR, or delete it"
            )


def claim_output_folder(folder: str) -> IO | None:
    """
    Lock the folder for a training, see :func:`lock_folder`, and remove what a killed one left half
    written. The first process does it for all.
    """
    if not comm.is_main_process() or "://" in folder:
        return None
    lock = lock_folder(folder)
    remove_unfinished(folder)
    return lock


def check_space(
    checkpointer: GFLCheckpointer, optimizer: torch.optim.Optimizer, number: int
) -> None:
    """
    Raise InputError if there is no space for a checkpoint of a training, and warn if there is none
    for the ``number`` of them that it will save.
    """
    folder = checkpointer.save_dir
    if not comm.is_main_process() or "://" in folder:
        return
    size = _checkpoint_size(checkpointer, optimizer) / 1e6
    free = shutil.disk_usage(folder).free / 1e6
    if free < size:
        raise InputError(
            f"OUTPUT_DIR {folder} has {free:.0f} MB of free space, but a checkpoint takes about "
            f"{size:.0f} MB: make space, or name another OUTPUT_DIR"
        )
    if free < number * size:
        logger.warning(
            f"OUTPUT_DIR {folder} has {free:.0f} MB of free space, but up to {number} checkpoints "
            f"will take about {number * size:.0f} MB (SOLVER.CHECKPOINT_PERIOD)."
        )


def _checkpoint_size(checkpointer: GFLCheckpointer, optimizer: torch.optim.Optimizer) -> int:
    """In bytes, without what is small."""
    parts = [checkpointer.model, *checkpointer.checkpointables.values()]
    models = [part.state_dict() for part in parts if isinstance(part, nn.Module)]
    # The optimizer has its tensors only after a step.
    copies = 2 if "betas" in optimizer.defaults else int(optimizer.defaults.get("momentum", 0) > 0)
    trained = [p for group in optimizer.param_groups for p in group["params"]] * copies
    tensors = [*(tensor for model in models for tensor in model.values()), *trained]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def inference_folder(cfg: CfgNode, dataset: str = "") -> str:
    """The folder of evaluation results; one of several datasets in DATASETS.TEST has its own."""
    has_own = dataset and len(cfg.DATASETS.TEST) > 1
    return os.path.join(cfg.OUTPUT_DIR, "inference", *([dataset] if has_own else []))


def read_metrics(run: str | Path, name: str = "bbox/AP") -> dict[int, dict[str, float]]:
    """
    Read the ``metrics.json`` in the output folder of a training; raises OSError if there is none.
    Iterations without the metric ``name`` are left out.

    Returns:
        dict: iteration, from 1, -> all metrics of that iteration. In order; where a training was
        resumed, or another one was started in the same folder, what came later replaces all that
        was there from that iteration on. Detectron2 counts its evaluation after the last iteration
        as one iteration more.
    """
    records, last = {}, -1
    lines = (Path(run) / "metrics.json").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            # A training that was killed may leave half a line, to which the next one appends.
            try:
                record = json.loads(line[line.rfind('{"') :])
            except ValueError:
                if number < len(lines):
                    raise
                break
        iteration = record["iteration"]
        # Within a training, records of an evaluation may come after those of later iterations;
        # those of the losses are in order.
        if "total_loss" in record:
            if iteration <= last:  # a training starts
                records = {i: records[i] for i in records if i <= iteration}
            last = iteration
        records.setdefault(iteration + 1, {}).update(record)
    return {i: records[i] for i in sorted(records) if name in records[i]}


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """
    Parse the command line of a script that takes KEY VALUE pairs, as ``opts``, behind its other
    positional arguments. Options may stand before, between and behind them. After a ``--`` all are
    KEY VALUE pairs, so that a value may begin with a dash.
    """
    help = "changes of the config; after -- values may begin with a dash"
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help=help)
    # argparse's own treatment of "--" differs between versions of Python.
    arguments = sys.argv[1:]
    index = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_intermixed_args(arguments[:index])
    args.opts += arguments[index + 1 :]
    return args


def make_fresh_folder(folder: str | Path, maker: str) -> None:
    """
    Make an empty folder. One that the same script, ``maker``, made before is deleted with all that
    is in it.

    Raises:
        InputError: it exists, is not empty, and ``maker`` did not make it.
    """
    folder = Path(folder).resolve()
    mark = folder / _MARK
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        if not mark.is_file() or mark.read_text(encoding="utf-8") != maker:
            raise InputError(
                f"{folder} exists, and {maker} did not make it: delete it, or name another folder"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(maker, encoding="utf-8")


def run_training(command: Sequence[str], folder: str | Path) -> dict[str, float]:
    """
    Train in another process, by a command that starts ``train_net.py`` with a config and options.
    Its log goes where ours goes. No other training has written to the folder, its ``OUTPUT_DIR``.

    Returns:
        dict: the box metrics of the evaluation after the last iteration, in percent: "AP", "AP50"
        and so on, and "AP-<class>".

    Raises:
        InputError: the training failed, or its AP is missing or NaN.
    """
    if "OUTPUT_DIR" in command:
        raise InputError("OUTPUT_DIR cannot be changed here: this script chooses the folder")
    status = subprocess.run([*command, "OUTPUT_DIR", str(folder)], check=False).returncode
    if status:
        raise InputError(f"The training in {folder} ended with status {status}: see its log")
    try:
        # Every record has an "iteration": an earlier evaluation is not taken for the last.
        records = read_metrics(folder, "iteration")
    except OSError:
        records = {}
    last = records[max(records)] if records else {}
    metrics = {key[len("bbox/") :]: last[key] for key in last if key.startswith("bbox/")}
    if "AP" not in metrics:
        raise InputError(f"{folder} has no metrics.json with bbox/AP after the last iteration")
    if math.isnan(metrics["AP"]):
        raise InputError(f"AP of the training in {folder} is NaN: nothing was detected")
    return metrics
