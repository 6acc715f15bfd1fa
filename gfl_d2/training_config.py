"""Configuration keys of the training that this project's trainer adds, and their checks."""

import importlib.util
import math

from detectron2.config import CfgNode as CN

from .augmentation_config import add_augmentation_config, check_augmentation_config
from .config_checks import get_value, require
from .errors import InputError

__all__ = ["add_training_config", "check_training_config"]

_WRITERS = ("wandb", "mlflow")


def add_training_config(cfg: CN) -> None:
    """Add the keys, with their defaults, to a Detectron2 config (in place). All are off."""
    add_augmentation_config(cfg)
    # Exponential moving average of weights and BatchNorm statistics, after each step
    # average = d * average + (1 - d) * weights. It is what is evaluated, in training and by
    # --eval-only and Predictor, what `model_best.pth` keeps, and "ema" in other checkpoints.
    cfg.MODEL_EMA = CN()
    cfg.MODEL_EMA.ENABLED = False
    # d, in [0, 1), after the warm-up. It looks back over about 1 / (1 - d) iterations.
    cfg.MODEL_EMA.DECAY = 0.9998
    # In iteration t, d = DECAY * (1 - exp(-t / WARMUP)): weights of the beginning are forgotten.
    # >= 0, in iterations; 0 for none.
    cfg.MODEL_EMA.WARMUP = 2000

    # Compute the gradients of a batch in this many parts, one after the other, >= 1: less memory,
    # the same step, in more time. IMS_PER_BATCH stays the images of a step.
    cfg.SOLVER.ACCUMULATE = 1
    # IMS_PER_BATCH for which the schedule is written, or 0. With another one BASE_LR is scaled
    # in proportion, and MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and TEST.EVAL_PERIOD
    # inversely, as Detectron2 does with REFERENCE_WORLD_SIZE.
    cfg.SOLVER.AUTO_SCALE_LR = 0
    # Log the norm of the gradients, before they are clipped, as "grad_norm".
    cfg.SOLVER.LOG_GRAD_NORM = False
    # End the training when TEST.BEST_CHECKPOINT_METRIC was not better, by more than MIN_DELTA
    # (>= 0, in units of the metric), in so many evaluations, one after the other; 0 for never.
    cfg.SOLVER.EARLY_STOPPING = CN()
    cfg.SOLVER.EARLY_STOPPING.PATIENCE = 0
    cfg.SOLVER.EARLY_STOPPING.MIN_DELTA = 0.0
    # At --resume the learning rate, weight decay and momentum are those of the config, instead of
    # the checkpoint's. The schedule (STEPS, MAX_ITER, LR_SCHEDULER_NAME) is the config's anyway.
    cfg.SOLVER.OVERRIDE_ON_RESUME = False
    # "SGD", or "AdamW" (decoupled weight decay; MOMENTUM and NESTEROV are not used).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning rates of the backbone's stages: res5 has this times BASE_LR, res4 its square, down to
    # the stem (in a ViT: its last block, the one before, ...); in (0, 1], 1 for none. FPN and head
    # have BASE_LR.
    cfg.SOLVER.LAYER_DECAY = 1.0

    # Losses on DATASETS.TEST at every evaluation, as "val/loss_qfl", ..., "val/total_loss".
    cfg.TEST.EVAL_LOSS = False

    # Detectron2's VIS_PERIOD works too: every so many iterations pictures of detections, beside the
    # ground truth, and of distributions go to TensorBoard, of the first images of DATASETS.TEST.

    # Where scalars go beside TensorBoard and metrics.json: "wandb", "mlflow". They read their own
    # environment variables, such as WANDB_PROJECT and MLFLOW_TRACKING_URI.
    cfg.WRITERS = []


def check_training_config(cfg: CN, num_processes: int = 1) -> None:
    """
    Check what only training depends on, after :func:`gfl_d2.config.check_config`.

    Args:
        num_processes: of all machines.

    Raises:
        InputError: the message names the key.
    """
    amp = cfg.SOLVER.AMP.ENABLED
    allowed = "False on a CPU: it is float16 for GPUs; SOLVER.BF16 works on both"
    require(cfg, "SOLVER.AMP.ENABLED", cfg.MODEL.DEVICE != "cpu" or not amp, allowed)
    _check_teacher(cfg)
    _check_ranges(cfg)
    check_augmentation_config(cfg)
    _check_processes(cfg, num_processes)
    _check_sampler(cfg)
    _check_writers(cfg)
    is_evaluated = bool(cfg.DATASETS.TEST) and cfg.TEST.EVAL_PERIOD > 0
    _check_early_stopping(cfg, is_evaluated)
    if is_evaluated and cfg.TEST.BEST_CHECKPOINT_METRIC:
        _check_metric(cfg)


def _check_teacher(cfg: CN) -> None:
    distill = cfg.MODEL.GFL.DISTILL
    is_on = bool(distill.TERMS)
    if is_on != bool(distill.TEACHER_WEIGHTS) or (distill.TEACHER_CONFIG and not is_on):
        keys = ("TERMS", "TEACHER_WEIGHTS", "TEACHER_CONFIG")
        got = ", ".join(f"{key} {distill[key]!r}" for key in keys)
        raise InputError(
            "MODEL.GFL.DISTILL needs both TERMS (what is learned) and TEACHER_WEIGHTS (from whom), "
            f"or none of its teacher's keys, got {got}"
        )
    allowed = "False with MODEL.GFL.DISTILL.TERMS: it runs the student without its teacher"
    both = is_on and cfg.TEST.PRECISE_BN.ENABLED
    require(cfg, "TEST.PRECISE_BN.ENABLED", not both, allowed)


def _check_ranges(cfg: CN) -> None:
    solver, ema = cfg.SOLVER, cfg.MODEL_EMA
    require(cfg, "MODEL_EMA.DECAY", 0 <= ema.DECAY < 1, "in [0, 1)")
    is_time = ema.WARMUP >= 0 and math.isfinite(ema.WARMUP)
    require(cfg, "MODEL_EMA.WARMUP", is_time, "a number of iterations, >= 0")
    allowed = "False when MODEL_EMA.ENABLED is True: the averages have statistics of their own"
    both = ema.ENABLED and cfg.TEST.PRECISE_BN.ENABLED
    require(cfg, "TEST.PRECISE_BN.ENABLED", not both, allowed)
    for key in ("MAX_ITER", "CHECKPOINT_PERIOD"):
        require(cfg, f"SOLVER.{key}", solver[key] >= 1, "a number of iterations, >= 1")
    require(cfg, "SOLVER.AUTO_SCALE_LR", solver.AUTO_SCALE_LR >= 0, "a size of batches, or 0")
    allowed = "0 when SOLVER.REFERENCE_WORLD_SIZE is not: both scale the schedule"
    both = solver.AUTO_SCALE_LR and solver.REFERENCE_WORLD_SIZE
    require(cfg, "SOLVER.AUTO_SCALE_LR", not both, allowed)
    kinds = ("SGD", "AdamW")
    require(cfg, "SOLVER.OPTIMIZER", solver.OPTIMIZER in kinds, f"one of {kinds}")
    require(cfg, "SOLVER.LAYER_DECAY", 0 < solver.LAYER_DECAY <= 1, "in (0, 1]")
    require(cfg, "VIS_PERIOD", cfg.VIS_PERIOD >= 0, "a number of iterations, or 0")
    has_images = len(cfg.DATASETS.TEST) + len(cfg.DATASETS.TRAIN) > 0
    require(cfg, "VIS_PERIOD", has_images or not cfg.VIS_PERIOD, "0 without a dataset to draw")


def _check_processes(cfg: CN, number: int) -> None:
    if number > 1 and cfg.MODEL.DEVICE == "cpu":
        for key in ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.GFL.NORM"):
            is_for_gpus = get_value(cfg, key) in ("SyncBN", "nnSyncBN")
            require(cfg, key, not is_for_gpus, "another one for several processes on CPUs")
    solver, batch = cfg.SOLVER, cfg.SOLVER.IMS_PER_BATCH
    # Detectron2 scales the batch from this number of processes to theirs.
    number = solver.REFERENCE_WORLD_SIZE or number
    is_multiple = batch > 0 and batch % number == 0
    allowed = f"a multiple of the number of processes, {number}"
    require(cfg, "SOLVER.IMS_PER_BATCH", is_multiple, allowed)
    is_divisor = solver.ACCUMULATE >= 1 and batch // number % solver.ACCUMULATE == 0
    share = f" / {number} processes" if number > 1 else ""
    allowed = f"a divisor of SOLVER.IMS_PER_BATCH, {batch}{share}"
    require(cfg, "SOLVER.ACCUMULATE", is_divisor, allowed)


def _check_sampler(cfg: CN) -> None:
    ratio = cfg.DATALOADER.get("RANDOM_SUBSET_RATIO", 1)  # of Detectron2's main branch
    require(cfg, "DATALOADER.RANDOM_SUBSET_RATIO", 0 < ratio <= 1, "in (0, 1]")


def _check_writers(cfg: CN) -> None:
    allowed = f"a list of {' and '.join(map(repr, _WRITERS))}"
    require(cfg, "WRITERS", all(name in _WRITERS for name in cfg.WRITERS), allowed)
    for name in cfg.WRITERS:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"WRITERS has '{name}', which is not installed: pip install {name}")


def _check_early_stopping(cfg: CN, is_evaluated: bool) -> None:
    key, stopping = "SOLVER.EARLY_STOPPING", cfg.SOLVER.EARLY_STOPPING
    require(cfg, f"{key}.PATIENCE", stopping.PATIENCE >= 0, "a number of evaluations, or 0")
    is_difference = stopping.MIN_DELTA >= 0 and math.isfinite(stopping.MIN_DELTA)
    require(cfg, f"{key}.MIN_DELTA", is_difference, ">= 0")
    can_stop = is_evaluated and cfg.TEST.BEST_CHECKPOINT_METRIC
    allowed = "0 without TEST.EVAL_PERIOD, DATASETS.TEST and TEST.BEST_CHECKPOINT_METRIC"
    require(cfg, f"{key}.PATIENCE", can_stop or not stopping.PATIENCE, allowed)


def _check_metric(cfg: CN) -> None:
    metric, test = cfg.TEST.BEST_CHECKPOINT_METRIC, cfg.DATASETS.TEST
    is_loss = f"/{metric}".rpartition("/val/")[2].startswith(("loss_", "total_loss"))
    require(cfg, "TEST.BEST_CHECKPOINT_METRIC", not is_loss, "a metric of which more is better")
    prefix = next((f"{name}/" for name in test if metric.startswith(f"{name}/")), "")
    if len(test) > 1 and not prefix:
        raise InputError(
            f"TEST.BEST_CHECKPOINT_METRIC must begin with one of the {len(test)} datasets of "
            f"DATASETS.TEST, for instance '{test[0]}/{metric}', or be '', got {metric!r}"
        )
    if len(test) == 1 and prefix:
        raise InputError(
            "TEST.BEST_CHECKPOINT_METRIC must not name the dataset when DATASETS.TEST has only "
            f"one: '{metric[len(prefix) :]}', got {metric!r}"
        )
