"""The model is a plain nn.Module: what is done to modules works on it, with every choice."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.utils.events import EventStorage
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from gfl_d2.modeling import GFL, Predictions
from models import CHOICES, WITH_RESNET, build_gfl, make_input, small_config

COMBINATIONS = [
    *(choices for choices in CHOICES if choices[2] == "atss"),
    ("none", "general", "sapd"),
    ("joint", "general", "atss", *WITH_RESNET),
    ("dgqp", "general", "atss", *WITH_RESNET),
]
INPUTS = [make_input(), make_input([])]


def build(*choices) -> GFL:
    """In eval mode, with scores that are neither all alike nor all below the threshold."""
    model = build_gfl(*choices)
    nn.init.normal_(model.head.cls_score.weight, std=0.2)
    nn.init.constant_(model.head.cls_score.bias, -2.0)
    return model.eval()


@torch.no_grad()
def detect(model, inputs=INPUTS):
    """Boxes, scores and classes of each image."""
    results = [output["instances"] for output in model(inputs)]
    return [(x.pred_boxes.tensor, x.scores, x.pred_classes) for x in results]


def losses(model):
    with EventStorage():
        return model.train()(INPUTS)


def load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": load,
    "AveragedModel": AveragedModel,
}


@pytest.mark.slow
@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("choices", COMBINATIONS)
def test_a_copy_is_equal_and_has_weights_of_its_own(choices, in_bfloat16):
    model = build(*choices)
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        sum(losses(model).values()).backward()  # a model in use
    model.zero_grad(set_to_none=True)
    before = detect(model.eval())
    assert len(before[0][1]) > 0
    copies = {name: copy_model(model).eval() for name, copy_model in COPIES.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, copied in copies.items():
        assert_close(
            detect(copied), before, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    sum(losses(copied).values()).backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("choices", COMBINATIONS)
def test_hooks_of_every_module_are_called(choices):
    model, called = build(*choices), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    detect(model)
    losses(model)
    # What holds other modules without being called itself.
    containers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) or name == "backbone.top_block.unused"
    }
    assert {name for name, _ in model.named_modules()} - called == containers


@pytest.mark.slow
@pytest.mark.parametrize("choices", COMBINATIONS)
def test_torch_compile(choices):
    # Else the exponent of a loss, once another model had a different one, is a symbol, which
    # PyTorch cannot hand to a function with a gradient of its own.
    torch.compiler.reset()
    model = build(*choices)
    expected, expected_losses = detect(model), losses(copy.deepcopy(model))
    # The whole of it takes a while to compile: for one model with its gradients.
    backend = "aot_eager" if choices == COMBINATIONS[-1] else "eager"
    compiled = torch.compile(model, backend=backend)
    assert_close(detect(compiled), expected, rtol=1e-4, atol=1e-3)
    model.train()
    with EventStorage():
        actual = compiled(INPUTS)
    assert_close(actual, expected_losses, rtol=1e-4, atol=1e-5)
    sum(actual.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_eight_threads():
    """Images of several sizes at once give what they give alone."""
    model = build("joint", "general", "atss", *WITH_RESNET)
    inputs = [[make_input(size=(64 + 32 * (i % 3), 96 + 32 * (i % 2)))] for i in range(24)]
    expected = [detect(model, x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(lambda x: detect(model, x), inputs))
    assert_close(actual, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("choices", COMBINATIONS)
def test_building_on_another_device_leaves_nothing_behind(choices):
    expected = losses(build_gfl(*choices))
    torch.set_default_device("meta")
    try:
        meta = GFL(small_config(*choices))
    finally:
        torch.set_default_device(None)
    assert all(x.is_meta for x in (*meta.parameters(), *meta.buffers()))
    assert_close(losses(build_gfl(*choices)), expected, rtol=0, atol=0)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("choices", COMBINATIONS)
def test_tracing(choices):
    """By Detectron2's adapter; the trace holds for images of other sizes."""
    model = build(*choices)
    sizes = (128, 192), (64, 96), (160, 320)
    images = [make_input(size=size)["image"] for size in sizes]
    adapter = TracingAdapter(
        model,
        [{"image": images[0]}],
        inference_func=lambda model, inputs: [x["instances"] for x in model(inputs)],
    )
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    for image in images:
        assert_close(traced(image), adapter(image), rtol=1e-4, atol=1e-3)


class Candidates(nn.Module):
    """The detector without NMS, from a batch of images whose sides are multiples of 32."""

    def __init__(self, model: GFL):
        super().__init__()
        self.model = model

    def forward(self, images, image_sizes):
        model = self.model
        features = model.backbone((images - model.pixel_mean) / model.pixel_std)
        predictions = model.head([features[name] for name in model.head_in_features])
        return tuple(model.candidates(Predictions(*predictions), image_sizes))


# Those that differ at inference: other choices differ in their losses.
EXPORTED = [x for x in COMBINATIONS if x[0] in ("joint", "dgqp", "centerness")]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("choices", EXPORTED)
def test_export(choices):
    """By torch.export, for any height and width."""
    model = Candidates(build(*choices))

    def arguments(height, width):
        image = make_input(size=(height, width))["image"][None]
        return image, torch.tensor([(height - 5, width - 9)])

    # Every map has more than one row and column: torch.export makes a constant of a 1.
    height, width = (torch.export.Dim(name, min=5, max=40) for name in ("height", "width"))
    sides = {2: 32 * height, 3: 32 * width}
    exported = torch.export.export(
        model, arguments(192, 224), dynamic_shapes=(sides, None), strict=False
    )
    for size in (192, 224), (160, 480), (320, 160):
        expected = model(*arguments(*size))
        assert (expected[1] > 0).any()
        assert_close(exported.module()(*arguments(*size)), expected, rtol=1e-4, atol=1e-3)
