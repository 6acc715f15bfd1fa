#!/usr/bin/env python3
"""
Draw what the model gets in training: images and boxes of DATASETS.TRAIN after all augmentations.

    python tools/visualize_data.py --config-file configs/gfl_R_18_FPN_bccd.yaml \
        --output data.jpg INPUT.MOSAIC.PROB 0.5

Each row has an image as it is annotated, and then as the model gets it, several times. Crowds are
marked: the model does not learn them. KEY VALUE pairs at the end change the config, as for
``train_net.py``; SEED repeats a picture.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.common import DatasetFromList
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.utils.env import seed_all_rng

from gfl_d2.augmentation_config import check_augmentation_config
from gfl_d2.config import load_config
from gfl_d2.data import (
    GFLDatasetMapper,
    check_registered,
    load_training_dicts,
    register_datasets,
    resolve_num_classes,
)
from gfl_d2.engine.runs import parse_arguments
from gfl_d2.errors import InputError
from gfl_d2.visualization import (
    check_picture_path,
    draw_annotations,
    read_images,
    save_picture,
    stack_columns,
    stack_rows,
)


def draw_data(cfg: CfgNode, num_images: int, skip: int, samples: int) -> np.ndarray:
    """
    Draw images of the first ``DATASETS.TRAIN``, one a row, as annotated and in ``samples`` random
    augmentations. ``skip`` images are left out first.

    Returns:
        ndarray: RGB, uint8, shape (H, W, 3).

    Raises:
        InputError: there is no such image, or none can be read.
    """
    records = DatasetFromList(load_training_dicts(cfg), copy=False)
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    mapper = GFLDatasetMapper(cfg, is_train=True, records=records)
    chosen = (records[i] for i in range(skip, len(records)))
    rows = []
    for record, image in read_images(chosen, num_images):
        name = record["file_name"].rpartition("/")[2]
        row = [draw_annotations(image, record.get("annotations", []), metadata, "annotated", name)]
        for _ in range(samples):
            pixels, annotations = mapper.augment(record)
            height, width = pixels.shape[:2]
            rgb = convert_image_to_rgb(pixels, cfg.INPUT.FORMAT)
            number = sum(not a.get("iscrowd", 0) for a in annotations)
            title = f"{width} x {height}, {number} boxes"
            row.append(draw_annotations(rgb, annotations, metadata, title))
        rows.append(stack_columns(row))
    if not rows:
        raise InputError(f"Nothing to draw: DATASETS.TRAIN has {len(records)} images")
    return stack_rows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", required=True, help="picture to write")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--skip", type=int, default=0, help="images to leave out first")
    parser.add_argument("--samples", type=int, default=3, help="of each image, augmented")
    args = parse_arguments(parser)

    try:
        if args.num_images < 1 or args.skip < 0 or args.samples < 1:
            raise InputError("--num-images and --samples must be 1 or more, --skip 0 or more")
        check_picture_path(args.output)
        cfg = load_config(args.config_file, args.opts)
        check_augmentation_config(cfg)
        if not cfg.DATASETS.TRAIN:
            raise InputError("DATASETS.TRAIN names no dataset")
        register_datasets(cfg, cfg.DATASETS.TRAIN)
        check_registered(cfg, cfg.DATASETS.TRAIN)
        cfg = resolve_num_classes(cfg)
        seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)
        picture = draw_data(cfg, args.num_images, args.skip, args.samples)
        save_picture(args.output, picture)
        print(f"Images as annotated, and as the model gets them: {args.output}")
    except InputError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
