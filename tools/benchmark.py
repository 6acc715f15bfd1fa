#!/usr/bin/env python3
"""
Time and peak memory of GFL beside Detectron2's RetinaNet and FCOS, in one process, taking turns.

    python tools/benchmark.py infer --size 480 640
    python tools/benchmark.py train --batch 2 --boxes 10 --precision fp32
    python tools/benchmark.py loss --size 800 1216 --batch 2 --boxes 200
    python tools/benchmark.py assign --size 800 1216 --batch 2 --boxes 200
    python tools/benchmark.py post --candidates 3500

`infer` is everything from the image tensor to detections, `train` a step with backward pass and
optimizer, `loss` what follows the head, forward and backward, `assign` the assignment (against the
plain algorithm, which computes distances to all anchors), `post` the post-processing. Weights are
random; the score threshold of each model is set so that `--candidates` pairs pass it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import detectron2
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from gfl_d2 import load_config
from gfl_d2.engine import Trainer
from gfl_d2.errors import InputError
from gfl_d2.inference import prepare_for_inference
from gfl_d2.modeling import GFL, aligned_iou

ROOT = Path(__file__).resolve().parents[1]
RETINANET = "model_zoo/configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

Step = Callable[[], object]


# Models.


def build_gfl(
    config_file: str, device: str, num_classes: int, inference_precision: str | None = None
) -> GFL:
    """As ``train_net.py`` has it, to train or, in some precision, with ``--eval-only``."""
    opts = ["MODEL.DEVICE", device, "MODEL.GFL.NUM_CLASSES", num_classes]
    if inference_precision is None:
        return Trainer.build_model(load_config(config_file, opts))
    cfg = load_config(config_file, [*opts, "TEST.PRECISION", PRECISIONS[inference_precision]])
    return prepare_for_inference(cfg, Trainer.build_model(cfg))


def build_retinanet(device: str, num_classes: int) -> DenseDetector:
    """In its default form."""
    cfg = get_cfg()
    cfg.merge_from_file(str(Path(detectron2.__file__).parent / RETINANET))
    cfg.MODEL.DEVICE = device
    cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    return build_model(cfg)


def build_fcos(device: str, num_classes: int) -> DenseDetector:
    """As Detectron2's ``fcos_R_50_FPN_1x`` has it, on GFL's backbone."""
    cfg = load_config(str(ROOT / "configs" / "gfl_R_50_FPN_1x.yaml"), ["MODEL.DEVICE", device])
    backbone = build_backbone(cfg)
    names = ["p3", "p4", "p5", "p6", "p7"]
    shapes = [ShapeSpec(channels=256, stride=8 * 2**i) for i in range(5)]
    options = {"input_shape": shapes, "num_classes": num_classes, "conv_dims": [256] * 4}
    try:
        head = FCOSHead(**options, norm="GN")
    except ValueError:  # Detectron2 0.6 cannot build it
        head = FCOSHead(**options)
    return FCOS(
        backbone=backbone,
        head=head,
        head_in_features=names,
        num_classes=num_classes,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    ).to(device)


def build_models(args: argparse.Namespace) -> dict[str, DenseDetector]:
    options = {"device": args.device, "num_classes": args.classes}
    precision = args.precision if args.mode in ("infer", "post") else None
    models = {"GFL": build_gfl(args.config_file, **options, inference_precision=precision)}
    if args.mode != "assign":
        models["RetinaNet"] = build_retinanet(**options)
        models["FCOS"] = build_fcos(**options)
    for config_file in args.others:
        name = Path(config_file).stem
        models[name] = build_gfl(config_file, **options, inference_precision=precision)
    return {name: model for name, model in models.items() if name not in args.skip}


# What is timed.


def make_inputs(args: argparse.Namespace) -> list[dict]:
    """Noise, with boxes from a few pixels to the whole image, most of them small."""
    height, width = args.size
    generator = torch.Generator().manual_seed(0)
    limit = torch.tensor([width, height], dtype=torch.float32)
    inputs = []
    for _ in range(args.batch):
        corner = torch.rand(args.boxes, 2, generator=generator) * limit * 0.9
        extent = 4 + torch.exp(torch.rand(args.boxes, 2, generator=generator) * limit.log())
        gt = Instances((height, width))
        gt.gt_boxes = Boxes(torch.cat((corner, torch.minimum(corner + extent, limit)), dim=1))
        gt.gt_classes = torch.randint(0, args.classes, (args.boxes,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": gt.to(args.device)})
    return inputs


def predict(model: DenseDetector, inputs: list[dict]):
    """Images, features and predictions of the head, with logits spread as of a trained model."""
    images = model.preprocess_image(inputs)
    with torch.no_grad():
        features = model.backbone(images.tensor)
        features = [features[name] for name in model.head_in_features]
        predictions = tuple(list(maps) for maps in model.head(features))
        for maps in predictions[0]:
            maps.add_(torch.randn_like(maps))
    return images, features, predictions


def set_threshold(model: DenseDetector, inputs: list[dict], candidates: int) -> None:
    """The score threshold that ``candidates`` (location, class) pairs of an image pass."""
    logits = predict(model, inputs[:1])[2][0]
    scores = torch.cat([maps.flatten() for maps in logits]).float().sigmoid()
    model.test_score_thresh = float(scores.sort(descending=True).values[candidates])


def infer_step(model, inputs, args) -> Step:
    model.eval()
    set_threshold(model, inputs, args.candidates)
    return torch.no_grad()(lambda: model(inputs))


def post_step(model, inputs, args) -> Step:
    model.eval()
    set_threshold(model, inputs, args.candidates)
    images, features, predictions = predict(model, inputs)
    return torch.no_grad()(lambda: model.forward_inference(images, features, predictions))


def train_step(model, inputs, args) -> Step:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)

    def step():
        optimizer.zero_grad()
        with EventStorage():
            sum(model(inputs).values()).backward()
        optimizer.step()

    return step


def loss_step(model, inputs, args) -> Step:
    model.train()
    images, features, predictions = predict(model, inputs)
    maps = [x.requires_grad_() for levels in predictions for x in levels]
    gt_instances = [x["instances"] for x in inputs]

    def step():
        with EventStorage():
            losses = model.forward_training(images, features, predictions, gt_instances)
        torch.autograd.grad(sum(losses.values()), maps)

    return step


def assign_steps(model: GFL, inputs: list[dict]) -> dict[str, Step]:
    images, features, _ = predict(model, inputs)
    locations = model._locations(features, images.image_sizes)
    boxes = [x["instances"].gt_boxes.tensor for x in inputs]
    anchors = make_anchors(locations, boxes[0].device)
    return {
        "arithmetic": lambda: model.assigner(locations, boxes),
        "plain": lambda: [plain_atss(anchors, gt) for gt in boxes],
    }


def make_anchors(locations, device) -> list[torch.Tensor]:
    """Boxes of each level, shape (Ri, 4)."""
    centers = locations.centers(device).tensor_split(locations.starts[1:-1])
    halves = [grid.anchor_size / 2 for grid in locations.grids]
    return [torch.cat((c - half, c + half), dim=1) for c, half in zip(centers, halves)]


def plain_atss(anchors: list[torch.Tensor], gt: torch.Tensor, topk: int = 9) -> torch.Tensor:
    """ATSS by the distances and IoUs of all pairs, as it is usually written."""
    boxes = torch.cat(anchors)
    gt_centers = (gt[:, :2] + gt[:, 2:]) / 2
    iou = aligned_iou(boxes, gt[:, None])  # (M, R)
    indices, first = [], 0
    for level in anchors:
        distance = torch.cdist(gt_centers, (level[:, :2] + level[:, 2:]) / 2)
        nearest = distance.topk(min(topk, len(level)), dim=1, largest=False).indices
        indices.append(nearest + first)
        first += len(level)
    index = torch.cat(indices, dim=1)
    candidates = iou.gather(1, index)
    threshold = candidates.mean(dim=1, keepdim=True) + candidates.std(dim=1, keepdim=True)
    centers = (boxes[index][..., :2] + boxes[index][..., 2:]) / 2
    sides = torch.cat((centers - gt[:, None, :2], gt[:, None, 2:] - centers), dim=-1)
    is_positive = (candidates >= threshold) & (sides.amin(dim=-1) > 0.01)
    best = torch.full_like(iou, -1).scatter_(1, index, torch.where(is_positive, candidates, -1))
    value, number = best.max(dim=0)
    return torch.where(value >= 0, number, -1)


# Measuring.


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def can_run(name: str, step: Step) -> bool:
    """Run once. Not every model has every precision."""
    try:
        step()
    except RuntimeError as error:
        print(f"{name} is left out: {error}".splitlines()[0])
        return False
    return True


def measure_times(
    steps: dict[str, Step], repeats: int, warmup: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of each run; the subjects take turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + repeats):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if i >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
        print(f"\rround {i + 1} of {warmup + repeats}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def measure_memory(step: Step, device: str) -> float | None:
    """Peak of what one run needs beyond what is there before, in MiB; None if it cannot be told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # Give back what the allocator keeps at hand: it would not show. Then reset the peak.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _read_status("VmRSS")
        step()
        return (_read_status("VmHWM") - before) / 2**10
    except (AttributeError, OSError):
        return None


def _read_status(key: str) -> int:
    """In KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def summarize(times: list[float]) -> dict[str, float]:
    quartiles = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    )
    return {"median_ms": quartiles[1], "q1_ms": quartiles[0], "q3_ms": quartiles[2]}


def describe_machine(device: str) -> dict[str, str]:
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        cpu_info = Path("/proc/cpuinfo")
        text = cpu_info.read_text() if cpu_info.is_file() else ""
        models = [x.split(":")[1].strip() for x in text.splitlines() if x.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "python": platform.python_version(),
    }


def print_table(results: dict[str, dict[str, float]]) -> None:
    first = next(iter(results.values()))["median_ms"]
    print(f"{'':28}{'ratio':>8}{'median ms':>12}{'quartiles':>20}{'peak MiB':>10}")
    for name, x in results.items():
        spread = f"{x['q1_ms']:.1f} to {x['q3_ms']:.1f}"
        memory = "" if x["peak_mib"] is None else f"{x['peak_mib']:.0f}"
        ratio = x["median_ms"] / first
        print(f"{name:28}{ratio:8.2f}{x['median_ms']:12.1f}{spread:>20}{memory:>10}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("mode", choices=["infer", "train", "loss", "assign", "post"])
    parser.add_argument(
        "--config-file", default=str(ROOT / "configs" / "gfl_R_50_FPN_1x.yaml"), help="of GFL"
    )
    parser.add_argument("--others", nargs="*", default=[], help="more configs to compare")
    parser.add_argument("--skip", nargs="*", default=[], help="subjects to leave out, e.g. FCOS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], help="height and width")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--boxes", type=int, default=20, help="ground-truth boxes an image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--candidates", type=int, default=1000, help="pairs above the threshold")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    device_type = torch.device(args.device).type
    is_low = args.precision != "fp32"
    autocast = (
        torch.autocast(device_type, getattr(torch, PRECISIONS[args.precision]))
        if is_low
        else nullcontext()
    )
    inputs = make_inputs(args)
    try:
        models = build_models(args)
    except InputError as error:
        sys.exit(f"Error: {error}")

    with autocast:
        if args.mode == "assign":
            steps = assign_steps(models["GFL"], inputs)
        else:
            make_step = {
                "infer": infer_step, "train": train_step, "loss": loss_step, "post": post_step
            }[args.mode]  # fmt: skip
            steps = {name: make_step(model, inputs, args) for name, model in models.items()}
        steps = {name: step for name, step in steps.items() if name not in args.skip}
        steps = {name: step for name, step in steps.items() if can_run(name, step)}
        times = measure_times(steps, args.repeats, args.warmup, args.device)
        results = {
            name: {**summarize(times[name]), "peak_mib": measure_memory(step, args.device)}
            for name, step in steps.items()
        }

    machine = describe_machine(args.device)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    print(", ".join(f"{k} {v}" for k, v in {**machine, **settings}.items() if v != []))
    print_table(results)
    if args.json:
        report = {"machine": machine, "settings": settings, "results": results, "times_ms": times}
        args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
