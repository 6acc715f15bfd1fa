#!/usr/bin/env python3
"""
Convert weights of other code bases to Detectron2's format, or back.

    python tools/convert_weights.py gfl_r50_fpn_1x_coco.pth output/gfl_r50.pth
    python tools/convert_weights.py output/model_final.pth output/mmdet.pth --to mmdet

It reads GFL detectors of MMDetection 2 and 3, the authors' GFocal (v1) and GFocalV2 releases, and
ImageNet backbones with torchvision's names, and finds out which it is and which config fits. What
cannot be converted in full is refused. Options at the end change the config of --config-file, as
for train_net.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gfl_d2.config import load_config
from gfl_d2.conversion import (
    check_config,
    check_output,
    describe,
    find_configs,
    from_mmdet,
    read_checkpoint,
    suggest_command,
    to_mmdet,
    write_checkpoint,
)
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
    conversion = (to_mmdet if args.to == "mmdet" else from_mmdet)(checkpoint, cfg)
    facts = conversion.facts
    if cfg is not None:
        fitting = [(args.config_file, check_config(facts, cfg, args.config_file))]
    elif args.to == "mmdet":
        fitting = []
    else:
        fitting = find_configs(facts, CONFIGS.glob("*.yaml"))
    write_checkpoint(conversion.content, args.output, source=args.input)

    print(f"{args.input} is from {facts.source}: {describe(facts)}.")
    print(*conversion.notes, f"Written: {args.output}", sep="\n")
    if fitting and args.to != "mmdet":
        (config_file, changes), *others = fitting
        config_file = os.path.relpath(config_file)
        if changes:
            print(f"{config_file} fits with these changes:")
        else:
            also = "".join(f", {os.path.relpath(file)}" for file, _ in others)
            print(f"{config_file}{also} {'fit' if also else 'fits'}:")
        print(suggest_command(facts, config_file, changes, args.output, args.opts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("input", help="weights to convert")
    parser.add_argument("output", help="file to write, *.pth")
    parser.add_argument("--to", choices=("detectron2", "mmdet"), default="detectron2")
    parser.add_argument("--config-file", help="config that the weights have to fit")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs for --config-file")
    args = parser.parse_intermixed_args()

    try:
        convert(args)
    except InputError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
