"""
Head, losses, gradients and detections against the reference implementations: of GFL, and of GFLv2
with C class channels and with the C + 1 of its release, whose last has no positives.
"""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from gfl_d2.modeling import (
    DistributionGuidedQuality,
    GroundTruth,
    JointQuality,
    Predictions,
    collect_samples,
    distance_to_bbox,
    distribution_focal_loss,
    giou_loss,
    integral,
    quality_focal_loss,
)
from models import gfl_on_features
from reference_data import assert_close_to_largest, case, load

LEVELS = range(5)
# The reference searches the padding of a batch, and ours does not. With this divisibility of the
# input, all of the padding counts as the images' own.
WITH_PADDING = {"size_divisibility": 256}
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
    with EventStorage(19) as storage:  # an iteration that logs
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


@torch.no_grad()
@pytest.mark.parametrize(("file", "name"), CASES)
def test_samples(file, name):
    """Everything that the losses are computed from, and the losses of each level."""
    ref = load(file)
    model = reference_model(ref)
    inputs = batch(ref, name)
    predictions = Predictions(*model.head(model.backbone.features))
    levels = model.levels(predictions, ref["image_sizes"])
    gt = GroundTruth.from_instances([x["instances"] for x in inputs])
    matches = model.assigner(levels, gt)
    samples = collect_samples(predictions, levels, matches, gt, model.head.box)
    weights = model.head.quality.box_weights(predictions, samples)
    all_weights = samples.mask(weights).sum()
    if f"{name}/pos_weight_sum" in ref:
        assert_close(all_weights, ref[f"{name}/pos_weight_sum"], rtol=1e-5, atol=0)
    box_norm = all_weights.clamp(min=model.criterion.box_normalizer_min)

    logits = predictions.class_logits
    if predictions.quality_logits is not None:
        logits = list(map(model.head.quality.score_logits, logits, predictions.quality_logits))
    shape = matches.is_positive.shape
    num_pos = torch.zeros(2)
    for i, maps in enumerate(logits):
        # The positives of this level.
        is_positive = matches.is_positive[:, i]
        image, row, column = (
            x[is_positive]
            for x in (
                matches.image[:, None].expand_as(is_positive),
                matches.row[:, i],
                matches.column[:, i],
            )
        )
        labels, iou, weight, boxes, gt_boxes, distances, bins = (
            x.unflatten(0, shape)[:, i][is_positive]
            for x in (samples.classes, samples.iou, weights, samples.boxes, samples.gt_boxes,
                      samples.gt_distances, samples.box_values)
        )  # fmt: skip
        height, width = maps.shape[2:]
        index = (image * height + row) * width + column
        num_pos += torch.bincount(image, minlength=2)
        dense_labels = torch.full((2 * height * width,), 4)
        dense_labels[index] = labels
        quality = torch.zeros(2 * height * width)
        quality[index] = iou
        valid = levels.valid_mask(i).flatten()
        # The release counts its last channel as a class, and one more as background.
        assert torch.equal(dense_labels, ref[f"{name}/label_l{i}"].clamp(max=4))
        assert torch.equal(valid.float(), ref[f"{name}/label_weight_l{i}"])
        assert_close(quality, ref[f"{name}/quality_l{i}"], rtol=1e-5, atol=1e-6)
        expected = ref[f"{name}/loss_cls_per_level"][i] * ref[f"{name}/avg_factor_cls"]
        flat = maps.permute(0, 2, 3, 1).flatten(0, 2)
        dense_labels[dense_labels == 4] = model.num_classes
        loss = quality_focal_loss(flat[valid], dense_labels[valid], quality[valid])
        assert_close(loss.sum(), expected, rtol=1e-5, atol=1e-6)

        assert (len(index) > 0) == (f"{name}/pos_index_l{i}" in ref)
        if len(index) == 0:
            continue
        order = index.argsort()
        assert torch.equal(index[order], ref[f"{name}/pos_index_l{i}"])
        distances = distances.clamp(0, 15.9)
        for ours, theirs in [
            (boxes, "pos_pred_box"),
            (gt_boxes, "pos_target_box"),
            (weight, "pos_weight"),
            (distances, "pos_dfl_target"),
        ]:
            assert_close(ours[order], ref[f"{name}/{theirs}_l{i}"], rtol=1e-5, atol=1e-5)
        loss = 2 * (weight * giou_loss(boxes, gt_boxes)).sum()
        assert_close(loss / box_norm, ref[f"{name}/loss_bbox_per_level"][i], rtol=1e-5, atol=0)
        loss = distribution_focal_loss(bins.reshape(-1, 17), distances.flatten())
        loss = 0.25 * (weight * loss.view(-1, 4).mean(dim=1)).sum()
        assert_close(loss / box_norm, ref[f"{name}/loss_dfl_per_level"][i], rtol=1e-5, atol=0)
    assert num_pos.clamp(min=1).sum() == ref[f"{name}/avg_factor_cls"]


def pair_up(detections, others):
    """The most similar of the others, each once, for each detection: boxes, scores, classes."""
    rows = [
        torch.cat((boxes, 1000 * scores[:, None], 1000 * classes[:, None]), dim=1).double()
        for boxes, scores, classes in (detections, others)
    ]
    order = torch.cdist(*rows).argmin(dim=1)
    assert len(order.unique()) == len(order)
    return order


@torch.no_grad()
def test_predictions_of_every_location():
    """Head outputs, scores and decoded boxes, and the candidates for NMS."""
    ref = load("gfl_head_predict")
    model = reference_model(ref, **WITH_PADDING).eval()
    predictions = Predictions(*model.head(model.backbone.features))
    levels = model.levels(predictions, ref["image_sizes"])
    sizes = ref["image_sizes"].tolist()
    for i, (height, width) in enumerate(levels.shapes):
        logits, values = predictions.class_logits[i], predictions.box_values[i]
        assert_close_to_largest(logits, ref[f"cls_score_l{i}"], 1e-5)
        assert_close_to_largest(values, ref[f"bbox_pred_l{i}"], 1e-5)
        assert_close(flatten(logits).sigmoid(), ref[f"score_l{i}"], rtol=1e-5, atol=1e-6)
        cells = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
        stride = model.backbone.output_shape()[f"p{i + 3}"].stride
        for b, size in enumerate(sizes):
            distances = integral(flatten(values)[b], 16) * stride
            boxes = Boxes(distance_to_bbox(cells * stride, distances))
            boxes.clip(size)
            assert_close(boxes.tensor, ref[f"box_l{i}"][b], rtol=1e-5, atol=1e-3)

    candidates = model.candidates(predictions, ref["image_sizes"])
    for b in range(len(sizes)):
        order = candidates.scores[b].argsort(descending=True)[: (candidates.scores[b] > 0).sum()]
        boxes, scores, classes = (x[b][order] for x in candidates)
        # The reference counts those that lie in the padding, and drops them later.
        assert len(boxes) == len(ref[f"raw/boxes_{b}"]) <= ref[f"raw/num_per_level_{b}"].sum()
        # It has them level by level. Scores that are alike to rounding have no order.
        order = pair_up(
            (boxes, scores, classes),
            (ref[f"raw/{name}_{b}"] for name in ("boxes", "scores", "labels")),
        )
        assert_close(boxes, ref[f"raw/boxes_{b}"][order], rtol=1e-5, atol=1e-3)
        assert_close(scores, ref[f"raw/scores_{b}"][order], rtol=1e-5, atol=1e-6)
        assert torch.equal(classes, ref[f"raw/labels_{b}"][order])


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
    model = reference_model(ref, **settings, **WITH_PADDING).eval()
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
def test_an_image_without_padding_has_the_detections_of_the_reference():
    """The first one: the batch is as large as it is, up to a multiple of 32."""
    ref = load("gfl_head_predict")
    sizes = ref["image_sizes"].tolist()
    first, second = reference_model(ref).eval()([{"image": torch.zeros(3, h, w)} for h, w in sizes])
    assert torch.equal(first["instances"].pred_classes, ref["det/labels_0"])
    assert_close(first["instances"].scores, ref["det/scores_0"], rtol=1e-5, atol=1e-6)
    # The second one loses what lay in the padding.
    assert not torch.equal(second["instances"].pred_classes, ref["det/labels_1"])


@torch.no_grad()
def test_detections_in_the_original_image():
    """Boxes are scaled to the size asked for, as by the reference before its NMS."""
    ref = load("gfl_head_predict")
    model = reference_model(ref, **WITH_PADDING).eval()
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
