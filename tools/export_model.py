#!/usr/bin/env python3
"""
Export a detector as a file that runs without Detectron2 and this project: from pixels to boxes.

    python tools/export_model.py --format onnx output/model_final.pth gfl.onnx

The file's detections are compared with the model's on pictures before it is written. The weights
need a config in ``--config-file`` unless they carry one. KEY VALUE pairs at the end change the
config, as for ``train_net.py``. See docs/deployment.md.
"""

from __future__ import annotations

import argparse
import sys

from gfl_d2.checkpoint import find_config
from gfl_d2.deploy.export import EXTENSIONS, ExportOptions, export_model
from gfl_d2.engine.runs import parse_arguments
from gfl_d2.errors import InputError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("weights", help="a checkpoint")
    parser.add_argument("output", help=f"file to write: {', '.join(EXTENSIONS.values())}")
    parser.add_argument("--format", required=True, choices=EXTENSIONS)
    parser.add_argument("--config-file", help="for weights that do not carry their config")
    parser.add_argument(
        "--nms", action=argparse.BooleanOptionalAction, default=True, help="in the graph"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--dynamic", action="store_true", help="free batch, height and width (the default)"
    )
    sizes.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="one size, and a batch of 1"
    )
    parser.add_argument("--half", action="store_true", help="backbone and head in float16")
    parser.add_argument(
        "--int8", metavar="FOLDER", help="quantize, calibrated with these images (onnx, openvino)"
    )
    parser.add_argument("--opset", type=int, default=ExportOptions.opset, help="of ONNX")
    parser.add_argument("--uint8", action="store_true", help="input in uint8, not float32")
    parser.add_argument(
        "--images", help="a picture, or a folder (8 are taken), to compare detections on"
    )
    args = parse_arguments(parser)
    try:
        opts = [*args.opts, "MODEL.WEIGHTS", args.weights, "MODEL.DEVICE", "cpu"]
        cfg = find_config(args.config_file, opts)
        options = ExportOptions(
            format=args.format,
            nms=args.nms,
            size=args.size and tuple(args.size),
            half=args.half,
            int8=args.int8,
            opset=args.opset,
            uint8=args.uint8,
        )
        check = export_model(cfg, options, args.output, args.images)
    except InputError as error:
        sys.exit(f"Error: {error}")
    print("\n".join(check.lines))
    print(f"{args.output}: {check}")
    if not check.detections:
        print("Nothing was detected, so nothing was compared: give photographs by --images")


if __name__ == "__main__":
    main()
