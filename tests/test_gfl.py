"""The meta-architecture: properties of training and inference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from gfl_d2.modeling import GeneralDistribution, GroundTruth, JointQuality, Predictions
from gfl_d2.modeling.criterion import GFLCriterion
from gfl_d2.modeling.focal_quality import NoQuality
from models import STRIDES, gfl_on_features

SIZE = (128, 192)


def make_features(num_images=2, size=SIZE, channels=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_images, channels, -(-size[0] // s), -(-size[1] // s), generator=generator)
        for s in STRIDES
    ]


def make_model(features, **kwargs):
    torch.manual_seed(0)
    model = gfl_on_features(features, num_classes=3, num_convs=1, conv_dim=32, **kwargs)
    # Scores that are neither all alike nor all below the threshold.
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.2)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.2)
    torch.nn.init.constant_(model.head.cls_score.bias, -2.0)
    return model


def make_inputs(boxes_per_image, size=SIZE):
    inputs = []
    for boxes in boxes_per_image:
        gt = Instances(size)
        gt.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        gt.gt_classes = torch.arange(len(boxes)) % 3
        inputs.append({"image": torch.zeros(3, *size), "instances": gt})
    return inputs


def train_losses(model, inputs):
    with EventStorage(19) as storage:  # an iteration that logs
        losses = model.train()(inputs)
    return losses, {key: value for key, (value, _) in storage.latest().items()}


BOXES = [[10.3, 20.2, 80.1, 90.7], [60.0, 5.0, 188.0, 120.0], [100.5, 30.5, 140.2, 77.0]]


@pytest.mark.parametrize(
    "boxes",
    [
        [BOXES, BOXES[:1]],
        [BOXES, []],
        [[], []],
        [[[50.2, 50.3, 50.6, 50.8]], []],  # smaller than a pixel: may have no positive
        [[[-300.0, -300.0, 700.0, 700.0]], BOXES],
        [BOXES * 2, [BOXES[0]] * 5],
    ],
)
def test_losses_are_finite_and_reach_every_parameter(boxes):
    features = [f.requires_grad_() for f in make_features()]
    model = make_model(features)
    losses, _ = train_losses(model, make_inputs(boxes))
    assert set(losses) == {"loss_qfl", "loss_bbox", "loss_dfl"}
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.isfinite(), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(feature.grad is not None for feature in features)


def test_each_loss_alone_reaches_its_branch_without_any_box():
    """A process that never uses a parameter would hang distributed training."""
    for name, branch in [("loss_bbox", "bbox_pred"), ("loss_dfl", "bbox_pred")]:
        model = make_model(make_features())
        losses, _ = train_losses(model, make_inputs([[], []]))
        losses[name].backward()
        assert getattr(model.head, branch).weight.grad is not None
        assert losses[name] == 0


def test_infinite_logit_in_the_padding_does_not_matter():
    model = make_model(make_features(size=(256, 256)))
    inputs = make_inputs([BOXES, BOXES])
    inputs[0]["image"] = torch.zeros(3, 256, 256)  # the batch is larger than the second image
    images = model.preprocess_image(inputs)
    logits, distributions = model.head(model.backbone.features)
    with EventStorage():
        gt = [x["instances"] for x in inputs]
        expected = model.forward_training(
            images, model.backbone.features, (logits, distributions), gt
        )
        logits[0][1, :, -1, -1] = float("inf")
        losses = model.forward_training(
            images, model.backbone.features, (logits, distributions), gt
        )
    for name in losses:
        assert torch.equal(losses[name], expected[name])


def test_boxes_that_overflow_do_not_matter_where_nothing_is_positive():
    """In half precision a prediction that no loss holds may become infinite."""
    model = make_model(make_features()).train()
    inputs = make_inputs([BOXES, []])
    images, features = model.preprocess_image(inputs), model.backbone.features
    gt = [x["instances"] for x in inputs]
    results = []
    for value in (0.0, float("inf"), float("nan")):
        logits, boxes = ([x.detach().requires_grad_() for x in y] for y in model.head(features))
        with torch.no_grad():
            levels = model.levels(Predictions(logits, boxes), torch.tensor([SIZE, SIZE]))
            matches = model.assigner(levels, GroundTruth.from_instances(gt))
            for i, maps in enumerate(boxes):
                places = matches.places(i, maps.shape)
                keep = torch.zeros(maps[:, 0].numel(), dtype=torch.bool)
                keep[places[matches.is_positive[:, i]]] = True
                maps.masked_fill_(~keep.view(2, 1, *maps.shape[2:]), value)
        with EventStorage():
            losses = model.forward_training(images, features, (logits, boxes), gt)
        sum(losses.values()).backward()
        results.append((losses, [x.grad for x in (*logits, *boxes)]))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def test_positives_are_logged():
    """A box whose sides are all at least 950 px away, more than 4 strides of 128 px."""
    inputs = make_inputs([[[-1000.0, -1000.0, 1200.0, 1100.0]], []])
    for reg_max, frac_beyond in [(4, 1), (16, 0)]:  # its positives are on P7
        model = make_model(make_features(), box=GeneralDistribution(reg_max))
        _, logged = train_losses(model, inputs)
        assert logged["gfl/frac_sides_beyond_reg_max"] == frac_beyond
        assert logged["gfl/num_pos_per_image"] > 0
        assert 0 <= logged["gfl/pos_quality"] <= 1
    _, logged = train_losses(make_model(make_features()), make_inputs([[], []]))
    assert logged["gfl/num_pos_per_image"] == 0


@pytest.mark.parametrize("boxes", [BOXES, [[63.0, 63.0, 66.0, 65.0]], [[-9e9, -9e9, 9e9, 9e9]]])
def test_what_is_logged_is_of_the_positives(boxes):
    """Of many, of one, and of some that are so far away from all sides that none is predicted."""
    model, caught = make_model(make_features()), []
    model.criterion.register_forward_hook(lambda _, inputs, losses: caught.append(inputs[2]))
    _, logged = train_losses(model, make_inputs([boxes, []]))
    (samples,) = caught
    is_positive = samples.is_positive
    assert int(is_positive.sum()) == 1 or len(boxes) > 1 or boxes[0][0] < 0
    assert logged["gfl/num_pos_per_image"] == int(is_positive.sum()) / 2 > 0
    assert logged["gfl/pos_quality"] == pytest.approx(float(samples.iou[is_positive].mean()))
    beyond = (samples.gt_distances[is_positive] > 16).float().mean()
    assert logged["gfl/frac_sides_beyond_reg_max"] == pytest.approx(float(beyond))


def test_values_are_read_in_few_iterations_only():
    """Since a GPU has to be waited for."""
    inputs = make_inputs([BOXES, []])
    for first, is_logged in [(18, False), (19, True), (20, False)]:
        with EventStorage(first) as storage:
            make_model(make_features()).train()(inputs)
        assert ("gfl/pos_quality" in storage.latest()) == is_logged


def test_box_normalizer_min():
    """The floor binds while the positives' scores sum to less; it scales the box losses alone."""
    inputs = make_inputs([BOXES[:1], []])
    losses = {}
    for floor in (1e-6, 1e3, 2e3):
        model = make_model(make_features(), criterion={"box_normalizer_min": floor})
        losses[floor], _ = train_losses(model, inputs)
    for name in ("loss_bbox", "loss_dfl"):
        assert_close(losses[1e3][name], 2 * losses[2e3][name])
        assert losses[1e-6][name] > losses[1e3][name]
    assert torch.equal(losses[1e-6]["loss_qfl"], losses[1e3]["loss_qfl"])


def test_box_weight_min():
    """It changes the losses of the boxes alone; 1 weighs all positives the same."""
    inputs = make_inputs([BOXES, BOXES[:1]])
    plain, even, raised = (
        train_losses(make_model(make_features(), **choices), inputs)[0]
        for choices in (
            {},
            {"quality": NoQuality()},
            {"criterion": {"box_weight_min": 1.0}},
        )
    )
    assert torch.equal(raised["loss_qfl"], plain["loss_qfl"])
    for name in ("loss_bbox", "loss_dfl"):
        assert_close(raised[name], even[name])
        assert not torch.isclose(raised[name], plain[name])


def test_box_weight_min_is_a_floor():
    """Weights below it are raised to it, others stay, and it makes no positives."""
    criterion = GFLCriterion(box_weight_min=0.3)
    weights = torch.tensor([0.1, 0.3, 0.8, 0.2])
    is_positive = torch.tensor([True, True, True, False])
    criterion.quality = SimpleNamespace(box_weights=lambda predictions, samples: weights)
    samples = SimpleNamespace(weigh=lambda x: torch.where(is_positive, x, 0))
    assert_close(criterion.box_weights(None, samples), torch.tensor([0.3, 0.3, 0.8, 0]))


def test_loss_weights():
    inputs = make_inputs([BOXES, BOXES[:1]])
    plain, _ = train_losses(make_model(make_features()), inputs)
    model = make_model(
        make_features(),
        box=GeneralDistribution(dfl_weight=1.25),
        quality=JointQuality(weight=3.0),
        criterion={"bbox_weight": 4.0},
    )
    weighted, _ = train_losses(model, inputs)
    for name, factor in [("loss_qfl", 3), ("loss_bbox", 2), ("loss_dfl", 5)]:
        assert_close(weighted[name], factor * plain[name])


@torch.no_grad()
def test_batch_of_two_is_two_batches_of_one():
    features = make_features()
    both = make_model(features).eval()(make_inputs([BOXES, []]))
    for i in range(2):
        model = make_model([f[i : i + 1] for f in features]).eval()
        (alone,) = model(make_inputs([BOXES]))
        assert_same_detections(alone["instances"], both[i]["instances"])
        assert len(alone["instances"]) > 0


def assert_same_detections(a, b):
    assert torch.equal(a.pred_classes, b.pred_classes)
    assert_close(a.scores, b.scores)
    assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=0, atol=1e-3)  # pixels


@torch.no_grad()
def test_nothing_above_the_threshold():
    model = make_model(make_features(), test_score_thresh=0.9999).eval()
    for output in model(make_inputs([[], []])):
        assert len(output["instances"]) == 0
        assert output["instances"].pred_boxes.tensor.shape == (0, 4)


@torch.no_grad()
def test_detections_are_plausible():
    model = make_model(make_features(), max_detections_per_image=30).eval()
    for output in model(make_inputs([[], []])):
        detections = output["instances"]
        assert len(detections) == 30
        assert (detections.scores[:-1] >= detections.scores[1:]).all()
        assert detections.scores.min() > 0.05
        boxes = detections.pred_boxes
        assert boxes.nonempty().all()
        assert boxes.inside_box(SIZE, boundary_threshold=1).all()
        assert set(detections.pred_classes.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_under_autocast_are_float32(dtype):
    inputs = make_inputs([BOXES, BOXES[:1]])
    expected, _ = train_losses(make_model(make_features()), inputs)
    model = make_model(make_features())
    with torch.autocast("cpu", dtype=dtype):
        losses, _ = train_losses(model, inputs)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        # The head is in half precision, so equal only roughly.
        assert_close(loss, expected[name], rtol=0.05, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_detections_under_autocast_are_float32(dtype):
    """Decoding rounds nothing: it gives what it gives for the same predictions in float32."""
    features = make_features()
    model = make_model(features).eval()
    images = model.preprocess_image(make_inputs([[], []]))
    with torch.autocast("cpu", dtype=dtype):
        predictions = model.head(features)
        assert predictions[1][0].dtype == dtype
        results = model.forward_inference(images, features, predictions)
    in_float32 = tuple([x.float() for x in maps] for maps in predictions)
    for result, expected in zip(results, model.forward_inference(images, features, in_float32)):
        assert result.scores.dtype == result.pred_boxes.tensor.dtype == torch.float32
        assert torch.equal(result.scores, expected.scores)
        assert torch.equal(result.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_gradient_of_box_losses_by_finite_differences():
    """
    Of the box losses along a direction in feature space, in float64. QFL's target and the
    positives' weights are detached, so they depend on the features where the gradient does not.
    """
    features = [f.double() for f in make_features(num_images=1)]
    model = make_model(features).double()
    inputs = make_inputs([BOXES])
    direction = [torch.randn_like(f) for f in features]

    def box_losses(step):
        model.backbone.features = [f + step * d for f, d in zip(features, direction)]
        _, distributions = model.head(model.backbone.features)
        images = model.preprocess_image(inputs)
        with EventStorage():
            losses = model.forward_training(
                images, features, (fixed_logits, distributions), [inputs[0]["instances"]]
            )
        return losses["loss_bbox"] + losses["loss_dfl"]

    fixed_logits = [x.detach() for x in model.head(features)[0]]
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    box_losses(step).backward()
    numeric = (box_losses(torch.tensor(1e-5)) - box_losses(torch.tensor(-1e-5))) / 2e-5
    assert_close(step.grad, numeric.detach(), rtol=1e-5, atol=1e-8)
