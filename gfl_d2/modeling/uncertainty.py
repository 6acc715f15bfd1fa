"""How sure the sides of detections are: ``TEST.UNCERTAINTY``."""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch import Tensor

from .box_representation import BoxRepresentation

__all__ = ["image_sides", "measure_uncertainty", "scale_uncertainty"]


def measure_uncertainty(detections: Instances, box: BoxRepresentation) -> None:
    """
    Put ``box_std`` and ``box_entropy``, shape (D, 4), in the place of the fields that
    :func:`gfl_d2.modeling.post_processing.suppress` has from sides. The unit of ``box_std`` is
    width or height of the image: when Detectron2 resizes detections, it scales boxes only.
    """
    std, detections.box_entropy = box.uncertainty(detections.box_values)
    detections.box_std = std * detections.box_strides / image_sides(detections)
    for name in ("box_values", "box_centers", "box_strides"):
        detections.remove(name)


def scale_uncertainty(detections: Instances) -> None:
    """Turn the unit of ``box_std`` into pixels, in place."""
    detections.box_std = detections.box_std * image_sides(detections)


def image_sides(detections: Instances) -> Tensor:
    """Width, height, width, height of the image. They are tensors where the model is traced."""
    height, width = (torch.as_tensor(side) for side in detections.image_size)
    return torch.stack((width, height, width, height)).to(detections.scores)
