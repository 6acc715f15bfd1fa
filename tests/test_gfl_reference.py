"""Head, losses, gradients and detections against the reference implementation."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from models import gfl_on_features
from reference_data import assert_close_to_largest, case, load

LEVELS = range(5)


def per_level(ref, name):
    return [ref[f"{name}_l{i}"] for i in LEVELS]


def reference_model(ref, **kwargs):
    """GFL with the head weights of the reference, on its input features."""
    features = [feature.clone().requires_grad_() for feature in per_level(ref, "feat")]
    model = gfl_on_features(features, num_classes=4, num_convs=count_convs(ref), **kwargs)
    state = {our_key(key): w for key, w in case(ref, "weights").items()}
    scales = [state.pop(f"scales.{i}").reshape(()) for i in LEVELS]
    model.head.load_state_dict({**state, "scales": torch.stack(scales)})
    return model


def count_convs(ref):
    return sum(key.startswith("weights/cls_convs") and key.endswith("conv.weight") for key in ref)


def our_key(key):
    for theirs, ours in {
        "cls_convs": "cls_subnet",
        "reg_convs": "bbox_subnet",
        "gfl_cls": "cls_score",
        "gfl_reg": "bbox_pred",
        ".conv.": ".",
        ".gn.": ".norm.",
        ".scale": "",
    }.items():
        key = key.replace(theirs, ours)
    return key


def batch(ref, name):
    """Inputs of two images whose pixels do not matter, with the ground truth of the case."""
    inputs = []
    for i, (height, width) in enumerate(ref["image_sizes"].tolist()):
        gt = Instances((height, width))
        gt.gt_boxes = Boxes(ref[f"{name}/gt_boxes_{i}"])
        gt.gt_classes = ref[f"{name}/gt_labels_{i}"]
        inputs.append({"image": torch.zeros(3, height, width), "instances": gt})
    return inputs


def test_head_forward():
    ref = load("gfl_head_train")
    model = reference_model(ref)
    logits, distributions = model.head(model.backbone.features)
    for i in LEVELS:
        assert_close_to_largest(logits[i], ref[f"cls_score_l{i}"], 1e-5)
        assert_close_to_largest(distributions[i], ref[f"bbox_pred_l{i}"], 1e-5)


@pytest.mark.parametrize("name", ["both", "one_empty", "none", "low_scores"])
def test_training(name):
    ref = load("gfl_head_train")
    model = reference_model(ref)
    if name == "low_scores":
        with torch.no_grad():
            model.head.cls_score.bias += ref["low_scores/cls_bias_shift"]
    model.train()
    with EventStorage() as storage:
        losses = model(batch(ref, name))
    assert_close(losses["loss_qfl"], ref[f"{name}/loss_cls"], rtol=1e-5, atol=0)
    assert_close(losses["loss_bbox"], ref[f"{name}/loss_bbox"], rtol=1e-5, atol=0)
    assert_close(losses["loss_dfl"], ref[f"{name}/loss_dfl"], rtol=1e-5, atol=0)

    sum(losses.values()).backward()
    for i in LEVELS:
        if f"{name}/grad_feat_l{i}" in ref:
            expected = ref[f"{name}/grad_feat_l{i}"]
            # An empty level of a case has gradients from its background only: compare with the
            # largest of all levels.
            largest = max(ref[f"{name}/grad_feat_l{k}"].abs().max() for k in LEVELS)
            error = (model.backbone.features[i].grad - expected).abs().max() / largest
            assert error < 1e-5
    for key, norm in case(ref, f"{name}/grad_norm").items():
        parameter = our_key(key)
        if parameter.startswith("scales."):
            grad = model.head.scales.grad[int(parameter.split(".")[1])]
        else:
            grad = model.head.get_parameter(parameter).grad
        assert_close(grad.norm(), norm, rtol=1e-4, atol=1e-7)

    num_pos = sum((ref[f"{name}/label_l{i}"] < 4).sum() for i in LEVELS)
    quality = [ref[f"{name}/quality_l{i}"] for i in LEVELS]
    mean_quality = torch.cat(quality).sum() / num_pos.clamp(min=1)
    latest = {key: value for key, (value, _) in storage.latest().items()}
    assert latest["gfl/num_pos_per_image"] == float(num_pos) / 2
    assert latest["gfl/pos_quality"] == pytest.approx(float(mean_quality), rel=1e-5)


def test_training_targets():
    """Labels of every location, invalid ones included, and the positives' boxes."""
    ref = load("gfl_head_train")
    model = reference_model(ref)
    images = model.preprocess_image(batch(ref, "both"))
    anchors = model.anchor_generator(model.backbone.features)
    valid = model._valid_locations(model.backbone.features, images.image_sizes)
    sizes = [len(a) for a in anchors]
    for i, valid_i in enumerate(valid.split(sizes, dim=1)):
        weight = ref[f"both/label_weight_l{i}"].view(2, -1)
        assert torch.equal(valid_i, weight > 0)
    for b, inputs in enumerate(batch(ref, "both")):
        gt = inputs["instances"]
        matched = model.assigner(anchors, gt.gt_boxes, valid[b])
        labels = torch.where(matched >= 0, gt.gt_classes[matched], 4)
        for i, labels_i in enumerate(labels.split(sizes)):
            assert torch.equal(labels_i, ref[f"both/label_l{i}"].view(2, -1)[b])


@pytest.mark.parametrize(
    ("result", "settings"),
    [
        ("det", {}),
        ("det_pre50_max20", {"test_topk_candidates": 50, "max_detections_per_image": 20}),
    ],
)
@torch.no_grad()
def test_detections(result, settings):
    ref = load("gfl_head_predict")
    model = reference_model(ref, **settings).eval()
    sizes = ref["image_sizes"].tolist()
    outputs = model([{"image": torch.zeros(3, h, w)} for h, w in sizes])
    for b, output in enumerate(outputs):
        detections = output["instances"]
        assert torch.equal(detections.pred_classes, ref[f"{result}/labels_{b}"])
        assert_close(detections.scores, ref[f"{result}/scores_{b}"], rtol=1e-5, atol=1e-6)
        assert_close(detections.pred_boxes.tensor, ref[f"{result}/boxes_{b}"], rtol=1e-5, atol=1e-3)


@torch.no_grad()
def test_detections_in_the_original_image():
    """Boxes are scaled to the size asked for, as by the reference before its NMS."""
    ref = load("gfl_head_predict")
    model = reference_model(ref).eval()
    inputs = []
    for (height, width), scale in zip(ref["image_sizes"].tolist(), ref["scale_factors"].tolist()):
        inputs.append(
            {
                "image": torch.zeros(3, height, width),
                "height": height / scale[1],
                "width": width / scale[0],
            }
        )
    for b, output in enumerate(model(inputs)):
        detections = output["instances"]
        expected = ref[f"det_rescaled/boxes_{b}"]
        assert torch.equal(detections.pred_classes, ref[f"det_rescaled/labels_{b}"])
        assert_close(detections.pred_boxes.tensor, expected, rtol=1e-5, atol=1e-2)
