"""Compiling backbone and head by torch.compile."""

import torch
from torch import nn

__all__ = ["begin_step", "compile_parts"]


def compile_parts(model: nn.Module, mode: str) -> None:
    """
    Compile backbone and head in place, when they are first called. Parameters keep their names.
    What follows the head is left as it is: its shapes depend on values.

    Args:
        model: a :class:`detectron2.modeling.meta_arch.dense_detector.DenseDetector`.
        mode: of :func:`torch.compile`; "" for not at all.
    """
    if not mode:
        return
    for part in (model.backbone, model.head):
        part.compile(mode=mode)
    model.register_forward_pre_hook(begin_step)


def begin_step(*_: object) -> None:
    """
    Tell what runs as CUDA graphs that outputs of before are done with: those of the backbone, which
    are the head's input, are not, until the model is called again.
    """
    torch.compiler.cudagraph_mark_step_begin()
