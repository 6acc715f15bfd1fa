#!/usr/bin/env python3
"""
Check the whole chain, from annotations to AP, by training a small model on a few images until it
knows them by heart, and evaluating it on the same images. A high AP says nothing of how the model
does on other images; a low one says that something is broken in the data or in the code.

    python tools/overfit.py datasets/coco/annotations/instances_val2017.json datasets/coco/val2017

Options after a ``--`` are passed on to ``train_net.py``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from gfl_d2.engine import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "gfl_R_18_FPN_overfit.yaml"


def take_images(data: dict, count: int) -> dict:
    """The first ``count`` images of a COCO dataset that have annotations, and all categories."""
    annotated = {annotation["image_id"] for annotation in data["annotations"]}
    images = [image for image in data["images"] if image["id"] in annotated][:count]
    ids = {image["id"] for image in images}
    annotations = [a for a in data["annotations"] if a["image_id"] in ids]
    return {**data, "images": images, "annotations": annotations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("json_file", type=Path, help="annotations in COCO format")
    parser.add_argument("image_root", type=Path, help="folder of the images")
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--min-ap", type=float, default=60.0, help="fail below this AP")
    parser.add_argument("--output", type=Path, default=Path("output/overfit"))
    parser.add_argument("opts", nargs="*", help="options for train_net.py, after a --")
    args = parser.parse_args()

    data = take_images(json.loads(args.json_file.read_text(encoding="utf-8")), args.num_images)
    args.output.mkdir(parents=True, exist_ok=True)
    subset = args.output.resolve() / "instances.json"
    subset.write_text(json.dumps(data), encoding="utf-8")
    print(f"{len(data['images'])} images, {len(data['annotations'])} annotations: {subset}")

    command = [
        *(sys.executable, str(ROOT / "train_net.py"), "--config-file", str(CONFIG)),
        *("DATASETS.REGISTER", str([["overfit", str(subset), str(args.image_root.resolve())]])),
        *("MODEL.GFL.NUM_CLASSES", str(len(data["categories"]))),
        *("OUTPUT_DIR", str(args.output.resolve())),
    ]
    status = subprocess.run([*command, *args.opts], check=False).returncode
    if status:
        sys.exit(status)
    ap = list(read_metrics(args.output).values())[-1]["bbox/AP"]
    print(f"AP on the images trained on: {ap:.1f}")
    if not ap >= args.min_ap:  # so that NaN fails too
        sys.exit(f"AP is {ap:.1f}, and at least {args.min_ap:g} was expected")


if __name__ == "__main__":
    main()
