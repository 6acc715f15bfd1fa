"""Hooks of the trainer."""

import logging
import math
import os

import torch
from detectron2.engine import HookBase

from ..checkpoint import GFLCheckpointer
from ..errors import InputError, first_line

__all__ = ["BestModelSaver"]

logger = logging.getLogger(__name__)


class BestModelSaver(HookBase):
    """
    Keep the weights with the highest value of a metric as ``model_best.pth``. The value is kept in
    the same file, from which it is read when training is resumed. Training is never resumed from
    that file: it has no optimizer, and ``last_checkpoint`` does not name it.

    It comes after the hook that evaluates.
    """

    FILE_NAME = "model_best.pth"

    def __init__(self, checkpointer: GFLCheckpointer, metric: str):
        """``metric``: as it is logged, e.g. "bbox/AP"."""
        self._checkpointer, self._metric = checkpointer, metric
        self._path = os.path.join(checkpointer.save_dir, self.FILE_NAME)
        self._best, self._last_seen = -math.inf, -1

    def before_train(self) -> None:
        """Raises InputError if ``model_best.pth`` is damaged."""
        if not os.path.isfile(self._path):
            return
        try:
            saved = torch.load(self._path, map_location="cpu", weights_only=True)
            metrics = saved.get("metrics", {})
        except Exception as error:  # unpickling may raise anything
            advice = f"{self._path} cannot be read, move it out of the way"
            raise InputError(f"{advice}: {first_line(error)}") from None
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
                f"{self.FILE_NAME} of this training."
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
            "model": self._checkpointer.model.state_dict(),
            # The one evaluated after the last iteration counts as one more.
            "iteration": min(iteration, self.trainer.max_iter - 1),
            "metrics": {self._metric: value},
        }
        with self._checkpointer.path_manager.open(self._path, "wb") as file:
            torch.save(content, file)
        logger.info(f"{self._metric} {value:.3f} is the best so far, kept in {self._path}")
