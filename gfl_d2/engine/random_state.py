"""The state of random number generators."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["preserved_random_state"]


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """After it random numbers go on as if it had not been: those of Python, NumPy and PyTorch."""
    state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
