"""
Head, losses, gradients and detections against the reference implementations: of GFL, and of GFLv2
with C class channels and with the C + 1 of its release, whose last has no positives.
"""

from __future__ import annotations

import functools

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from gfl_d2.modeling import (
    DistributionGuidedQuality,
    JointQuality,
    Predictions,
    distance_to_bbox,
    distribution_focal_loss,
    giou_loss,
    integral,
    quality_focal_loss,
    quality_focal_loss_sum,
)
from gfl_d2.modeling.locations import valid_mask
from models import gfl_on_features, split
from reference_data import assert_close_to_largest, case, load

LEVELS = range(5)
V2 = ["gfl_v2_head", "gfl_v2_head_released_channels"]
CASES = [
    *(("gfl_head_train", name) for name in ("both", "one_empty", "none")),
    *((file, name) for file in V2 for name in ("both", "one_empty", "none")),
]


def per_level(ref, name):
    return [ref[f"{name}_l{i}"] for i in LEVELS]


def reference_model(ref, **kwargs):
    """GFL with the head weights of the reference, on its input features."""
    features = [feature.clone().requires_grad_() for feature in per_level(ref, "feat")]
    is_v2 = "weights/reg_conf.0.weight" in ref
    model = gfl_on_features(
        features,
        num_classes=len(ref["weights/gfl_cls.bias"]),
        num_convs=count_convs(ref),
        quality=DistributionGuidedQuality() if is_v2 else JointQuality(),
        # GFLv2's release has no floor.
        criterion={"box_normalizer_min": 1e-12 if is_v2 else 1.0},
        **kwargs,
    )
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
        "reg_conf": "quality_pred",
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


@pytest.mark.parametrize("file", ["gfl_head_train", *V2])
def test_head_forward(file):
    ref = load(file)
    model = reference_model(ref)
    logits, distributions, *quality = model.head(model.backbone.features)
    for i in LEVELS:
        assert_close_to_largest(distributions[i], ref[f"bbox_pred_l{i}"], 1e-5)
        if not quality:
            assert_close_to_largest(logits[i], ref[f"cls_score_l{i}"], 1e-5)
            continue
        statistics = model.head.quality_pred.statistics(distributions[i])
        assert_close_to_largest(statistics, ref[f"stat_l{i}"], 1e-5)
        assert_close_to_largest(quality[0][i].sigmoid(), ref[f"quality_score_l{i}"], 1e-5)
        scores = model.head.quality.score_logits(logits[i], quality[0][i]).sigmoid()
        assert_close_to_largest(scores, ref[f"cls_score_l{i}"], 1e-5)


@pytest.mark.parametrize(("file", "name"), [*CASES, ("gfl_head_train", "low_scores")])
def test_training(file, name):
    ref = load(file)
    model = reference_model(ref)
    if name == "low_scores":
        with torch.no_grad():
            model.head.cls_score.bias += ref["low_scores/cls_bias_shift"]
    model.train()
    with EventStorage() as storage:
        losses = model(batch(ref, name))
    assert_close(losses["loss_qfl"], ref[f"{name}/loss_cls"], rtol=1e-5, atol=0)
    # GFLv2's release divides 0 by 0 where there is no box.
    zero = torch.zeros(())
    assert_close(losses["loss_bbox"], ref.get(f"{name}/loss_bbox", zero), rtol=1e-5, atol=0)
    assert_close(losses["loss_dfl"], ref.get(f"{name}/loss_dfl", zero), rtol=1e-5, atol=0)

    num_pos = sum((ref[f"{name}/label_l{i}"] < 4).sum() for i in LEVELS)
    quality = torch.cat([ref[f"{name}/quality_l{i}"] for i in LEVELS]).sum()
    latest = {key: value for key, (value, _) in storage.latest().items()}
    assert latest["gfl/num_pos_per_image"] == float(num_pos) / 2
    assert latest["gfl/pos_quality"] == pytest.approx(float(quality / num_pos.clamp(min=1)))


@pytest.mark.parametrize(("file", "name"), [x for x in CASES if x[1] != "none" or x[0] not in V2])
def test_gradients(file, name):
    ref = load(file)
    model = reference_model(ref).train()
    with EventStorage():
        sum(model(batch(ref, name)).values()).backward()
    expected = [ref[f"{name}/grad_feat_l{i}"] for i in LEVELS]
    # Relative to the largest of all levels: some have no positive.
    largest = max(grad.abs().max() for grad in expected)
    for feature, grad in zip(model.backbone.features, expected):
        assert (feature.grad - grad).abs().max() / largest < 1e-5

    norms = case(ref, f"{name}/grad_norm")
    largest = max(norms.values())
    assert len(norms) == len(list(model.head.parameters())) - 1 + len(LEVELS)  # a scale per level
    for key, norm in norms.items():
        if key.startswith("scales."):
            grad = model.head.scales.grad[int(key.split(".")[1])]
        else:
            grad = model.head.get_parameter(our_key(key)).grad
        assert (grad.norm() - norm).abs() / largest < 1e-5, key


def compute_targets(model, ref, name):
    """Targets of a case, with the weights of the positives, and what they were computed from."""
    inputs = batch(ref, name)
    images = model.preprocess_image(inputs)
    features = model.backbone.features
    predictions = Predictions(*model.head(features))
    locations = model._locations(features, images.image_sizes)
    assignment = model.assigner(locations, [ref[f"{name}/gt_boxes_{i}"] for i in range(2)])
    classes = torch.cat([ref[f"{name}/gt_labels_{i}"] for i in range(2)])
    targets = model.criterion.targets(predictions, locations, assignment, classes)
    _, weights = model.head.quality.losses(predictions, targets)
    return predictions, targets, weights


@torch.no_grad()
@pytest.mark.parametrize(("file", "name"), CASES)
def test_targets(file, name):
    """Everything that the losses are computed from, and the losses of each level."""
    ref = load(file)
    model = reference_model(ref)
    predictions, targets, weights = compute_targets(model, ref, name)
    logits = predictions.logits
    if predictions.quality is not None:
        logits = map(model.head.quality.score_logits, logits, predictions.quality)
    if f"{name}/pos_weight_sum" in ref:
        assert_close(weights.sum(), ref[f"{name}/pos_weight_sum"], rtol=1e-5, atol=0)
    box_norm = weights.sum().clamp(min=model.criterion.box_normalizer_min)

    levels = zip(
        logits,
        targets.positives,
        *map(
            functools.partial(split, targets),
            (targets.labels, targets.iou, weights, targets.boxes, targets.gt_boxes,
             targets.gt_distances, targets.predictions),
        ),
    )  # fmt: skip
    num_pos = torch.zeros(2)
    for i, (maps, positives, labels, iou, weights_i, boxes, gt_boxes, distances, bins) in enumerate(
        levels
    ):
        height, width = maps.shape[2:]
        index = (positives.image * height + positives.row) * width + positives.column
        num_pos += torch.bincount(positives.image, minlength=2)
        dense_labels = torch.full((2 * height * width,), 4)
        dense_labels[index] = labels
        quality = torch.zeros(2 * height * width)
        quality[index] = iou
        valid = valid_mask(targets.valid_sizes[i], height, width, maps.device).flatten()
        # The release counts its last channel as a class, and one more as background.
        assert torch.equal(dense_labels, ref[f"{name}/label_l{i}"].clamp(max=4))
        assert torch.equal(valid.float(), ref[f"{name}/label_weight_l{i}"])
        assert_close(quality, ref[f"{name}/quality_l{i}"], rtol=1e-5, atol=1e-6)
        expected = ref[f"{name}/loss_cls_per_level"][i] * ref[f"{name}/avg_factor_cls"]
        flat = maps.permute(0, 2, 3, 1).flatten(0, 2)
        dense_labels[dense_labels == 4] = model.num_classes
        loss = quality_focal_loss(flat[valid], dense_labels[valid], quality[valid])
        assert_close(loss.sum(), expected, rtol=1e-5, atol=1e-6)
        sizes = targets.valid_sizes[i]
        loss = quality_focal_loss_sum([maps], [positives], labels, iou, valid_sizes=[sizes])
        assert_close(loss, expected, rtol=1e-5, atol=1e-6)

        assert (len(index) > 0) == (f"{name}/pos_index_l{i}" in ref)
        if len(index) == 0:
            continue
        order = index.argsort()
        assert torch.equal(index[order], ref[f"{name}/pos_index_l{i}"])
        distances = distances.clamp(0, 15.9)
        for ours, theirs in [
            (boxes, "pos_pred_box"),
            (gt_boxes, "pos_target_box"),
            (weights_i, "pos_weight"),
            (distances, "pos_dfl_target"),
        ]:
            assert_close(ours[order], ref[f"{name}/{theirs}_l{i}"], rtol=1e-5, atol=1e-5)
        loss = 2 * (weights_i * giou_loss(boxes, gt_boxes)).sum()
        assert_close(loss / box_norm, ref[f"{name}/loss_bbox_per_level"][i], rtol=1e-5, atol=0)
        loss = distribution_focal_loss(bins.reshape(-1, 17), distances.flatten())
        loss = 0.25 * (weights_i * loss.view(-1, 4).mean(dim=1)).sum()
        assert_close(loss / box_norm, ref[f"{name}/loss_dfl_per_level"][i], rtol=1e-5, atol=0)
    assert num_pos.clamp(min=1).sum() == ref[f"{name}/avg_factor_cls"]


@torch.no_grad()
def test_predictions_of_every_location():
    """Head outputs, scores and decoded boxes, and the candidates for NMS."""
    ref = load("gfl_head_predict")
    model = reference_model(ref).eval()
    features = model.backbone.features
    logits, distributions = model.head(features)
    sizes = ref["image_sizes"].tolist()
    locations = model._locations(features, sizes)
    centers = locations.centers(torch.device("cpu")).tensor_split(locations.starts[1:-1])
    for i in LEVELS:
        assert_close_to_largest(logits[i], ref[f"cls_score_l{i}"], 1e-5)
        assert_close_to_largest(distributions[i], ref[f"bbox_pred_l{i}"], 1e-5)
        assert_close(flatten(logits[i]).sigmoid(), ref[f"score_l{i}"], rtol=1e-5, atol=1e-6)
        for b, size in enumerate(sizes):
            distances = integral(flatten(distributions[i])[b], 16) * model.grids[i].stride
            boxes = Boxes(distance_to_bbox(centers[i], distances))
            boxes.clip(size)
            assert_close(boxes.tensor, ref[f"box_l{i}"][b], rtol=1e-5, atol=1e-3)

    candidates = model._candidates(Predictions(logits, distributions), sizes)
    is_kept = Boxes(candidates.boxes).nonempty()
    for b in range(len(sizes)):
        assert (candidates.image == b).sum() == ref[f"raw/num_per_level_{b}"].sum()
        boxes, scores, classes, _ = (x[is_kept & (candidates.image == b)] for x in candidates)
        assert_close(boxes, ref[f"raw/boxes_{b}"], rtol=1e-5, atol=1e-3)
        assert_close(scores, ref[f"raw/scores_{b}"], rtol=1e-5, atol=1e-6)
        assert torch.equal(classes, ref[f"raw/labels_{b}"])


def flatten(maps):
    """From shape (N, X, H, W) to (N, H * W, X)."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("file", ["gfl_head_predict", *V2])
@pytest.mark.parametrize(
    ("result", "settings"),
    [
        ("det", {}),
        ("det_pre50_max20", {"test_topk_candidates": 50, "max_detections_per_image": 20}),
    ],
)
@torch.no_grad()
def test_detections(file, result, settings):
    ref = load(file)
    model = reference_model(ref, **settings).eval()
    sizes = ref["image_sizes"].tolist()
    outputs = model([{"image": torch.zeros(3, h, w)} for h, w in sizes])
    for b, output in enumerate(outputs):
        # GFLv2's release keeps boxes that lie in the padding, and so has the fewer others.
        kept = Boxes(ref[f"{result}/boxes_{b}"]).nonempty()
        assert kept.all() or file in V2
        detections = output["instances"][: int(kept.sum())]
        boxes, scores, labels = (
            ref[f"{result}/{x}_{b}"][kept] for x in ("boxes", "scores", "labels")
        )
        assert torch.equal(detections.pred_classes, labels)
        assert_close(detections.scores, scores, rtol=1e-5, atol=1e-6)
        assert_close(detections.pred_boxes.tensor, boxes, rtol=1e-5, atol=1e-3)


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
        assert_close(detections.scores, ref[f"det_rescaled/scores_{b}"], rtol=1e-5, atol=1e-6)
