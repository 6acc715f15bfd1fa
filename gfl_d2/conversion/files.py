"""Reading files that nobody vouches for, and writing files that are complete."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..files import atomic_write
from ..plain_data import check_weights, load_torch

__all__ = ["Checkpoint", "check_output", "read_checkpoint", "write_checkpoint"]

# Objects beside the weights in MMDetection 3's files: its log (and `getattr` of the log's methods),
# and NumPy's numbers. Nothing of them is needed, so each of these names is read as `_Nothing`.
_READ_AS_NOTHING = [
    *("mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr", "datetime.datetime"),
    *("numpy.dtype", "numpy.ndarray"),
    *("numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar"),
    *("numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"),
]


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds."""

    path: str  # for messages
    weights: dict[str, Tensor]  # by name
    # About them. Names of classes are in the places of MMDetection 2, "CLASSES", or 3.
    meta: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # names of what else is there, such as an optimizer's state


class _Nothing:
    """Stands for an object that is not wanted: takes any arguments and state, keeps none."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    __setstate__ = __init__


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """
    Read a file that ``torch.save`` wrote, with or without something around the weights, or one
    of safetensors. Only tensors and plain data are read: a pickle that names anything else is
    refused, and nothing in it is executed.

    Raises:
        InputError: the file is missing, is no checkpoint, or holds more than tensors and plain
            data. The message names what.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"Weights file {path} does not exist")
    if path.endswith(".safetensors"):
        return _unwrap(path, _read_safetensors(path))
    names = [(_Nothing, name) for name in _READ_AS_NOTHING]
    return _unwrap(path, load_torch(path, path, names))


def _read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(
            f"Weights file {path} needs safetensors: pip install safetensors"
        ) from None
    try:
        return safetensors.torch.load_file(path)
    # Its errors are of a type of its own, or of the file system.
    except Exception as error:
        raise InputError(f"Weights file {path} cannot be read: {first_line(error)}") from None


def _unwrap(path: str, content: Any) -> Checkpoint:
    rest = dict(content) if isinstance(content, Mapping) else {}
    key = next((k for k in ("state_dict", "model") if isinstance(rest.get(k), Mapping)), None)
    weights, rest = (rest, {}) if key is None else (rest.pop(key), rest)
    if not weights:
        raise InputError(f"Weights file {path} has no weights")
    check_weights(weights, path)
    if all(name.startswith("module.") for name in weights):  # of torch.nn.DataParallel
        weights = {name[len("module.") :]: value for name, value in weights.items()}
    weights = {name: value.detach() for name, value in weights.items()}
    meta = rest.pop("meta", None)
    meta = meta if isinstance(meta, dict) else {}
    rest.pop("config", None)  # of ours, as the names are
    if "class_names" in rest:
        meta = {**meta, "CLASSES": rest.pop("class_names")}
    return Checkpoint(path, weights, meta, tuple(map(str, rest)))


def write_checkpoint(content: dict[str, Any], path: str | os.PathLike) -> None:
    """
    Save a file that appears under its name only when it is complete. It replaces what was there.

    Raises:
        InputError: as :func:`check_output`, or the folder cannot be written to.
    """
    check_output(path)
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch makes the latter of some of the former
        raise InputError(f"{path} cannot be written: {error}") from None


def check_output(path: str | os.PathLike, *, source: str = "") -> None:
    """
    Check that there may be a file of this name, before there is anything to write.

    Raises:
        InputError: it does not end in .pth, by which Detectron2 knows the format; its folder does
            not exist; it is a folder, or the file ``source``.
    """
    path = Path(path)
    if path.suffix != ".pth":
        raise InputError(f"The file to write must end in .pth, not {path.name}")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder")
    if source and path.exists() and path.samefile(source):
        raise InputError(f"{path} is the file to convert: it is not overwritten")
