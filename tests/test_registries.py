"""A choice is added by one registered class: here one of each kind, from outside of the package."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from detectron2.utils.events import EventStorage

from gfl_d2.errors import InputError
from gfl_d2.modeling import ATSSAssigner, BoxRepresentation, JointQuality
from gfl_d2.registry import ASSIGNER_REGISTRY, BOX_REPRESENTATION_REGISTRY, QUALITY_REGISTRY
from models import WITH_RESNET, build_gfl, make_input


@QUALITY_REGISTRY.register("toy_quality")
class HalfQuality(JointQuality):
    """QFL whose targets are half of the IoU."""

    def losses(self, predictions, levels, samples):
        samples = samples._replace(iou=samples.iou / 2)
        return {"loss_toy": super().losses(predictions, levels, samples)["loss_qfl"]}


@BOX_REPRESENTATION_REGISTRY.register("toy_box")
@dataclass(frozen=True)
class Softplus(BoxRepresentation):
    """One number a side, whose softplus is the distance."""

    num_values = 1
    max_distance = float("inf")

    @classmethod
    def from_config(cls, cfg):
        return cls()

    def decode(self, values):
        return torch.nn.functional.softplus(values)

    def losses(self, values, target):
        return {"loss_distance": (self.decode(values) - target).abs().mean(dim=1)}


@ASSIGNER_REGISTRY.register("toy_assigner")
class NearestAssigner(ATSSAssigner):
    """A box gets the location of each level that is nearest to it."""

    def forward(self, levels, gt, outputs=None):
        matches = super().forward(levels, gt, outputs)
        is_nearest = torch.zeros_like(matches.is_positive)
        is_nearest[:, :, 0] = True
        return matches._replace(is_positive=is_nearest)


@ASSIGNER_REGISTRY.register("toy_weights")
class WeighingAssigner(NearestAssigner):
    """Every positive weighs 3. What it learns of the features is a loss of its own."""

    @classmethod
    def from_config(cls, cfg, input_shape):
        assigner = super().from_config(cfg, input_shape)
        assigner.factor = torch.nn.Parameter(torch.full((len(input_shape),), 2.0))
        return assigner

    def forward(self, levels, gt, outputs=None):
        matches = super().forward(levels, gt, outputs)
        means = torch.stack([x.mean() for x in outputs.features])
        loss = (self.factor * means).square().mean() * (outputs.iteration + 1)
        weight = torch.full(matches.row.shape, 3.0)
        return matches._replace(weight=weight, losses={"loss_of_assigner": loss})


def test_an_assigner_may_weigh_positives_and_learn():
    losses = {}
    for name in ("toy_assigner", "toy_weights"):
        model = build_gfl("none", "dirac", name, *WITH_RESNET).train()
        for iteration in (0, 1):
            with EventStorage(iteration):
                losses[name, iteration] = model([make_input(), make_input([])])
    plain, weighted = losses["toy_assigner", 1], losses["toy_weights", 1]
    # The weights and their sum cancel in the boxes' loss. In the classes' the background is left:
    # (background + 3 * positives) / 30, where it was (background + positives) / 11.
    assert torch.allclose(weighted["loss_bbox"], plain["loss_bbox"], rtol=1e-5)
    positives = (30 * weighted["loss_cls"] - 11 * plain["loss_cls"]) / 2
    assert 0 < positives < 11 * plain["loss_cls"]
    first = losses["toy_weights", 0]["loss_of_assigner"]
    assert torch.allclose(weighted["loss_of_assigner"], 2 * first, rtol=1e-5)
    sum(weighted.values()).backward()
    assert (model.assigner.factor.grad != 0).all()


def test_registered_choices_train():
    model = build_gfl("toy_quality", "toy_box", "toy_assigner", *WITH_RESNET).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    totals = []
    for iteration in range(19, 31):
        with EventStorage(iteration) as storage:
            losses = model([make_input(), make_input([])])
        assert set(losses) == {"loss_toy", "loss_bbox", "loss_distance"}
        totals.append(float(sum(losses.values()).detach()))
        if iteration == 19:
            assert storage.latest()["gfl/num_pos_per_image"][0] == 2 * 5 / 2
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("key", ["QUALITY", "BOX_REPRESENTATION", "ASSIGNER"])
def test_an_unknown_name_lists_the_known_ones(key):
    with pytest.raises(InputError, match=rf"MODEL\.GFL\.{key} must be one of .*'toy_.*'none such'"):
        build_gfl("joint", "general", "atss", f"MODEL.GFL.{key}", "none such")
