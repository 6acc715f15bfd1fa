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
        dict: iteration, from 1, -> all metrics of that record. In order; what a resumed training
        wrote again replaces what was there. Detectron2 counts its evaluation after the last
        iteration as one iteration more.

    Raises:
        OSError: there is no ``metrics.json``.
    """
    records = {}
    for line in (Path(run) / "metrics.json").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if name in record:
            records[record["iteration"] + 1] = record
    return dict(sorted(records.items()))
