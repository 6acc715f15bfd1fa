"""Detectron2's trainer in several processes, on CPUs too."""

from __future__ import annotations

import logging
import weakref

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..modeling import GFL

__all__ = ["ParallelTrainer"]


class ParallelTrainer(DefaultTrainer):
    """
    :class:`DefaultTrainer`, which names a GPU to DistributedDataParallel, for models on a CPU too.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        # In this order: each may draw random numbers.
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        options = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        options["find_unused_parameters"] = _has_idle_features(model)
        model = create_ddp_model(model, broadcast_buffers=False, **options)
        step = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = step(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.checkpointer = DetectionCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.register_hooks(self.build_hooks())


def _has_idle_features(model: nn.Module) -> bool:
    """Whether the backbone computes features that no head takes: their layers get no gradient."""
    return isinstance(model, GFL) and not (
        model.backbone.output_shape().keys() <= set(model.head_in_features)
    )
