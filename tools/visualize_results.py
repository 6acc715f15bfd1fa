#!/usr/bin/env python3
"""
Draw ground truth beside the detections that an evaluation wrote.

    python tools/visualize_results.py --config-file configs/gfl_R_18_FPN_bccd.yaml \
        --results output/inference/coco_instances_results.json --output detections.jpg

The images are those of the first dataset of ``DATASETS.TEST``. Options after a ``--`` change the
config, as for ``train_net.py``.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from pathlib import Path

import cv2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image

from gfl_d2.config import load_config
from gfl_d2.data import register_datasets
from gfl_d2.errors import InputError
from gfl_d2.visualization import draw_comparison, results_to_instances, stack_rows


def draw(dataset: str, results_file: Path, num_images: int, skip: int, score_thresh: float):
    """Pictures of ``num_images`` images of a dataset below each other, RGB."""
    metadata = MetadataCatalog.get(dataset)
    by_image = collections.defaultdict(list)
    for result in json.loads(results_file.read_text(encoding="utf-8")):
        by_image[result["image_id"]].append(result)
    rows = []
    for record in DatasetCatalog.get(dataset)[skip : skip + num_images]:
        image = read_image(record["file_name"], format="RGB")
        results = by_image[record["image_id"]]
        predictions = results_to_instances(results, image.shape[:2], metadata)
        rows.append(draw_comparison(image, record, predictions, metadata, score_thresh))
    return stack_rows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--results", type=Path, required=True, help="coco_instances_results.json")
    parser.add_argument("--output", required=True, help="picture to write")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--skip", type=int, default=0, help="images to skip before")
    parser.add_argument("--score-thresh", type=float, default=0.4)
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs, after a --")
    args = parser.parse_args()

    try:
        cfg = load_config(args.config_file, args.opts)
        register_datasets(cfg, required=cfg.DATASETS.TEST)
    except InputError as error:
        sys.exit(f"Error: {error}")
    picture = draw(
        cfg.DATASETS.TEST[0], args.results, args.num_images, args.skip, args.score_thresh
    )
    cv2.imwrite(args.output, picture[:, :, ::-1])


if __name__ == "__main__":
    main()
