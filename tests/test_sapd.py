"""SAPD: weights, levels and losses as in the plain algorithm, and what its network learns from."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.testing import assert_close

from gfl_d2.checkpoint import GFLCheckpointer
from gfl_d2.deploy import prepare_for_inference
from gfl_d2.errors import InputError
from gfl_d2.modeling import SAPDAssigner, distance_to_bbox
from models import STRIDES, build_gfl, make_input, small_config
from plain_sapd import plain_sapd

MAX_ITER = 100
SAPD = ("none", "dirac", "sapd", "MODEL.ANCHOR_GENERATOR.OFFSET", 0.5,
        "MODEL.GFL.BBOX_REG_LOSS_TYPE", "iou", "MODEL.GFL.LOSS_BBOX_WEIGHT", 1.0,
        "SOLVER.MAX_ITER", MAX_ITER)  # fmt: skip
HARD, SOFT = MAX_ITER // 2 - 1, MAX_ITER // 2
SIZES = (96, 160), (64, 128)  # the second image is smaller: there is padding
CROWD = [[20.0, 12.0, 150.0, 90.0], [60.0, 20.0, 100.0, 80.0], [70.0, 30.0, 96.0, 55.0]]


def build(*opts, seed=0, class_std=0.1):
    """With predictions and levels that differ from place to place."""
    model = build_gfl(*SAPD, *opts).train()
    torch.manual_seed(seed)
    for conv in model.backbone.convs:
        nn.init.normal_(conv.weight, std=1.5 / math.sqrt(conv.weight[0].numel()))
    nn.init.normal_(model.head.cls_score.weight, std=class_std)
    nn.init.normal_(model.head.bbox_pred.weight, std=0.05)
    for layer in model.assigner.selector.layers:
        if hasattr(layer, "weight"):
            nn.init.normal_(layer.weight, std=1.6 / math.sqrt(layer.weight[0].numel()))
    return model


def random_boxes(count, size, generator):
    """One large, others that overlap, some of them small, with odd fractions of a pixel."""
    limit = torch.tensor([size[1], size[0]]).float()
    center = limit * (0.35 + 0.4 * torch.rand(count, 2, generator=generator))
    half = limit * 0.5 * torch.rand(count, 2, generator=generator).square() + 2.03
    center[:1], half[:1] = 0.4 * limit + 0.13, 0.37 * limit
    corners = (center - half).clamp(min=0), torch.minimum(center + half, limit)
    return torch.cat(corners, dim=1)


def random_crowd(seed, counts):
    generator = torch.Generator().manual_seed(seed)
    return [random_boxes(n, size, generator) for n, size in zip(counts, SIZES)]


def make_batch(boxes):
    """Images, their ground truth in float32, and the same as plain numbers."""
    instances, plain = [], []
    for size, of_image in zip(SIZES, boxes):
        gt = Instances(size, gt_boxes=Boxes(of_image), gt_classes=torch.arange(len(of_image)) % 3)
        instances.append(gt)
        plain.append((of_image.double().tolist(), gt.gt_classes.tolist(), size))
    pixels = torch.rand(2, 3, *SIZES[0], generator=torch.Generator().manual_seed(0)) * 255
    return ImageList(pixels, list(SIZES)), instances, plain


def run(model, images, instances, iteration):
    """Features, predictions with gradients, matches and losses."""
    caught = []
    hook = model.assigner.register_forward_hook(lambda _, inputs, out: caught.append((inputs, out)))
    features = list(model.backbone((images.tensor - model.pixel_mean) / model.pixel_std).values())
    predictions = model.head(features)
    for x in (*predictions[0], *predictions[1]):
        x.retain_grad()
    with EventStorage(iteration):
        losses = model.forward_training(images, features, predictions, instances)
    hook.remove()
    return predictions, caught[0], losses


def map_of(matches, level, shape, values):
    """Shape (N, Hi, Wi), -1 where nothing is positive."""
    out = torch.full((shape[0] * shape[2] * shape[3],), -1.0)
    is_positive = matches.is_positive[:, level]
    out[matches.places(level, shape)[is_positive]] = values[:, level][is_positive].float()
    return out.view(shape[0], *shape[2:])


@pytest.mark.parametrize("iteration", [HARD, SOFT])
@pytest.mark.parametrize(
    ("seed", "counts", "class_std"),
    [(0, (9, 7), 0.1), (1, (14, 0), 0.1), (2, (3, 12), 0.1), (3, (0, 0), 0.1), (4, (9, 7), 0.3)],
)
def test_equals_the_plain_form(seed, counts, class_std, iteration):
    model = build(seed=seed, class_std=class_std)
    images, instances, plain = make_batch(random_crowd(seed, counts))
    predictions, ((_, gt, outputs), matches), losses = run(model, images, instances, iteration)
    sum(losses.values()).backward()

    level_logits = model.assigner.selector(outputs.features, gt).detach().double()
    probs = level_logits.softmax(dim=1).split(counts)
    logits, values = (
        [x.detach().double().requires_grad_() for x in maps] for maps in predictions[:2]
    )
    predicted = []
    for stride, x in zip(STRIDES, values):
        cells = torch.meshgrid(*(torch.arange(n) + 0.5 for n in x.shape[2:]), indexing="ij")
        centers = torch.stack(cells[::-1], dim=-1) * stride
        distances = 4 * stride * x.permute(0, 2, 3, 1).exp()
        predicted.append(distance_to_bbox(centers, distances).permute(0, 3, 1, 2))
    weights, best, loss_cls, loss_bbox = plain_sapd(
        plain, STRIDES, logits, predicted, [x.tolist() for x in probs], iteration == HARD
    )

    for i, expected in enumerate(weights):
        found = map_of(matches, i, logits[i].shape, matches.weight)
        assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert_close(losses["loss_cls"].double(), torch.as_tensor(loss_cls).detach(), rtol=1e-5, atol=0)
    assert_close(
        losses["loss_bbox"].double(), torch.as_tensor(loss_bbox).detach(), rtol=1e-5, atol=0
    )
    best = [level for of_image in best for level in of_image]
    entropy = [-level_logits[m].log_softmax(0)[i] for m, i in enumerate(best) if i is not None]
    expected = 0.1 * sum(entropy) / max(len(entropy), 1)
    assert float(losses["loss_level"].detach()) == pytest.approx(float(expected), rel=1e-4)

    (loss_cls + loss_bbox).backward()
    for maps, plain_maps in zip(predictions, (logits, values)):
        for x, expected in zip(maps, plain_maps):
            gradient = torch.zeros_like(expected) if expected.grad is None else expected.grad
            assert_close(x.grad.double(), gradient, rtol=1e-3, atol=1e-7)


def test_boxes_of_a_crowd_learn_on_several_levels():
    """What is compared above is not trivial: boxes share locations, and choose differently."""
    model = build(seed=2)
    images, instances, _ = make_batch(random_crowd(2, (12, 12)))
    hard, soft = (run(model, images, instances, i)[1][1] for i in (HARD, SOFT))
    assert len(hard.weight.amax(dim=2).argmax(dim=1).unique()) > 1
    assert (hard.weight > 0).any(dim=2).sum(dim=1).max() == 1
    assert (soft.weight > 0).any(dim=2).sum(dim=1).max() == 3
    assert (soft.weight[soft.is_positive] == 0).any()


def test_the_choice_is_hard_in_the_first_half_also_of_a_resumed_training():
    """The iteration is that of the trainer, which goes on where it was."""
    model, chosen = build(), {}

    def note(_, inputs, matches):
        chosen[inputs[2].iteration] = int((matches.weight > 0).any(dim=2).sum(dim=1).max())

    model.assigner.register_forward_hook(note)
    inputs = [make_input(CROWD, SIZES[0])]
    data = [inputs] * 4
    for start in (0, SOFT - 1, SOFT + 20):
        trainer = SimpleTrainer(model, data, torch.optim.SGD(model.parameters(), lr=0.0))
        trainer.train(start, start + 2)
    levels = {0: 1, 1: 1, SOFT - 1: 1, SOFT: 3, SOFT + 20: 3, SOFT + 21: 3}
    assert chosen == levels


@pytest.mark.parametrize("iteration", [HARD, SOFT])
def test_the_network_learns_from_its_cross_entropy_alone(iteration):
    model, inputs = build(), [make_input(CROWD, SIZES[0])]
    with EventStorage(iteration):
        losses = model(inputs)
    parameters = dict(model.assigner.named_parameters())
    assert len(parameters) == 2 * 4  # three convolutions and a linear layer
    detector = losses["loss_cls"] + losses["loss_bbox"]
    found = torch.autograd.grad(detector, parameters.values(), retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in found)
    found = torch.autograd.grad(losses["loss_level"], parameters.values(), retain_graph=True)
    assert all((gradient != 0).any() for gradient in found)
    # It does not change what the head learns, but the features learn with it.
    of_head = torch.autograd.grad(
        losses["loss_level"], model.head.parameters(), allow_unused=True, retain_graph=True
    )
    assert all(gradient is None for gradient in of_head)
    assert (torch.autograd.grad(losses["loss_level"], model.backbone.convs[0].weight)[0] != 0).any()


def test_odd_boxes():
    """Beyond the image, without area, outside of it, smaller than a cell: what is left learns."""
    odd = [[-300.0, -200.0, 500.0, 400.0], [50.0, 50.0, 50.0, 90.0], [900.0, 900.0, 990.0, 990.0],
           [40.1, 40.1, 43.0, 42.0], [60.0, 20.0, 120.0, 80.0]]  # fmt: skip
    model = build()
    images, instances, _ = make_batch([torch.tensor(odd), torch.zeros(0, 4)])
    _, (_, matches), losses = run(model, images, instances, SOFT)
    assert (matches.is_positive.flatten(1).any(dim=1) == torch.tensor([1, 0, 0, 0, 1]).bool()).all()
    # A fifth of what of the first is in the image, 160 pixels wide and 96 high: four columns, two
    # rows, without what the last takes.
    assert 1 <= matches.is_positive[0, 0].sum() <= 4 * 2
    assert all(loss.isfinite() for loss in losses.values())


def test_a_batch_without_boxes():
    model = build()
    with EventStorage(SOFT):
        losses = model([make_input([]), make_input([])])
    sum(losses.values()).backward()
    assert losses["loss_bbox"] == losses["loss_level"] == 0 < losses["loss_cls"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_outputs_are_needed():
    model = build()
    with pytest.raises(ValueError, match="outputs"):
        SAPDAssigner(model.assigner.selector, hard_iterations=1)(None, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [("SAPD_SHRINK", 0.0), ("SAPD_SHRINK", 1.5), ("SAPD_LEVELS", 0), ("LOSS_LEVEL_WEIGHT", -1.0),
     ("BBOX_REG_LOSS_TYPE", "smooth_l1")],
)  # fmt: skip
def test_bad_values_name_their_key(key, value):
    with pytest.raises(InputError, match=f"MODEL.GFL.{key}"):
        small_config(*SAPD, f"MODEL.GFL.{key}", value)


def test_nothing_of_the_network_is_left_at_inference(tmp_path):
    trained = build()
    torch.save({"model": trained.state_dict()}, tmp_path / "model.pth")
    cfg = small_config(*SAPD)
    model = prepare_for_inference(cfg, build_gfl(*SAPD))
    assert not any("assigner" in name for name, _ in model.named_parameters())

    # What was trained loads into a model without it; and what is without it into one that has it.
    without = build_gfl("none", "dirac", "atss", *SAPD[3:])
    GFLCheckpointer(without, complete=True).load(str(tmp_path / "model.pth"))
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith("assigner.")}
    torch.save({"model": state}, tmp_path / "detector.pth")
    whole = build_gfl(*SAPD)
    GFLCheckpointer(whole, complete=True).load(str(tmp_path / "detector.pth"))
    for loaded in (without, whole):
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())

    # All else is missed as ever, and to resume training all is needed.
    del state["head.scales"]
    torch.save({"model": state}, tmp_path / "broken.pth")
    with pytest.raises(InputError, match=r"Not in the file \(1\): head.scales"):
        GFLCheckpointer(whole, complete=True).load(str(tmp_path / "broken.pth"))
    (tmp_path / "last_checkpoint").write_text("detector.pth")
    with pytest.raises(InputError, match=r"Not in the file \(8\): assigner\.selector"):
        GFLCheckpointer(whole, str(tmp_path)).resume_or_load("", resume=True)
