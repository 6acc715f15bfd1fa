"""Hooks of the trainer."""

from __future__ import annotations

import os

from detectron2.engine import hooks

__all__ = ["BestCheckpointer"]


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's, which remembers the best metric when training is resumed."""

    def after_train(self) -> None:
        # Training is resumed from model_final.pth. The best checkpoint, if it is saved now, counts
        # the last iteration twice.
        last = self._checkpointer.get_checkpoint_file()
        super().after_train()
        if last:
            self._checkpointer.tag_last_checkpoint(os.path.basename(last))

    def state_dict(self) -> dict:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: dict) -> None:
        self.best_metric = state_dict["best_metric"]
        self.best_iter = state_dict["best_iter"]
