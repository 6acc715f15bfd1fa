#!/usr/bin/env python3
"""
The demo: draw a small dataset, train GFL on it from random initialization, evaluate, and save a
picture of ground truth beside detections. It takes minutes on a CPU.

    python demo/run_demo.py

Everything is written to ``output/demo``; what an earlier demo trained there is deleted first.
KEY VALUE pairs are passed on to ``train_net.py``, for instance ``SOLVER.MAX_ITER 100``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from make_dataset import make_dataset

from gfl_d2.data import register_coco_format
from gfl_d2.engine.runs import make_fresh_folder, parse_arguments, run_training
from gfl_d2.errors import InputError
from gfl_d2.results import find_results
from gfl_d2.visualization import draw_results, save_picture

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "gfl_R_18_FPN_demo.yaml"
GENERATOR = ROOT / "demo" / "make_dataset.py"
# The config names these folders, relative to ROOT.
DATA = ROOT / "output" / "demo" / "data"
TRAINING = ROOT / "output" / "demo" / "train"
PICTURE = ROOT / "output" / "demo" / "detections.png"

SETTINGS = {"seed": 0, "num_train": 600, "num_val": 150, "width": 256, "height": 192}
REQUIRED_AP = 50.0


def prepare_data() -> None:
    """Draw the dataset, unless it is there already."""
    if all(is_up_to_date(split) for split in ("train", "val")):
        print(f"The dataset is there: {DATA}", flush=True)
        return
    print(f"Drawing the dataset: {DATA}", flush=True)
    make_dataset(str(DATA), **SETTINGS)


def is_up_to_date(split: str) -> bool:
    """Whether a split has been drawn with these settings, by the program as it is now."""
    annotations = DATA / f"{split}.json"
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        is_newer = annotations.stat().st_mtime > GENERATOR.stat().st_mtime
        return is_newer and content["info"]["settings"] == SETTINGS
    except (OSError, ValueError, KeyError):
        return False


def train(opts: list[str]) -> dict[str, float]:
    """Train and evaluate. Returns AP in percent: over all classes, and of each."""
    make_fresh_folder(TRAINING, "demo/run_demo.py")
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(CONFIG), *opts]
    return run_training(command, TRAINING)


def draw_picture() -> None:
    """Draw the first few validation pictures that have many objects."""
    register_coco_format("demo_val", DATA / "val.json", DATA / "val")
    results = find_results(TRAINING, "demo_val")
    save_picture(PICTURE, draw_results("demo_val", results, min_boxes=6))


def print_table(results: dict[str, float]) -> None:
    per_class = {k[len("AP-") :]: v for k, v in results.items() if k.startswith("AP-")}
    overall = {k: v for k, v in results.items() if not k.startswith("AP-")}
    print("\nAP on the validation pictures, in percent")
    for table in (overall, per_class):
        print("  ".join(f"{name:>8}" for name in table))
        print("  ".join(f"{value:8.1f}" for value in table.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    args = parse_arguments(parser)

    start = time.monotonic()
    os.chdir(ROOT)
    prepare_data()
    try:
        results = train(args.opts)
        draw_picture()
    except InputError as error:
        sys.exit(f"The demo failed: {error}")
    print_table(results)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"\nGround truth beside detections: {PICTURE}\nThe demo took {minutes}:{seconds:02d}")
    if results["AP"] < REQUIRED_AP:
        sys.exit(f"The demo failed: AP is {results['AP']:.1f}, and {REQUIRED_AP:.0f} is required")


if __name__ == "__main__":
    main()
