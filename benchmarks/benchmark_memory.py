#!/usr/bin/env python3
"""
Memory of GFL over many images and iterations, and of extreme inputs, on a CPU.

    python benchmarks/benchmark_memory.py growth
    python benchmarks/benchmark_memory.py extremes

growth: images of many sizes are detected, then trained on; the memory of the process is shown at
every tenth of the way. extremes: the peak that one step adds, beside that of an ordinary one, each
in a process of its own. Weights are random.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
from dataclasses import dataclass, replace

import torch
from benchmarking import (
    ROOT,
    Step,
    Workload,
    build_gfl,
    infer_step,
    make_inputs,
    measure_memory,
    read_status,
    train_step,
    trim_memory,
)
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from gfl_d2.tables import format_table

CONFIG = str(ROOT / "configs" / "gfl_R_18_FPN_bccd_reference.yaml")
PARTS = 10


@dataclass(frozen=True)
class Extreme:
    work: Workload
    is_training: bool = False
    fires_everywhere: bool = False


ORDINARY = Workload(size=(480, 640))
EXTREMES = {
    "inference, 480 x 640": Extreme(ORDINARY),
    "inference, 4096 x 4096": Extreme(replace(ORDINARY, size=(4096, 4096))),
    "inference, every score 0.9": Extreme(ORDINARY, fires_everywhere=True),
    "inference, 1,203 classes": Extreme(replace(ORDINARY, classes=1203)),
    "inference, 1,203 classes, every score 0.9": Extreme(
        replace(ORDINARY, classes=1203), fires_everywhere=True
    ),
    "training, 20 boxes": Extreme(ORDINARY, is_training=True),
    "training, 5,000 boxes": Extreme(replace(ORDINARY, boxes=5000), is_training=True),
}


def measure_extreme(name: str, results: multiprocessing.Queue) -> None:
    """Put the peak in MiB and the number of detections, which training has not."""
    extreme = EXTREMES[name]
    inputs = make_inputs(extreme.work)
    model = build_gfl(extreme.work, CONFIG, is_training=extreme.is_training)
    if extreme.is_training:
        step = train_step(model, inputs, extreme.work)
    elif extreme.fires_everywhere:
        torch.nn.init.zeros_(model.head.cls_score.weight)
        torch.nn.init.constant_(model.head.cls_score.bias, torch.logit(torch.tensor(0.9)).item())
        step = torch.no_grad()(lambda: model.eval()(inputs))
    else:
        step = infer_step(model, inputs, extreme.work)
    output = step()  # what stays, such as the momentum
    detections = None if extreme.is_training else len(output[0]["instances"])
    results.put((measure_memory(step, "cpu"), detections))


def show_extremes() -> None:
    context, rows = multiprocessing.get_context("spawn"), []
    for name in tqdm(EXTREMES):
        results = context.Queue()
        process = context.Process(target=measure_extreme, args=(name, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name}: the process ended with {process.exitcode}")
        peak, detections = results.get()
        rows.append({"step": name, "MiB": peak, "detections": detections})
    print(format_table(rows, floatfmt=",.0f"))


def show_growth(number_of_images: int, number_of_iterations: int) -> None:
    work = Workload(size=(0, 0), boxes=10, classes=3)
    random.seed(0)

    def random_inputs() -> list[dict]:
        size = random.randrange(96, 257), random.randrange(96, 257)
        return make_inputs(replace(work, size=size))

    model = build_gfl(work, CONFIG, is_training=False).eval()
    detect = torch.no_grad()(lambda: model(random_inputs()))
    inference = run("inference", detect, number_of_images)

    model = build_gfl(work, CONFIG).train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-6, momentum=0.9
    )

    def train() -> None:
        optimizer.zero_grad()
        sum(model(random_inputs()).values()).backward()
        optimizer.step()

    with EventStorage() as storage:

        def step() -> None:
            train()
            storage.step()

        training = run("training", step, number_of_iterations)
    names = ("images", "inference, MiB", "iterations", "training, MiB")
    rows = [dict(zip(names, (*a, *b))) for a, b in zip(inference, training)]
    print(format_table(rows, floatfmt=",.0f"))


def run(name: str, step: Step, number: int) -> list[tuple[int, float]]:
    """At every tenth of the way, how many steps there were and the memory of the process in MiB."""
    rows = []
    for i in tqdm(range(number), desc=name):
        step()
        if (i + 1) % (number // PARTS) == 0:
            trim_memory()  # sizes differ, and leave gaps of which this is no measure
            rows.append((i + 1, read_status("VmRSS") / 2**10))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("mode", choices=["growth", "extremes"])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--iterations", type=int, default=500)
    args = parser.parse_args()
    if min(args.images, args.iterations) < PARTS:
        parser.error(f"--images and --iterations must be at least {PARTS}")
    if args.mode == "extremes":
        show_extremes()
    else:
        show_growth(args.images, args.iterations)


if __name__ == "__main__":
    main()
