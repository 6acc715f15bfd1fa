"""Which precisions a machine has."""

from __future__ import annotations

import torch

__all__ = ["has_fast_bfloat16"]


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether convolutions in bfloat16 are not slower than in float32 on this machine."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    # Not in every version of PyTorch, nor on every processor.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
