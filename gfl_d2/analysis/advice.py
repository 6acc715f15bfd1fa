"""What the figures of a dataset say about the config: plain rules, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from ..modeling import LocationGrid
from .assignment import Assignment, AssignmentRule, assign_boxes
from .boxes import BoxTable, InputSize, box_roots, input_shapes

__all__ = ["Advice", "advise_anchor_scale", "advise_detections", "advise_reg_max", "advise_size"]

# Sides of positives' targets that REG_MAX should cover.
COVERED = 0.999
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


@dataclass(frozen=True)
class Advice:
    """What a rule recommends, if anything, and the figures behind it."""

    reason: str
    opts: dict[str, Any]  # keys and values of the config; empty for no change


@dataclass(frozen=True)
class SizeFigures:
    """What one input size makes of the boxes."""

    size: InputSize
    share_without: float  # boxes without an anchor
    share_small: float  # boxes below _SMALL_BOX strides
    smallest_class: str  # of those with at least _MIN_BOXES boxes; "" if there is none
    smallest_median: float | None  # median root of the area of its boxes, in pixels

    @classmethod
    def measure(
        cls, table: BoxTable, images: np.ndarray, size: InputSize, rule: AssignmentRule
    ) -> SizeFigures:
        label = f"input of {size}"
        assignment = assign_boxes(table, images, size, rule, label)
        return cls.of_assignment(table, assignment, size, rule)

    @classmethod
    def of_assignment(
        cls, table: BoxTable, assignment: Assignment, size: InputSize, rule: AssignmentRule
    ) -> SizeFigures:
        roots = box_roots(assignment.boxes)
        classes = table.classes[assignment.box]
        counts = np.bincount(table.classes, minlength=len(table.class_names))
        medians = {
            name: float(np.median(roots[classes == i]))
            for i, name in enumerate(table.class_names)
            if counts[i] >= _MIN_BOXES and (classes == i).any()
        }
        name = min(medians, key=medians.get, default="")
        return cls(
            size=size,
            share_without=assignment.share_without,
            share_small=float((roots < _SMALL_BOX * rule.strides[0]).mean()),
            smallest_class=name,
            smallest_median=medians.get(name),
        )

    @property
    def trouble(self) -> float:
        """The share of boxes that are hard to learn, roughly."""
        return self.share_small + self.share_without

    def is_fine(self, stride: int) -> bool:
        return (
            self.share_small <= _MANY_SMALL
            and self.share_without <= _MANY_WITHOUT
            and (self.smallest_median is None or self.smallest_median >= SMALL_CLASS * stride)
        )


def advise_reg_max(cfg: CfgNode, train: Assignment, longest_in_test: float) -> Advice:
    """
    Enough bins for ``COVERED`` of the sides of positives' targets.

    Args:
        train: of the training data.
        longest_in_test: the longest target of the test data, in bins.
    """
    key, reg_max = "MODEL.GFL.REG_MAX", cfg.MODEL.GFL.REG_MAX
    if cfg.MODEL.GFL.BOX_REPRESENTATION != "general":
        return Advice("only the box representation 'general' has REG_MAX", {})
    total = train.targets.sum(axis=0)
    needed = covering_reg_max(total)
    beyond = float(total[reg_max + 1 :].sum() / max(total.sum(), 1))
    if needed > reg_max:
        return Advice(
            f"{beyond:.2%} of the sides of targets are longer than REG_MAX {reg_max}; {needed} "
            f"covers {COVERED:.1%}",
            {key: needed},
        )
    longest = max(float(train.longest_target.max(initial=0)), longest_in_test)
    safe = math.ceil(1.25 * longest)
    if len(train.box) >= _BOXES_TO_LOWER and safe <= reg_max / 2:
        return Advice(
            f"the longest side of a target, in train and test, is of {longest:.1f} bins: {safe} "
            f"has a quarter to spare, and the other bins of REG_MAX {reg_max} are never used",
            {key: safe},
        )
    return Advice(
        f"REG_MAX {reg_max} covers {1 - beyond:.2%} of the sides of targets; {needed} would cover "
        f"{COVERED:.1%}. Unused bins cost next to nothing, and longer boxes may come",
        {},
    )


def advise_size(
    cfg: CfgNode,
    table: BoxTable,
    images: np.ndarray,
    now: SizeFigures,
    rule: AssignmentRule,
) -> tuple[Advice, list[SizeFigures]]:
    """
    An input as small as the small boxes allow.

    Returns:
        Advice: of the sizes of training and test, changed by the same factor.
        list[SizeFigures]: of the sizes that were tried.
    """
    stride = rule.strides[0]
    if 0 in (*now.size.short, cfg.INPUT.MIN_SIZE_TEST):
        return Advice(f"images are not resized: {_describe(now, stride)}", {}), []
    # What the images have themselves, relative to the input.
    shapes = input_shapes(table.sizes, int(np.median(now.size.short)), now.size.longest)
    native = float(np.median(table.sizes.min(axis=1) / shapes.min(axis=1)))
    if now.is_fine(stride):
        if native > 1 / _ENLARGED:
            return Advice(f"few boxes are small: {_describe(now, stride)}", {}), []
        then = SizeFigures.measure(table, images, now.size.scaled(native), rule)
        if then.is_fine(stride):
            reason = "images are enlarged for nothing"
            return _change_size(cfg, native, then, stride, reason), [then]
        reason = f"images are enlarged {1 / native:.2g} times, but small boxes need it"
        return Advice(f"{reason}: {_describe(then, stride)} otherwise", {}), [then]
    # Beyond the images' own size there is no more detail, only more anchors.
    limit = min(max(native, 2.0 if now.share_without > _MANY_WITHOUT else 0), _FACTORS[-1])
    factors = [x for x in _FACTORS if x < limit * 0.95] + [limit] * (limit >= 1.2)
    if not factors:
        reason = f"{_describe(now, stride)}; but images have no more detail"
        return Advice(f"{reason}: the input is {1 / native:.2g} times their own size", {}), []
    tried = []
    for factor in factors:
        tried.append(SizeFigures.measure(table, images, now.size.scaled(factor), rule))
        if tried[-1].is_fine(stride):
            break
    then = tried[-1]
    if not then.is_fine(stride) and then.trouble > now.trouble / 2:
        reason = f"{_describe(now, stride)}; {then.size} would not help much"
        return Advice(f"{reason}: {_describe(then, stride)}", {}), tried
    return _change_size(cfg, factors[len(tried) - 1], then, stride, _describe(now, stride)), tried


def _change_size(
    cfg: CfgNode, factor: float, then: SizeFigures, stride: int, reason: str
) -> Advice:
    given = InputSize(tuple(np.atleast_1d(cfg.INPUT.MIN_SIZE_TRAIN)), cfg.INPUT.MAX_SIZE_TRAIN)
    train = given.scaled(factor)
    test = InputSize.from_config(cfg, is_train=False).scaled(factor)
    factor = train.short[-1] / given.short[-1]
    return Advice(
        f"{reason}. With sides {factor:.3g} times as long, in {factor**2:.2g} times the time, "
        f"{_describe(then, stride)}",
        {
            "INPUT.MIN_SIZE_TRAIN": train.short,
            "INPUT.MAX_SIZE_TRAIN": train.longest,
            "INPUT.MIN_SIZE_TEST": test.short[0],
            "INPUT.MAX_SIZE_TEST": test.longest,
        },
    )


def advise_anchor_scale(
    cfg: CfgNode,
    table: BoxTable,
    images: np.ndarray,
    now: Assignment,
    size: InputSize,
    rule: AssignmentRule,
) -> tuple[Advice, dict[float, dict[str, float]], Assignment]:
    """
    The scale by which the fewest boxes get no anchor; of equals that with the most even number of
    anchors a box.

    Returns:
        Advice: of the scale.
        dict: scale -> its figures.
        Assignment: with the scale that is recommended, or the present one.
    """
    key, current = "MODEL.GFL.ANCHOR_SCALE", float(cfg.MODEL.GFL.ANCHOR_SCALE)
    figures, assignments = {}, {current: now}
    for scale in sorted({*_SCALES, current}):
        if scale != current:
            grid = LocationGrid(
                rule.strides,
                offset=cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
                legacy_centers=cfg.MODEL.GFL.LEGACY_ANCHOR_CENTERS,
                anchor_scale=scale,
            )
            other = replace(rule, grid=grid)
            label = f"anchor scale {scale:g}"
            assignments[scale] = assign_boxes(table, images, size, other, label)
        assignment = assignments[scale]
        count = assignment.positives.sum(axis=1)
        figures[scale] = {
            "share_without_anchor": assignment.share_without,
            "anchors_per_box": float(count.mean()),
            "spread": float(count.std() / max(count.mean(), 1e-9)),
            "reg_max": covering_reg_max(assignment.targets.sum(axis=0)),
        }

    def badness(scale: float) -> tuple:
        values = figures[scale]
        return round(values["share_without_anchor"], 3), values["spread"]

    best = min(figures, key=badness)
    share, other_share = (figures[x]["share_without_anchor"] for x in (current, best))
    without = f"{share:.2%} of the boxes get no anchor with scale {current:g}"
    if share - other_share >= _GAIN_OF_SCALE:
        advice = Advice(f"{without}, {other_share:.2%} with {best:g}", {key: best})
        return advice, figures, assignments[best]
    others = " or ".join(f"{x:g}" for x in figures if x != current)
    return Advice(f"{without}; {others} would not save {_GAIN_OF_SCALE:.1%}", {}), figures, now


def advise_detections(cfg: CfgNode, boxes_per_image: np.ndarray) -> Advice:
    """As many detections as the most crowded image has boxes, and half as many again."""
    key, limit = "TEST.DETECTIONS_PER_IMAGE", cfg.TEST.DETECTIONS_PER_IMAGE
    most, above = int(boxes_per_image.max(initial=0)), int((boxes_per_image > limit).sum())
    if above == 0:
        return Advice(f"no image has more than {most} boxes; the limit is {limit}", {})
    return Advice(
        f"{above} images have more boxes than the limit of {limit}, up to {most}: half as many "
        "again leave room for wrong ones",
        {key: math.ceil(1.5 * most / 50) * 50},
    )


def covering_reg_max(targets: np.ndarray) -> int:
    """The smallest REG_MAX, at least 1, that covers ``COVERED`` of the sides counted by bins."""
    total = targets.sum()
    return max(1, int(np.searchsorted(targets.cumsum(), COVERED * total))) if total else 1


def _describe(figures: SizeFigures, stride: int) -> str:
    text = (
        f"{figures.share_small:.1%} of the boxes are below {_SMALL_BOX * stride} pixels at the "
        f"input, {figures.share_without:.1%} get no anchor"
    )
    if figures.smallest_class:
        text += (
            f", and the median of the smallest class, {figures.smallest_class}, is "
            f"{figures.smallest_median:.0f} pixels ({SMALL_CLASS * stride} or more are well)"
        )
    return text
