"""Exported files on the CPU, all by one call."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from ...errors import InputError

__all__ = ["METADATA_KEY", "ExportedModel", "load_exported"]

METADATA_KEY = "gfl_d2"

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


class ExportedModel:
    """
    An exported file, ready to run.

    Attributes:
        metadata: what the file carries, see :func:`gfl_d2.deploy.export.describe`.
    """

    def __init__(self, run: Callable[[np.ndarray, np.ndarray], Any], metadata: str):
        self._run = run
        self.metadata = json.loads(metadata)

    def __call__(self, images: np.ndarray, image_sizes: np.ndarray) -> Arrays:
        """
        Boxes, scores and labels, as in :mod:`gfl_d2.deploy.export`. ``images`` may be of any type
        of numbers: they are given to the file as what it takes.
        """
        dtype = np.dtype(self.metadata["input_type"])
        outputs = self._run(images.astype(dtype), image_sizes.astype(np.int64))
        return tuple(np.asarray(x) for x in outputs)


def load_exported(
    path: str | os.PathLike, threads: int = 0, precision: str = "f32"
) -> ExportedModel:
    """
    Load an exported file, whose extension says what it is. It runs on the CPU, in float32 where it
    was exported so.

    Args:
        threads: for ONNX Runtime and OpenVINO; 0 for their own choice. PyTorch has its own.
        precision: of OpenVINO, "f32" or "bf16", which needs a processor that has it.

    Raises:
        InputError: there is no such file, or its extension is that of no export.
    """
    path = os.fspath(path)
    loaders = {
        ".onnx": _load_onnx,
        ".xml": _load_openvino,
        ".ts": _load_torchscript,
        ".pt2": _load_torch_export,
    }
    if Path(path).suffix not in loaders:
        raise InputError(f"{path} is no exported file: these end with {', '.join(loaders)}")
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    return loaders[Path(path).suffix](path, threads, precision)


def _load_onnx(path: str, threads: int, precision: str) -> ExportedModel:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray, image_sizes: np.ndarray) -> list[np.ndarray]:
        return session.run(
            ["boxes", "scores", "labels"], {"images": images, "image_sizes": image_sizes}
        )

    return ExportedModel(run, session.get_modelmeta().custom_metadata_map[METADATA_KEY])


def _load_openvino(path: str, threads: int, precision: str) -> ExportedModel:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    # Without a hint the CPU takes bfloat16 where it has it.
    settings = {"INFERENCE_PRECISION_HINT": precision}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, "CPU", settings)

    def run(images: np.ndarray, image_sizes: np.ndarray) -> list[np.ndarray]:
        outputs = compiled({"images": images, "image_sizes": image_sizes})
        return [outputs[name] for name in ("boxes", "scores", "labels")]

    return ExportedModel(run, model.get_rt_info([METADATA_KEY]).astype(str))


def _load_torchscript(path: str, threads: int, precision: str) -> ExportedModel:
    files = {f"{METADATA_KEY}.json": ""}
    module = torch.jit.load(path, map_location="cpu", _extra_files=files)
    (metadata,) = files.values()
    return ExportedModel(_run_torch(module), metadata)


def _load_torch_export(path: str, threads: int, precision: str) -> ExportedModel:
    import torchvision  # noqa: F401  # registers its operators

    files = {f"{METADATA_KEY}.json": ""}
    program = torch.export.load(path, extra_files=files)
    (metadata,) = files.values()
    return ExportedModel(_run_torch(program.module()), metadata)


def _run_torch(module: torch.nn.Module) -> Callable[[np.ndarray, np.ndarray], list[np.ndarray]]:
    def run(images: np.ndarray, image_sizes: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = module(torch.from_numpy(images), torch.from_numpy(image_sizes))
        return [x.numpy() for x in outputs]

    return run
