"""From a config and weights to an exported file that was checked."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

import gfl_d2

from ...data import to_array
from ...errors import InputError, first_line
from ...modeling import GFL
from ..fusing import fuse_norms
from ..predictor import Predictor
from .check import Check, check_export, make_batch, resize_pictures
from .graph import DetectorGraph
from .onnx_files import quantize_onnx, write_onnx
from .openvino_files import write_openvino
from .options import ExportOptions, check_model, check_options, plain_config
from .running import METADATA_KEY, load_exported

__all__ = ["describe", "export_model"]

_IMAGE_TYPES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_MAX_CHECKED = 8
_MAX_CALIBRATION = 300
# Of boxes in pixels, and of scores.
_TOLERANCES = {"float32": (0.1, 1e-3), "float16": (2.0, 0.02), "int8": (8.0, 0.1)}


def export_model(
    cfg: CfgNode, options: ExportOptions, output: str | os.PathLike, images: str | None = None
) -> Check:
    """
    Export a model and compare what the file detects with what the model does. The file appears
    when that has passed; nothing is left otherwise.

    Args:
        cfg: ``MODEL.WEIGHTS`` names the weights.
        options: what to export.
        output: file to write. OpenVINO has a second one beside it, which ends with ".bin".
        images: a picture, or a folder whose first ones are taken, to compare with; by default a
            photograph that comes with Matplotlib.

    Returns:
        Check: the differences. Those of int8 do not fail.

    Raises:
        InputError: an option or file is wrong, the model cannot be exported, or the detections of
            the file differ.
    """
    output = Path(output)
    check_options(options, output)
    calibration = _find_images(options.int8)[:_MAX_CALIBRATION] if options.int8 else []
    paths = _find_images(images)[:_MAX_CHECKED] if images else [_built_in_picture()]
    predictor = Predictor(plain_config(cfg))
    model = predictor.model
    check_model(model, options)
    info = describe(cfg, model, options, predictor.metadata.get("thing_classes") or ())
    pictures = [to_array(path, predictor.input_format) for path in paths]

    def calibrate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for path in calibration:
            picture = to_array(path, predictor.input_format)
            yield make_batch(resize_pictures([picture], info), info)

    # In the folder of the output, so that moving the files there is one step.
    with _temporary_folder(output.parent) as folder:
        path = Path(folder) / output.name
        _write(model, path, options, info, calibrate())
        check = check_export(load_exported(path), model, pictures, *_TOLERANCES[options.precision])
        if check.unmatched and not options.int8:
            raise InputError(f"{output} is not written, since its detections differ: {check}")
        # The weights of OpenVINO before the file that needs them.
        for name in (output.with_suffix(".bin").name, output.name):
            if (Path(folder) / name).exists():
                os.replace(Path(folder) / name, output.parent / name)
    return check


def _temporary_folder(parent: Path) -> tempfile.TemporaryDirectory:
    try:
        return tempfile.TemporaryDirectory(prefix=".export-", dir=parent)
    except OSError as error:
        raise InputError(f"Folder {parent} cannot be written to: {error.strerror}") from None


def describe(
    cfg: CfgNode, model: GFL, options: ExportOptions, class_names: Sequence[str]
) -> dict[str, Any]:
    """What an exported file carries, as plain data."""
    divisibility = max(1, model.backbone.size_divisibility)
    coarsest = max(shape.stride for shape in model.backbone.output_shape().values())
    return {
        "version": gfl_d2.__version__,
        "format": options.format,
        "class_names": list(class_names) if len(class_names) == model.num_classes else [],
        "num_classes": model.num_classes,
        "input_format": cfg.INPUT.FORMAT,  # of the channels: "BGR" or "RGB"
        "input_type": "uint8" if options.uint8 else "float32",
        "channels": len(cfg.MODEL.PIXEL_MEAN),
        # As in evaluation: the shorter side becomes min_size, unless the longer one becomes larger
        # than max_size. With a min_size of 0 images stay as they are.
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "resize_filter": cfg.INPUT.RESIZE_FILTER,  # "pillow" or "opencv"
        "size": options.size and list(options.size),  # height and width; None for any
        "size_divisibility": divisibility,
        # Every map has two rows and columns: PyTorch's exporter makes constants of ones.
        "min_side": (coarsest // divisibility + 1) * divisibility,
        "precision": options.precision,
        "nms": options.nms,
        "score_threshold": model.test_score_thresh,
        "nms_threshold": model.test_nms_thresh,
        "nms_class_agnostic": model.test_nms_class_agnostic,
        "max_detections": model.max_detections_per_image,
        "config": cfg.dump(),
    }


def _write(
    model: GFL, path: Path, options: ExportOptions, info: dict, calibration: Iterator
) -> None:
    metadata, is_torch = json.dumps(info), options.format.startswith("torch")
    half = options.half and options.format != "openvino"  # which makes weights float16 by itself
    graph = DetectorGraph(_prepare(model, half), with_nms=options.nms and is_torch)
    files = {f"{METADATA_KEY}.json": metadata}
    try:
        if options.format == "torchscript":
            traced = torch.jit.trace(graph, _example(info), check_trace=False)
            torch.jit.save(traced, str(path), _extra_files=files)
            return
        # Not strict, which later versions are by default: PyTorch 2.6 has to be told.
        program = torch.export.export(
            graph, _example(info), dynamic_shapes=_free_sides(info), strict=False
        )
        if options.format == "torch-export":
            torch.export.save(program, str(path), extra_files=files)
            return
        onnx_path = path.with_name("graph.onnx")
        write_onnx(
            program,
            onnx_path,
            opset=options.opset,
            metadata=metadata,
            info=info,
            nms_of=model if options.nms else None,
        )
        if options.format == "openvino":
            write_openvino(
                onnx_path,
                path,
                metadata=metadata,
                half=options.half,
                calibration=calibration if options.int8 else None,
            )
        elif options.int8:
            quantize_onnx(onnx_path, path, calibration)
        else:
            os.replace(onnx_path, path)
    except InputError:
        raise
    # Exporters raise anything for what they cannot do.
    except Exception as error:
        raise InputError(
            f"The model cannot be exported as {options.format}: {first_line(error)}"
        ) from error


def _prepare(model: GFL, half: bool) -> GFL:
    """A copy with BatchNorms folded in and nothing to train."""
    model = copy.deepcopy(model).requires_grad_(False)
    fuse_norms(model)
    if half:
        for part in (model.backbone, model.head):
            part.half()
    return model


def _example(info: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs to export with."""
    number, side = (1, None) if info["size"] else (2, info["min_side"])
    height, width = info["size"] or (side + info["size_divisibility"], side)
    images = torch.zeros(
        number, info["channels"], height, width, dtype=getattr(torch, info["input_type"])
    )
    return images, torch.tensor([[height, width]] * number)


def _free_sides(info: dict) -> tuple[dict, dict] | None:
    if info["size"]:
        return None
    divisibility = info["size_divisibility"]
    least = info["min_side"] // divisibility
    batch = torch.export.Dim("batch", min=1)
    height, width = (torch.export.Dim(name, min=least) for name in ("height", "width"))
    return {0: batch, 2: divisibility * height, 3: divisibility * width}, {0: batch}


def _find_images(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise InputError(f"{path} is neither a picture nor a folder of pictures")
    names = sorted(name for name in os.listdir(path) if name.lower().endswith(_IMAGE_TYPES))
    if not names:
        raise InputError(f"Folder {path} has no pictures ({', '.join(_IMAGE_TYPES)})")
    return [os.path.join(path, name) for name in names]


def _built_in_picture() -> str:
    from matplotlib.cbook import get_sample_data

    return str(get_sample_data("grace_hopper.jpg", asfileobj=False))
