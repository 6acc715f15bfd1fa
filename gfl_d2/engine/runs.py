"""Trainings that scripts start, each in a fresh folder of its own."""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .metrics import read_metrics

__all__ = ["make_fresh_folder", "parse_arguments", "run_training"]

# Names the script that made a folder, which may delete it.
_MARK = "made_by.txt"


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """
    Parse the command line of a script. What follows ``--`` becomes the list ``opts``: argparse
    itself gives it to a list before the ``--``, or refuses it.
    """
    parser.usage = f"{parser.format_usage().split(':', 1)[1].strip()} [-- KEY VALUE ...]"
    arguments = sys.argv[1:]
    index = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:index])
    args.opts = arguments[index + 1 :]
    return args


def make_fresh_folder(folder: str | Path, maker: str) -> None:
    """
    Make an empty folder. One that the same maker made before is deleted with all that is in it.

    Args:
        folder: where.
        maker: name of the script that needs it.

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
    Train in another process. Its log goes where ours goes.

    Args:
        command: starts ``train_net.py`` with a config and options.
        folder: the ``OUTPUT_DIR``. No other training has written there.

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
