#!/usr/bin/env python3
"""
All measurements on a GPU, in one run of less than ten minutes.

    python benchmarks/benchmark_gpu.py --json gpu.json

First whether results are those of a CPU, and whether the loss waits for the GPU. Then inference and
training of GFL, RetinaNet and FCOS side by side, the loss alone, where the time goes, and last what
torch.compile brings. Results are written after each part. Parts that fail or do not fit into
``--limit`` are left out and named.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from benchmarking import (
    MODES,
    Step,
    Workload,
    build_fcos,
    build_gfl,
    build_retinanet,
    describe_machine,
    forward_parts,
    make_inputs,
    make_step,
    measure,
    prepare,
    print_table,
)
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# Name, precision of the workload, and whether float32 may round to TF32.
PRECISIONS = {
    "float32": ("fp32", False),
    "TF32": ("fp32", True),
    "bfloat16": ("bf16", True),
    "float16": ("fp16", True),
}


@contextmanager
def tf32(is_allowed: bool) -> Iterator[None]:
    """Whether convolutions and products in float32 may round their operands to TF32."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = is_allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


# Are the results right?


def make_weights(classes: int) -> dict[str, Tensor]:
    """Random, with predictions that differ from place to place."""
    torch.manual_seed(0)
    model = build_gfl(Workload(classes=classes))
    for conv in (model.head.cls_score, model.head.bbox_pred):
        nn.init.normal_(conv.weight, std=0.05)
    return model.state_dict()


def make_mixed_inputs(work: Workload) -> list[dict]:
    """The first image is the largest, so that the others have padding."""
    inputs = make_inputs(work)
    height, width = work.size
    size = (height * 3 // 4, width * 2 // 3)
    for x in inputs[1:]:
        gt = Instances(size, **x["instances"].get_fields())
        gt.gt_boxes.clip(size)
        x["instances"] = gt[gt.gt_boxes.nonempty()]
        x["image"] = x["image"][:, : size[0], : size[1]]
    return inputs


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference, relative to that of the expected values about their mean."""
    actual, expected = (
        torch.cat([x.detach().flatten().double().cpu() for x in part])
        for part in (actual, expected)
    )
    return float((actual - expected).norm() / (expected - expected.mean()).norm())


def fraction_found(detections: Instances, expected: Instances) -> float:
    """How many of the expected detections are there: same class, IoU > 0.98, score within 1%."""
    iou = pairwise_iou(expected.pred_boxes, detections.pred_boxes)
    is_found = (iou > 0.98) & (expected.pred_classes[:, None] == detections.pred_classes)
    is_found &= (detections.scores / expected.scores[:, None] - 1).abs() < 0.01
    return float(is_found.any(dim=1).double().mean())


@torch.no_grad()
def check_inference(work: Workload) -> dict[str, dict[str, float]]:
    """Predictions and detections in each precision, against float32 on the CPU."""
    weights, inputs = make_weights(work.classes), make_mixed_inputs(work)

    def run(work):
        model = build_gfl(work, is_training=False, weights=weights)
        model.test_score_thresh = 0.02
        parts = forward_parts(model, inputs)
        return *parts[2], model.forward_inference(*parts)

    expected = run(replace(work, device="cpu", precision="fp32"))
    result = {}
    for name, (precision, is_allowed) in PRECISIONS.items():
        if work.device == "cpu" and precision == "fp16":
            continue
        with tf32(is_allowed):
            logits, boxes, detections = run(replace(work, precision=precision))
        found = [fraction_found(x.to("cpu"), y) for x, y in zip(detections, expected[2])]
        result[name] = {
            "error of logits": relative_error(logits, expected[0]),
            "error of boxes": relative_error(boxes, expected[1]),
            "detections found": sum(found) / len(found),
        }
    return result


def check_training(work: Workload) -> dict[str, float]:
    """Losses and gradients in float32, against the CPU."""
    results = []
    for device in (work.device, "cpu"):
        here = replace(work, device=device, precision="fp32")
        model = build_gfl(here, weights=make_weights(work.classes)).train()
        with EventStorage(), tf32(False):
            losses = model(make_mixed_inputs(here))
            sum(losses.values()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append(([x.detach() for x in losses.values()], grads))
    (losses, grads), (expected_losses, expected_grads) = results
    return {
        "error of losses": max(
            abs(float(x) / float(y) - 1) for x, y in zip(losses, expected_losses)
        ),
        "error of gradients": relative_error(grads, expected_grads),
    }


def check_synchronization(work: Workload) -> dict[str, int]:
    """Fails if anything between the head's outputs and their gradients waits for the GPU."""
    model = build_gfl(work, weights=make_weights(work.classes))
    compute = MODES["loss"](model, make_mixed_inputs(work), work)
    compute()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compute()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"synchronizations": 0}


# Models side by side.


def compare(
    mode: str, work: Workload, repeats: int, variants: dict[str, dict] | None = None, others=True
) -> dict[str, dict | str]:
    """GFL and its variants, which are options of :func:`build_gfl`, RetinaNet and FCOS."""
    torch._dynamo.reset()  # sizes seen before would make it compile for any
    is_training, inputs = mode in ("train", "loss"), make_inputs(work)
    builders = {
        name: functools.partial(build_gfl, is_training=is_training, **options)
        for name, options in {"GFL": {}, **(variants or {})}.items()
    }
    if others:
        builders.update({"RetinaNet": build_retinanet, "FCOS": build_fcos})
    makers = {
        name: functools.partial(make_step, mode, build, inputs, work)
        for name, build in builders.items()
    }
    results, failures = measure(makers, work.device, repeats, warmup=3)
    return {**results, **failures}


# Where does the time go?


def break_down(step: Step, work: Workload) -> dict[str, float]:
    """Median time and, on a GPU, that of its kernels and their number; the rate of convolutions."""
    results, _ = measure({"": lambda: step}, work.device, repeats=5, warmup=2)
    result = {"ms": results[""]["median_ms"]}
    if work.device.startswith("cuda"):
        prepare(step)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        kernels = [x for x in profiler.events() if x.device_type == DeviceType.CUDA]
        result["kernels ms"] = sum(x.time_range.elapsed_us() for x in kernels) / 1e3
        result["kernels"] = len(kernels)
    prepare(step)
    with FlopCounterMode(display=False) as flops:
        step()
    result["TFLOP/s"] = flops.get_total_flops() / result["ms"] / 1e9
    return result


@torch.no_grad()
def break_down_inference(work: Workload) -> dict[str, dict]:
    model, inputs = build_gfl(work, is_training=False), make_inputs(work)
    step, post = (MODES[mode](model, inputs, work) for mode in ("infer", "post"))
    images, features, _ = forward_parts(model, inputs)
    x = images.tensor.to(features[0].dtype)
    parts = {
        "preprocessing": lambda: model.preprocess_image(inputs),
        "ResNet": lambda: model.backbone.bottom_up(x),
        "ResNet and FPN": lambda: model.backbone(x),
        "head": lambda: model.head(features),
        "post-processing": post,
        "all": step,
    }
    return {name: break_down(part, work) for name, part in parts.items()}


def break_down_training(work: Workload) -> dict[str, dict]:
    """Forward and backward of each part."""
    model, inputs = build_gfl(work), make_inputs(work)
    step = MODES["train"](model, inputs, work)
    loss = MODES["loss"](build_gfl(work), inputs, work)
    with torch.no_grad(), work.autocast():
        images, features, _ = forward_parts(model, inputs)
    features = [x.requires_grad_() for x in features]

    def run(part, *inputs):
        def run_and_back():
            with work.autocast():
                out = [x for x in tree_leaves(part(*inputs)) if x.requires_grad]
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])

        return run_and_back

    parts = {
        "ResNet": run(model.backbone.bottom_up, images.tensor),
        "ResNet and FPN": run(model.backbone, images.tensor),
        "head": run(model.head, features),
        "loss": loss,
        "all, with optimizer": step,
    }
    return {name: break_down(part, work) for name, part in parts.items()}


# All of it.


class Report:
    """Prints and writes what has been measured, part by part."""

    def __init__(self, machine: dict[str, str], path: Path | None, limit: float):
        self.path = path
        self.deadline = time.monotonic() + limit
        self.content = {"machine": machine, "left_out": []}
        print(", ".join(f"{k} {v}" for k, v in machine.items()), flush=True)

    def add(self, title: str, make: Callable[[], dict]) -> dict:
        """Measure, unless time is over. What fails does not keep the others from being measured."""
        print(f"\n{title}", flush=True)
        start = time.monotonic()
        try:
            if start > self.deadline:
                raise TimeoutError("the time is over")
            result = make()
        except Exception as error:
            result = {}
            reason = f"{type(error).__name__}: {error}"
            self.content["left_out"].append(f"{title}: {reason}")
            print(f"left out: {reason}")
        for name in [name for name, x in result.items() if isinstance(x, str)]:
            self.content["left_out"].append(f"{title}, {name}: {result.pop(name)}")
        self.content[title] = result
        if self.path:
            self.path.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        show(result)
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return result


def show(result: dict) -> None:
    values = list(result.values())
    if values and all(isinstance(x, dict) and "median_ms" in x for x in values):
        print_table(result)
        return
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {x:.4g}" for k, x in value.items())
        print(f"{name:24} {value if isinstance(value, str) else format(value, '.4g')}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], help="height and width")
    parser.add_argument("--batch", type=int, default=16, help="beside 1, and of training")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--limit", type=float, default=540, help="seconds; no part starts after it")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU")
    return args


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    report = Report(describe_machine(args.device), args.json, args.limit)
    one = Workload(device=args.device, size=tuple(args.size))
    batch = replace(one, batch=args.batch)
    few = replace(one, batch=2)
    report.add("Inference against the CPU, relative errors", lambda: check_inference(few))
    report.add("Training against the CPU, relative errors", lambda: check_training(few))
    if args.device.startswith("cuda"):
        report.add("Waiting in the loss", lambda: check_synchronization(few))
    for work in (one, batch):
        for name, (precision, is_allowed) in PRECISIONS.items():
            with tf32(is_allowed):
                in_precision = replace(work, precision=precision)
                variants = {"GFL, TEST.OPTIMIZE False": {"opts": ("TEST.OPTIMIZE", False)}}
                report.add(
                    f"Inference, batch {work.batch}, {name}",
                    lambda w=in_precision, v=variants: compare("infer", w, args.repeats, v),
                )
    for name in ("TF32", "bfloat16", "float16"):
        precision, is_allowed = PRECISIONS[name]
        with tf32(is_allowed):
            work = replace(batch, precision=precision)
            variants = {
                "GFL, SOLVER.CHANNELS_LAST False": {"opts": ("SOLVER.CHANNELS_LAST", False)}
            }
            report.add(
                f"Training step, batch {batch.batch}, {name}",
                lambda w=work, v=variants: compare("train", w, args.repeats // 2, v),
            )
            report.add(
                f"Loss, batch {batch.batch}, {name}",
                lambda w=work: compare("loss", w, args.repeats),
            )

    one, batch = (replace(work, precision="bf16") for work in (one, batch))
    for work in (one, batch):
        report.add(
            f"Parts of inference, batch {work.batch}, bfloat16",
            lambda w=work: break_down_inference(w),
        )
    report.add(
        f"Parts of training, batch {batch.batch}, bfloat16",
        lambda: break_down_training(batch),
    )

    # Last, as each takes a minute or more.
    for mode, work, compile_mode in (
        ("infer", one, "reduce-overhead"),
        ("infer", batch, "reduce-overhead"),
        ("train", batch, "default"),
        ("infer", one, "default"),
    ):
        variants = {"GFL compiled": {"compile_mode": compile_mode}}
        report.add(
            f"Compiled, {compile_mode}: {mode}, batch {work.batch}, bfloat16",
            lambda m=mode, w=work, v=variants: compare(m, w, args.repeats, v, others=False),
        )
    for left_out in report.content["left_out"]:
        print(f"left out: {left_out}", file=sys.stderr)


if __name__ == "__main__":
    main()
