#!/usr/bin/env python3
"""
Train a grid of ablations on a small budget, with several seeds each, and print their AP.

    python tools/run_ablations.py configs/ablations/table_3_*.yaml --output output/ablations \
        --config-file configs/gfl_R_18_FPN_demo.yaml --seeds 0 1 2 -- SOLVER.MAX_ITER 500

An ablation gives its ``MODEL.GFL``, without the number of classes and the size of the head. Data,
backbone and schedule are those of ``--config-file``. KEY VALUE pairs behind the ablations, or at
the end after a ``--``, hold for all runs.

Run the same command again after an interruption: finished runs are kept, an unfinished one starts
again from its beginning.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from statistics import mean, stdev

from gfl_d2.config import load_config
from gfl_d2.engine.runs import make_fresh_folder, parse_arguments, run_training
from gfl_d2.errors import InputError, name_some
from gfl_d2.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("AP", "AP50", "AP75")
# These depend on the data and on the size of the model.
_NOT_TAKEN = ("NUM_CLASSES", "IN_FEATURES", "NUM_CONVS", "CONV_DIM", "NORM")


def ablation_opts(config_file: str) -> list[str]:
    """What is taken of an ablation's ``MODEL.GFL``, as KEY VALUE pairs."""
    gfl = dict(load_config(config_file).MODEL.GFL)
    gfl.update({f"DISTILL.{key}": value for key, value in gfl.pop("DISTILL").items()})
    pairs = [(f"MODEL.GFL.{key}", str(x)) for key, x in gfl.items() if key not in _NOT_TAKEN]
    return list(itertools.chain(*pairs))


def read_result(file: Path, settings: str) -> dict[str, float] | None:
    """
    The metrics of a finished run, None if there is none.

    Raises:
        InputError: it was trained with other settings.
    """
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    if result["settings"] != settings:
        changed = set(settings.splitlines()) ^ set(result["settings"].splitlines())
        raise InputError(
            f"{file.parent} has a run of other settings, which differ in "
            f"{name_some(sorted(line.strip() for line in changed))}: delete it, or choose another "
            "--output"
        )
    return result["metrics"]


def run_once(config_file: str, opts: list[str], folder: Path) -> dict[str, float]:
    """The metrics of one run: those of a finished one with these settings, or of a new one."""
    file = folder / "result.json"
    settings = load_config(config_file, opts).dump()
    metrics = read_result(file, settings)
    if metrics is None:
        make_fresh_folder(folder, "tools/run_ablations.py")
        command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", config_file]
        metrics = run_training([*command, *opts], folder)
        result = json.dumps({"metrics": metrics, "settings": settings}, indent=1)
        with atomic_write(file, "w") as stream:
            stream.write(result)
    return {name: metrics[name] for name in METRICS}


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


def run_grid(args: argparse.Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """The metrics of every run, by ablation and seed."""
    rows = {Path(path).stem: [*ablation_opts(path), *args.opts] for path in args.ablations}
    for row_opts in rows.values():
        load_config(args.config_file, row_opts)  # a mistake shows before any training
    results = {name: {} for name in rows}
    runs = [(seed, name) for seed in args.seeds for name in rows]
    for i, (seed, name) in enumerate(runs):
        folder = args.output.resolve() / name / str(seed)
        print(f"[{i + 1}/{len(runs)}] {name}, seed {seed}: {folder}", flush=True)
        results[name][seed] = run_once(args.config_file, [*rows[name], "SEED", str(seed)], folder)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("ablations", nargs="+", metavar="CONFIG", help="in configs/ablations")
    parser.add_argument("--config-file", required=True, help="data, backbone and schedule")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    args = parse_arguments(parser)
    configs = list(itertools.takewhile(lambda x: x.endswith((".yaml", ".yml")), args.ablations))
    args.opts = args.ablations[len(configs) :] + args.opts
    args.ablations = configs
    if not configs:
        parser.error(f"{args.opts[0]} is not the config of an ablation, *.yaml")

    try:
        results = run_grid(args)
    except InputError as error:
        sys.exit(f"Error: {error}")
    print("\n" + format_table(results))
    (args.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
