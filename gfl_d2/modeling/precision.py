"""Float32 where half precision is not safe."""

import torch
from torch import Tensor

__all__ = ["full_precision"]


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors in float32; others, float64 included, as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
