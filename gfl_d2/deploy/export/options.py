"""What can be exported, and refusals of what cannot, before the work begins."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.layers import DeformConv, ModulatedDeformConv
from torch import nn

from ...errors import InputError
from ...modeling import GFL
from ...modeling.backbone import DeformConv2d

__all__ = ["EXTENSIONS", "ExportOptions", "check_model", "check_options", "plain_config"]

logger = logging.getLogger(__name__)

EXTENSIONS = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".ts", "torch-export": ".pt2"}

_OPSETS = range(18, 24)
_DEFORM_OPSET = 19  # the first with DeformConv


@dataclass(frozen=True)
class ExportOptions:
    """What is exported."""

    format: str  # one of EXTENSIONS
    nms: bool = True
    size: tuple[int, int] | None = None  # height and width of a batch of 1; None for any
    half: bool = False  # backbone and head in float16
    int8: str | None = None  # folder of images to calibrate with; None for no quantization
    opset: int = 20  # of ONNX
    uint8: bool = False  # type of the input

    @property
    def precision(self) -> str:
        return "int8" if self.int8 else "float16" if self.half else "float32"


def check_options(options: ExportOptions, output: Path) -> None:
    """Raise InputError if they do not fit together, or a package or the output's folder lacks."""
    extension = EXTENSIONS[options.format]
    if output.suffix != extension:
        raise InputError(
            f"The name of an export as {options.format} ends with {extension}, got {output}"
        )
    if not output.parent.is_dir():
        raise InputError(f"Folder {output.parent} for the output does not exist: make it first")
    if output.is_dir():
        raise InputError(f"{output}: there is a folder of this name")
    if options.half and options.int8:
        raise InputError("--half and --int8 exclude each other: choose one")
    if options.int8 and options.format not in ("onnx", "openvino"):
        raise InputError(f"--int8 is for onnx and openvino, not for {options.format}")
    if options.opset not in _OPSETS:
        raise InputError(f"--opset must be {_OPSETS[0]} to {_OPSETS[-1]}, got {options.opset}")
    _check_packages(options)


def _check_packages(options: ExportOptions) -> None:
    packages, extra = [], "export"
    if options.format in ("onnx", "openvino"):
        packages = ["onnx", "onnxscript"]
    if options.format == "onnx":
        packages.append("onnxruntime")
    if options.format == "openvino":
        extra = "openvino"
        packages += ["openvino", *(["nncf"] if options.int8 else [])]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"Export as {options.format} needs {', '.join(missing)}: pip install -e '.[{extra}]'"
        )


def plain_config(cfg: CfgNode) -> CfgNode:
    """
    The config of the model that is exported, on the CPU and in float32, whatever makes evaluation
    faster. A warning names what exports do not have.
    """
    left_out = {
        "TEST.AUG.ENABLED": cfg.TEST.AUG.ENABLED,
        "TEST.TILES.SIZE": cfg.TEST.TILES.SIZE > 0,
        "TEST.UNCERTAINTY": cfg.TEST.UNCERTAINTY,
        "TEST.CALIBRATION": cfg.TEST.CALIBRATION != "",
    }
    names = [name for name, is_on in left_out.items() if is_on]
    if names:
        logger.warning(f"Exported files do without {', '.join(names)}.")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.TEST.AUG.ENABLED, cfg.TEST.TILES.SIZE = False, 0
    cfg.TEST.UNCERTAINTY, cfg.TEST.CALIBRATION = False, ""
    cfg.TEST.OPTIMIZE, cfg.TEST.PRECISION, cfg.TEST.COMPILE = False, "float32", ""
    return cfg


def check_model(model: nn.Module, options: ExportOptions) -> None:
    """Raise InputError if the model cannot be exported so."""
    if not isinstance(model, GFL):
        raise InputError(
            f"MODEL.META_ARCHITECTURE {type(model).__name__!r} cannot be exported: only 'GFL' can"
        )
    layers = {type(module) for module in model.modules()}
    if layers & {DeformConv, ModulatedDeformConv}:
        raise InputError(
            "Detectron2's deformable convolutions cannot be exported: take this project's, by "
            "MODEL.BACKBONE.NAME build_gfl_resnet_fpn_backbone"
        )
    if DeformConv2d in layers and options.format == "openvino":
        raise InputError(
            "OpenVINO reads no deformable convolutions (ONNX's DeformConv): export as onnx, "
            "torchscript or torch-export"
        )
    if DeformConv2d in layers and options.format == "onnx" and options.opset < _DEFORM_OPSET:
        raise InputError(
            f"Deformable convolutions need --opset {_DEFORM_OPSET} or higher, got {options.opset}"
        )
    divisibility = max(1, model.backbone.size_divisibility)
    if options.size and any(x < 1 or x % divisibility for x in options.size):
        raise InputError(
            f"--size must be multiples of {divisibility}, got {options.size[0]} {options.size[1]}"
        )
