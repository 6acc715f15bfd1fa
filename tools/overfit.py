#!/usr/bin/env python3
"""
Check the whole chain, from annotations to AP: train a small model on a few images until it knows
them by heart, and evaluate it on the same images. A high AP says nothing of other images; a low one
says that something is broken in the data or in the code.

    python tools/overfit.py datasets/coco/annotations/instances_val2017.json datasets/coco/val2017

KEY VALUE pairs at the end are passed on to ``train_net.py``. An earlier output of this script is
deleted first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from gfl_d2.data import CocoData, read_coco, register_coco_format
from gfl_d2.engine.runs import make_fresh_folder, parse_arguments, run_training
from gfl_d2.errors import InputError
from gfl_d2.results import find_results
from gfl_d2.visualization import draw_results, read_images, save_picture

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "gfl_R_18_FPN_overfit.yaml"


def take_images(data: CocoData, count: int) -> dict:
    """
    The first ``count`` images that have boxes, in COCO format, with all classes.

    Raises:
        InputError: there are none, or none can be read.
    """
    if count < 1:
        raise InputError(f"--num-images must be 1 or more, not {count}")
    has_box = np.bincount(data.image_indices[~data.is_crowd], minlength=len(data.image_ids))
    annotated = itertools.compress(data.to_records(), has_box)
    ids = {record["image_id"] for record, _ in read_images(annotated, count)}
    if not ids:
        raise InputError(f"{data.json_file} has no image with a box")
    is_taken = np.array([id in ids for id in data.image_ids])
    data.take_boxes(is_taken[data.image_indices])
    content = data.to_coco()
    return {**content, "images": list(itertools.compress(content["images"], is_taken))}


def overfit(args: argparse.Namespace) -> float:
    """Train and evaluate. Returns AP in percent."""
    output, image_root = args.output.resolve(), args.image_root.resolve()
    data = read_coco(args.json_file, image_root, check_images=False)  # not all are needed
    data = take_images(data, args.num_images)
    make_fresh_folder(output, "tools/overfit.py")
    subset = output / "instances.json"
    subset.write_text(json.dumps(data), encoding="utf-8")
    register_coco_format("overfit", subset, image_root)
    print(f"{len(data['images'])} images, {len(data['annotations'])} annotations: {subset}")

    command = [
        *(sys.executable, str(ROOT / "train_net.py"), "--config-file", str(CONFIG)),
        *("DATASETS.REGISTER", str([["overfit", str(subset), str(image_root)]])),
        *("MODEL.GFL.NUM_CLASSES", str(len(data["categories"]))),
    ]
    ap = run_training([*command, *args.opts], output)["AP"]
    picture = output / "detections.jpg"
    save_picture(picture, draw_results("overfit", find_results(output, "overfit")))
    print(f"AP on the images trained on: {ap:.1f}\nGround truth beside detections: {picture}")
    return ap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("json_file", type=Path, help="annotations in COCO format")
    parser.add_argument("image_root", type=Path, help="folder of the images")
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--min-ap", type=float, default=60.0, help="fail below this AP")
    parser.add_argument("--output", type=Path, default=Path("output/overfit"))
    args = parse_arguments(parser)

    try:
        ap = overfit(args)
    except InputError as error:
        sys.exit(f"Error: {error}")
    if ap < args.min_ap:
        sys.exit(f"AP is {ap:.1f}, and at least {args.min_ap:g} was expected")


if __name__ == "__main__":
    main()
