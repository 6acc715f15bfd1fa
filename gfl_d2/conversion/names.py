"""What parameters are called in MMDetection and here, in both directions."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["BOTTOM_UP", "COUNTER", "Rule", "is_res2net", "pack", "rules_for", "translate", "unpack"]

# Where the backbone's parameters are here.
BOTTOM_UP = "backbone.bottom_up"
# How the names of BatchNorm's counters end, which frozen norms have not.
COUNTER = ".num_batches_tracked"

# Templates of a name there, and here.
Rule = tuple[str, str]

# A slot "{x}" is a number, "{x+1}" that number plus one; "{w}" is a weight or bias, "{s}" that or a
# statistic of a normalization; "name[{x}]" is an element of a vector. Where several names there
# stand for one here, the first is what is written.
_DETECTOR_RULES = (
    ("neck.lateral_convs.{i}.conv.{w}", "backbone.fpn_lateral{i+3}.{w}"),
    ("neck.fpn_convs.0.conv.{w}", "backbone.fpn_output3.{w}"),
    ("neck.fpn_convs.1.conv.{w}", "backbone.fpn_output4.{w}"),
    ("neck.fpn_convs.2.conv.{w}", "backbone.fpn_output5.{w}"),
    ("neck.fpn_convs.3.conv.{w}", "backbone.top_block.p6.{w}"),
    ("neck.fpn_convs.4.conv.{w}", "backbone.top_block.p7.{w}"),
    ("bbox_head.cls_convs.{i}.conv.{w}", "head.cls_subnet.{i}.{w}"),
    ("bbox_head.cls_convs.{i}.gn.{w}", "head.cls_subnet.{i}.norm.{w}"),
    ("bbox_head.reg_convs.{i}.conv.{w}", "head.bbox_subnet.{i}.{w}"),
    ("bbox_head.reg_convs.{i}.gn.{w}", "head.bbox_subnet.{i}.norm.{w}"),
    ("bbox_head.gfl_cls.{w}", "head.cls_score.{w}"),
    ("bbox_head.gfl_reg.{w}", "head.bbox_pred.{w}"),
    ("bbox_head.reg_conf.{i}.{w}", "head.quality_pred.{i}.{w}"),
    ("bbox_head.scales.{i}.scale", "head.scales[{i}]"),
)
_THERE, _HERE = "backbone.layer{k}.{b}", f"{BOTTOM_UP}.res{{k+1}}.{{b}}"
_RESNET_RULES = (
    ("backbone.conv1.{w}", f"{BOTTOM_UP}.stem.conv1.{{w}}"),
    ("backbone.bn1.{s}", f"{BOTTOM_UP}.stem.conv1.norm.{{s}}"),
    (f"{_THERE}.conv{{c}}.{{w}}", f"{_HERE}.conv{{c}}.{{w}}"),
    (f"{_THERE}.bn{{c}}.{{s}}", f"{_HERE}.conv{{c}}.norm.{{s}}"),
    (f"{_THERE}.conv2.conv_offset.{{w}}", f"{_HERE}.conv2_offset.{{w}}"),
    (f"{_THERE}.conv2_offset.{{w}}", f"{_HERE}.conv2_offset.{{w}}"),  # in old versions
    (f"{_THERE}.downsample.0.{{w}}", f"{_HERE}.shortcut.{{w}}"),
    (f"{_THERE}.downsample.1.{{s}}", f"{_HERE}.shortcut.norm.{{s}}"),
)
_RES2NET_RULES = (
    ("backbone.stem.0.{w}", f"{BOTTOM_UP}.stem.conv1.{{w}}"),
    ("backbone.stem.1.{s}", f"{BOTTOM_UP}.stem.conv1.norm.{{s}}"),
    ("backbone.stem.3.{w}", f"{BOTTOM_UP}.stem.conv2.{{w}}"),
    ("backbone.stem.4.{s}", f"{BOTTOM_UP}.stem.conv2.norm.{{s}}"),
    ("backbone.stem.6.{w}", f"{BOTTOM_UP}.stem.conv3.{{w}}"),
    ("backbone.stem.7.{s}", f"{BOTTOM_UP}.stem.conv3.norm.{{s}}"),
    # The stem in timm.
    ("backbone.conv1.0.{w}", f"{BOTTOM_UP}.stem.conv1.{{w}}"),
    ("backbone.conv1.1.{s}", f"{BOTTOM_UP}.stem.conv1.norm.{{s}}"),
    ("backbone.conv1.3.{w}", f"{BOTTOM_UP}.stem.conv2.{{w}}"),
    ("backbone.conv1.4.{s}", f"{BOTTOM_UP}.stem.conv2.norm.{{s}}"),
    ("backbone.conv1.6.{w}", f"{BOTTOM_UP}.stem.conv3.{{w}}"),
    ("backbone.bn1.{s}", f"{BOTTOM_UP}.stem.conv3.norm.{{s}}"),
    (f"{_THERE}.conv{{c}}.{{w}}", f"{_HERE}.conv{{c}}.{{w}}"),
    (f"{_THERE}.bn{{c}}.{{s}}", f"{_HERE}.conv{{c}}.norm.{{s}}"),
    (f"{_THERE}.convs.{{i}}.{{w}}", f"{_HERE}.convs.{{i}}.{{w}}"),
    (f"{_THERE}.bns.{{i}}.{{s}}", f"{_HERE}.convs.{{i}}.norm.{{s}}"),
    (f"{_THERE}.convs.{{i}}.conv_offset.{{w}}", f"{_HERE}.conv_offsets.{{i}}.{{w}}"),
    (f"{_THERE}.downsample.1.{{w}}", f"{_HERE}.shortcut.{{w}}"),  # 0 is a pooling
    (f"{_THERE}.downsample.2.{{s}}", f"{_HERE}.shortcut.norm.{{s}}"),
)

_SLOT = re.compile(r"\{(\w)(?:\+(\d+))?\}")
_SLOT_VALUES = {"w": "weight|bias", "s": "weight|bias|running_mean|running_var|num_batches_tracked"}
_NUMBER = "0|[1-9][0-9]{0,3}"  # one spelling per number: no two names mean the same
_ELEMENT = re.compile(r"(.+)\[([0-9]+)\]")


def rules_for(names: Iterable[str]) -> tuple[Rule, ...]:
    """The rules for models that have these names, there or here."""
    return _DETECTOR_RULES + (_RES2NET_RULES if is_res2net(names) else _RESNET_RULES)


def is_res2net(names: Iterable[str]) -> bool:
    names = list(names)
    return sum(".convs." in name for name in names) > sum(".conv2." in name for name in names)


def translate(name: str, rules: Sequence[Rule], *, back: bool = False) -> list[tuple[Rule, str]]:
    """
    Args:
        name: there; or here, if ``back``.
        rules: pairs of templates.

    Returns:
        list[tuple]: the rules that fit, each with the name that it gives.
    """
    found = []
    for rule in rules:
        source, target = reversed(rule) if back else rule
        pattern, shifts = _compile(source)
        match = pattern.fullmatch(name)
        if match:
            values = match.groupdict()
            values.update({slot: int(values[slot]) - shift for slot, shift in shifts.items()})
            if all(values[slot] >= 0 for slot in shifts):
                found.append((rule, _fill(target, values)))
    return found


@functools.cache
def _compile(template: str) -> tuple[re.Pattern, dict[str, int]]:
    """A pattern with a group for each slot, and what is added to each number."""
    literal, *rest = _SLOT.split(template)
    pattern, shifts = re.escape(literal), {}
    for slot, shift, literal in zip(rest[::3], rest[1::3], rest[2::3]):
        pattern += f"(?P<{slot}>{_SLOT_VALUES.get(slot, _NUMBER)}){re.escape(literal)}"
        if slot not in _SLOT_VALUES:
            shifts[slot] = int(shift or 0)
    return re.compile(pattern), shifts


def _fill(template: str, values: Mapping[str, Any]) -> str:
    def value(slot: re.Match) -> str:
        name, shift = slot.groups()
        return values[name] if name in _SLOT_VALUES else str(values[name] + int(shift or 0))

    return _SLOT.sub(value, template)


def unpack(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With vectors that are many parameters there taken apart: ``name[0]``, ``name[1]``, ..."""
    tensors = {}
    for name, value in weights.items():
        if value.ndim == 1 and translate(f"{name}[0]", _DETECTOR_RULES, back=True):
            tensors.update({f"{name}[{i}]": element for i, element in enumerate(value)})
        else:
            tensors[name] = value
    return tensors


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of :func:`unpack`. A vector comes where one of its elements came first."""
    weights: dict[str, Any] = {}
    for name, value in tensors.items():
        element = _ELEMENT.fullmatch(name)
        if element:
            weights.setdefault(element[1], {})[int(element[2])] = value
        else:
            weights[name] = value
    return {
        name: torch.stack([v for _, v in sorted(value.items())])
        if isinstance(value, dict)
        else value
        for name, value in weights.items()
    }
