"""TEST.UNCERTAINTY: how sure each side of a detection is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from detectron2.export import TracingAdapter
from torch import nn
from torch.testing import assert_close

from gfl_d2.deploy import prepare_for_inference
from gfl_d2.errors import InputError
from gfl_d2.modeling import DiracDelta, Gaussian, GeneralDistribution, Predictions
from models import build_gfl, make_input, small_config

KEY = ("TEST.UNCERTAINTY", True)
CHOICES = [("joint", "general"), ("dgqp", "general"), ("centerness", "gaussian")]


def build(quality="joint", box="general", *opts):
    """In eval mode, with scores and distributions that are not all alike."""
    model = build_gfl(quality, box, "atss", *opts)
    nn.init.normal_(model.head.cls_score.weight, std=0.2)
    nn.init.constant_(model.head.cls_score.bias, -2.0)
    nn.init.normal_(model.head.bbox_pred.weight, std=0.2)
    return model.eval()


@torch.no_grad()
def detect(model, *inputs):
    return [output["instances"] for output in model(list(inputs))]


@pytest.mark.parametrize(("bin_width", "side"), [(1.0, 0), (0.5, 3)])
def test_two_bins(bin_width, side):
    """Bins 2 and 6 with probabilities 3/4 and 1/4: the mean is 3, the variance 3/4 + 9/4."""
    box = GeneralDistribution(reg_max=8, bin_width=bin_width)
    probs = torch.zeros(4, 9)
    probs[:, 4] = 1
    probs[side] = torch.tensor([0, 0, 0.75, 0, 0, 0, 0.25, 0, 0])
    std, entropy = box.uncertainty(probs.clamp(min=1e-12).log().flatten())
    expected = torch.zeros(2, 4)
    expected[:, side] = torch.tensor(
        [3**0.5 * bin_width, -0.75 * math.log(0.75) - 0.25 * math.log(0.25)]
    )
    assert_close(torch.stack((std, entropy)), expected, atol=1e-4, rtol=1e-5)


def test_nothing_known_is_the_highest_entropy():
    std, entropy = GeneralDistribution(reg_max=16).uncertainty(torch.zeros(2, 68))
    assert_close(entropy, torch.full((2, 4), math.log(17)))
    assert_close(std, torch.full((2, 4), ((17**2 - 1) / 12) ** 0.5))


def test_gaussian():
    values = torch.tensor([[[0.3, math.log(4.0)]] * 3 + [[0.3, 100.0]]]).flatten(1)
    std, entropy = Gaussian().uncertainty(values)
    assert_close(std, torch.tensor([[2.0, 2.0, 2.0, math.exp(5)]]))
    assert_close(entropy[0, 0].item(), torch.distributions.Normal(0.0, 2.0).entropy().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("box", [GeneralDistribution(), Gaussian()])
def test_half_precision(box, dtype):
    values = torch.randn(5, 4 * box.num_values, generator=torch.Generator().manual_seed(0)) * 3
    for actual, expected in zip(
        box.uncertainty(values.to(dtype)), box.uncertainty(values.to(dtype).float())
    ):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("choices", CHOICES)
def test_detections_are_the_same(choices):
    model, plain = build(*choices, *KEY), build(*choices)
    for x, expected in zip(*(detect(m, make_input(), make_input([])) for m in (model, plain))):
        assert set(x.get_fields()) - set(expected.get_fields()) == {"box_std", "box_entropy"}
        assert torch.equal(x.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(x.scores, expected.scores)
        assert torch.equal(x.pred_classes, expected.pred_classes)
        assert x.box_std.shape == x.box_entropy.shape == (len(x), 4)
        assert (x.box_std > 0).all()
        assert len(x) > 0


@torch.no_grad()
def predict(model, image):
    """Boxes, shape (R, 4), distributions, (R, 4, n + 1), and strides, (R,), of all locations."""
    images = model.preprocess_image([{"image": image}])
    features = model.backbone(images.tensor)
    maps = model.head([features[name] for name in model.head_in_features])[1]
    boxes, probs, strides = [], [], []
    for stride, values in zip(model.grid.strides.tolist(), maps):
        p = values[0].unflatten(0, (4, -1)).softmax(dim=1).permute(2, 3, 0, 1)  # (H, W, 4, n + 1)
        left, top, right, bottom = ((p * torch.arange(p.shape[-1])).sum(-1) * stride).unbind(-1)
        rows, columns = (torch.arange(n) * stride for n in p.shape[:2])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        boxes.append(torch.stack((x - left, y - top, x + right, y + bottom), dim=-1).view(-1, 4))
        probs.append(p.flatten(0, 1))
        strides += [stride] * len(probs[-1])
    return torch.cat(boxes), torch.cat(probs), torch.tensor(strides)


def test_a_side_has_the_spread_of_its_own_distribution():
    """Against the moments at the location whose box it is, for boxes that nothing cuts off."""
    model = build("joint", "general", *KEY)
    image = make_input(size=(320, 384))["image"]
    (found,) = detect(model, {"image": image})
    boxes, probs, strides = predict(model, image)
    distance = (found.pred_boxes.tensor[:, None] - boxes).abs().amax(dim=-1)  # (D, R)
    is_whole, location = distance.min(dim=1).values < 1e-2, distance.argmin(dim=1)
    assert is_whole.sum() > 5
    p, bins = probs[location], torch.arange(17.0)
    variance = (p * bins**2).sum(dim=-1) - (p * bins).sum(dim=-1) ** 2
    std, entropy = variance.sqrt() * strides[location, None], -(p * p.log()).sum(dim=-1)
    assert_close(found.box_std[is_whole], std[is_whole], rtol=1e-3, atol=1e-3)
    assert_close(found.box_entropy[is_whole], entropy[is_whole], rtol=1e-4, atol=1e-4)


def test_pixels_of_the_resized_image():
    model = build("joint", "general", *KEY)
    image = make_input()["image"]
    height, width = image.shape[1:]
    (small,), (large,) = (
        detect(model, {"image": image, "height": height * y, "width": width * x})
        for y, x in ((1, 1), (3, 2))
    )
    assert_close(large.box_std, small.box_std * torch.tensor([2.0, 3.0, 2.0, 3.0]))
    assert torch.equal(large.box_entropy, small.box_entropy)


def test_no_detections():
    model = build("joint", "general", *KEY)
    model.test_score_thresh = 1.0
    (found,) = detect(model, make_input())
    assert found.box_std.shape == found.box_entropy.shape == (0, 4)


def test_batch():
    model = build("joint", "general", *KEY)
    inputs = [make_input(), make_input(size=(96, 64))]
    (alone,) = detect(model, inputs[1])
    assert_close(
        detect(model, inputs[1], inputs[1])[1].box_std, alone.box_std, rtol=1e-5, atol=1e-3
    )
    assert all(len(x.box_std) == len(x) > 0 for x in detect(model, *inputs))


def test_in_bfloat16(monkeypatch):
    monkeypatch.setattr("gfl_d2.deploy.predictor.has_fast_bfloat16", lambda _: True)
    cfg = small_config("joint", "general", "atss", *KEY, "TEST.PRECISION", "bfloat16")
    (found,) = detect(prepare_for_inference(cfg, build("joint", "general", *KEY)), make_input())
    assert len(found) > 0
    assert found.box_std.dtype == found.box_entropy.dtype == torch.float32


@pytest.mark.parametrize("choices", CHOICES)
def test_copies_and_traces(choices):
    model = build(*choices, *KEY)
    (expected,) = detect(model, make_input())
    (copied,) = detect(copy.deepcopy(model), make_input())
    assert torch.equal(copied.box_std, expected.box_std)
    adapter = TracingAdapter(
        model,
        [{"image": make_input(size=(128, 192))["image"]}],
        inference_func=lambda model, inputs: [x["instances"] for x in model(inputs)],
    )
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    for size in (128, 192), (64, 96):
        image = make_input(size=size)["image"]
        assert_close(traced(image), adapter(image), rtol=1e-4, atol=1e-3)


class WithSides(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, sizes):
        features = self.model.backbone(images)
        predictions = self.model.head([features[x] for x in self.model.head_in_features])
        candidates, sides = self.model.candidates_and_sides(Predictions(*predictions), sizes)
        return *candidates, *sides


@torch.no_grad()
@pytest.mark.parametrize("choices", CHOICES)
def test_export(choices):
    """What box_std is computed from, by torch.export."""
    model = WithSides(build(*choices, *KEY))
    arguments = torch.rand(1, 3, 192, 224), torch.tensor([(187, 215)])
    exported = torch.export.export(model, arguments, strict=False).module()
    assert_close(exported(*arguments), model(*arguments), rtol=1e-4, atol=1e-3)


def test_a_representation_without_distribution_is_refused():
    for box in ("general", "gaussian"):
        assert small_config("none", box, "atss", *KEY).TEST.UNCERTAINTY
    message = r"TEST\.UNCERTAINTY must be False when MODEL\.GFL\.BOX_REPRESENTATION is 'dirac'"
    with pytest.raises(InputError, match=message):
        small_config("none", "dirac", "atss", *KEY)
    with pytest.raises(InputError, match=r"TEST\.UNCERTAINTY must be False for .*'RetinaNet'"):
        small_config("none", "general", "atss", *KEY, "MODEL.META_ARCHITECTURE", "RetinaNet")
    with pytest.raises(NotImplementedError, match="DiracDelta predicts no distribution"):
        DiracDelta().uncertainty(torch.zeros(1, 4))
