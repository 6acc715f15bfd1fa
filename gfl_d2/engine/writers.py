"""Scalars of a training, written to services."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import defaultdict

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

__all__ = ["MLflowWriter", "WandbWriter", "build_writer"]

_WINDOW_SIZE = 20  # of the median, as in Detectron2's writers


class _ScalarWriter(EventWriter):
    """Hands on each scalar once, in the order of iterations, as Detectron2's JSONWriter does."""

    def __init__(self):
        self._last_write = -1

    @abstractmethod
    def log(self, scalars: dict[str, float], iteration: int) -> None: ...

    def write(self) -> None:
        latest = get_event_storage().latest_with_smoothing_hint(_WINDOW_SIZE)
        by_iteration = defaultdict(dict)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                by_iteration[iteration][name] = float(value)
        for iteration in sorted(by_iteration):
            self.log(by_iteration[iteration], iteration)
            self._last_write = iteration


class WandbWriter(_ScalarWriter):
    """To Weights & Biases, with the config. Its ``WANDB_...`` environment variables apply."""

    def __init__(self, cfg: CfgNode):
        import wandb

        super().__init__()
        self._run = wandb.init(dir=cfg.OUTPUT_DIR, config={"config": cfg.dump()})

    def log(self, scalars: dict[str, float], iteration: int) -> None:
        self._run.log(scalars, step=iteration)

    def close(self) -> None:
        self._run.finish()


class MLflowWriter(_ScalarWriter):
    """To MLflow, with the config as a file. Its ``MLFLOW_...`` environment variables apply."""

    def __init__(self, cfg: CfgNode):
        import mlflow

        super().__init__()
        self._mlflow = mlflow
        mlflow.start_run()
        mlflow.log_text(cfg.dump(), "config.yaml")

    def log(self, scalars: dict[str, float], iteration: int) -> None:
        # Names of classes may have what MLflow refuses in names.
        allowed = {re.sub(r"[^/\w.\- ]", "_", name): value for name, value in scalars.items()}
        self._mlflow.log_metrics(allowed, step=iteration)

    def close(self) -> None:
        self._mlflow.end_run()


def build_writer(name: str, cfg: CfgNode) -> EventWriter:
    """``name``: one of ``WRITERS``."""
    return {"wandb": WandbWriter, "mlflow": MLflowWriter}[name](cfg)
