"""Lower precision, where it is safe, and float32, where it is not."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .errors import InputError

__all__ = [
    "autocast_in_training",
    "begin_step",
    "compile_parts",
    "full_precision",
    "has_fast_bfloat16",
]


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors in float32; others, float64 included, as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether convolutions in bfloat16 are not slower than in float32 on this machine."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    # Not in every version of PyTorch, nor on every processor.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def autocast_in_training(model: nn.Module, device_type: str, dtype: torch.dtype) -> nn.Module:
    """
    Make ``model`` run its forward pass under autocast while it is in training mode. Its loss and
    the optimizer stay in float32. With bfloat16, which has the range of float32, gradients need no
    scaling, so that any trainer will do, on a CPU too.

    Args:
        model: changed in place; its parameters and their names are not.
        device_type: "cuda" or "cpu".
        dtype: that of the convolutions.

    Returns:
        the same model.
    """
    forward = model.forward

    @functools.wraps(forward)
    def autocast_forward(*args, **kwargs):
        with torch.autocast(device_type, dtype=dtype, enabled=model.training):
            return forward(*args, **kwargs)

    model.forward = autocast_forward
    return model


def compile_parts(model: nn.Module, mode: str) -> None:
    """
    Compile backbone and head, when they are first called. What follows them is left as it is: its
    shapes depend on values.

    Args:
        model: a :class:`detectron2.modeling.meta_arch.dense_detector.DenseDetector`. Changed in
            place; its parameters and their names are not.
        mode: of :func:`torch.compile`; "" for not at all.

    Raises:
        InputError: this version of PyTorch cannot compile modules in place.
    """
    if not mode:
        return
    if not hasattr(model, "compile"):
        raise InputError(
            "TEST.COMPILE and SOLVER.COMPILE need a PyTorch that has torch.nn.Module.compile, "
            f"this is {torch.__version__}"
        )
    for part in (model.backbone, model.head):
        part.compile(mode=mode)
    model.register_forward_pre_hook(begin_step)


def begin_step(*_: object) -> None:
    """
    Tell what runs as CUDA graphs that outputs of before are done with: those of the backbone, which
    are the head's input, are not, until the model is called again.
    """
    if hasattr(torch, "compiler") and hasattr(torch.compiler, "cudagraph_mark_step_begin"):
        torch.compiler.cudagraph_mark_step_begin()
