"""Optimizers: Detectron2's own, with gradients clipped over the whole model if asked for."""

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from torch import nn

__all__ = ["build_optimizer"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """
    Detectron2's :func:`detectron2.solver.build_optimizer`, which knows of
    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` "value" and "norm" (of each parameter by itself), and one
    type more: "full_model" clips the norm of the gradient of all parameters together.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
        return build_detectron2_optimizer(cfg, model)

    without_clipping = cfg.clone()
    without_clipping.defrost()
    without_clipping.SOLVER.CLIP_GRADIENTS.ENABLED = False
    optimizer = build_detectron2_optimizer(without_clipping, model)

    def clip_gradients(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

    optimizer.register_step_pre_hook(clip_gradients)
    return optimizer
