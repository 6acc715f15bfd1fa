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

    def forward(self, levels, gt, predict=None):
        matches = super().forward(levels, gt, predict)
        is_nearest = torch.zeros_like(matches.is_positive)
        is_nearest[:, :, 0] = True
        return matches._replace(is_positive=is_nearest)


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
