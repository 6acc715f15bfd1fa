"""What parameters are called in MMDetection, torchvision, timm and MMPretrain."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..errors import InputError, name_some

__all__ = ["BOTTOM_UP", "COUNTER", "Source", "names_there", "unpack"]

# Where the backbone's parameters are here.
BOTTOM_UP = "backbone.bottom_up"
# How the name of a BatchNorm's counter ends. A frozen norm has none.
COUNTER = ".num_batches_tracked"

# Patterns of modules here, what they are called there, and their normalizations. Where several
# patterns fit, MMDetection's name is the first. Those of a backbone are for names without
# "bottom_up", and with "layer1" for "res2".
_RULES = (
    *((rf"backbone\.fpn_lateral{i + 3}", f"neck.lateral_convs.{i}.conv", "") for i in range(3)),
    *((rf"backbone\.fpn_output{i + 3}", f"neck.fpn_convs.{i}.conv", "") for i in range(3)),
    *((rf"backbone\.top_block\.p{i + 3}", f"neck.fpn_convs.{i}.conv", "") for i in (3, 4)),
    (r"head\.cls_subnet\.(\d+)", r"bbox_head.cls_convs.\1.conv", r"bbox_head.cls_convs.\1.gn"),
    (r"head\.bbox_subnet\.(\d+)", r"bbox_head.reg_convs.\1.conv", r"bbox_head.reg_convs.\1.gn"),
    (r"head\.cls_score", "bbox_head.gfl_cls", ""),
    (r"head\.bbox_pred", "bbox_head.gfl_reg", ""),
    (r"head\.quality_pred\.(\d+)", r"bbox_head.reg_conf.\1", ""),
    (r"head\.scales\.(\d+)", r"bbox_head.scales.\1", ""),
    (r"(backbone\.layer.+)\.conv(\d)", r"\1.conv\2", r"\1.bn\2"),
)
_RESNET_RULES = (
    *_RULES,
    (r"backbone\.stem\.conv1", "backbone.conv1", "backbone.bn1"),
    (r"(backbone\.layer.+)\.conv2_offset", r"\1.conv2.conv_offset", ""),
    (r"(backbone\.layer.+)\.conv2_offset", r"\1.conv2_offset", ""),  # in MMDetection 1
    (r"(backbone\.layer.+)\.shortcut", r"\1.downsample.0", r"\1.downsample.1"),
)
_RES2NET_RULES = (
    *_RULES,
    (r"backbone\.stem\.conv1", "backbone.stem.0", "backbone.stem.1"),
    (r"backbone\.stem\.conv2", "backbone.stem.3", "backbone.stem.4"),
    (r"backbone\.stem\.conv3", "backbone.stem.6", "backbone.stem.7"),
    (r"backbone\.stem\.conv1", "backbone.conv1.0", "backbone.conv1.1"),  # in timm
    (r"backbone\.stem\.conv2", "backbone.conv1.3", "backbone.conv1.4"),
    (r"backbone\.stem\.conv3", "backbone.conv1.6", "backbone.bn1"),
    (r"(backbone\.layer.+)\.convs\.(\d+)", r"\1.convs.\2", r"\1.bns.\2"),
    (r"(backbone\.layer.+)\.conv_offsets\.(\d+)", r"\1.convs.\2.conv_offset", ""),
    # downsample.0 is a pooling
    (r"(backbone\.layer.+)\.shortcut", r"\1.downsample.1", r"\1.downsample.2"),
)


def names_there(here: str, *, res2net: bool) -> list[str]:
    """All names that other code bases have for a parameter; MMDetection's is the first."""
    module, _, parameter = here.rpartition(".")
    module, is_norm, _ = module.partition(".norm")
    module = re.sub(r"\.bottom_up\.res(\d)", lambda m: f".layer{int(m[1]) - 1}", module)
    module = module.replace(".bottom_up", "")
    rules = _RES2NET_RULES if res2net else _RESNET_RULES
    matches = ((re.fullmatch(rule[0], module), rule[2 if is_norm else 1]) for rule in rules)
    return [f"{match.expand(there)}.{parameter}" for match, there in matches if match]


def unpack(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ours with the scales of the levels apart, as they are there."""
    weights = dict(weights)
    if "head.scales" in weights and weights["head.scales"].ndim == 1:
        for i, scale in enumerate(weights.pop("head.scales")):
            weights[f"head.scales.{i}.scale"] = scale
    return weights


class Source:
    """The weights of a file, asked for by the names that they have here."""

    def __init__(self, path: str, weights: Mapping[str, Tensor], *, is_ours: bool):
        self.path, self.weights, self.is_ours = path, weights, is_ours
        self.is_res2net = any(".convs." in name for name in weights)
        prefixes = ("backbone.", "neck.", "bbox_head.")
        self.has_prefix = any(name.startswith(prefixes) for name in weights)

    def names(self, here: str) -> list[str]:
        """The names that the file may have for a parameter."""
        if self.is_ours:
            return [here]
        there = names_there(here, res2net=self.is_res2net)
        return there if self.has_prefix else [name.replace("backbone.", "", 1) for name in there]

    def find(self, here: str) -> str | None:
        """The name in the file. None if it has none."""
        return next((name for name in self.names(here) if name in self.weights), None)

    def has(self, module: str) -> bool:
        """Whether the file has any parameter of a module or its normalization."""
        parts = ("weight", "bias", "norm.weight", "norm.bias")
        return any(self.find(f"{module}.{part}") is not None for part in parts)

    def size(self, here: str, axis: int = 0) -> int:
        """The size of a parameter along an axis. Raises InputError if there is no such."""
        there = self.find(here)
        if there is None:
            raise InputError(
                f"Weights file {self.path} is not of a whole GFL detector or ImageNet backbone: it "
                f"lacks {' or '.join(self.names(here))}, but has {name_some(self.weights)}"
            )
        shape = tuple(self.weights[there].shape)
        if len(shape) <= axis:
            raise InputError(f"Weights file {self.path}: {there} has the shape {shape}")
        return shape[axis]
