#!/usr/bin/env python3
"""
Plot AP and training loss of runs beside each other, from the ``metrics.json`` that each run wrote.

    python tools/plot_metrics.py --output curves.png GFL=output/gfl0,output/gfl1 RetinaNet=output/r

Runs of one label, separated by commas, differ by their seed. The line is their mean; the band goes
from the lowest to the highest.
"""

from __future__ import annotations

import argparse
import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from gfl_d2.engine import read_metrics
from gfl_d2.errors import InputError
from gfl_d2.visualization import check_picture_path, save_plot


def plot(axes: plt.Axes, label: str, runs: list[str], name: str) -> None:
    """Mean and range over ``runs`` at the iterations that all of them have."""
    try:
        records = [read_metrics(run, name) for run in runs]
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{label}: a metrics.json cannot be read: {error}") from None
    iterations = sorted(set.intersection(*map(set, records)))
    if not iterations:
        raise InputError(f"{label}: no iteration at which all of {', '.join(runs)} have {name}")
    values = np.array([[record[i][name] for i in iterations] for record in records])
    marker = "." if name.startswith("bbox/") else ""
    (line,) = axes.plot(iterations, values.mean(axis=0), label=label, marker=marker)
    low, high = values.min(axis=0), values.max(axis=0)
    axes.fill_between(iterations, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="LABEL=FOLDER[,FOLDER…]")
    parser.add_argument("--metrics", nargs="+", default=["bbox/AP", "total_loss"])
    parser.add_argument("--output", required=True, help="picture to write")
    args = parser.parse_args()

    size = (4.2 * len(args.metrics), 3)
    figure, all_axes = plt.subplots(1, len(args.metrics), figsize=size, squeeze=False)
    try:
        check_picture_path(args.output, is_plot=True)
        for axes, name in zip(all_axes[0], args.metrics):
            for run in args.runs:
                label, separator, folders = run.partition("=")
                if not separator:
                    raise InputError(f"'{run}' is not LABEL=FOLDER[,FOLDER…]")
                plot(axes, label, folders.split(","), name)
            axes.set(xlabel="iteration", title=name)
            axes.grid(alpha=0.3)
        all_axes[0][0].legend()
        figure.tight_layout()
        save_plot(args.output, figure, dpi=110)
    except InputError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
