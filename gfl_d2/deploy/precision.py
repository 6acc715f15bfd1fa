"""Which precisions a machine has, and how to train in them."""

from __future__ import annotations

import functools

import torch
from torch import nn

__all__ = ["autocast_in_training", "has_fast_bfloat16"]


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
