"""OpenVINO, from the ONNX file, and its quantization by NNCF."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .running import METADATA_KEY

__all__ = ["write_openvino"]


def write_openvino(
    onnx_path: str,
    path: str,
    *,
    metadata: str,
    half: bool,
    calibration: Iterable[tuple[np.ndarray, np.ndarray]] | None,
) -> None:
    """
    Args:
        onnx_path: an exported file.
        path: file to write; the weights go beside it, into one that ends with ".bin".
        metadata: text.
        half: keep weights in float16.
        calibration: inputs of the detector, for int8; None for none.
    """
    import openvino

    model = openvino.convert_model(onnx_path)
    if calibration is not None:
        model = _quantize(model, calibration)
    model.set_rt_info(metadata, [METADATA_KEY])
    openvino.save_model(model, path, compress_to_fp16=half)


def _quantize(model, inputs: Iterable[tuple[np.ndarray, np.ndarray]]):
    import nncf

    data = [{"images": images, "image_sizes": sizes} for images, sizes in inputs]
    return nncf.quantize(
        model,
        nncf.Dataset(data),
        subset_size=len(data),
        # Of convolutions, and what is between them: boxes and scores stay in float32.
        ignored_scope=nncf.IgnoredScope(
            types=["Multiply", "Divide", "Subtract", "MVN", "ReduceSum", "ReduceMean", "MatMul"],
            validate=False,
        ),
    )
