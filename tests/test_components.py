"""GFL's parts in Detectron2's own detectors (demo/components.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage

from models import TinyBackbone, make_input
from scripts import load_script
from test_docs import code_blocks

components = load_script("demo/components.py")


def build_retinanet():
    torch.manual_seed(0)
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "GFLRetinaNet"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_tiny_backbone"
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[x, x * 1.4] for x in (32, 64, 128, 256, 512)]
    return build_model(cfg)


def build_fcos():
    """As the document shows it, but for a small backbone."""
    torch.manual_seed(0)
    scope = {}
    exec(code_blocks("docs/components.md", "python")[0], scope)
    model = scope["model"]
    model.num_classes = 3
    model.head.num_convs, model.head.conv_dim = 1, 64
    for shape in model.head.input_shape:
        shape.channels = 32
    model.backbone = TinyBackbone()
    return instantiate(model)


DETECTORS = pytest.mark.parametrize("build", [build_retinanet, build_fcos])


def inputs():
    return [make_input(), make_input(boxes=[(20.0, 12.0, 60.0, 58.0)], size=(96, 96))]


def train(model, batch, iterations):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    totals = []
    with EventStorage():
        for _ in range(iterations):
            losses = model.train()(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            totals.append({name: loss.item() for name, loss in losses.items()})
    return totals


def decode(values: np.ndarray, anchors: np.ndarray, reg_max: int, bin_width: float) -> np.ndarray:
    """Boxes in float64: means of distributions, in sizes of the anchors."""
    values = values.astype(np.float64).reshape(len(values), 4, reg_max + 1)
    probs = np.exp(values - values.max(axis=2, keepdims=True))
    probs /= probs.sum(axis=2, keepdims=True)
    distances = (probs * np.arange(reg_max + 1) * bin_width).sum(axis=2)
    width, height = (anchors[:, i + 2] - anchors[:, i] for i in (0, 1))
    distances *= np.sqrt(width * height)[:, None]
    x, y = ((anchors[:, i] + anchors[:, i + 2]) / 2 for i in (0, 1))
    sides = [x - distances[:, 0], y - distances[:, 1], x + distances[:, 2], y + distances[:, 3]]
    return np.stack(sides, axis=1)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    ends = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    both = ends.clip(min=0).prod(axis=1)
    areas = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    return both / (sum(areas) - both)


@DETECTORS
def test_learns_and_detects(build):
    model, batch = build(), inputs()
    losses = train(model, batch, 30)
    assert set(losses[0]) == {"loss_qfl", "loss_bbox", "loss_dfl"}
    for name in losses[0]:
        assert losses[-1][name] < 0.7 * losses[0][name], name
    with torch.no_grad():
        outputs = model.eval()(batch)
    for detected, given in zip(outputs, batch):
        detections, gt = detected["instances"], given["instances"]
        best = pairwise_iou(gt.gt_boxes, detections.pred_boxes).amax(dim=1)
        assert (best > 0.5).all(), best


@DETECTORS
def test_targets_of_scores_are_ious(build, monkeypatch):
    model, batch = build(), inputs()
    train(model, batch, 2)
    seen = {}

    def record(logits, labels, quality, **kwargs):
        seen.update(labels=labels, quality=quality)
        return original(logits, labels, quality, **kwargs)

    original = components.quality_focal_loss
    monkeypatch.setattr(components, "quality_focal_loss", record)
    monkeypatch.setattr(type(model), "losses", _recorded(type(model).losses, seen))
    train(model, batch, 1)
    anchors, labels, gt_boxes, _, values = (x.detach().numpy() for x in seen["arguments"])
    assert np.array_equal(seen["labels"].numpy(), labels[labels >= 0])
    positive = (labels >= 0) & (labels < 3)
    assert 3 <= positive.sum() < 200
    box = model.head.box
    boxes = decode(values[positive], anchors[positive], box.reg_max, box.bin_width)
    expected = np.zeros(len(labels))
    expected[positive] = iou(boxes, gt_boxes[positive].astype(np.float64))
    assert expected.max() > 0.3
    np.testing.assert_allclose(seen["quality"].numpy(), expected[labels >= 0], atol=1e-6)


def _recorded(losses, seen):
    def record(self, *arguments):
        seen["arguments"] = arguments
        return losses(self, *arguments)

    return record


@DETECTORS
def test_boxes_are_means_of_the_distributions(build):
    model, image = build().eval(), make_input(size=(64, 96))
    box, captured = model.head.box, {}
    model.test_score_thresh = 0.0
    model.head.register_forward_hook(lambda module, inputs, out: captured.update(out=out))
    with torch.no_grad():
        detections = model([image])[0]["instances"]
        values = torch.cat(model.split(captured["out"])[1], dim=1)[0].numpy()
        anchors = model.anchor_generator([x for x in captured["out"][0]])
    boxes = decode(values, Boxes.cat(anchors).tensor.numpy(), box.reg_max, box.bin_width)
    boxes = boxes.clip(0, [96, 64, 96, 64])
    assert len(detections) > 10
    for detected in detections.pred_boxes.tensor.numpy():
        assert np.abs(boxes - detected).max(axis=1).min() < 1e-3


@DETECTORS
def test_images_without_objects(build):
    model = build()
    if hasattr(model, "match_anchors"):
        pytest.skip("FCOS of Detectron2 0.6 takes no image without objects")
    batch = [make_input(boxes=())]
    with EventStorage():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    assert losses["loss_bbox"] == losses["loss_dfl"] == 0 < losses["loss_qfl"]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
