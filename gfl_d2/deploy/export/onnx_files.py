"""ONNX: the candidates by PyTorch's exporter, and NMS in ONNX's own operators behind them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...modeling import GFL
from .running import METADATA_KEY

if TYPE_CHECKING:
    import onnx

__all__ = ["append_nms", "quantize_onnx", "write_onnx"]

_OUTPUTS = ("boxes", "scores", "labels")
_PREDICTORS = ("head.cls_score.", "head.bbox_pred.")  # in the names of weights

# NonMaxSuppression gives (image, class, place) of each box that is left, in no order that is of
# use. All other shapes are known beforehand. %-values are those of the model.
_NMS = """
<ir_version: %(ir_version)d, opset_import: ["" : %(opset)d]>
nms (float[N, K, 4] in_boxes, float[N, K] in_scores, int64[N, K] in_labels)
    => (float[N, D, 4] boxes, float[N, D] scores, int64[N, D] labels)
<int64[1] nms_limit = {%(limit)d}, float[1] nms_iou = {%(iou).9g},
 float[1] nms_least = {%(least).9g}, float[1] nms_zero = {0}, int64[1] nms_one = {1},
 int64[1, %(groups)d, 1] nms_groups = {%(numbers)s}, int64[2] nms_columns = {0, 2},
 int64[1] nms_last = {-1}>
{
    nms_label = Unsqueeze (in_labels, nms_one)
    nms_is_group = %(compare)s (nms_label, nms_groups)
    nms_score = Unsqueeze (in_scores, nms_one)
    nms_group_scores = Where (nms_is_group, nms_score, nms_zero)
    nms_found = NonMaxSuppression (in_boxes, nms_group_scores, nms_limit, nms_iou, nms_least)
    nms_places = Gather <axis = 1> (nms_found, nms_columns)
    nms_kept = GatherND (in_scores, nms_places)
    nms_shape = Shape (in_scores)
    nms_none = ConstantOfShape (nms_shape)
    nms_all = ScatterND (nms_none, nms_places, nms_kept)
    nms_images = Shape <start = 0, end = 1> (in_scores)
    nms_more_shape = Concat <axis = 0> (nms_images, nms_limit)
    nms_more = ConstantOfShape (nms_more_shape)
    nms_padded = Concat <axis = 1> (nms_all, nms_more)
    scores, nms_order = TopK <axis = 1> (nms_padded, nms_limit)
    nms_number = Shape <start = 1, end = 2> (in_scores)
    nms_end = Sub (nms_number, nms_one)
    nms_inside = Min (nms_order, nms_end)
    nms_index = Unsqueeze (nms_inside, nms_last)
    boxes = GatherND <batch_dims = 1> (in_boxes, nms_index)
    labels = GatherND <batch_dims = 1> (in_labels, nms_index)
}
"""


def write_onnx(
    program: torch.export.ExportedProgram,
    path: str,
    *,
    opset: int,
    metadata: str,
    info: dict,
    nms_of: GFL | None,
) -> None:
    """
    Args:
        program: of a :class:`DetectorGraph` without NMS.
        path: file to write.
        opset: version of ONNX's operators.
        metadata: text.
        info: see :func:`gfl_d2.deploy.export.describe`.
        nms_of: the model whose NMS is appended; None for none.
    """
    import onnx

    with redirect_stdout(io.StringIO()):  # it reports its steps
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["images", "image_sizes"],
            output_names=[f"in_{name}" if nms_of is not None else name for name in _OUTPUTS],
            verbose=False,
        )
    model = exported.model_proto
    if nms_of is not None:
        model = append_nms(model, nms_of)
    _name_dimensions(model, info)
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def _name_dimensions(model: onnx.ModelProto, info: dict) -> None:
    """Plain names of the free sides, where the exporter writes formulas."""
    batch, (height, width) = (1, info["size"]) if info["size"] else ("N", ("H", "W"))
    for value in (*model.graph.input, *model.graph.output):
        sizes = value.type.tensor_type.shape.dim
        if value.name == "images":
            names = (batch, info["channels"], height, width)
        elif value.name == "image_sizes":
            names = (batch, 2)
        elif info["nms"]:
            names = (batch, info["max_detections"], 4)
        else:
            names = (batch, sizes[1].dim_value or "K", 4)
        for size, name in zip(sizes, names):
            size.Clear()
            setattr(size, "dim_value" if isinstance(name, int) else "dim_param", name)


def append_nms(model: onnx.ModelProto, detector: GFL) -> onnx.ModelProto:
    """``model``, whose outputs are candidates, with the NMS of ``detector`` behind them."""
    import onnx

    groups = 1 if detector.test_nms_class_agnostic else detector.num_classes
    text = _NMS % {
        "ir_version": model.ir_version,
        "opset": model.opset_import[0].version,
        "limit": detector.max_detections_per_image,
        "iou": detector.test_nms_thresh,
        # Scores are 0 or higher than the threshold: this parts them, by > and by >=.
        "least": detector.test_score_thresh / 2 or 1e-9,
        "groups": groups,
        "numbers": ", ".join(map(str, range(groups))),
        # All labels are at least 0: one group.
        "compare": "GreaterOrEqual" if detector.test_nms_class_agnostic else "Equal",
    }
    nms = onnx.parser.parse_model(text)
    names = [(f"in_{name}", f"in_{name}") for name in _OUTPUTS]
    merged = onnx.compose.merge_models(model, nms, io_map=names)
    versions = {
        opset.domain: opset.version for opset in merged.opset_import
    }  # some are there twice
    del merged.opset_import[:]
    merged.opset_import.extend(onnx.helper.make_opsetid(*item) for item in versions.items())
    return merged


def quantize_onnx(path: str, output: str, inputs: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """
    Write a copy with convolutions in int8, but for those that predict classes and box sides: they
    are little work, and no layer behind them evens out what rounding does.

    Args:
        inputs: of the detector, to calibrate with.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._inputs = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(
                ({"images": images, "image_sizes": sizes} for images, sizes in self._inputs), None
            )

    quant_pre_process(path, output, skip_symbolic_shape=True)
    nodes = onnx.load(output, load_external_data=False).graph.node
    predictors = [
        node.name
        for node in nodes
        if node.op_type == "Conv" and any(name in node.input[1] for name in _PREDICTORS)
    ]
    quantize_static(
        output,
        output,
        Reader(),
        op_types_to_quantize=["Conv"],
        per_channel=True,
        nodes_to_exclude=predictors,
    )
