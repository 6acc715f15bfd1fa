#!/usr/bin/env python3
"""
Time and peak memory of GFL beside Detectron2's RetinaNet and FCOS, in one process, taking turns.

    python benchmarks/benchmark.py infer --size 480 640 --precision fp32 bf16
    python benchmarks/benchmark.py train --batch 2 --boxes 10
    python benchmarks/benchmark.py loss --size 800 1216 --batch 2 --boxes 200
    python benchmarks/benchmark.py assign --size 800 1216 --batch 2 --boxes 200
    python benchmarks/benchmark.py post --candidates 3500
    python benchmarks/benchmark.py loss --skip RetinaNet FCOS --vary boxes 0 20 200 5000

`infer` is everything from the image tensor to detections, `train` a step with backward pass and
optimizer, `loss` what follows the head, forward and backward, `assign` the assignment (against the
plain algorithm, which computes distances to all anchors), `post` the post-processing. Weights are
random, classifiers scaled to logits with a standard deviation of 1, and the score threshold of each
model set so that `--candidates` pairs of an image pass it.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from benchmarking import (
    GFL_CONFIG,
    MODES,
    PRECISIONS,
    Step,
    Workload,
    assign_steps,
    build_fcos,
    build_gfl,
    build_retinanet,
    describe_machine,
    make_inputs,
    make_step,
    measure,
    print_table,
)

from gfl_d2.errors import InputError

VARIED = {
    "size": lambda value: (value, value),
    **dict.fromkeys(("batch", "boxes", "classes", "candidates"), int),
}


def list_subjects(args: argparse.Namespace, work: Workload) -> dict[str, Callable[[], Step]]:
    """Functions that make the step of each model in each precision, by the name in the table."""
    inputs = make_inputs(work)
    if args.mode == "assign":
        steps = assign_steps(build_gfl(work, args.config_file), inputs)
        return {name: lambda s=step: s for name, step in steps.items() if name not in args.skip}
    is_training = args.mode in ("train", "loss")
    configs = {"GFL": args.config_file, **{Path(path).stem: path for path in args.others}}
    builders = {
        name: functools.partial(build_gfl, config_file=path, is_training=is_training)
        for name, path in configs.items()
    }
    if args.compile:
        builders["GFL compiled"] = functools.partial(builders["GFL"], compile_mode=args.compile)
    if args.opts:
        name = " ".join(["GFL", *args.opts])
        builders[name] = functools.partial(builders["GFL"], opts=args.opts)
    builders.update({"RetinaNet": build_retinanet, "FCOS": build_fcos})
    subjects = {}
    for precision in args.precision:
        here = replace(work, precision=precision)
        suffix = f" {precision}" if len(args.precision) > 1 else ""
        for name, build in builders.items():
            if name not in args.skip:
                make = functools.partial(make_step, args.mode, build, inputs, here)
                subjects[name + suffix] = make
    return subjects


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("mode", choices=[*MODES, "assign"])
    parser.add_argument("--config-file", default=GFL_CONFIG, help="of GFL")
    parser.add_argument("--others", nargs="*", default=[], help="more configs to compare")
    parser.add_argument("--skip", nargs="*", default=[], help="subjects to leave out, e.g. FCOS")
    parser.add_argument("--compile", default="", metavar="MODE", help="GFL by torch.compile, too")
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="GFL with these changes, too"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], help="height and width")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--boxes", type=int, default=20, help="ground-truth boxes an image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--candidates", type=int, default=1000, help="pairs above the threshold")
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=["fp32"])
    parser.add_argument(
        "--vary",
        nargs="+",
        metavar=("NAME", "VALUE"),
        help=f"an option ({', '.join(VARIED)}) and the values to give it; sizes are square",
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    if args.vary and (args.vary[0] not in VARIED or len(args.vary) < 2):
        parser.error(f"--vary takes one of {', '.join(VARIED)}, and values")
    return args


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    names = ("device", "batch", "boxes", "classes", "candidates")
    work = Workload(size=tuple(args.size), **{name: getattr(args, name) for name in names})
    machine = describe_machine(args.device)
    settings = {k: v for k, v in vars(args).items() if k != "json" and v not in ([], "", None)}
    print(", ".join(f"{k} {v}" for k, v in {**machine, **settings}.items()))

    name, *values = args.vary or [None, None]
    results, failures = {}, {}
    for value in values:
        changed = work if name is None else replace(work, **{name: VARIED[name](int(value))})
        suffix = "" if name is None else f", {name} {value}"
        try:
            subjects = list_subjects(args, changed)
            measured = measure(subjects, args.device, args.repeats, args.warmup)
        except InputError as error:
            sys.exit(f"Error: {error}")
        for part, whole in zip(measured, (results, failures)):
            whole.update({f"{subject}{suffix}": x for subject, x in part.items()})
        if args.json:  # what there is, should a later value fail
            report = {
                "machine": machine,
                "settings": settings,
                "results": results,
                "left_out": failures,
            }
            args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print_table(results)


if __name__ == "__main__":
    main()
