#!/usr/bin/env python3
"""
Draw ground truth beside the detections that an evaluation wrote.

    python tools/visualize_results.py --config-file configs/gfl_R_18_FPN_bccd.yaml \
        --results output --output detections.jpg

The images are those of the first dataset of ``DATASETS.TEST``. KEY VALUE pairs at the end change
the config, as for ``train_net.py``.
"""

from __future__ import annotations

import argparse
import sys

from gfl_d2.config import load_config
from gfl_d2.data import check_registered, loading, register_datasets
from gfl_d2.engine.runs import parse_arguments
from gfl_d2.errors import InputError
from gfl_d2.results import find_results
from gfl_d2.visualization import check_picture_path, draw_results, save_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument(
        "--results", help="OUTPUT_DIR of the run, by default the config's, or a file of results"
    )
    parser.add_argument("--output", required=True, help="picture to write")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--skip", type=int, default=0, help="images to leave out first")
    parser.add_argument("--score-thresh", type=float, default=0.4)
    args = parse_arguments(parser)

    try:
        check_picture_path(args.output)
        cfg = load_config(args.config_file, args.opts)
        if not cfg.DATASETS.TEST:
            raise InputError("DATASETS.TEST names no dataset")
        dataset = cfg.DATASETS.TEST[0]
        register_datasets(cfg, [dataset], check_images=False)
        check_registered(cfg, [dataset])
        results = find_results(args.results or cfg.OUTPUT_DIR, dataset)
        with loading([dataset]):
            picture = draw_results(
                dataset, results, args.num_images, args.skip, score_thresh=args.score_thresh
            )
        save_picture(args.output, picture)
        print(f"Ground truth beside detections: {args.output}")
    except InputError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
