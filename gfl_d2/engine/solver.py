"""Optimizer and schedule: what this project adds to Detectron2's."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from detectron2.utils.events import get_event_storage
from torch import nn

from ..modeling.backbone import layer_decay_factors

__all__ = [
    "build_optimizer", "clip_all_gradients", "describe_changes", "override_groups",
    "scale_to_batch",
]  # fmt: skip

# What an optimizer keeps in its checkpoint, and the keys it comes from.
_KEYS_OF_GROUPS = {
    "initial_lr": "SOLVER.BASE_LR (with LAYER_DECAY, BIAS_LR_FACTOR)",
    "weight_decay": "SOLVER.WEIGHT_DECAY (or _NORM, _BIAS)",
    "momentum": "SOLVER.MOMENTUM",
    "nesterov": "SOLVER.NESTEROV",
}


def scale_to_batch(cfg: CfgNode) -> CfgNode:
    """
    A config whose schedule is scaled from ``SOLVER.AUTO_SCALE_LR`` images a batch to
    ``SOLVER.IMS_PER_BATCH``, by Detectron2's rule for numbers of processes. The same one if that
    is 0.
    """
    reference, batch = cfg.SOLVER.AUTO_SCALE_LR, cfg.SOLVER.IMS_PER_BATCH
    if reference in (0, batch):
        return cfg
    scaled = cfg.clone()
    scaled.defrost()
    scaled.SOLVER.IMS_PER_BATCH = scaled.SOLVER.REFERENCE_WORLD_SIZE = reference
    scaled = DefaultTrainer.auto_scale_workers(scaled, batch)
    for node, key in (("SOLVER", "CHECKPOINT_PERIOD"), ("TEST", "EVAL_PERIOD")):
        if cfg[node][key] > 0:  # rounded to 0 it would be never
            scaled[node][key] = max(scaled[node][key], 1)
    scaled.SOLVER.REFERENCE_WORLD_SIZE = cfg.SOLVER.REFERENCE_WORLD_SIZE
    scaled.SOLVER.AUTO_SCALE_LR = batch
    if cfg.is_frozen():
        scaled.freeze()
    return scaled


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """
    Detectron2's, which knows the ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` "value" and "norm" (of each
    parameter by itself), and "full_model": the norm of all gradients together is clipped. And the
    keys ``SOLVER.OPTIMIZER``, ``LAYER_DECAY`` and ``LOG_GRAD_NORM``.

    Raises InputError if ``LAYER_DECAY`` does not know the backbone.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clips_all = clip.ENABLED and clip.CLIP_TYPE == "full_model"
    if clips_all:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    solver = cfg.SOLVER
    # Of Detectron2's own optimizer, in its main branch, hooks run after its clipping.
    if solver.OPTIMIZER == "SGD" and solver.LAYER_DECAY == 1 and not solver.LOG_GRAD_NORM:
        optimizer = build_detectron2_optimizer(cfg, model)
    else:
        optimizer = _build_other(cfg, model)
    if solver.LOG_GRAD_NORM:
        optimizer.register_step_pre_hook(_log_grad_norm)
    if clips_all:
        clip_all_gradients(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer


def clip_all_gradients(
    optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0
) -> None:
    """Have the norm of all gradients together clipped before each step."""

    def clip_gradients(optimizer, args, kwargs):
        nn.utils.clip_grad_norm_(_parameters(optimizer), max_norm, norm_type)

    optimizer.register_step_pre_hook(clip_gradients)


def _build_other(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if solver.LAYER_DECAY != 1:
        groups = _decay_layers(groups, model, solver.LAYER_DECAY)
    if solver.OPTIMIZER == "AdamW":
        optimizer, options = torch.optim.AdamW, {}
    else:
        optimizer = torch.optim.SGD
        options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    options.update(lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    return maybe_add_gradient_clipping(cfg, optimizer)(groups, **options)


def _decay_layers(groups: list[dict], model: nn.Module, rate: float) -> list[dict]:
    factors = layer_decay_factors(model, rate)
    factor = {parameter: factors[name] for name, parameter in model.named_parameters()}
    return reduce_param_groups(
        [
            {**group, "params": [parameter], "lr": group["lr"] * factor[parameter]}
            for group in groups
            for parameter in group["params"]
        ]
    )


def _log_grad_norm(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    storage = get_event_storage()
    # Detectron2's clipping of each parameter has a step within a step.
    if storage.latest().get("grad_norm", (0, -1))[1] == storage.iter:
        return
    norms = [p.grad.norm() for p in _parameters(optimizer) if p.grad is not None]
    storage.put_scalar("grad_norm", torch.stack(norms).norm().item())


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def describe_changes(configured: list[dict], loaded: list[dict]) -> str:
    """What differs in the first group where it does, e.g. 'SOLVER.MOMENTUM 0.9, not 0.8'."""
    changes = {}
    for here, there in zip(configured, loaded):
        for key, name in _KEYS_OF_GROUPS.items():
            if key in here and key in there and here[key] != there[key]:
                changes.setdefault(name, f"{name} {there[key]:g}, not {here[key]:g}")
    return ", ".join(changes.values())


def override_groups(scheduler: torch.optim.lr_scheduler.LRScheduler, groups: list[dict]) -> None:
    """
    Go on with these hyperparameters, in the place of those that optimizer and schedule have loaded.

    Args:
        scheduler: Detectron2's :class:`LRMultiplier`, with its optimizer.
        groups: the optimizer's, from before it was loaded.
    """
    optimizer = scheduler.optimizer
    for group, configured in zip(optimizer.param_groups, groups):
        group.update({key: value for key, value in configured.items() if key != "params"})
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, lr in zip(optimizer.param_groups, scheduler.get_lr()):
        group["lr"] = lr
