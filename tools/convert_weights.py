#!/usr/bin/env python3
"""
Convert weights of other code bases to Detectron2's format, or back.

    python tools/convert_weights.py gfl_r50_fpn_1x_coco.pth output/gfl_r50.pth
    python tools/convert_weights.py output/model_final.pth output/mmdet.pth --to mmdet

It reads GFL detectors of MMDetection 2 and 3, the authors' GFocal (v1) and GFocalV2 releases, and
ImageNet backbones with torchvision's names or of timm (.pth, .safetensors), and finds out which it
is and which config fits. What cannot be converted in full is refused. Options at the end change the
config of --config-file, as for train_net.py. The file that is written for Detectron2 has the names
of the classes, if they are known, and the config, if it is given or only one fits but for its head.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from detectron2.config import CfgNode

from gfl_d2.checkpoint import describe_model
from gfl_d2.config import load_config
from gfl_d2.conversion import (
    TIMM_BUILDER,
    Checkpoint,
    check_config,
    check_output,
    describe,
    find_configs,
    find_timm_model,
    from_mmdet,
    from_timm,
    read_checkpoint,
    to_mmdet,
    write_checkpoint,
)
from gfl_d2.engine.runs import parse_arguments
from gfl_d2.errors import InputError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def convert(args: argparse.Namespace) -> None:
    """
    Write ``args.output`` and print what it is.

    Raises:
        InputError: the weights cannot be converted in full, or do not fit the config that is given.
            Nothing is written then.
    """
    check_output(args.output, source=args.input)
    if args.opts and not args.config_file:
        raise InputError(f"{' '.join(args.opts)}: options change a config, so give --config-file")
    cfg = None
    if args.config_file:
        cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])

    checkpoint = read_checkpoint(args.input)
    timm_model = "" if args.to == "mmdet" else choose_timm_model(checkpoint, cfg)
    if timm_model:
        conversion = from_timm(checkpoint, timm_model)
    else:
        conversion = (to_mmdet if args.to == "mmdet" else from_mmdet)(checkpoint, cfg)
    needed = conversion.needed
    if cfg is not None:
        fitting = {args.config_file: check_config(needed, cfg, args.config_file)}
    elif args.to == "mmdet":
        fitting = {}
    else:
        fitting = find_configs(needed, CONFIGS.glob("gfl_*.yaml"))
    content, is_detector = conversion.content, "MODEL.GFL.NUM_CLASSES" in needed
    config_file, changes = next(iter(fitting.items()), ("", {}))
    opts = list(args.opts)
    for key, value in changes.items():
        opts += [key, "FrozenBN" if key == "MODEL.RESNETS.NORM" else str(value)]
    # A config of another backbone is a suggestion: its data and image sizes are those of others.
    is_known = len(fitting) == 1 and all(key.startswith("MODEL.GFL.") for key in changes)
    has_config = is_known and is_detector and args.to != "mmdet"
    if has_config:
        cfg = load_config(config_file, [*opts, "MODEL.DEVICE", "cpu"])
        content = {**describe_model(cfg, content.get("class_names")), **content}
    write_checkpoint(content, args.output)

    print(f"{args.input} is from {conversion.source}: {describe(needed)}.")
    if checkpoint.ignored:
        print(f"Ignored: {', '.join(checkpoint.ignored)}.")
    print(*conversion.notes, f"Written: {args.output}", sep="\n")
    if fitting and args.to != "mmdet":
        files = [os.path.relpath(file) for file in fitting]
        if has_config:
            changed = f", changed by {shlex.join(opts)}," if opts else ""
            print(f"{files[0]}{changed} fits, and the file has this config:")
        elif changes:
            print(f"{files[0]} fits with these changes:")
        elif len(files) > 1:
            print(f"{', '.join(files)} fit (with --config-file the written file has that config):")
        else:
            print(f"{files[0]} fits:")
        words = ["python", "train_net.py"]
        words += [] if has_config else ["--config-file", files[0]]
        # Weights of a backbone alone are not evaluated: training starts from them.
        words += ["--eval-only"] if is_detector else []
        words += ["MODEL.WEIGHTS", args.output, *([] if has_config else opts)]
        print(shlex.join(words))


def choose_timm_model(checkpoint: Checkpoint, cfg: CfgNode | None) -> str:
    """The model of timm that the config names, or else the weights are of. "" if there is none."""
    if cfg is not None:
        return cfg.MODEL.TIMM.NAME if cfg.MODEL.BACKBONE.NAME == TIMM_BUILDER else ""
    if any(re.match(r"(backbone|neck|bbox_head|layer\d)\.", name) for name in checkpoint.weights):
        return ""  # ResNets, and what has one
    cfgs = [
        load_config(str(p), ["MODEL.DEVICE", "cpu"]) for p in sorted(CONFIGS.glob("gfl_*.yaml"))
    ]
    names = (c.MODEL.TIMM.NAME for c in cfgs if c.MODEL.BACKBONE.NAME == TIMM_BUILDER)
    return find_timm_model(checkpoint, dict.fromkeys(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("input", help="weights to convert")
    parser.add_argument("output", help="file to write, *.pth")
    parser.add_argument("--to", choices=("detectron2", "mmdet"), default="detectron2")
    parser.add_argument("--config-file", help="config that the weights have to fit")
    args = parse_arguments(parser)

    try:
        convert(args)
    except InputError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
