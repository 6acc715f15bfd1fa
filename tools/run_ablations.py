#!/usr/bin/env python3
"""
Train a grid of ablations on a small budget, with several seeds each, and print their AP.

    python tools/run_ablations.py configs/ablations/table_3_*.yaml --output output/ablations \
        --config-file configs/gfl_R_18_FPN_demo.yaml --seeds 0 1 2 -- SOLVER.MAX_ITER 500

From each ablation its ``MODEL.GFL`` is taken, but for the number of classes and the size of the
head; data, backbone and schedule are those of ``--config-file``. Options after a ``--`` hold for
all. A grid that was interrupted goes on where
it stopped when run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from gfl_d2.config import load_config
from gfl_d2.engine import read_metrics
from gfl_d2.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("AP", "AP50", "AP75")
# What depends on the data and on the size of the model.
_NOT_TAKEN = ("NUM_CLASSES", "IN_FEATURES", "NUM_CONVS", "CONV_DIM", "NORM")


def ablation_opts(config_file: str) -> list[str]:
    """The ``MODEL.GFL`` of a config but for data and size of the head, as KEY VALUE pairs."""
    opts = []
    for key, value in load_config(config_file).MODEL.GFL.items():
        if key not in _NOT_TAKEN:
            opts += [f"MODEL.GFL.{key}", str(value)]
    return opts


def check_settings(folder: Path, settings: dict) -> None:
    """
    Write down what a run is trained with, so that one of other settings is not taken for it.

    Raises:
        InputError: it is there with other settings.
    """
    path = folder / "settings.json"
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != settings:
            raise InputError(f"{folder} has a run with other settings: see {path}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def read_result(folder: Path, num_iterations: int) -> dict[str, float] | None:
    """AP after the last iteration, or None if training has not come that far."""
    try:
        records = read_metrics(folder)
    except OSError:
        return None
    if max(records, default=0) < num_iterations:
        return None
    last = records[max(records)]
    return {name: last[f"bbox/{name}"] for name in METRICS}


def train(config_file: str, opts: list[str], seed: int, folder: Path) -> None:
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", config_file, "--resume"]
    command += [*opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(f"{folder}: train_net.py ended with status {status}")


def format_table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """A table in Markdown: mean over the seeds, standard deviation, and AP of each seed."""
    lines = ["| ablation | AP | ± | AP50 | AP75 | AP of each seed |", "|---|---|---|---|---|---|"]
    for name, by_seed in results.items():
        values = {key: [result[key] for result in by_seed.values()] for key in METRICS}
        spread = f"{stdev(values['AP']):.1f}" if len(by_seed) > 1 else ""
        ap, ap50, ap75 = (f"{mean(values[key]):.1f}" for key in METRICS)
        each = ", ".join(f"{ap:.1f}" for ap in values["AP"])
        lines.append(f"| {name} | {ap} | {spread} | {ap50} | {ap75} | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("ablations", nargs="+", metavar="CONFIG", help="in configs/ablations")
    parser.add_argument("--config-file", required=True, help="data, backbone and schedule")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    # Not by argparse: it would give the list before the "--" what follows it.
    index = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, opts = parser.parse_args(sys.argv[1:index]), sys.argv[index + 1 :]

    try:
        num_iterations = load_config(args.config_file, opts).SOLVER.MAX_ITER
        rows = {Path(path).stem: ablation_opts(path) for path in args.ablations}
        for row_opts in rows.values():
            load_config(args.config_file, [*row_opts, *opts])
    except InputError as error:
        sys.exit(f"Error: {error}")

    results = {name: {} for name in rows}
    runs = [(seed, name) for seed in args.seeds for name in rows]
    for i, (seed, name) in enumerate(runs):
        folder = args.output.resolve() / name / str(seed)
        print(f"[{i + 1}/{len(runs)}] {name}, seed {seed}: {folder}", flush=True)
        settings = {"config_file": args.config_file, "opts": [*rows[name], *opts], "seed": seed}
        try:
            check_settings(folder, settings)
        except InputError as error:
            sys.exit(f"Error: {error}")
        if read_result(folder, num_iterations) is None:
            train(args.config_file, [*rows[name], *opts], seed, folder)
        results[name][seed] = read_result(folder, num_iterations)
    print("\n" + format_table(results))
    (args.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
