#!/usr/bin/env python3
"""
Draw the detections of an image with the learned distributions of their four sides.

    python tools/visualize_distributions.py output/model_final.pth --input image.jpg \
        --output distributions.png --html distributions.html

With ``--dataset``, a name of ``DATASETS.TEST`` or another that the config registers, ``--input``
is an image of it, by file name or id, and its ground truth is drawn, too. The weights need a config
in ``--config-file`` unless they carry one. KEY VALUE pairs at the end change the config, as for
``train_net.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from gfl_d2.checkpoint import GFLCheckpointer, find_config
from gfl_d2.data import GFLDatasetMapper, loading, read_image, register_datasets
from gfl_d2.deploy import prepare_for_inference
from gfl_d2.distributions import (
    detect_with_distributions,
    draw_distributions,
    ground_truth,
    make_page,
    match_ground_truth,
)
from gfl_d2.engine.runs import parse_arguments
from gfl_d2.errors import InputError, name_some
from gfl_d2.files import atomic_write
from gfl_d2.visualization import check_picture_path, save_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("weights", help="a checkpoint")
    parser.add_argument("--config-file", help="for weights that do not carry their config")
    parser.add_argument("--input", required=True, help="an image, or one of --dataset")
    parser.add_argument("--dataset", help="registered name; its ground truth is drawn")
    parser.add_argument("--output", help="picture to write")
    parser.add_argument("--html", help="page to write: one file, for any browser")
    parser.add_argument("--confidence-threshold", type=float, default=0.3)
    parser.add_argument(
        "--detections", type=int, nargs="+", help="which to draw in detail, 0 for the best score"
    )
    args = parse_arguments(parser)
    if not args.output and not args.html:
        parser.error("--output or --html is needed")
    try:
        run(args)
    except InputError as error:
        sys.exit(f"Error: {error}")


def run(args: argparse.Namespace) -> None:
    if args.output:
        check_picture_path(args.output)
    if args.html and not Path(args.html).parent.is_dir():
        raise InputError(f"--html {args.html}: its folder does not exist")
    one_view = ["TEST.AUG.ENABLED", False, "TEST.TILES.SIZE", 0]  # boxes of several are merged
    opts = [*args.opts, "MODEL.WEIGHTS", args.weights, *one_view]
    cfg = find_config(args.config_file, opts)
    record = find_record(cfg, args.dataset, args.input)
    image = read_image(record["file_name"], format="RGB")
    inputs = GFLDatasetMapper(cfg, is_train=False)(record)
    inputs["height"], inputs["width"] = image.shape[:2]
    model = build_model(cfg)
    checkpointer = GFLCheckpointer(model, complete=True, averaged=cfg.MODEL_EMA.ENABLED)
    names = checkpointer.load(args.weights).get("class_names")
    if args.dataset and not names:
        names = MetadataCatalog.get(args.dataset).get("thing_classes")
    names = names or [f"class {i}" for i in range(cfg.MODEL.GFL.NUM_CLASSES)]
    found = detect_with_distributions(prepare_for_inference(cfg, model), inputs)
    gt_boxes, targets = None, None
    if args.dataset:
        gt_boxes, classes = ground_truth(record)
        match = match_ground_truth(found, gt_boxes, classes)
        targets = torch.full((len(found), 4), torch.nan)
        targets[match >= 0] = gt_boxes[match[match >= 0]]
    if args.html:
        page = make_page(
            image, found, names, Path(record["file_name"]).name, targets, gt_boxes,
            args.confidence_threshold,
        )  # fmt: skip
        try:
            with atomic_write(args.html, "w") as file:
                file.write(page)
        except OSError as error:
            raise InputError(f"--html {args.html} cannot be written: {error}") from None
        print(f"Written: {args.html}")
    if args.output:
        number = int((found.scores >= args.confidence_threshold).sum())  # in order of scores
        chosen = list(range(min(number, 4))) if args.detections is None else args.detections
        if any(not 0 <= i < number for i in chosen):
            raise InputError(
                f"--detections {' '.join(map(str, chosen))}: there are {number} that score "
                f"{args.confidence_threshold:g} or more, counted from 0"
            )
        targets = targets if targets is None else targets[:number]
        save_picture(
            args.output, draw_distributions(image, found[:number], names, chosen, targets, gt_boxes)
        )
        print(f"Written: {args.output}")


def find_record(cfg: CfgNode, dataset: str | None, image: str) -> dict:
    """
    The image in Detectron2's format.

    Raises:
        InputError: the dataset does not have it, or several that it may be.
    """
    if not dataset:
        return {"file_name": image}
    register_datasets(cfg, [dataset], check_images=False)
    with loading([dataset]):
        records = DatasetCatalog.get(dataset)
    by_id = [record for record in records if image == str(record.get("image_id"))]
    name = "/" + Path(image).as_posix()
    by_name = [r for r in records if ("/" + Path(r["file_name"]).as_posix()).endswith(name)]
    found = by_id or by_name
    if len(found) == 1:
        return found[0]
    if found:
        some = name_some(record["file_name"] for record in found)
        raise InputError(f"--input {image}: '{dataset}' has several such images: {some}")
    some = name_some(Path(record["file_name"]).name for record in records)
    raise InputError(f"--input {image}: '{dataset}' has no such image; it has {some}")


if __name__ == "__main__":
    main()
