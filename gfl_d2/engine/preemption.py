"""Trainings that a signal ends, to go on later."""

from __future__ import annotations

import logging
import signal
import threading

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..checkpoint import GFLCheckpointer

__all__ = ["SIGNALS", "Preempted", "Preemption"]

logger = logging.getLogger(__name__)

# SLURM sends the first before it kills, and what `--signal` names earlier.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Ends the process with the status of one that SIGTERM ended."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class Preemption(HookBase):
    """
    At SIGTERM or SIGUSR1, to any of the processes, save a checkpoint after the step that runs, and
    raise :class:`Preempted` in all of them. After the last step the training ends as it would.

    It comes last, on all processes. Outside of the main thread it does nothing.
    """

    def __init__(self, checkpointer: GFLCheckpointer):
        self._checkpointer = checkpointer
        self._is_asked = self._is_ending = False
        self._previous, self._group = {}, None

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in SIGNALS}
        if comm.get_world_size() > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def _ask(self, number: int, frame: object) -> None:
        self._is_asked = True

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if not self._is_any_asked() or iteration + 1 >= self.trainer.max_iter:
            return
        self._is_ending = True
        name = f"model_{iteration:07d}"
        if comm.is_main_process():
            if not self._checkpointer.get_checkpoint_file().endswith(f"{name}.pth"):
                self._checkpointer.save(name, iteration=iteration)
            logger.warning(f"Ended by a signal after iteration {iteration}: --resume goes on.")
        raise Preempted

    def _is_any_asked(self) -> bool:
        if self._group is None:
            return self._is_asked
        asked = torch.tensor(int(self._is_asked))
        torch.distributed.all_reduce(asked, group=self._group)
        return bool(asked)

    def after_train(self) -> None:
        if self._is_ending:  # a launcher ends the others when one has left
            comm.synchronize()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
