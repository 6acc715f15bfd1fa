"""Hooks of the trainer."""

from __future__ import annotations

import logging
import math
import os

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from torch import nn

from ..checkpoint import BEST_MODEL, GFLCheckpointer
from ..errors import InputError, name_some
from ..plain_data import load_torch

__all__ = ["BestModelSaver", "EarlyStopping", "Evaluation", "FinalModelSaver", "TrainingEnds"]

logger = logging.getLogger(__name__)


class BestModelSaver(HookBase):
    """
    Keep the weights with the highest value of a metric as ``model_best.pth``. The value is kept in
    the same file, from which it is read when training is resumed. Training is never resumed from
    that file: it has no optimizer, and ``last_checkpoint`` does not name it.

    It comes after the hook that evaluates.
    """

    def __init__(self, checkpointer: GFLCheckpointer, metric: str, model: nn.Module | None = None):
        """
        Args:
            checkpointer: of the training.
            metric: as it is logged, e.g. "bbox/AP".
            model: what is evaluated, if not the checkpointer's model.
        """
        self._checkpointer, self._metric = checkpointer, metric
        self._model = checkpointer.model if model is None else model
        self._path = os.path.join(checkpointer.save_dir, BEST_MODEL)
        self._best, self._last_seen = -math.inf, -1

    def before_train(self) -> None:
        """Raises InputError if ``model_best.pth`` is damaged."""
        if not os.path.isfile(self._path):
            return
        try:
            metrics = load_torch(self._path, self._path).get("metrics", {})
        except (AttributeError, InputError) as error:
            raise InputError(f"{error}. Move {self._path} out of the way") from None
        if self._metric in metrics:
            self._best = metrics[self._metric]
            logger.info(f"Best {self._metric} so far: {self._best:.3f}")
        else:
            logger.warning(
                f"{self._path} was not kept for {self._metric}: the next evaluation replaces it."
            )

    def after_train(self) -> None:
        self.after_step()
        if self._last_seen < 0 and self.trainer.iter >= self.trainer.max_iter:
            logger.warning(
                f"No evaluation gave TEST.BEST_CHECKPOINT_METRIC {self._metric!r}: there is no "
                f"{BEST_MODEL} of this training."
            )

    def after_step(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._metric, (math.nan, -1))
        if iteration <= self._last_seen:  # no evaluation since
            return
        self._last_seen = iteration
        if not math.isfinite(value) or value <= self._best:
            return
        self._best = value
        content = {
            **self._checkpointer.description,
            "model": self._model.state_dict(),
            # The one evaluated after the last iteration counts as one more.
            "iteration": min(iteration, self.trainer.max_iter - 1),
            "metrics": {self._metric: value},
        }
        with self._checkpointer.path_manager.open(self._path, "wb") as file:
            torch.save(content, file)
        logger.info(f"{self._metric} {value:.3f} is the best so far, kept in {self._path}")


class Evaluation(EvalHook):
    """
    Detectron2's, but that a training which fails in its last step is not evaluated: a process that
    failed alone would wait there for the others, and they for it.
    """

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
        else:
            del self._func  # as there: it refers to the trainer, which would not be freed


class FinalModelSaver(HookBase):
    """
    Write ``model_final.pth`` when a training with no iterations left is resumed from a checkpoint
    other than that file: it was killed between the two. On the main process.
    """

    def __init__(self, checkpointer: GFLCheckpointer):
        self._checkpointer = checkpointer

    def before_train(self) -> None:
        start, end = self.trainer.start_iter, self.trainer.max_iter
        last = os.path.basename(self._checkpointer.get_checkpoint_file())
        if start >= end > 0 and last != "model_final.pth":
            self.trainer.iter = start - 1  # saved with the trainer's state: the last one done
            self._checkpointer.save("model_final", iteration=start - 1)
            self.trainer.iter = start


class TrainingEnds(BaseException):
    """Ends a training before its time. It is no error: Detectron2 would log a stack trace."""


class EarlyStopping(HookBase):
    """
    End the training when a metric has not got better in several evaluations, one after the other.
    Evaluations without the metric, or with NaN (nothing was detected), are among these. The last
    weights are saved as ``model_final.pth``, as after the last iteration.

    What it has seen is part of the checkpoint. It comes after the hook that evaluates and before
    the one that saves, so that no evaluation is forgotten; on all processes.
    """

    def __init__(self, metric: str, period: int, patience: int, min_delta: float = 0.0):
        """
        Args:
            metric: as it is logged, e.g. "bbox/AP". More is better.
            period: iterations between evaluations.
            patience: evaluations without a better value, >= 1, after which the training ends.
            min_delta: only a value higher than the best by more than this is better.
        """
        self._metric, self._period = metric, period
        self._patience, self._min_delta = patience, min_delta
        self._best, self._num_worse = -math.inf, 0

    def before_train(self) -> None:
        self._end_if_due()

    def after_step(self) -> None:
        iteration = self.trainer.iter
        # The evaluation after the last iteration comes when the training has ended.
        if (iteration + 1) % self._period or iteration + 1 >= self.trainer.max_iter:
            return
        latest = self.trainer.storage.latest()
        value, seen = latest.get(self._metric, (math.nan, -1))
        if seen != iteration and comm.is_main_process():
            names = (name for name, (_, when) in latest.items() if when == iteration)
            there = name_some(sorted(name for name in names if "/AP" in name), 20)
            logger.warning(f"This evaluation gave no {self._metric!r}, but {there}")
        # Only the first process evaluates.
        value = comm.all_gather(value if seen == iteration else math.nan)[0]
        if value > self._best + self._min_delta:  # not so for NaN
            self._best, self._num_worse = value, 0
            return
        self._num_worse += 1
        if self._num_worse >= self._patience and comm.is_main_process():
            self.trainer.checkpointer.save("model_final", iteration=iteration)
        self._end_if_due()

    def _end_if_due(self) -> None:
        if self._num_worse >= self._patience:
            raise TrainingEnds(
                f"{self._metric} was not better than {self._best:.3f} in {self._num_worse} "
                "evaluations: the training ends (SOLVER.EARLY_STOPPING)"
            )

    def state_dict(self) -> dict:
        return {"best": self._best, "num_worse": self._num_worse}

    def load_state_dict(self, state_dict: dict) -> None:
        self._best, self._num_worse = state_dict["best"], state_dict["num_worse"]
