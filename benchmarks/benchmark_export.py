#!/usr/bin/env python3
"""
Time of exported detectors beside the model's own, in one process, taking turns: from the pixels of
an image, (height, width, 3) in uint8, to boxes.

    python benchmarks/benchmark_export.py output/exports --size 480 640

Weights are random, as in benchmark.py, and int8 is calibrated with noise. FOLDER keeps the model
and its files: take another one to measure another.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from benchmarking import (
    GFL_CONFIG,
    Step,
    Workload,
    build_gfl,
    describe_machine,
    infer_step,
    make_inputs,
    measure,
    print_table,
)
from PIL import Image

from gfl_d2 import load_config
from gfl_d2.deploy import Predictor, has_fast_bfloat16
from gfl_d2.deploy.export import EXTENSIONS, ExportOptions, export_model, load_exported
from gfl_d2.deploy.export.check import make_batch
from gfl_d2.errors import InputError

CALIBRATION_IMAGES = 10
INT8 = ("onnx", "openvino")


def write_model(folder: Path, work: Workload, config_file: str) -> Path:
    """A config, which names weights and a threshold beside it, and images to calibrate with."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    config, weights = folder / "model.yaml", folder / "model.pth"
    if config.is_file():
        return config
    noise = np.random.default_rng(0)
    for i in range(CALIBRATION_IMAGES):
        pixels = noise.integers(0, 256, (*work.size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    opts = ["TEST.OPTIMIZE", False]  # or its norms are gone
    model = build_gfl(work, config_file, is_training=False, opts=opts)
    infer_step(model, make_inputs(work), work)
    torch.save({"model": model.state_dict()}, weights)
    opts = [
        *("MODEL.WEIGHTS", str(weights.resolve()), "MODEL.DEVICE", "cpu"),
        *("MODEL.GFL.NUM_CLASSES", work.classes, "INPUT.MIN_SIZE_TEST", 0),
        *("MODEL.GFL.SCORE_THRESH_TEST", model.test_score_thresh),
    ]
    config.write_text(load_config(config_file, opts).dump(), encoding="utf-8")
    return config


def list_subjects(config: Path, pixels: np.ndarray) -> dict[str, Callable[[], Step]]:
    """Functions that make the step of each, by its name in the table."""
    low = has_fast_bfloat16("cpu")
    options = {"model": [], "model compiled": ["TEST.COMPILE", "default"]}
    options.update({"model bfloat16": ["TEST.PRECISION", "bfloat16"]} if low else {})
    subjects = {
        name: functools.partial(model_step, config, opts, pixels) for name, opts in options.items()
    }
    for name in EXTENSIONS:
        subjects[name] = functools.partial(file_step, config, name, pixels)
        if name == "openvino" and low:
            subjects["openvino bfloat16"] = functools.partial(subjects[name], precision="bf16")
        if name in INT8:
            subjects[f"{name} int8"] = functools.partial(subjects[name], int8=True)
    return subjects


def model_step(config: Path, opts: list, pixels: np.ndarray) -> Step:
    model = Predictor(load_config(str(config), opts)).model

    @torch.no_grad()
    def step():
        return model([{"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy())}])

    return step


def file_step(
    config: Path, name: str, pixels: np.ndarray, int8: bool = False, precision: str = "f32"
) -> Step:
    """The file is exported if it is not there."""
    path = config.with_name(f"{name}{'-int8' * int8}{EXTENSIONS[name]}")
    if not path.is_file():
        print(f"Exporting {path}", flush=True)
        images = config.parent / "images"
        options = ExportOptions(format=name, int8=str(images) if int8 else None, uint8=True)
        export_model(load_config(str(config)), options, path, str(images / "0.png"))
    detector = load_exported(path, torch.get_num_threads(), precision)
    return lambda: detector(*make_batch([pixels], detector.metadata))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="for the model and its exported files")
    parser.add_argument("--config-file", default=GFL_CONFIG)
    parser.add_argument("--skip", nargs="*", default=[], help="subjects to leave out, e.g. onnx")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], help="height and width")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--candidates", type=int, default=1000, help="pairs above the threshold")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    work = Workload(size=tuple(args.size), classes=args.classes, candidates=args.candidates)
    machine = describe_machine("cpu")
    print(", ".join(f"{k} {v}" for k, v in {**machine, **vars(args)}.items()))
    (item,) = make_inputs(work)
    pixels = np.ascontiguousarray(item["image"].numpy().transpose(1, 2, 0))
    try:
        config = write_model(args.folder, work, args.config_file)
        subjects = list_subjects(config, pixels)
        subjects = {name: make for name, make in subjects.items() if name not in args.skip}
        results, _ = measure(subjects, "cpu", args.repeats, args.warmup)
    except InputError as error:
        sys.exit(f"Error: {error}")
    print_table(results)


if __name__ == "__main__":
    main()
