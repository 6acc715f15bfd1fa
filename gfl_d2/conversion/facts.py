"""What weights say about their model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from ..errors import InputError
from .names import BOTTOM_UP, is_res2net

__all__ = ["COCO_CLASSES", "LEGACY_CENTERS", "NUM_CLASSES", "Facts", "describe", "infer_config"]

LEGACY_CENTERS = "MODEL.GFL.LEGACY_ANCHOR_CENTERS"
NUM_CLASSES = "MODEL.GFL.NUM_CLASSES"
COCO_CLASSES = 80

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


@dataclass(frozen=True)
class Facts:
    """
    What weights say about their model.

    Attributes:
        source: the code base that they come from, in words.
        is_detector: otherwise a backbone alone.
        config: the values that a config must have for the weights to fit and to mean the same, by
            key, e.g. ``{"MODEL.RESNETS.DEPTH": 50}``.
    """

    source: str
    is_detector: bool
    config: dict[str, Any]


def infer_config(
    path: str, tensors: Mapping[str, Tensor], is_detector: bool, cfg: CfgNode | None
) -> dict[str, Any]:
    """
    The config that weights need, from their names (here) and shapes. What several tensors show is
    decided by most of them, so that a damaged one turns out to be wrong, rather than all others;
    what none shows is Detectron2's default, so that it is missing from a model with it.
    """
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    config = _infer_backbone(path, shapes, cfg)
    if not is_detector:
        if not any(config.get("MODEL.RESNETS.DEFORM_ON_PER_STAGE", ())):
            # Weights for ImageNet have none, whatever is made of them.
            config.pop("MODEL.RESNETS.DEFORM_ON_PER_STAGE", None)
        return config
    names = ["res3", "res4", "res5"]
    return {
        "MODEL.META_ARCHITECTURE": "GFL",
        "MODEL.BACKBONE.NAME": "build_gfl_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": names,
        "MODEL.FPN.IN_FEATURES": names,
        **config,
        "MODEL.FPN.OUT_CHANNELS": _most(shapes, r"backbone\.(fpn_\w+|top_block\.p\d)\.\w+", 256),
        "MODEL.FPN.NORM": "",
        "MODEL.FPN.FUSE_TYPE": "sum",
        **_infer_head(shapes),
    }


def _infer_backbone(
    path: str, shapes: dict[str, tuple[int, ...]], cfg: CfgNode | None
) -> dict[str, Any]:
    blocks = _count(shapes, r"res([2-5])\.(\d+)\..+")
    has_bottlenecks = sum(".conv3." in name for name in shapes) > len(blocks)
    has_splits = is_res2net(shapes)
    norm = r"norm\.(weight|bias|running_mean|running_var)"
    last = r"res2\.\d+\.conv3" if has_bottlenecks else r"res2\.\d+\.conv2"
    stem = r"stem\.conv3" if has_splits else r"stem\.conv1"
    out_channels = _most(shapes, rf"{BOTTOM_UP}\.{last}\.{norm}", 256)
    config = {
        "MODEL.RESNETS.DEPTH": _infer_depth(blocks, has_bottlenecks),
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": _most(shapes, rf"{BOTTOM_UP}\.{stem}\.{norm}", 64),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": out_channels,
        "MODEL.RESNETS.RES5_DILATION": 1,
    }
    if not has_bottlenecks:
        return config
    config["MODEL.RESNETS.STRIDE_IN_1X1"] = False
    if has_splits:
        # The width of a split in res5, for 8 times as many channels as in res2, is rounded least.
        width = _most(shapes, rf"{BOTTOM_UP}\.res5\.\d+\.convs\.\d+\.{norm}", 208)
        splits = _count(shapes, r"res[2-5]\.\d+\.convs\.(\d+)\..+")
        config["MODEL.BACKBONE.NAME"] = "build_gfl_res2net_fpn_backbone"
        config["MODEL.RES2NET.SCALES"] = 1 + sum(number > len(blocks) for number in splits.values())
        config["MODEL.RES2NET.BASE_WIDTH"] = -(-width * 64 // max(out_channels // 4 * 8, 1))
        # What it has no use for.
        config["MODEL.RESNETS.NUM_GROUPS"], config["MODEL.RESNETS.WIDTH_PER_GROUP"] = 1, 64
    else:
        width = _most(shapes, rf"{BOTTOM_UP}\.res2\.\d+\.conv1\.{norm}", 64)
        convs = (s for n, s in shapes.items() if n.endswith(".conv2.weight") and len(s) == 4)
        groups = max(_mode((s[0] // max(s[1], 1) for s in convs), 1), 1)
        config["MODEL.RESNETS.NUM_GROUPS"] = groups
        config["MODEL.RESNETS.WIDTH_PER_GROUP"] = width // groups
    return {**config, **_infer_deformation(path, shapes, blocks, cfg)}


def _infer_depth(blocks: Counter, has_bottlenecks: bool) -> int:
    """The depth whose blocks are most like those that there are."""

    def distance(depth: int) -> int:
        expected = {
            (stage, block)
            for stage, number in zip("2345", _BLOCKS_PER_STAGE[depth])
            for block in map(str, range(number))
        }
        # A block that is missing counts more than a stray name.
        surplus = sum(number for block, number in blocks.items() if block not in expected)
        return surplus + 5 * len(expected.difference(blocks))

    depths = (50, 101, 152) if has_bottlenecks else (18, 34)
    return min(depths, key=distance)


def _infer_deformation(
    path: str, shapes: dict[str, tuple[int, ...]], blocks: Counter, cfg: CfgNode | None
) -> dict[str, Any]:
    name = r"(?:conv2_offset|conv_offsets\.\d+)\.(?:weight|bias)"
    deformable = Counter(stage for stage, _ in _count(shapes, rf"res([2-5])\.(\d+)\.{name}"))
    per_stage = Counter(stage for stage, _ in blocks)
    stages = [2 * deformable[stage] > per_stage[stage] for stage in "2345"]
    if not any(stages):
        return {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": stages}
    # For each of 3x3 taps an offset in y and x, and if modulated a weight.
    channels = _most(shapes, rf"{BOTTOM_UP}\.res[2-5]\.\d+\.{name}", 18)
    kinds = {
        modulated: channels // per
        for modulated, per in ((False, 18), (True, 27))
        if channels % per == 0
    }
    if len(kinds) == 2:
        if cfg is None:
            raise InputError(
                f"Weights file {path}: {channels} offset channels are either {kinds[False]} groups "
                f"of 18 or {kinds[True]} modulated groups of 27. Of --config-file, "
                "MODEL.RESNETS.DEFORM_MODULATED decides"
            )
        kinds = {k: v for k, v in kinds.items() if k == cfg.MODEL.RESNETS.DEFORM_MODULATED}
    modulated, groups = next(iter(kinds.items()), (False, 1))
    return {
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": stages,
        "MODEL.RESNETS.DEFORM_MODULATED": modulated,
        "MODEL.RESNETS.DEFORM_NUM_GROUPS": groups,
    }


def _infer_head(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    convs = Counter()
    for name in shapes:
        match = re.fullmatch(r"head\.(?:cls|bbox)_subnet\.(\d+)\..+", name)
        if match:
            convs[match[1]] += 1
    num_convs = sum(number > 2 for number in convs.values())
    num_norms = sum(name.startswith("head.") and ".norm." in name for name in shapes)
    config = {
        "MODEL.GFL.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        NUM_CLASSES: _most(shapes, r"head\.cls_score\.\w+", COCO_CLASSES),
        "MODEL.GFL.NUM_CONVS": num_convs,
        "MODEL.GFL.NORM": "GN" if num_norms > num_convs else "",
        "MODEL.GFL.QUALITY": "joint",
        "MODEL.GFL.BOX_REPRESENTATION": "general",
        "MODEL.GFL.REG_MAX": max(_most(shapes, r"head\.bbox_pred\.\w+", 68) // 4 - 1, 1),
        "MODEL.GFL.BIN_WIDTH": 1.0,
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
    }
    if num_convs:
        subnet = r"head\.(cls|bbox)_subnet\.\d+\.(norm\.)?\w+"
        config["MODEL.GFL.CONV_DIM"] = _most(shapes, subnet, 256)
    quality = [name for name in shapes if name.startswith("head.quality_pred.")]
    if len(quality) > 1:
        # Of each of four sides the largest probabilities and their mean.
        inputs = _most(shapes, r"head\.quality_pred\.0\.weight", 20, axis=1)
        config["MODEL.GFL.QUALITY"] = "dgqp"
        config["MODEL.GFL.DGQP_TOPK"] = max(inputs // 4 - 1, 1)
        config["MODEL.GFL.DGQP_CHANNELS"] = _most(shapes, r"head\.quality_pred\.0\.\w+", 64)
    return config


def _count(names: Iterable[str], pattern: str) -> Counter:
    """How many names of the backbone the pattern fits, by its groups."""
    compiled = re.compile(rf"{BOTTOM_UP}\.{pattern}")
    matches = filter(None, map(compiled.fullmatch, names))
    return Counter(m.groups() for m in matches)


def _most(
    shapes: Mapping[str, tuple[int, ...]], pattern: str, default: int, *, axis: int = 0
) -> int:
    """The size that most tensors of these names have."""
    compiled = re.compile(pattern)
    sizes = (s[axis] for n, s in shapes.items() if compiled.fullmatch(n) and len(s) > axis)
    return _mode(sizes, default)


def _mode(values: Iterable[int], default: int) -> int:
    common = Counter(values).most_common(1)
    return common[0][0] if common else default


def describe(facts: Facts) -> str:
    """What weights are of, in words."""
    config = {key.rpartition(".")[2]: value for key, value in facts.config.items()}
    is_res2net = "SCALES" in config
    parts = [f"{'Res2Net' if is_res2net else 'ResNet'}-{config['DEPTH']}"]
    if is_res2net:
        parts[0] += f" ({config['SCALES']} splits of base width {config['BASE_WIDTH']})"
    elif config.get("NUM_GROUPS", 1) > 1:
        groups, width = config["NUM_GROUPS"], config["WIDTH_PER_GROUP"]
        parts[0] = f"ResNeXt-{config['DEPTH']} {groups}x{width}d"
    stages = [f"res{i}" for i, on in enumerate(config.get("DEFORM_ON_PER_STAGE", ()), 2) if on]
    if stages:
        kind = "modulated deformable" if config["DEFORM_MODULATED"] else "deformable"
        parts.append(f"{kind} convolutions in {', '.join(stages)}")
    if not facts.is_detector:
        return "; ".join([*parts, "no detector"])
    version = "GFLv2" if config["QUALITY"] == "dgqp" else "GFL"
    parts += [
        f"FPN of {config['OUT_CHANNELS']} channels",
        f"head of {config['NUM_CONVS']} + {config['NUM_CONVS']} convolutions",
        f"{config['NUM_CLASSES']} classes",
        f"{config['REG_MAX'] + 1} bins",
    ]
    return f"{version}: {'; '.join(parts)}"
