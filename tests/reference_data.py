"""Access to what the reference implementation computes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

REFERENCE = Path(__file__).parent / "reference"


def load(name: str) -> "dict[str, torch.Tensor]":
    """All arrays of a file as tensors, by key."""
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def checkpoint_file(name: str) -> Path:
    """
    A file of its checkpoints. One detector is in ``tests/reference/``, the others may be beside the
    checkout: the test is skipped where they are not.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "reference" / "checkpoints"
    folders = (REFERENCE, Path(os.environ.get("GFL_D2_TEST_CHECKPOINTS", beside)))
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"no {name} to test with: set GFL_D2_TEST_CHECKPOINTS")


def case(arrays: "dict[str, torch.Tensor]", name: str) -> "dict[str, torch.Tensor]":
    """The arrays of one case, by what follows ``name/``."""
    return {key[len(name) + 1 :]: a for key, a in arrays.items() if key.startswith(name + "/")}


def assert_close_to_largest(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest magnitude of ``expected``."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"relative error {error:.2e}"
