"""Reading the metrics that a training wrote."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["read_metrics"]


def read_metrics(run: str | Path, name: str = "bbox/AP") -> dict[int, dict[str, float]]:
    """
    Args:
        run: output folder of a training, with its ``metrics.json``.
        name: a metric; records without it are left out.

    Returns:
        dict: iteration, from 1, -> all metrics of that iteration. In order; where a training was
        resumed, or another one was started in the same folder, what came later replaces all that
        was there from that iteration on. Detectron2 counts its evaluation after the last iteration
        as one iteration more.

    Raises:
        OSError: there is no ``metrics.json``.
    """
    records = {}
    last = -1
    for line in (Path(run) / "metrics.json").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        iteration = record["iteration"]
        # Within a training, records of an evaluation may come after those of later iterations;
        # those of the losses are in order.
        if "total_loss" in record:
            if iteration <= last:  # a training starts
                records = {i: records[i] for i in records if i <= iteration}
            last = iteration
        records.setdefault(iteration + 1, {}).update(record)
    return {i: records[i] for i in sorted(records) if name in records[i]}
