"""Models made faster for inference, with the same results."""

from __future__ import annotations

import functools
import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor
from torch import Tensor, nn

from ..checkpoint import GFLCheckpointer, load_checkpoint_config
from ..config import choose_device
from ..errors import InputError
from .compilation import compile_parts
from .fusing import fuse_norms
from .tta import DenseDetectorWithTTA, input_config, uses_views

__all__ = ["Predictor", "has_fast_bfloat16", "prepare_for_inference"]

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Predictor(DefaultPredictor):
    """
    :class:`DefaultPredictor` for a model that :func:`prepare_for_inference` makes faster. It loads
    every parameter or none, and takes the CPU where there is no GPU. ``metadata.thing_classes`` has
    the names of the classes if the checkpoint or Detectron2's catalog has them.
    """

    def __init__(self, cfg: CfgNode | str | os.PathLike):
        """
        Args:
            cfg: a config whose ``MODEL.WEIGHTS`` names the weights, or a checkpoint of a training,
                which carries its config: see :func:`gfl_d2.checkpoint.load_checkpoint_config`.

        Raises:
            InputError: the weights do not fit the model, the checkpoint carries no config, or
                ``INPUT.FORMAT`` is neither "BGR" nor "RGB".
        """
        is_alone = not isinstance(cfg, CfgNode)
        if is_alone:
            cfg = load_checkpoint_config(cfg)
        if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
            raise InputError(
                f"INPUT.FORMAT must be 'BGR' or 'RGB' for a Predictor, got {cfg.INPUT.FORMAT!r}"
            )
        cfg = cfg.clone()
        cfg.defrost()
        choose_device(cfg)
        # Detectron2 would load what fits of the file, and leave the rest random.
        weights, cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS, ""
        super().__init__(input_config(cfg))
        cfg.MODEL.WEIGHTS = weights
        self.cfg = cfg
        names = GFLCheckpointer(self.model, complete=True).load(weights).get("class_names")
        metadata = getattr(self, "metadata", Metadata())
        known = metadata.get("thing_classes")
        # A data set of this name may be another here than where the model was trained.
        if names and (known is None or (is_alone and list(known) != names)):
            metadata = Metadata(name=weights, thing_classes=names)
        self.metadata = metadata
        self.model = prepare_for_inference(cfg, self.model)


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether convolutions in bfloat16 are not slower than in float32 on this machine."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    # Not in every version of PyTorch, nor on every processor.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def prepare_for_inference(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """
    Make a :class:`detectron2.modeling.meta_arch.dense_detector.DenseDetector` faster that has its
    weights, as ``TEST.OPTIMIZE``, ``TEST.PRECISION`` and ``TEST.COMPILE`` say. It is changed in
    place, returned in eval mode, and cannot be trained any more. With ``TEST.AUG`` or
    ``TEST.TILES`` it is returned in a :class:`DenseDetectorWithTTA`, which needs images of
    :func:`input_config`.
    """
    model.eval()
    device_type = next(model.parameters()).device.type
    if cfg.TEST.OPTIMIZE:
        fuse_norms(model)
    model.to(memory_format=torch.channels_last if cfg.TEST.OPTIMIZE else torch.contiguous_format)
    dtype = _DTYPES[cfg.TEST.PRECISION]
    if dtype == torch.bfloat16 and not has_fast_bfloat16(device_type):
        logger.warning("TEST.PRECISION: no bfloat16 on this machine, using float32.")
    elif dtype != torch.float32:
        for part in (model.backbone, model.head):
            part.to(dtype)
        model.backbone.register_forward_pre_hook(functools.partial(_cast_images, dtype=dtype))
    compile_parts(model, cfg.TEST.COMPILE)
    return DenseDetectorWithTTA(cfg, model) if uses_views(cfg) else model


def _cast_images(_: nn.Module, inputs: tuple[Tensor], dtype: torch.dtype) -> tuple[Tensor]:
    """A forward pre-hook that can be copied and pickled with its module, unlike a closure."""
    return (inputs[0].to(dtype),)
