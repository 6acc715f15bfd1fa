"""Exponential moving average of a model's weights."""

from __future__ import annotations

import logging
import math

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

__all__ = ["ModelAverager", "share_buffers"]

logger = logging.getLogger(__name__)


class ModelAverager(HookBase):
    """
    Keep the exponential moving average of a model's weights in another model. Statistics of
    BatchNorm, which belong to the weights, are averaged likewise; whole numbers are copied.

    It comes before the hook that saves.
    """

    def __init__(self, model: nn.Module, average: nn.Module, decay: float, warmup: float):
        """
        Args:
            model: what is trained, without DistributedDataParallel.
            average: a copy of it, which is changed.
            decay: of the average in one iteration, in [0, 1).
            warmup: in iteration t the decay is ``decay * (1 - exp(-t / warmup))``.
        """
        self._model, self._average = model, average
        self._decay, self._warmup = decay, warmup
        self._num_updates = 0

    def before_train(self) -> None:
        if self._num_updates == 0:
            if self.trainer.start_iter > 0:
                logger.warning("The checkpoint has no averages of weights: they start now.")
            self._average.load_state_dict(self._model.state_dict())

    @torch.no_grad()
    def after_step(self) -> None:
        self._num_updates += 1
        decay = self._decay
        if self._warmup > 0:
            decay *= 1 - math.exp(-self._num_updates / self._warmup)
        values = self._model.state_dict()
        for name, average in self._average.state_dict().items():
            if average.is_floating_point():
                average.lerp_(values[name], 1 - decay)
            else:
                average.copy_(values[name])

    def state_dict(self) -> dict:
        return {"num_updates": self._num_updates}

    def load_state_dict(self, state_dict: dict) -> None:
        self._num_updates = state_dict["num_updates"]


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """
    Give all processes the buffers of the first: each has its own statistics of BatchNorm, and only
    weights are equal.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
