"""Models made faster for inference, with the same results."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from .precision import has_fast_bfloat16

__all__ = ["Predictor", "fuse_norms", "prepare_for_inference"]

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
        cfg: ``TEST.FUSE_NORM``, ``TEST.PRECISION`` and ``TEST.COMPILE``.
        model: a :class:`detectron2.modeling.meta_arch.dense_detector.DenseDetector`.

    Returns:
        the same model, in eval mode.
    """
    model.eval()
    if cfg.TEST.FUSE_NORM:
        fuse_norms(model)
    device_type = next(model.parameters()).device.type
    if device_type == "cpu":
        model.to(memory_format=torch.channels_last)
    dtype = _DTYPES[cfg.TEST.PRECISION]
    if dtype == torch.bfloat16 and not has_fast_bfloat16(device_type):
        logger.warning("TEST.PRECISION: no bfloat16 on this machine, using float32.")
    elif dtype != torch.float32:
        for part in (model.backbone, model.head):
            part.to(dtype)
        model.backbone.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    if cfg.TEST.COMPILE:
        for part in (model.backbone, model.head):
            part.compile()
    return model


@torch.no_grad()
def fuse_norms(model: nn.Module) -> None:
    """
    Fold each BatchNorm, frozen or in eval mode, into the convolution before it: the same linear
    map, up to rounding.

    Args:
        model: whose convolutions are Detectron2's, or this project's deformable ones: with their
            norm in an attribute. Changed in place.
    """
    for conv in model.modules():
        norm = getattr(conv, "norm", None)
        if not isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d)) or norm.training:
            continue
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if conv.bias is not None:
            bias = bias + conv.bias * scale
        conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
        conv.bias = nn.Parameter(bias, requires_grad=False)
        conv.norm = None
