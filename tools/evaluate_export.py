#!/usr/bin/env python3
"""
Evaluate an exported detector, of any format, as train_net.py --eval-only does a checkpoint.

    python tools/evaluate_export.py gfl.onnx OUTPUT_DIR output/onnx

The datasets are those of DATASETS.TEST in the config that the file carries, or in --config-file.
KEY VALUE pairs at the end change the config: the data, the size of images and OUTPUT_DIR.
Thresholds are the file's. Results go to OUTPUT_DIR/inference. See docs/deployment.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger

from gfl_d2.config import load_config, parse_config
from gfl_d2.data import check_datasets, compare_classes, register_datasets
from gfl_d2.deploy.export import EXTENSIONS, ExportedModel, load_exported
from gfl_d2.deploy.export.check import make_batch, resize_pictures
from gfl_d2.engine import Trainer, check_evaluators, inference_folder
from gfl_d2.engine.runs import parse_arguments
from gfl_d2.errors import InputError, first_line
from gfl_d2.modeling.post_processing import Candidates, suppress


class Detector:
    """
    An exported file that is called as Detectron2's models are in evaluation.

    Attributes:
        seconds: how long the file ran for each image.
    """

    def __init__(self, exported: ExportedModel):
        self.exported = exported
        self.seconds: list[float] = []

    def __call__(self, inputs: list[dict]) -> list[dict]:
        return [{"instances": self._detect(item)} for item in inputs]

    def _detect(self, item: dict) -> Instances:
        info = self.exported.metadata
        pixels = [item["image"].numpy().transpose(1, 2, 0)]
        if info["size"]:
            pixels = resize_pictures(pixels, info)
        images, sizes = make_batch(pixels, info)
        start = time.perf_counter()
        outputs = self.exported(images, sizes)
        self.seconds.append(time.perf_counter() - start)
        candidates = Candidates(*(torch.from_numpy(np.array(x)) for x in outputs))
        # It leaves as they are detections that had NMS.
        (detections,) = suppress(
            candidates,
            [tuple(sizes[0].tolist())],
            nms_thresh=1.0 if info["nms"] else info["nms_threshold"],
            max_detections=info["max_detections"],
            class_agnostic=info["nms_class_agnostic"],
        )
        return detector_postprocess(detections, item["height"], item["width"])


def load(path: str, bf16: bool = False) -> ExportedModel:
    """Raises InputError if it is no exported file, or what runs it is not installed."""
    if bf16 and Path(path).suffix != EXTENSIONS["openvino"]:
        raise InputError(f"--bf16 is for OpenVINO's files, not for {path}")
    try:
        return load_exported(path, precision="bf16" if bf16 else "f32")
    except InputError:
        raise
    # Each format's package raises errors of its own.
    except Exception as error:
        raise InputError(
            f"{path} cannot be loaded as a file of tools/export_model.py: {first_line(error)}"
        ) from None


def make_config(path: str, info: dict, config_file: str | None, opts: list[str]) -> CfgNode:
    """For the data of an evaluation."""
    cfg = (
        load_config(config_file, opts) if config_file else parse_config(info["config"], path, opts)
    )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = info["input_format"]
    cfg.MODEL.GFL.NUM_CLASSES = info["num_classes"]
    cfg.TEST.DETECTIONS_PER_IMAGE = info["max_detections"]
    if info["size"]:
        cfg.INPUT.MIN_SIZE_TEST = 0  # images come as they are, and the detector resizes them
    cfg.freeze()
    return cfg


def evaluate(path: str, config_file: str | None, opts: list[str], bf16: bool = False) -> dict:
    """The results of Detectron2's evaluators, by task; by dataset if there are several."""
    setup_logger(name="gfl_d2")
    exported = load(path, bf16)
    info = exported.metadata
    cfg = make_config(path, info, config_file, opts)
    register_datasets(cfg, cfg.DATASETS.TEST)
    check_datasets(cfg, eval_only=True)
    check_evaluators(cfg.DATASETS.TEST)
    compare_classes(cfg.DATASETS.TEST, info["class_names"])
    setup_logger(inference_folder(cfg))
    detector = Detector(exported)
    results = Trainer.test(cfg, detector)
    # The first run of a file may compile it.
    seconds = detector.seconds[1:] or detector.seconds
    print(f"{path}: {len(seconds) / sum(seconds):.1f} images/s, without reading and resizing them")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("file", help=f"exported detector: {', '.join(EXTENSIONS.values())}")
    parser.add_argument("--config-file", help="instead of the config that the file carries")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (OpenVINO)")
    args = parse_arguments(parser)
    try:
        evaluate(args.file, args.config_file, args.opts, args.bf16)
    except InputError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
