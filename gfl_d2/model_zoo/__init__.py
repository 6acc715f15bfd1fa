"""Models by the names of their configs, as :mod:`detectron2.model_zoo` has them."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from ..checkpoint import GFLCheckpointer
from ..config import load_config
from ..errors import InputError, name_some

__all__ = ["get", "get_config", "get_config_file"]

# In the repository a link to its top folder `configs`, of which a wheel has a copy.
_CONFIGS = Path(__file__).parent / "configs"


def get_config_file(config_path: str) -> str:
    """
    The path of a config. ``config_path`` is relative to ``configs/``, such as
    "gfl_R_50_FPN_1x.yaml", "ablations/table_3_qfl.yaml" or "lazy/gfl_R_50_FPN_1x.py".

    Raises:
        InputError: there is no such config.
    """
    file = _CONFIGS / config_path
    if not file.is_file():
        names = [path.relative_to(_CONFIGS).as_posix() for path in _CONFIGS.glob("**/*.yaml")]
        raise InputError(
            f"gfl_d2.model_zoo has no config {config_path!r}. It has {name_some(sorted(names), 50)}"
        )
    return str(file)


def get_config(config_path: str) -> CfgNode | DictConfig:
    """
    The config, checked and free to be changed. ``MODEL.WEIGHTS`` names the weights to start
    training from, ``MODEL.DEVICE`` is "cpu" where there is no GPU. A Python config as it is.
    """
    file = get_config_file(config_path)
    if file.endswith(".py"):
        return LazyConfig.load(file)
    cfg = load_config(file)
    cfg.defrost()
    return cfg


def get(config_path: str, weights: str = "", device: str | None = None) -> nn.Module:
    """
    The model of a config, in training mode.

    Args:
        config_path: see :func:`get_config_file`.
        weights: a file with all parameters of the model; "" for random ones. None are hosted:
            MODEL_ZOO.md says where published ones are, and how to convert them.
        device: of the model; None for a GPU, if there is one.

    Raises:
        InputError: there is no such config, or the weights do not fit.
    """
    cfg = get_config(config_path)
    if isinstance(cfg, DictConfig):
        default = "cuda" if torch.cuda.is_available() else "cpu"
        model = instantiate(cfg.model).to(device or default)
    else:
        cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
        model = build_model(cfg)
    if weights:
        GFLCheckpointer(model, complete=True).load(weights)
    return model
