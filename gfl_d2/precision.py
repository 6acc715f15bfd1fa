"""Training in lower precision."""

from __future__ import annotations

import functools

import torch
from torch import nn

__all__ = ["autocast_in_training"]


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
