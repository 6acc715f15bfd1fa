"""The state of random number generators: those of Python, NumPy and PyTorch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["preserved_random_state", "seed_random_state", "seeded_random_state"]


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """After it random numbers go on as if it had not been, those of the current GPU too."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with _preserved_random_state(devices):
        yield


def seed_random_state(seed: int, *key: int) -> None:
    """
    Random numbers, those of GPUs too, from here on depend on ``seed`` and ``key`` alone. Other keys
    give other numbers. All are >= 0.
    """
    torch.manual_seed(_seed_on_the_cpu(seed, *key))


@contextlib.contextmanager
def seeded_random_state(seed: int, *key: int) -> Iterator[None]:
    """As :func:`seed_random_state`, until its end; not on GPUs, which a worker must not use."""
    with _preserved_random_state([]):
        _seed_on_the_cpu(seed, *key)
        yield


@contextlib.contextmanager
def _preserved_random_state(devices: list[int]) -> Iterator[None]:
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _seed_on_the_cpu(seed: int, *key: int) -> int:
    """The seed of PyTorch."""
    # Python and NumPy have the same generator: with one seed they would draw the same numbers.
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(3, np.uint64).tolist()
    random.seed(words[0])
    np.random.seed(words[1] % 2**32)
    torch.default_generator.manual_seed(words[2])
    return words[2]
