"""A training step in bfloat16."""

from __future__ import annotations

import time

import torch
from detectron2.engine import SimpleTrainer

__all__ = ["BFloat16Trainer"]


class BFloat16Trainer(SimpleTrainer):
    """
    :class:`SimpleTrainer` whose forward pass runs under autocast to bfloat16. Weights, gradients
    and the optimizer stay in float32. bfloat16 has the range of float32, so gradients need no
    scaling, unlike those of Detectron2's :class:`AMPTrainer`; and it works on a CPU too.

    The model is left as it is.
    """

    def run_step(self) -> None:
        assert self.model.training, "The model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        device_type = next(self.model.parameters()).device.type
        with torch.autocast(device_type, dtype=torch.bfloat16):
            losses = self.model(data)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self._write_metrics(losses, data_time)
        self.optimizer.step()
