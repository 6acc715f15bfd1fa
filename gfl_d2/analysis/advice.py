"""What the figures of a dataset say about the config: plain rules, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from .assignment import Assignment
from .boxes import BoxTable, InputSize, box_sizes

__all__ = [
    "Advice", "SizeFigures", "advise_anchor_scale", "advise_detections", "advise_reg_max",
    "advise_size", "covering_reg_max",
]  # fmt: skip

# Sides of positives' targets that REG_MAX should cover.
_COVERED = 0.999
# Below so many strides of the finest level, by the root of its area, a box is small, ...
_SMALL_BOX = 2
# ... and a class by its median: with fewer there is little that tells it from others.
SMALL_CLASS = 3
# A class with fewer boxes says little about sizes.
_MIN_BOXES = 20
# REG_MAX is lowered only on the word of so many boxes.
_BOXES_TO_LOWER = 1000
# Shares of boxes: more small ones than this, or more without an anchor, are worth a larger input.
_MANY_SMALL = 0.02
_MANY_WITHOUT = 0.02
# Another anchor scale is worth it if it gives an anchor to as many more of the boxes.
_GAIN_OF_SCALE = 0.005
_SCALES = (4.0, 6.0, 8.0, 10.0)
_FACTORS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
# Beyond this, images that are enlarged cost time for nothing.
_ENLARGED = 1.5


# Gives the anchors of the training data with these pairs of key and value in the config.
Assign = Callable[..., Assignment]


@dataclass(frozen=True)
class Advice:
    """What a rule recommends, if anything, and the figures behind it."""

    reason: str
    opts: dict[str, Any] = field(default_factory=dict)  # keys and values of the config


@dataclass(frozen=True)
class SizeFigures:
    """What one input size makes of the boxes."""

    size: InputSize
    stride: int  # of the finest level: what is small is measured by it
    share_without: float  # boxes without an anchor
    share_small: float  # boxes below _SMALL_BOX strides
    smallest_class: str  # of those with at least _MIN_BOXES boxes; "" if there is none
    smallest_median: float | None  # median root of the area of its boxes, in pixels

    @classmethod
    def measure(cls, assignment: Assignment, class_names: Sequence[str]) -> SizeFigures:
        roots, classes, size = box_sizes(assignment.boxes), assignment.classes, assignment.size
        stride = assignment.strides[0]
        (common,) = np.nonzero(np.bincount(classes) >= _MIN_BOXES * len(size.short))
        medians = {class_names[i]: float(np.median(roots[classes == i])) for i in common}
        smallest = min(medians, key=medians.get, default="")
        return cls(
            size=size,
            stride=stride,
            share_without=assignment.share_without,
            share_small=float((roots < _SMALL_BOX * stride).mean()),
            smallest_class=smallest,
            smallest_median=medians.get(smallest),
        )

    @property
    def trouble(self) -> float:
        """The share of boxes that are hard to learn, roughly."""
        return self.share_small + self.share_without

    @property
    def is_fine(self) -> bool:
        is_rare = self.share_small <= _MANY_SMALL and self.share_without <= _MANY_WITHOUT
        has_small = self.smallest_class and self.smallest_median < SMALL_CLASS * self.stride
        return is_rare and not has_small

    def __str__(self) -> str:
        text = (
            f"{self.share_small:.1%} of the boxes are below {_SMALL_BOX * self.stride} pixels at "
            f"the input, {self.share_without:.1%} get no anchor"
        )
        if not self.smallest_class:
            return text
        median = f"{self.smallest_median:.0f} pixels ({SMALL_CLASS * self.stride} or more are well)"
        return f"{text}, and the median of the smallest class, {self.smallest_class}, is {median}"


def advise_size(cfg: CfgNode, table: BoxTable, assign: Assign) -> tuple[Advice, list[SizeFigures]]:
    """
    An input as small as the small boxes allow.

    Returns:
        Advice: of the sizes of training and test, changed by the same factor.
        list[SizeFigures]: of the present size, and of those that were tried.
    """
    now = SizeFigures.measure(assign(), table.class_names)
    # The images' own size, relative to the input.
    native = float(np.median(table.sizes.min(axis=1) / now.size.shapes(table.sizes).min(axis=1)))
    if 0 in (*now.size.short, cfg.INPUT.MIN_SIZE_TEST):
        return Advice(f"images are not resized: {now}"), [now]
    if now.is_fine and native > 1 / _ENLARGED:
        return Advice(f"few boxes are small: {now}"), [now]
    if now.is_fine:
        factors = [native]
    else:
        # Beyond the images' own size there is no more detail, only more anchors.
        limit = min(max(native, 2.0 if now.share_without > _MANY_WITHOUT else 0), _FACTORS[-1])
        factors = [x for x in _FACTORS if x < limit * 0.95] + [limit] * (limit >= 1.2)
    if not factors:
        reason = f"{now}; but images have no more detail: the input is"
        return Advice(f"{reason} {1 / native:.2g} times their own size"), [now]
    tried = [now]
    for factor in factors:
        opts = _scale_input(cfg, factor)
        then = SizeFigures.measure(assign(*opts.items()), table.class_names)
        tried.append(then)
        if then.is_fine:
            break
    if now.is_fine and not then.is_fine:
        reason = f"images are enlarged {1 / native:.2g} times, but small boxes need it"
        return Advice(f"{reason}: {then} otherwise"), tried
    if not then.is_fine and then.trouble > now.trouble / 2:
        return Advice(f"{now}; sizes of {then.size.short} would not help much: {then}"), tried
    reason = "images are enlarged for nothing" if now.is_fine else str(now)
    factor = opts["INPUT.MIN_SIZE_TRAIN"][-1] / cfg.INPUT.MIN_SIZE_TRAIN[-1]
    cost = f"With sides {factor:.3g} times as long, in {factor**2:.2g} times the time"
    return Advice(f"{reason}. {cost}, {then}", opts), tried


def _scale_input(cfg: CfgNode, factor: float) -> dict[str, Any]:
    train = InputSize(tuple(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN).scaled(factor)
    test = InputSize.from_config(cfg, is_train=False).scaled(factor)
    return {
        "INPUT.MIN_SIZE_TRAIN": train.short,
        "INPUT.MAX_SIZE_TRAIN": train.longest,
        "INPUT.MIN_SIZE_TEST": test.short[0],
        "INPUT.MAX_SIZE_TEST": test.longest,
    }


def advise_anchor_scale(cfg: CfgNode, assign: Assign) -> tuple[Advice, dict[str, dict[str, float]]]:
    """
    The scale by which the fewest boxes get no anchor; of equals that with the most even number of
    anchors a box.

    Returns:
        Advice: of the scale.
        dict: scale -> its figures.
    """
    key, current = "MODEL.GFL.ANCHOR_SCALE", float(cfg.MODEL.GFL.ANCHOR_SCALE)
    figures = {}
    for scale in sorted({*_SCALES, current}):
        assignment = assign((key, scale)) if scale != current else assign()
        count = assignment.positives.sum(axis=1)
        figures[scale] = {
            "share_without_anchor": assignment.share_without,
            "anchors_per_box": float(count.mean()),
            "spread": float(count.std() / max(count.mean(), 1e-9)),
            "reg_max": covering_reg_max(assignment.targets.sum(axis=0)),
        }
    share = {scale: values["share_without_anchor"] for scale, values in figures.items()}
    best = min(figures, key=lambda scale: (round(share[scale], 3), figures[scale]["spread"]))
    reason = f"{share[current]:.2%} of the boxes get no anchor with scale {current:g}"
    if share[current] - share[best] >= _GAIN_OF_SCALE:
        advice = Advice(f"{reason}, {share[best]:.2%} with {best:g}", {key: best})
    else:
        others = " or ".join(f"{x:g}" for x in figures if x != current)
        advice = Advice(f"{reason}; {others} would not save {_GAIN_OF_SCALE:.1%}")
    return advice, {f"{scale:g}": values for scale, values in figures.items()}


def advise_reg_max(cfg: CfgNode, train: Assignment, longest_in_test: float) -> Advice:
    """
    Enough bins for ``_COVERED`` of the sides of positives' targets.

    Args:
        train: of the training data.
        longest_in_test: the longest target of the test data, in bins.
    """
    key, reg_max = "MODEL.GFL.REG_MAX", cfg.MODEL.GFL.REG_MAX
    if cfg.MODEL.GFL.BOX_REPRESENTATION != "general":
        return Advice("only the box representation 'general' has REG_MAX")
    targets = train.targets.sum(axis=0)
    needed = covering_reg_max(targets)
    beyond = targets[reg_max + 1 :].sum() / max(targets.sum(), 1)
    reason = f"{beyond:.2%} of the sides of targets are longer than REG_MAX {reg_max}; {needed} "
    if needed > reg_max:
        return Advice(f"{reason}covers {_COVERED:.1%}", {key: needed})
    longest = max(float(train.longest_target.max()), longest_in_test)
    safe = math.ceil(1.25 * longest)
    if len(train.boxes) >= _BOXES_TO_LOWER and safe <= reg_max / 2:
        reason = f"the longest side of a target, in train and test, is of {longest:.1f} bins"
        return Advice(
            f"{reason}: {safe} of REG_MAX {reg_max} leave a quarter to spare", {key: safe}
        )
    reason += f"would cover {_COVERED:.1%}. Unused bins cost next to nothing"
    return Advice(f"{reason}, and longer boxes may come")


def advise_detections(cfg: CfgNode, boxes_per_image: np.ndarray) -> Advice:
    """As many detections as the most crowded image has boxes, and half as many again."""
    key, limit = "TEST.DETECTIONS_PER_IMAGE", cfg.TEST.DETECTIONS_PER_IMAGE
    most, above = int(boxes_per_image.max()), int((boxes_per_image > limit).sum())
    if above == 0:
        return Advice(f"no image has more than {most} boxes; the limit is {limit}")
    return Advice(
        f"{above} images have more boxes than the limit of {limit}, up to {most}: half as many "
        "again leave room for wrong ones",
        {key: math.ceil(1.5 * most / 50) * 50},
    )


def covering_reg_max(targets: np.ndarray) -> int:
    """The smallest REG_MAX, at least 1, that covers ``_COVERED`` of the sides counted by bins."""
    return max(1, int(np.searchsorted(targets.cumsum(), _COVERED * targets.sum())))
