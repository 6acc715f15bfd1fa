"""
Files of weights, read as tensors and plain data: nothing in them is executed. And YAML, refused
where it would grow.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from .errors import InputError, first_line

__all__ = ["check_weights", "check_yaml", "find_refused", "load_pickle", "load_torch"]

_REFUSED = (
    "Weights file {path} holds more than tensors and plain data: it names {name}. It is refused, "
    "and nothing in it has been executed. If you trust it, save its weights alone where it comes "
    "from: c = torch.load(..., weights_only=False); torch.save({{'state_dict': c['state_dict'], "
    "'meta': {{'CLASSES': (...)}}}}, ...)"
)
_REFUSED_PICKLE = (
    "Weights file {path} holds more than NumPy arrays and plain data: it names {name}. It is "
    "refused, and nothing in it has been executed. If you trust it, save its weights by torch.save "
    "as .pth where it comes from"
)
_PLAIN = (Tensor, torch.nn.Parameter, int, float, str, bool, type(None))
_LARGEST_YAML = 10**6  # values
# Letters of NumPy's types of plain numbers, with the sizes that PyTorch has too.
_NUMBER = re.compile(r"[?b]1?|[iuf][1248]|f2")


def load_torch(
    file: str | os.PathLike, path: str, nothing: list[tuple[Any, str]] | None = None
) -> Any:
    """
    What ``torch.save`` wrote, on the CPU.

    Args:
        file: where it is.
        path: its name in messages.
        nothing: pairs of a class and a name in the file. Objects of that name are read as that
            class.

    Raises:
        InputError: it is something else, is damaged, or holds more than tensors and plain data.
            The message says what.
    """
    _refuse_archives(file, path)
    try:
        with torch.serialization.safe_globals(nothing or []):
            return torch.load(file, map_location="cpu", weights_only=True)
    # Bytes that are no checkpoint can make unpickling raise anything.
    except Exception as error:
        refused = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
        if refused:
            raise InputError(_REFUSED.format(path=path, name=refused[1])) from None
        # What comes before the reason is advice to load the file regardless.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        text = f"Weights file {path} cannot be read: {type(error).__name__}: {reason}"
        raise InputError(text.splitlines()[0]) from None


def find_refused(value: Any, name: str) -> str | None:
    """What of ``value`` :func:`load_torch` would refuse, e.g. "hooks.best is a numpy.float64"."""
    if type(value) in (dict, OrderedDict):
        parts = ((f"{name}.{item[0]}", part) for item in value.items() for part in item)
    elif type(value) in (list, tuple, set):
        parts = ((f"{name}[{i}]", part) for i, part in enumerate(value))
    elif type(value) in _PLAIN:
        return None
    else:
        file = io.BytesIO()
        try:
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception:  # of many kinds
            return f"{name} is a {type(value).__module__}.{type(value).__name__}"
        return None
    return next(filter(None, (find_refused(part, name) for name, part in parts)), None)


def _refuse_archives(file: str | os.PathLike, path: str) -> None:
    """
    TorchScript is a program. And ``torch.save`` compresses nothing: a file that grows when it is
    read may fill the memory.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception:  # no archive, or a damaged one: PyTorch tells
        return
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise InputError(f"Weights file {path} is a TorchScript program: give the checkpoint")
    size = sum(entry.file_size for entry in entries)
    if size > os.path.getsize(file):
        raise InputError(f"Weights file {path} is compressed, to {size} bytes: unpack it first")


def load_pickle(file: str | os.PathLike, path: str) -> Any:
    """
    What ``pickle.dump`` wrote, also Python 2's: NumPy arrays of numbers, and plain data. The
    arguments and errors are those of :func:`load_torch`.
    """
    try:
        with open(file, "rb") as stream:
            content = stream.read()
        # Memory for all numbers up to the largest is taken at once.
        size = len(content)
        puts = (arg for op, arg, _ in pickletools.genops(content) if op.name.endswith("PUT"))
        if max(puts, default=0) > size:
            raise pickle.UnpicklingError("it numbers more objects than it has bytes")
        del content
        with open(file, "rb") as stream:
            return _Unpickler(stream, encoding="latin1").load()
    except _NameError as error:
        raise InputError(_REFUSED_PICKLE.format(path=path, name=error)) from None
    except Exception as error:  # as above
        reason = first_line(error)
        raise InputError(f"Weights file {path} cannot be read: {reason}") from None


class _NameError(Exception):
    """A pickle names what it may not."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full not in _NAMES:
            raise _NameError(f"{module}.{name}"[:100].encode("unicode_escape").decode())
        return _NAMES[full]


class _Array(np.ndarray):
    """Checks what a pickle says of an array. NumPy takes it on trust."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, number, is_fortran, data = state
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"an array has the shape {shape}")
        super().__setstate__((1, shape, number.dtype(), bool(is_fortran), data))


class _Number:
    """Stands for ``numpy.dtype``: a type of plain numbers."""

    def __init__(self, code: str, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def dtype(self) -> np.dtype:
        if not _NUMBER.fullmatch(self.code):
            raise ValueError(f"an array is of type {self.code!r}, which are no plain numbers")
        return np.dtype(self.order + self.code)


def _make_array(*_) -> _Array:
    """Empty: a pickle fills it by its state."""
    return np.ndarray.__new__(_Array, (0,))


def _make_full_array(data: bytes, number: _Number, shape: tuple, order: str) -> _Array:
    array = _make_array()
    array.__setstate__((1, shape, number, order == "F", bytes(memoryview(data))))
    return array


def _make_scalar(number: _Number, data: bytes) -> np.generic:
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, number.dtype())[0]


# What a pickle may name, and what it gets.
_NAMES = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # of bytes
    "numpy.ndarray": None,  # an argument of _reconstruct
    "numpy.dtype": _Number,
    "numpy.core.multiarray._reconstruct": _make_array,
    "numpy.core.multiarray.scalar": _make_scalar,
    "numpy.core.numeric._frombuffer": _make_full_array,
}


def check_weights(weights: Any, path: str) -> None:
    """
    Raises:
        InputError: these are not tensors, or NumPy arrays, by their names, or one of them is not
            plain and dense, or has NaN or infinity in it.
    """
    if not (isinstance(weights, Mapping) and weights):
        raise InputError(
            f"Weights file {path} is not a checkpoint of a model: it does not map names to tensors"
        )
    for name, value in weights.items():
        if not (isinstance(name, str) and isinstance(value, (Tensor, np.ndarray))):
            raise InputError(
                f"Weights file {path} is not a checkpoint of a model: it does not map names to "
                f"tensors, but {name!r:.60} to a value of type {type(value).__name__}"
            )
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError):  # an array of something else than numbers
            tensor = None
        if tensor is None or not _is_dense(tensor):
            raise InputError(f"Weights file {path}: {name!r:.100} is not a plain, dense tensor")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"Weights file {path}: {name!r:.100} has NaN or infinity in it: was the training "
                "that wrote it diverging?"
            )


def _is_dense(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    # A view that repeats its values may be larger than the memory.
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def check_yaml(text: str) -> None:
    """
    Raises:
        InputError: aliases make the text as large as no memory, or repeat what they are in.
        yaml.YAMLError: it is no YAML.
    """
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = float("inf")  # as long as it is not known: a node in itself
            items = node.value if isinstance(node, yaml.CollectionNode) else ()
            pairs = (item if isinstance(item, tuple) else (item,) for item in items)
            sizes[id(node)] = 1 + sum(size(part) for pair in pairs for part in pair)
        return sizes[id(node)]

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and size(root) > _LARGEST_YAML:
            raise InputError(f"its aliases (*) make more than {_LARGEST_YAML} values of it")
    except RecursionError:
        raise InputError("it is nested too deep") from None
