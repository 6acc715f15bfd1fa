#!/usr/bin/env python3
"""
The demo: draw a small dataset, train GFL on it from random initialization, evaluate, and save a
picture of ground truth beside detections. Minutes on a CPU. Everything is written to
``output/demo``.

    python demo/run_demo.py

Options after a ``--`` are passed on to ``train_net.py``, e.g. ``-- SOLVER.MAX_ITER 100``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import cv2
from detectron2.data import DatasetCatalog, MetadataCatalog
from make_dataset import make_dataset

from gfl_d2.data import register_coco_format
from gfl_d2.engine import read_metrics
from gfl_d2.visualization import draw_comparison, results_to_instances, stack_rows

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "gfl_R_18_FPN_demo.yaml"
GENERATOR = ROOT / "demo" / "make_dataset.py"
# The config names these folders, relative to ROOT.
DATA = ROOT / "output" / "demo" / "data"
TRAINING = ROOT / "output" / "demo" / "train"
PICTURE = ROOT / "output" / "demo" / "detections.png"

SETTINGS = {"seed": 0, "num_train": 600, "num_val": 150, "width": 256, "height": 192}
REQUIRED_AP = 50.0
NUM_PICTURES = 4


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


def train(resume: bool, opts: list[str]) -> None:
    """Train and evaluate, in a process of its own, whose log goes where ours goes."""
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(CONFIG)]
    command += ["--resume"] if resume else []
    status = subprocess.run(command + opts, cwd=ROOT, check=False).returncode
    if status:
        sys.exit(f"The demo failed: train_net.py ended with status {status}")


def read_results() -> dict[str, float]:
    """AP of the evaluation after the last iteration, in percent: over all, and by class."""
    metrics = list(read_metrics(TRAINING).values())[-1]
    return {k[len("bbox/") :]: v for k, v in metrics.items() if k.startswith("bbox/")}


def print_table(results: dict[str, float]) -> None:
    per_class = {k[len("AP-") :]: v for k, v in results.items() if k.startswith("AP-")}
    overall = {k: v for k, v in results.items() if not k.startswith("AP-")}
    print("\nAP on the validation pictures, in percent")
    for table in (overall, per_class):
        print("  ".join(f"{name:>8}" for name in table))
        print("  ".join(f"{value:8.1f}" for value in table.values()))


def save_picture() -> None:
    """Ground truth beside detections, for the first few pictures with many objects."""
    register_coco_format("demo_val", DATA / "val.json", DATA / "val")
    metadata = MetadataCatalog.get("demo_val")
    crowded = [d for d in DatasetCatalog.get("demo_val") if len(d["annotations"]) >= 6]
    results = json.loads((TRAINING / "inference" / "coco_instances_results.json").read_text())
    rows = []
    for record in crowded[:NUM_PICTURES]:
        image = cv2.imread(record["file_name"])[:, :, ::-1]
        own = [r for r in results if r["image_id"] == record["image_id"]]
        predictions = results_to_instances(own, image.shape[:2], metadata)
        rows.append(draw_comparison(image, record, predictions, metadata, score_thresh=0.4))
    cv2.imwrite(str(PICTURE), stack_rows(rows)[:, :, ::-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--resume", action="store_true", help="go on with a training cut short")
    parser.add_argument("opts", nargs="*", help="options for train_net.py, after a --")
    args = parser.parse_args()

    start = time.monotonic()
    prepare_data()
    train(args.resume, args.opts)
    results = read_results()
    save_picture()
    print_table(results)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"\nGround truth beside detections: {PICTURE}\nThe demo took {minutes}:{seconds:02d}")
    if not results["AP"] >= REQUIRED_AP:  # so that NaN fails too
        sys.exit(f"The demo failed: AP is {results['AP']:.1f}, and {REQUIRED_AP:.0f} is required")


if __name__ == "__main__":
    main()
