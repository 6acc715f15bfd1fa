"""Whether weights are all that their model needs, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import Tensor

from ..config import add_gfl_config
from ..errors import InputError, name_some
from .facts import Facts, describe
from .names import BOTTOM_UP, COUNTER, unpack

__all__ = ["check_structure"]


def check_structure(
    path: str,
    tensors: Mapping[str, Tensor],
    facts: Facts,
    *,
    name_there: Callable[[str], str] = str,
    unknown: Sequence[str] = (),
) -> None:
    """
    Args:
        path: of the file, for messages.
        tensors: by name here, elements of vectors apart.
        facts: inferred from them.
        name_there: what the file calls, or would call, a parameter of this name.
        unknown: names in the file that are of no model.

    Raises:
        InputError: the model of these facts has not exactly these parameters.
    """
    try:
        expected = _expected_shapes(_freeze(facts.config), facts.is_detector)
    # What Detectron2 and PyTorch raise for a model that cannot be.
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"Weights file {path}: there is no such model as its shapes describe, "
            f"{describe(facts)}: {error}"
        ) from None
    missing = [n for n in expected if n not in tensors and not n.endswith(COUNTER)]
    shapes = {n: tuple(v.shape) for n, v in tensors.items()}
    problems = {
        "Not in the file": map(name_there, missing),
        "Not in the model": [*(name_there(n) for n in tensors if n not in expected), *unknown],
        "Of another shape than in the model": (
            f"{name_there(name)} is {shape}, not {expected[name]}"
            for name, shape in shapes.items()
            if shape != expected.get(name, shape)
        ),
        "Not floating-point": (
            name_there(name)
            for name, value in tensors.items()
            if not (value.is_floating_point() or name.endswith(COUNTER))
        ),
    }
    found = [(what, list(names)) for what, names in problems.items()]
    found = [f"{what} ({len(names)}): {name_some(names)}" for what, names in found if names]
    if found:
        raise InputError(
            f"Weights file {path} is not all of a model and nothing else. The nearest is "
            f"{describe(facts)}. {'. '.join(found)}"
        )


def _freeze(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in config.items())


@functools.lru_cache(maxsize=16)
def _expected_shapes(
    config: tuple[tuple[str, Any], ...], is_detector: bool
) -> dict[str, tuple[int, ...]]:
    """The parameters of a model with these values of config keys, elements of vectors apart."""
    cfg = get_cfg()
    add_gfl_config(cfg)
    values = {
        "MODEL.META_ARCHITECTURE": "GFL",
        "MODEL.BACKBONE.NAME": "build_gfl_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ("res3", "res4", "res5"),
        "MODEL.FPN.IN_FEATURES": ("res3", "res4", "res5"),
        "MODEL.BACKBONE.FREEZE_AT": 0,  # where the norms are frozen they have no counters
        "MODEL.DEVICE": "meta",
        **dict(config),
    }
    cfg.merge_from_list([item for pair in values.items() for item in pair])
    with torch.device("meta"):
        weights = build_model(cfg).state_dict()
    return {
        name: tuple(value.shape)
        for name, value in unpack(weights).items()
        if is_detector or name.startswith(f"{BOTTOM_UP}.")
    }
