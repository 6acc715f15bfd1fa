#!/usr/bin/env python3
"""
Measure on an annotated dataset what TEST.UNCERTAINTY says of the errors of box sides.

    python tools/measure_uncertainty.py output/model_final.pth --output uncertainty.png

The dataset is the first of ``DATASETS.TEST``. The weights need a config in ``--config-file`` unless
they carry one. KEY VALUE pairs at the end change the config, as for ``train_net.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances
from tqdm import tqdm

from gfl_d2.checkpoint import GFLCheckpointer, find_config
from gfl_d2.data import GFLDatasetMapper, loading, register_datasets
from gfl_d2.deploy import prepare_for_inference
from gfl_d2.distributions import ground_truth
from gfl_d2.distributions.measures import collect_errors, plot_errors, summarize
from gfl_d2.engine.runs import parse_arguments
from gfl_d2.errors import InputError
from gfl_d2.visualization import check_picture_path, save_plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("weights", help="a checkpoint")
    parser.add_argument("--config-file", help="for weights that do not carry their config")
    parser.add_argument("--output", required=True, help="picture to write")
    parser.add_argument("--confidence-threshold", type=float, default=0.3)
    args = parse_arguments(parser)
    opts = [*args.opts, "TEST.UNCERTAINTY", "True", "MODEL.WEIGHTS", args.weights]
    try:
        check_picture_path(args.output, is_plot=True)
        cfg = find_config(args.config_file, opts)
        if not cfg.DATASETS.TEST:
            raise InputError("DATASETS.TEST names no dataset")
        errors = collect_errors(detect_all(cfg, args.weights, args.confidence_threshold))
        for name, value in summarize(errors).items():
            print(f"{name:45} {value:.4g}")
        save_plot(args.output, plot_errors(errors, cfg.DATASETS.TEST[0]), dpi=70)
    except InputError as error:
        sys.exit(f"Error: {error}")


@torch.no_grad()
def detect_all(
    cfg: CfgNode, weights: str, score_thresh: float
) -> Iterator[tuple[Instances, torch.Tensor, torch.Tensor]]:
    """Of each image the detections, and boxes and classes of the ground truth."""
    dataset = cfg.DATASETS.TEST[0]
    register_datasets(cfg, [dataset])
    with loading([dataset]):
        records = DatasetCatalog.get(dataset)
    model = build_model(cfg)
    GFLCheckpointer(model, complete=True, averaged=cfg.MODEL_EMA.ENABLED).load(weights)
    model, mapper = prepare_for_inference(cfg, model), GFLDatasetMapper(cfg, is_train=False)
    for record in tqdm(records, desc="Detecting", delay=2):
        found = model([mapper(record)])[0]["instances"].to("cpu")
        yield found[found.scores >= score_thresh], *ground_truth(record)


if __name__ == "__main__":
    main()
