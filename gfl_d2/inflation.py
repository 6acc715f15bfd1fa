"""Weights of models for colour images, for images of other channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["inflate_stem"]

_COLOURS = 3


def inflate_stem(weights: dict[str, Any], model: Mapping[str, Tensor]) -> str:
    """
    Change (in place) the first convolution in weights of a model for 3 channels, so that it fits a
    model for 1, or for more than 3. With one channel it gives what it gave for three equal ones.
    Additional channels do nothing at first: their weights are 0.

    Args:
        weights: by name, which may lack the beginning of the model's names.
        model: the ``state_dict`` of the model.

    Returns:
        The name in ``weights``, or "" if none was changed: it fits as it is, or in no way.
    """
    for target, parameter in model.items():
        ends = {target.split(".", i)[-1] for i in range(target.count(".") + 1)}
        for name in ends & weights.keys():
            there, here = tuple(np.shape(weights[name])), tuple(parameter.shape)
            is_stem = len(there) == len(here) == 4 and there[1] == _COLOURS
            can_be = is_stem and (here[1] == 1 or here[1] > _COLOURS)
            if can_be and there[:1] + there[2:] == here[:1] + here[2:]:
                weights[name] = _inflate(torch.as_tensor(weights[name]), here[1])
                return name
    return ""


def _inflate(weight: Tensor, channels: int) -> Tensor:
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    additional = weight.new_zeros(weight.shape[0], channels - _COLOURS, *weight.shape[2:])
    return torch.cat([weight, additional], dim=1)
