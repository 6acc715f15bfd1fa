"""Models made faster for inference, with the same results."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from torch import nn

from .compilation import compile_parts
from .fusing import fuse_norms, pack_convs
from .precision import has_fast_bfloat16

__all__ = ["Predictor", "prepare_for_inference"]

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Predictor(DefaultPredictor):
    """
    :class:`DefaultPredictor`, faster: with the options of ``TEST`` that
    :func:`prepare_for_inference` takes.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        prepare_for_inference(cfg, self.model)


def prepare_for_inference(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """
    Make a model with its weights in place faster, in place. It cannot be trained any more.

    Args:
        cfg: ``TEST.OPTIMIZE``, ``TEST.PRECISION`` and ``TEST.COMPILE``.
        model: a :class:`detectron2.modeling.meta_arch.dense_detector.DenseDetector`.

    Returns:
        the same model, in eval mode.
    """
    model.eval()
    device_type = next(model.parameters()).device.type
    if cfg.TEST.OPTIMIZE:
        fuse_norms(model)
    memory_format = torch.channels_last if cfg.TEST.OPTIMIZE else torch.contiguous_format
    model.to(memory_format=memory_format)
    dtype = _DTYPES[cfg.TEST.PRECISION]
    if dtype == torch.bfloat16 and not has_fast_bfloat16(device_type):
        logger.warning("TEST.PRECISION: no bfloat16 on this machine, using float32.")
    elif dtype != torch.float32:
        for part in (model.backbone, model.head):
            part.to(dtype)
        model.backbone.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    if cfg.TEST.OPTIMIZE and device_type == "cpu" and not cfg.TEST.COMPILE:
        pack_convs(model.backbone)
        pack_convs(model.head, num_sizes=len(model.head_in_features))
    compile_parts(model, cfg.TEST.COMPILE)
    return model
