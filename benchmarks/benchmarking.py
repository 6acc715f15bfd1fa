"""Models, workloads and clocks of the benchmarks."""

from __future__ import annotations

import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import detectron2
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import nn

from gfl_d2 import load_config
from gfl_d2.deploy import prepare_for_inference
from gfl_d2.deploy.compilation import begin_step, compile_parts
from gfl_d2.engine import Trainer
from gfl_d2.errors import InputError
from gfl_d2.modeling import GFL, GroundTruth, Predictions

ROOT = Path(__file__).resolve().parents[1]
GFL_CONFIG = str(ROOT / "configs" / "gfl_R_50_FPN_1x.yaml")
RETINANET = "model_zoo/configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# An iteration in which GFL logs no diagnostics: it does in every twentieth, and reads values then.
NO_LOGGING = 1

# What is timed. It may have an attribute ``prepare``, a function to call before each time.
Step = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    """Images, boxes and precision that a model is timed with."""

    device: str = "cpu"
    size: tuple[int, int] = (480, 640)  # height and width of the images
    batch: int = 1
    boxes: int = 20  # ground truth, of each image
    classes: int = 80
    candidates: int = 1000  # (location, class) pairs of an image that are above the threshold
    precision: str = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, PRECISIONS[self.precision])

    def autocast(self) -> AbstractContextManager:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, self.dtype)

    def autocast_of(self, model: nn.Module) -> AbstractContextManager:
        """For a model at inference: none if its weights are in lower precision already."""
        is_low = next(model.head.parameters()).dtype != torch.float32
        return nullcontext() if is_low else self.autocast()


# Models. Weights are random.


def build_gfl(
    work: Workload,
    config_file: str = GFL_CONFIG,
    *,
    is_training: bool = True,
    weights: dict[str, torch.Tensor] | None = None,
    compile_mode: str = "",
    opts: Sequence = (),
) -> DenseDetector:
    """
    The model that ``train_net.py`` trains or, with --eval-only, evaluates.

    Args:
        work: gives device, classes and the precision of evaluation.
        config_file: of the model.
        is_training: True for the model that is trained.
        weights: a state dict; random by default.
        compile_mode: of :func:`torch.compile`; "" for not at all.
        opts: more keys and values of the config.
    """
    cfg = load_config(
        config_file,
        [
            *("MODEL.DEVICE", work.device, "MODEL.GFL.NUM_CLASSES", work.classes),
            *("TEST.PRECISION", PRECISIONS[work.precision], "TEST.COMPILE", compile_mode),
            *("SOLVER.BF16", False, "SOLVER.AMP.ENABLED", False),  # see Workload.autocast
            *opts,
        ],
    )
    model = Trainer.build_model(cfg)
    if weights is not None:
        model.load_state_dict(weights)
    if not is_training:
        return prepare_for_inference(cfg, model)
    compile_parts(model, compile_mode)
    return model


def build_retinanet(work: Workload) -> DenseDetector:
    """In its default form."""
    cfg = get_cfg()
    cfg.merge_from_file(str(Path(detectron2.__file__).parent / RETINANET))
    cfg.MODEL.DEVICE = work.device
    cfg.MODEL.RETINANET.NUM_CLASSES = work.classes
    return build_model(cfg)


def build_fcos(work: Workload) -> DenseDetector:
    """As Detectron2's ``fcos_R_50_FPN_1x`` has it, on GFL's backbone."""
    cfg = load_config(GFL_CONFIG, ["MODEL.DEVICE", work.device])
    backbone = build_backbone(cfg)
    shapes = [ShapeSpec(channels=256, stride=8 * 2**i) for i in range(5)]
    options = {"input_shape": shapes, "num_classes": work.classes, "conv_dims": [256] * 4}
    try:
        head = FCOSHead(**options, norm="GN")
    except ValueError:  # Detectron2 0.6 cannot build it
        head = FCOSHead(**options)
    return FCOS(
        backbone=backbone,
        head=head,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        num_classes=work.classes,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    ).to(work.device)


# Steps, to be timed.


def make_inputs(work: Workload) -> list[dict]:
    """Noise, with boxes from a few pixels to the whole image, most of them small."""
    height, width = work.size
    generator = torch.Generator().manual_seed(0)
    limit = torch.tensor([width, height], dtype=torch.float32)
    inputs = []
    for _ in range(work.batch):
        corner = torch.rand(work.boxes, 2, generator=generator) * limit * 0.9
        extent = 4 + torch.exp(torch.rand(work.boxes, 2, generator=generator) * limit.log())
        gt = Instances((height, width))
        gt.gt_boxes = Boxes(torch.cat((corner, torch.minimum(corner + extent, limit)), dim=1))
        gt.gt_classes = torch.randint(0, work.classes, (work.boxes,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": gt.to(work.device)})
    return inputs


def forward_parts(model: DenseDetector, inputs: list[dict]):
    """Images, features and predictions of the head."""
    begin_step()
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    features = [features[name] for name in model.head_in_features]
    return images, features, model.head(features)


@torch.no_grad()
def spread_logits(model: DenseDetector, inputs: list[dict]) -> None:
    """Scale the classifier for logits as of a trained model: with a standard deviation of 1."""
    logits = forward_parts(model, inputs)[2][0]
    std = torch.cat([maps.flatten() for maps in logits]).float().std()
    model.head.cls_score.weight.div_(std)


@torch.no_grad()
def set_threshold(model: DenseDetector, inputs: list[dict], candidates: int) -> None:
    """The score threshold that ``candidates`` (location, class) pairs an image pass, on average."""
    logits, _, *quality = forward_parts(model, inputs)[2]
    if isinstance(model, GFL):
        logits = map(model.head.quality.score_logits, logits, *(quality or [[None] * len(logits)]))
    scores = [maps.float().sigmoid() for maps in logits]
    if isinstance(model, FCOS):
        scores = [(x * y.float().sigmoid()).sqrt() for x, y in zip(scores, quality[0])]
    scores = torch.cat([x.flatten() for x in scores]).sort(descending=True).values
    model.test_score_thresh = float(scores[candidates * len(inputs)])


def infer_step(model: DenseDetector, inputs: list[dict], work: Workload) -> Step:
    """From image tensors to detections."""
    model.eval()
    with work.autocast_of(model):
        spread_logits(model, inputs)
    with work.autocast_of(model):  # again, as it keeps the weights that it has rounded
        set_threshold(model, inputs, work.candidates)

    @torch.no_grad()
    def step():
        with work.autocast_of(model):
            return model(inputs)

    return step


def post_step(model: DenseDetector, inputs: list[dict], work: Workload) -> Step:
    """Post-processing alone."""
    infer_step(model, inputs, work)
    with torch.no_grad(), work.autocast_of(model):
        images, features, predictions = forward_parts(model, inputs)

    copies = []

    def prepare():
        # Detectron2's FCOS changes its predictions in place.
        copies[:] = ([x.clone() for x in maps] for maps in predictions)

    @torch.no_grad()
    def step():
        with work.autocast_of(model):
            return model.forward_inference(images, features, copies)

    step.prepare = prepare
    return step


def train_step(model: DenseDetector, inputs: list[dict], work: Workload) -> Step:
    """Forward, backward and optimizer, with gradients scaled in float16."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)
    scaler = torch.amp.GradScaler(work.device) if work.precision == "fp16" else None

    def step():
        optimizer.zero_grad()
        with EventStorage(NO_LOGGING), work.autocast():
            loss = sum(model(inputs).values())
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return step


def loss_step(model: DenseDetector, inputs: list[dict], work: Workload) -> Step:
    """What follows the head in training, forward and backward to the predictions."""
    model.train()
    with work.autocast():
        spread_logits(model, inputs)
    with torch.no_grad(), work.autocast():
        images, features, predictions = forward_parts(model, inputs)
    maps = [x.requires_grad_() for levels in predictions for x in levels]
    gt_instances = [x["instances"] for x in inputs]

    def step():
        with EventStorage(NO_LOGGING), work.autocast():
            losses = model.forward_training(images, features, predictions, gt_instances)
        for x in maps:
            x.grad = None
        sum(losses.values()).backward()

    return step


MODES = {"infer": infer_step, "train": train_step, "loss": loss_step, "post": post_step}


def make_step(
    mode: str, build: Callable[[Workload], DenseDetector], inputs: list[dict], work: Workload
) -> Step:
    return MODES[mode](build(work), inputs, work)


def assign_steps(model: GFL, inputs: list[dict]) -> dict[str, Step]:
    """Assignment alone, by arithmetic and as it is usually written."""
    with torch.no_grad():
        images, features, predictions = forward_parts(model, inputs)
    sizes = torch.tensor(images.image_sizes, device=model.device)
    levels = model.levels(Predictions(*predictions), sizes)
    gt_instances = [x["instances"] for x in inputs]
    gt = GroundTruth.from_instances(gt_instances)
    shapes = model.backbone.output_shape()
    strides = [shapes[name].stride for name in model.head_in_features]
    anchors = [make_anchors(*level) for level in zip(features, strides)]
    return {
        "arithmetic": lambda: model.assigner(levels, gt),
        "plain": lambda: [plain_atss(anchors, x.gt_boxes) for x in gt_instances],
    }


def make_anchors(feature: torch.Tensor, stride: int) -> Boxes:
    """One square of eight strides for each location."""
    y, x = (torch.arange(n, device=feature.device) * stride for n in feature.shape[-2:])
    y, x = torch.meshgrid(y, x, indexing="ij")
    centers = torch.stack((x, y), dim=-1).reshape(-1, 2).float()
    return Boxes(torch.cat((centers - 4 * stride, centers + 4 * stride), dim=1))


def plain_atss(anchors: list[Boxes], gt: Boxes, topk: int = 9) -> torch.Tensor:
    """ATSS by the distances and IoUs of all pairs: the number of the box of each anchor, or -1."""
    iou = pairwise_iou(gt, Boxes.cat(anchors))
    indices, first = [], 0
    for level in anchors:
        distance = torch.cdist(gt.get_centers(), level.get_centers())
        nearest = distance.topk(min(topk, len(level)), dim=1, largest=False).indices
        indices.append(nearest + first)
        first += len(level)
    index = torch.cat(indices, dim=1)
    candidates = iou.gather(1, index)
    threshold = candidates.mean(dim=1, keepdim=True) + candidates.std(dim=1, keepdim=True)
    centers = Boxes.cat(anchors).get_centers()[index]
    corners = gt.tensor[:, None]
    sides = torch.cat((centers - corners[..., :2], corners[..., 2:] - centers), dim=-1)
    is_positive = (candidates >= threshold) & (sides.amin(dim=-1) > 0.01)
    best = torch.full_like(iou, -1).scatter_(1, index, torch.where(is_positive, candidates, -1))
    value, number = best.max(dim=0)
    return torch.where(value >= 0, number, -1)


# Clocks.


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(
    makers: dict[str, Callable[[], Step]], device: str, repeats: int, warmup: int
) -> tuple[dict[str, dict[str, float | list[float] | None]], dict[str, str]]:
    """
    Times and memory. A step that cannot be made or run is left out: not every model has every
    precision.

    Returns:
        results (dict): ``median_ms``, ``q1_ms``, ``q3_ms``, ``times_ms`` and ``peak_mib`` of each
            step.
        failures (dict): why each other step was left out.
    """
    steps, failures = {}, {}
    for name, make in makers.items():
        try:
            step = make()
            prepare(step)
            step()
        except InputError:
            raise
        except (RuntimeError, ValueError) as error:
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name} is left out: {failures[name]}")
        else:
            steps[name] = step
    times = measure_times(steps, device, repeats, warmup)
    results = {
        name: {
            **summarize(times[name]),
            "peak_mib": measure_memory(step, device),
            "times_ms": times[name],
        }
        for name, step in steps.items()
    }
    return results, failures


def measure_times(
    steps: dict[str, Step], device: str, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds of each run; the subjects take turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + repeats):
        for name, step in steps.items():
            prepare(step)
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if i >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
        print(f"\rround {i + 1} of {warmup + repeats}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def prepare(step: Step) -> None:
    getattr(step, "prepare", lambda: None)()


def measure_memory(step: Step, device: str) -> float | None:
    """Peak memory of one run beyond what is in use before it, in MiB. None if it is not known."""
    prepare(step)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        trim_memory()  # what is at hand already would not show
        # Reset the peak.
        Path("/proc/self/clear_refs").write_text("5")
        before = read_status("VmRSS")
        step()
        return (read_status("VmHWM") - before) / 2**10
    except (AttributeError, OSError):
        return None


def trim_memory() -> None:
    """Have the allocator give back what it keeps at hand. AttributeError where it cannot."""
    ctypes.CDLL(None).malloc_trim(0)


def read_status(key: str) -> int:
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
        tf32 = "on" if torch.backends.cudnn.allow_tf32 else "off"
        name = f"{torch.cuda.get_device_name()}, TF32 of convolutions {tf32}"
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
        "date": time.strftime("%Y-%m-%d"),
    }


def print_table(results: dict[str, dict[str, float]]) -> None:
    """Times are relative to the first row's."""
    if not results:
        return
    first = next(iter(results.values()))["median_ms"]
    print(f"{'':32}{'ratio':>8}{'median ms':>12}{'quartiles':>20}{'peak MiB':>10}")
    for name, x in results.items():
        spread = f"{x['q1_ms']:.1f} to {x['q3_ms']:.1f}"
        memory = "" if x["peak_mib"] is None else f"{x['peak_mib']:.0f}"
        ratio = x["median_ms"] / first
        print(f"{name:32}{ratio:8.2f}{x['median_ms']:12.1f}{spread:>20}{memory:>10}")
