"""Detectron2's checkpointer, made to execute nothing of what it reads."""

from __future__ import annotations

from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer

from .errors import InputError, first_line
from .plain_data import load_pickle, load_torch

__all__ = ["PlainCheckpointer"]


class _PlainReader(Checkpointer):
    """What :class:`DetectionCheckpointer` asks for what ``torch.save`` wrote."""

    _path = ""

    def _load_file(self, filename: str) -> Any:
        return load_torch(filename, self._path)


# The order matters: Detectron2's class calls that of fvcore, which _PlainReader stands before.
class PlainCheckpointer(DetectionCheckpointer, _PlainReader):
    """
    :class:`DetectionCheckpointer` that reads tensors, arrays and plain data alone: a file that
    holds more, or no weights, is an :class:`InputError`, and nothing in it is executed. Detectron2
    executes what a .pkl names.
    """

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        self._path = path
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith(".pkl"):
                return _name_parts(load_pickle(filename, self._path))
            if filename.endswith(".pyth"):  # Detectron2 reads it by itself
                load_torch(filename, self._path)
            return super()._load_file(filename)
        except InputError:
            raise
        except Exception as error:  # a file that holds something else
            reason = first_line(error)
            raise InputError(f"Weights file {self._path} cannot be read: {reason}") from None


def _name_parts(content: dict[str, Any]) -> dict[str, Any]:
    """What a .pkl of a model zoo holds, Detectron2's or Caffe2's, as Detectron2 has it."""
    if "model" in content and "__author__" in content:
        return content
    blobs = content.get("blobs", content)
    weights = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
