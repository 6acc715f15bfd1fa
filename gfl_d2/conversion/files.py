"""Reading files that nobody vouches for, and writing files that are complete."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = [
    "LEFTOVERS",
    "Checkpoint",
    "check_output",
    "keep_plain",
    "own_memory",
    "read_checkpoint",
    "write_checkpoint",
]

# Where a checkpoint of ours keeps what MMDetection's has beside the model, for the way back.
LEFTOVERS = "mmdet"

# Objects beside the weights in MMDetection 3's files: its log, and NumPy's numbers. Nothing of
# them is needed, so that each of these names may be read as `_Nothing`.
_READ_AS_NOTHING = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # of the methods of a HistoryBuffer
    "datetime.datetime",
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
)


@dataclass(frozen=True)
class Checkpoint:
    """
    What a file holds.

    Attributes:
        path: of the file, for messages.
        weights: by name, in the file's order.
        meta: data about them, such as names of classes.
        leftovers: of a checkpoint of ours, what :func:`from_mmdet` has kept aside.
        ignored: names of what else is there, such as the state of an optimizer.
    """

    path: str
    weights: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    leftovers: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


class _Nothing:
    """Stands for an object of a class that is not wanted: takes any state, keeps none."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """
    Read a file that ``torch.save`` wrote, with or without something around the weights. Only
    tensors and plain data are read: a pickle that names anything else is refused, and nothing in
    it is executed.

    Raises:
        InputError: the file is missing, is no checkpoint, or holds more than tensors and plain
            data. The message names what.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"Weights file {path} does not exist")
    try:
        with _reading_as_nothing():
            content = torch.load(path, map_location="cpu", weights_only=True)
    # Bytes that are no checkpoint can make unpickling raise anything.
    except Exception as error:
        raise InputError(_explain_unreadable(path, error)) from None
    if not isinstance(content, Mapping):
        raise InputError(f"Weights file {path} is no checkpoint: it has a {_kind(content)}")
    return _unwrap(path, content)


def _reading_as_nothing():
    # Older ones refuse MMDetection 3's files, unless they hold weights alone.
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        return nullcontext()
    return torch.serialization.safe_globals([(_Nothing, name) for name in _READ_AS_NOTHING])


def _explain_unreadable(path: str, error: Exception) -> str:
    text = str(error)
    refused = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", text)
    if refused:
        return (
            f"Weights file {path} holds more than tensors and plain data: it names {refused[1]}. "
            "It is refused, and nothing in it has been executed. If you trust it, save its weights "
            "alone where it comes from: c = torch.load(..., weights_only=False); torch.save("
            "{'state_dict': c['state_dict'], 'meta': {'CLASSES': (...)}}, ...)"
        )
    # What comes before the reason is advice to load the file regardless.
    reason = text.rpartition("WeightsUnpickler error: ")[2].strip()
    reason = f"{type(error).__name__}: {reason}".splitlines()[0]
    return f"Weights file {path} cannot be read: {reason}"


def _unwrap(path: str, content: Mapping) -> Checkpoint:
    key = next((k for k in ("state_dict", "model") if isinstance(content.get(k), Mapping)), None)
    weights = content if key is None else content[key]
    if not weights:
        raise InputError(f"Weights file {path} has no weights")
    for name, value in weights.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise InputError(
                f"Weights file {path} is not a checkpoint of a model: it does not map names to "
                f"tensors, but {name!r} to a {_kind(value)}"
            )
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise InputError(f"Weights file {path}: {name} is not a plain, dense tensor")
    if all(name.startswith("module.") for name in weights):  # of torch.nn.DataParallel
        weights = {name[len("module.") :]: value for name, value in weights.items()}
    rest = {} if key is None else {k: v for k, v in content.items() if k != key}
    meta, leftovers = rest.pop("meta", None), rest.pop(LEFTOVERS, None)
    return Checkpoint(
        path,
        {name: value.detach() for name, value in weights.items()},
        dict(meta) if isinstance(meta, Mapping) else {},
        dict(leftovers) if isinstance(leftovers, Mapping) else {},
        tuple(str(name) for name in rest),
    )


def _kind(value: Any) -> str:
    return f"value of type {type(value).__name__}"


def write_checkpoint(content: dict[str, Any], path: str | os.PathLike, *, source: str = "") -> None:
    """
    Save a file of which there is never a part: it appears under its name when it is complete.

    Args:
        content: of the file.
        path: of the file. What was there is replaced.
        source: a file that must stay.

    Raises:
        InputError: as :func:`check_output`, or the folder cannot be written to.
    """
    check_output(path, source=source)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is what torch makes of some of the former
        raise InputError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


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
    if source and path.exists() and os.path.samefile(path, source):
        raise InputError(f"{path} is the file to convert: it is not overwritten")


def keep_plain(value: Any) -> Any:
    """``value`` without what is not plain data, such as NumPy's numbers."""
    if isinstance(value, Mapping):
        items = {k: keep_plain(v) for k, v in value.items() if isinstance(k, (str, int))}
        return {k: v for k, v in items.items() if not isinstance(v, _Nothing)}
    if isinstance(value, (list, tuple)):
        kept = [v for v in map(keep_plain, value) if not isinstance(v, _Nothing)]
        return tuple(kept) if isinstance(value, tuple) else kept
    return value if isinstance(value, (str, int, float, type(None))) else _Nothing()


def own_memory(value: Tensor) -> Tensor:
    """The same values in memory of their own: with a view, all that it is a view of is saved."""
    size = value.numel() * value.element_size()
    if value.is_contiguous() and value.untyped_storage().nbytes() == size:
        return value
    return value.clone(memory_format=torch.contiguous_format)
