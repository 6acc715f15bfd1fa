#!/usr/bin/env python3
"""
Plot AP and training loss of runs beside each other, from the ``metrics.json`` that each run wrote.

    python tools/plot_metrics.py --output curves.png GFL=output/gfl0,output/gfl1 RetinaNet=output/r

Runs of one label, separated by commas, differ by their seed: their mean is drawn, and the range
between the lowest and the highest as a band.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from gfl_d2.engine import read_metrics


def plot(axes: plt.Axes, label: str, runs: list[Path], name: str, **style) -> None:
    """Mean and range over ``runs`` at the iterations that all of them have."""
    records = [read_metrics(run, name) for run in runs]
    series = [{i: record[name] for i, record in run.items()} for run in records]
    iterations = sorted(set.intersection(*map(set, series)))
    values = np.array([[s[i] for i in iterations] for s in series])
    (line,) = axes.plot(iterations, values.mean(axis=0), label=label, **style)
    if len(runs) > 1:
        axes.fill_between(
            iterations, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="LABEL=FOLDER[,FOLDER…]")
    parser.add_argument("--metrics", nargs="+", default=["bbox/AP", "total_loss"])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    figure, all_axes = plt.subplots(
        1, len(args.metrics), figsize=(4.2 * len(args.metrics), 3), squeeze=False
    )
    for axes, name in zip(all_axes[0], args.metrics):
        for run in args.runs:
            label, _, folders = run.partition("=")
            marker = "." if name.startswith("bbox/") else ""
            plot(axes, label, [Path(folder) for folder in folders.split(",")], name, marker=marker)
        axes.set_xlabel("iteration")
        axes.set_title(name)
        axes.grid(alpha=0.3)
    all_axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
