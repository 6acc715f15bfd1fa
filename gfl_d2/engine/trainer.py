"""Detectron2's trainer with the data, checks and options of this project."""

from __future__ import annotations

import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from torch import nn

from ..checkpoint import GFLCheckpointer
from ..data import GFLDatasetMapper, load_training_dicts, loading
from ..deploy.compilation import compile_parts
from ..deploy.precision import autocast_in_training, has_fast_bfloat16
from .hooks import BestCheckpointer
from .solver import build_optimizer

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """
    :class:`DefaultTrainer` with :class:`GFLDatasetMapper`, :class:`GFLCheckpointer`, COCO
    evaluation, the best checkpoint, and the keys that this project adds to ``SOLVER``.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        # Loads in the place of Detectron2's, which only warns of weights that do not fit.
        self.checkpointer = GFLCheckpointer(
            self.checkpointer.model, cfg.OUTPUT_DIR, **self.checkpointer.checkpointables
        )
        compile_parts(self.checkpointer.model, cfg.SOLVER.COMPILE)
        num_frozen = sum(not p.requires_grad for p in self.model.parameters())
        if num_frozen and not cfg.MODEL.WEIGHTS:
            logger.warning(
                f"MODEL.WEIGHTS is empty, but {num_frozen} parameters are frozen "
                "(MODEL.BACKBONE.FREEZE_AT): unless training is resumed, they stay random."
            )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        device_type = torch.device(cfg.MODEL.DEVICE).type
        if cfg.SOLVER.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        if cfg.SOLVER.BF16 and has_fast_bfloat16(device_type):
            model = autocast_in_training(model, device_type, torch.bfloat16)
        elif cfg.SOLVER.BF16:
            logger.warning("SOLVER.BF16: no bfloat16 convolutions on this machine, using float32.")
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_detection_train_loader(
            cfg, mapper=GFLDatasetMapper(cfg, is_train=True), dataset=load_training_dicts(cfg)
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        with loading([dataset_name]):
            return build_detection_test_loader(
                cfg, dataset_name, mapper=GFLDatasetMapper(cfg, is_train=False)
            )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None):
        if output_folder is None:
            output_folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        return COCOEvaluator(
            dataset_name, output_dir=output_folder, use_fast_impl=_has_fast_coco_eval()
        )

    def build_hooks(self) -> list[hooks.HookBase]:
        ret = super().build_hooks()
        metric = self.cfg.TEST.BEST_CHECKPOINT_METRIC
        if comm.is_main_process() and self.cfg.TEST.EVAL_PERIOD > 0 and metric:
            # Right after the evaluation that produces the metric.
            after = max(i for i, hook in enumerate(ret) if isinstance(hook, hooks.EvalHook)) + 1
            best = BestCheckpointer(self.cfg.TEST.EVAL_PERIOD, self.checkpointer, metric)
            ret.insert(after, best)
        return ret

    # Detectron2 0.6 leaves the optimizer out of the checkpoint, and resumes without its momentum.
    def state_dict(self) -> dict:
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logger.warning("The checkpoint has no optimizer state: momentum starts anew.")


def _has_fast_coco_eval() -> bool:
    """Whether Detectron2's C++ COCO evaluation is there; pycocotools is what replaces it."""
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return hasattr(_C, "COCOevalEvaluateImages")
