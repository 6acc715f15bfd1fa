"""
Which config weights need: the values that a config must have for weights to fit and to mean the
same, by key, e.g. ``{"MODEL.RESNETS.DEPTH": 50}``. This is the ``needed`` of the functions below.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.config import CfgNode

from ..config import load_config
from ..config_checks import get_value
from ..errors import InputError
from ..modeling.backbone import BLOCKS_PER_STAGE
from .names import BOTTOM_UP, Source

__all__ = ["check_config", "describe", "find_configs", "find_differences", "infer_config"]

# All of these evaluate alike, and training may start from weights with any.
_BATCH_NORMS = ("BN", "FrozenBN", "NaiveSyncBN", "SyncBN", "nnSyncBN")


def infer_config(source: Source, is_detector: bool, cfg: CfgNode | None) -> dict[str, Any]:
    """
    The config that weights need. Each value is read from one parameter: whether the others agree
    shows when their shapes are compared with those of the model. Raises InputError if the
    parameter is missing, or if ``cfg`` has to decide and is None.
    """
    needed = _infer_backbone(source)
    deformation = _infer_deformation(source, cfg)
    if not is_detector:
        # Weights for ImageNet are not deformable, whatever is made of them.
        return needed | deformation if len(deformation) > 1 else needed
    return {
        "MODEL.META_ARCHITECTURE": "GFL",
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        **needed,
        **deformation,
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": source.size("backbone.fpn_output3.weight"),
        "MODEL.FPN.NORM": "",
        "MODEL.FPN.FUSE_TYPE": "sum",
        **_infer_head(source),
    }


def _infer_backbone(source: Source) -> dict[str, Any]:
    block = f"{BOTTOM_UP}.res2.0"
    has_splits = source.is_res2net
    has_bottlenecks = has_splits or source.has(f"{block}.conv3")
    stem, last = (3 if has_splits else 1), (3 if has_bottlenecks else 2)
    out_channels = source.size(f"{block}.conv{last}.weight")
    width = source.size(f"{block}.conv1.weight")
    # Depths differ in the number of blocks in res4: the last of them must be there.
    depths = (152, 101, 50) if has_bottlenecks else (34, 18)
    last_blocks = {depth: BLOCKS_PER_STAGE[depth][2] - 1 for depth in depths}
    fitting = (d for d, i in last_blocks.items() if source.has(f"{BOTTOM_UP}.res4.{i}.conv1"))
    needed = {
        "MODEL.BACKBONE.NAME": f"build_gfl_{'res2net' if has_splits else 'resnet'}_fpn_backbone",
        "MODEL.RESNETS.DEPTH": next(fitting, depths[-1]),
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": source.size(f"{BOTTOM_UP}.stem.conv{stem}.weight"),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": out_channels,
        "MODEL.RESNETS.RES5_DILATION": 1,
    }
    if has_bottlenecks:
        needed["MODEL.RESNETS.STRIDE_IN_1X1"] = False
    if has_splits:
        needed["MODEL.RES2NET.SCALES"] = width // max(source.size(f"{block}.convs.0.weight"), 1)
        # Widths are rounded down, in proportion least in res5, which has 8 times the channels.
        width = source.size(f"{BOTTOM_UP}.res5.0.convs.0.weight")
        needed["MODEL.RES2NET.BASE_WIDTH"] = -(-width * 64 // max(out_channels // 4 * 8, 1))
        # A Res2Net has no use for these.
        needed["MODEL.RESNETS.NUM_GROUPS"], needed["MODEL.RESNETS.WIDTH_PER_GROUP"] = 1, 64
    elif has_bottlenecks:
        groups = max(width // max(source.size(f"{block}.conv2.weight", axis=1), 1), 1)
        needed["MODEL.RESNETS.NUM_GROUPS"] = groups
        needed["MODEL.RESNETS.WIDTH_PER_GROUP"] = width // groups
    return needed


def _infer_deformation(source: Source, cfg: CfgNode | None) -> dict[str, Any]:
    name = "conv_offsets.0" if source.is_res2net else "conv2_offset"
    offsets = [f"{BOTTOM_UP}.res{i}.0.{name}" for i in range(2, 6)]
    stages = [source.has(offset) for offset in offsets]
    if not any(stages):
        return {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": stages}
    # An offset in y and x for each of 3x3 taps, and a weight if they are modulated.
    channels = source.size(f"{offsets[stages.index(True)]}.weight")
    modulated = channels % 18 != 0 and channels % 27 == 0
    if channels % 54 == 0:
        if cfg is None:
            raise InputError(
                f"Weights file {source.path}: {channels} offset channels are either "
                f"{channels // 18} groups of 18 or {channels // 27} modulated groups of 27. Of "
                "--config-file, MODEL.RESNETS.DEFORM_MODULATED decides"
            )
        modulated = cfg.MODEL.RESNETS.DEFORM_MODULATED
    return {
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": stages,
        "MODEL.RESNETS.DEFORM_MODULATED": modulated,
        "MODEL.RESNETS.DEFORM_NUM_GROUPS": max(channels // (27 if modulated else 18), 1),
    }


def _infer_head(source: Source) -> dict[str, Any]:
    tower = "head.cls_subnet"
    num_convs = next(i for i in itertools.count() if not source.has(f"{tower}.{i}"))
    needed = {
        "MODEL.GFL.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        "MODEL.GFL.NUM_CLASSES": source.size("head.cls_score.weight"),
        "MODEL.GFL.NUM_CONVS": num_convs,
        "MODEL.GFL.NORM": "GN" if source.has(f"{tower}.0.norm") else "",
        "MODEL.GFL.QUALITY": "joint",
        "MODEL.GFL.BOX_REPRESENTATION": "general",
        "MODEL.GFL.REG_MAX": max(source.size("head.bbox_pred.weight") // 4 - 1, 1),
        "MODEL.GFL.BIN_WIDTH": 1.0,
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
    }
    if num_convs:
        needed["MODEL.GFL.CONV_DIM"] = source.size(f"{tower}.0.weight")
    if source.has("head.quality_pred.0"):
        # For each of four sides the largest probabilities and their mean.
        inputs = source.size("head.quality_pred.0.weight", axis=1)
        needed["MODEL.GFL.QUALITY"] = "dgqp"
        needed["MODEL.GFL.DGQP_TOPK"] = max(inputs // 4 - 1, 1)
        needed["MODEL.GFL.DGQP_CHANNELS"] = source.size("head.quality_pred.0.weight")
    return needed


def describe(needed: Mapping[str, Any]) -> str:
    """What weights are of, in words."""
    if "MODEL.TIMM.NAME" in needed:
        return f"{needed['MODEL.TIMM.NAME']} of timm; no detector"
    config = {key.rpartition(".")[2]: value for key, value in needed.items()}
    depth, groups = config["DEPTH"], config.get("NUM_GROUPS", 1)
    text = f"ResNet-{depth}"
    if "SCALES" in config:
        text = f"Res2Net-{depth} ({config['SCALES']} splits of base width {config['BASE_WIDTH']})"
    elif groups > 1:
        text = f"ResNeXt-{depth} {groups}x{config['WIDTH_PER_GROUP']}d"
    stages = [f"res{i}" for i, on in enumerate(config.get("DEFORM_ON_PER_STAGE", ()), 2) if on]
    if stages:
        kind = "modulated deformable" if config["DEFORM_MODULATED"] else "deformable"
        text += f"; {kind} convolutions in {', '.join(stages)}"
    if "NUM_CLASSES" not in config:
        return f"{text}; no detector"
    return (
        f"{'GFLv2' if config['QUALITY'] == 'dgqp' else 'GFL'}: {text}; "
        f"FPN of {config['OUT_CHANNELS']} channels; "
        f"head of {config['NUM_CONVS']} + {config['NUM_CONVS']} convolutions; "
        f"{config['NUM_CLASSES']} classes; {config['REG_MAX'] + 1} bins"
    )


def find_differences(needed: Mapping[str, Any], cfg: CfgNode) -> dict[str, Any]:
    """Those of the needed values that a config has not."""
    differences = {key: value for key, value in needed.items() if get_value(cfg, key) != value}
    if cfg.MODEL.RESNETS.NORM in _BATCH_NORMS:
        differences.pop("MODEL.RESNETS.NORM", None)
    is_detector, name = "MODEL.GFL.NUM_CLASSES" in needed, "MODEL.BACKBONE.NAME"
    # Weights of a plain ResNet alone suit every detector that has one.
    if not is_detector and "resnet" in needed[name] and "resnet" in get_value(cfg, name):
        differences.pop(name, None)
    return differences


def check_config(needed: Mapping[str, Any], cfg: CfgNode, config_file: str) -> dict[str, Any]:
    """
    Check that weights fit the config that a file has. What fits and yet has to be changed is
    returned: old anchor centers.

    Raises:
        InputError: they do not; the message names each key and both its values.
    """
    wrong = find_differences(needed, cfg)
    key = "MODEL.GFL.LEGACY_ANCHOR_CENTERS"
    advice = {key: wrong.pop(key)} if wrong.get(key) else {}
    if wrong:
        details = (f"{k} is {get_value(cfg, k)!r}, not {value!r}" for k, value in wrong.items())
        raise InputError(
            f"Config file '{config_file}' does not fit the weights, which are of "
            f"{describe(needed)}. In the config {'; '.join(details)}"
        )
    return advice


def find_configs(
    needed: Mapping[str, Any], config_files: Iterable[str | os.PathLike]
) -> dict[str, dict[str, Any]]:
    """
    The files that fit best, each with the keys that have to be changed, of which all have the same
    number. A backbone of another kind never fits.
    """
    found = {}
    for file in sorted(map(os.fspath, config_files)):
        differences = find_differences(needed, load_config(file, ["MODEL.DEVICE", "cpu"]))
        if "MODEL.BACKBONE.NAME" not in differences:
            found[file] = differences
    fewest = min(map(len, found.values()), default=0)
    return {file: changes for file, changes in found.items() if len(changes) == fewest}
