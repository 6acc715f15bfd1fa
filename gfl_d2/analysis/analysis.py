"""All figures of the datasets of a config, at the sizes that it trains with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from ..errors import InputError
from .advice import (
    Advice,
    advise_anchor_scale,
    advise_detections,
    advise_reg_max,
    advise_size,
    covering_reg_max,
)
from .assignment import REASONS, Assignment, assign_boxes
from .boxes import BoxTable, InputSize, box_sizes, read_boxes
from .checks import MAX_LISTED, check_files, find_suspicious

__all__ = ["Analysis", "analyze"]


@dataclass(frozen=True)
class Analysis:
    """What :func:`analyze` finds."""

    facts: dict[str, Any]  # can be written as JSON
    advice: list[Advice]
    parts: dict[str, BoxTable]  # "train" and perhaps "test", without crowds
    assignment: Assignment  # of the training data

    @property
    def opts(self) -> dict[str, Any]:
        """Keys and values of the config that are recommended."""
        return {key: value for advice in self.advice for key, value in advice.opts.items()}


def analyze(cfg: CfgNode, max_images: int = 2000, seed: int = 0) -> Analysis:
    """
    Analyse ``DATASETS.TRAIN``, all together, beside ``DATASETS.TEST``. They are registered.

    Args:
        max_images: anchors are assigned to the boxes of as many images with boxes, drawn at
            random; 0 for all. All images are counted.
        seed: of the draw.

    Raises:
        InputError: data that cannot be loaded, or no box to learn.
    """
    if max_images < 0:
        raise InputError(f"The number of images must be 0, for all, or more, got {max_images}")
    names = {"train": cfg.DATASETS.TRAIN, "test": cfg.DATASETS.TEST}
    tables = {part: read_boxes(names[part]) for part in names if names[part]}
    parts = {part: table.without_crowds() for part, table in tables.items()}
    sizes = {part: InputSize.from_config(cfg, part == "train") for part in names}
    learned = {part: _with_area(table, sizes[part]) for part, table in parts.items()}
    images = {part: _draw(table, max_images, seed) for part, table in learned.items()}
    train = parts["train"]
    num_crowds = {part: len(tables[part].boxes) - len(parts[part].boxes) for part in parts}
    if not len(images["train"]):
        raise InputError(
            f"Dataset {', '.join(train.names)} has no box to learn: "
            f"{len(tables['train'].boxes)} boxes, {num_crowds['train']} of them crowds. Add boxes, "
            "or name other data in DATASETS.TRAIN"
        )

    @functools.cache
    def assign(*opts: tuple[str, Any], part: str = "train") -> Assignment:
        changed = cfg.clone()
        changed.defrost()
        changed.merge_from_list([item for pair in opts for item in pair])
        label = ", ".join([f"anchors in {part}", *(f"{key} {value}" for key, value in opts)])
        return assign_boxes(changed, learned[part], images[part], part == "train", label)

    on_size, sizes_tried = advise_size(cfg, train, assign)
    # The other rules hold for the size and the scale that are recommended.
    at_size = functools.partial(assign, *on_size.opts.items())
    on_scale, scales_tried = advise_anchor_scale(cfg, at_size)
    then = functools.partial(at_size, *on_scale.opts.items())
    has_test = len(images.get("test", ())) > 0
    longest_in_test = float(then(part="test").longest_target.max()) if has_test else 0.0
    per_image = np.concatenate([table.boxes_per_image() for table in parts.values()])
    advice = [
        on_size,
        on_scale,
        advise_reg_max(cfg, then(), longest_in_test),
        advise_detections(cfg, per_image),
    ]
    now = assign()
    checks = {part: find_suspicious(table, sizes[part]) for part, table in parts.items()}
    suspicious = [{"part": part, **x} for part, (found, _) in checks.items() for x in found]
    suspicious.sort(key=lambda x: -x["score"])
    facts = {
        "reg_max": cfg.MODEL.GFL.REG_MAX,
        "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "input": {part: asdict(size) for part, size in sizes.items()},
        "images": [
            {"part": part, "crowds": num_crowds[part], **_count(table, sizes[part], cfg)}
            for part, table in parts.items()
        ],
        "classes": _count_classes(parts, sizes),
        "levels": _count_levels(now, cfg.MODEL.GFL.REG_MAX),
        "anchors": {
            "images": len(images["train"]),
            "images_with_boxes": len(np.unique(learned["train"].image)),
            "boxes": len(now.boxes),
            "without_anchor": dict(zip(REASONS, np.bincount(now.reason, minlength=4)[1:].tolist())),
            "without_anchor_by_class": _by_class(now.classes[now.reason > 0], train.class_names),
            "anchors_per_box": float(now.positives.sum(axis=1).mean()),
        },
        "sizes_tried": [asdict(x) for x in sizes_tried],
        "anchor_scales_tried": scales_tried,
        "duplicate_boxes": {part: duplicates for part, (_, duplicates) in checks.items()},
        "files": check_files({part: table.files for part, table in parts.items()}),
        "suspicious_boxes": len(suspicious),
        "suspicious": suspicious[:MAX_LISTED],
        "advice": [asdict(x) for x in advice],
    }
    return Analysis(facts, advice, parts, now)


def _with_area(table: BoxTable, size: InputSize) -> BoxTable:
    """Without boxes that have no area at an input size: training drops them."""
    keep = np.ones(len(table.boxes), dtype=bool)
    for short in size.short:
        boxes = table.boxes_at(size.shapes(table.sizes, short))
        keep &= (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(axis=1)
    return table.take(keep)


def _draw(table: BoxTable, max_images: int, seed: int) -> np.ndarray:
    """Some images that have boxes, in order."""
    images = np.unique(table.image)
    if max_images and len(images) > max_images:
        images = np.random.default_rng(seed).choice(images, max_images, replace=False)
    return np.sort(images)


def _count(table: BoxTable, size: InputSize, cfg: CfgNode) -> dict[str, Any]:
    """Images and boxes of a table without crowds. Sizes are at the input."""
    shapes, per_image = size.shapes(table.sizes), table.boxes_per_image()
    boxes = table.boxes_at(shapes)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    return {
        "datasets": ", ".join(table.names),
        "images": len(table.files),
        "images_without_boxes": int((per_image == 0).sum()),
        "above_detections_per_image": int((per_image > cfg.TEST.DETECTIONS_PER_IMAGE).sum()),
        "boxes": len(boxes),
        "most_boxes_in_image": int(per_image.max()),
        "percentile_99": float(np.percentile(per_image, 99)),
        **_percentiles("size", box_sizes(boxes)),
        **_percentiles("aspect", width / height.clip(min=1e-6)),
        "enlarged": float(np.median(shapes.min(axis=1) / table.sizes.min(axis=1))),
    }


def _count_classes(
    parts: Mapping[str, BoxTable], sizes: Mapping[str, InputSize]
) -> list[dict[str, Any]]:
    """Of each class: its boxes and images in each part, and the median size, the most first."""
    rows = [{"class": name} for name in parts["train"].class_names]
    for part, table in parts.items():
        roots = box_sizes(table.boxes_at(sizes[part].shapes(table.sizes)))
        for i, row in enumerate(rows):
            here = table.classes == i
            row[f"{part}_boxes"] = int(here.sum())
            row[f"{part}_images"] = len(np.unique(table.image[here]))
            row[f"{part}_median_size"] = float(np.median(roots[here])) if here.any() else None
    return sorted(rows, key=lambda row: -row["train_boxes"])


def _count_levels(assignment: Assignment, reg_max: int) -> list[dict[str, Any]]:
    """Of each level: its anchors, the boxes that have most of theirs there, and its targets."""
    roots, main = box_sizes(assignment.boxes), assignment.main_level()
    return [
        {
            "level": name,
            "stride": assignment.strides[i],
            "boxes": int((main == i).sum()),
            "anchors": int(assignment.positives[:, i].sum()),
            **_percentiles("size", roots[main == i]),
            "longest_target": float(assignment.longest_target[i]),
            "beyond_reg_max": float(targets[reg_max + 1 :].sum() / max(targets.sum(), 1)),
            "reg_max_needed": covering_reg_max(targets) if targets.any() else None,
        }
        for i, (name, targets) in enumerate(zip(assignment.level_names, assignment.targets))
    ]


def _percentiles(name: str, values: np.ndarray) -> dict[str, float | None]:
    found = np.percentile(values, (5, 50, 95)).tolist() if len(values) else [None] * 3
    return {f"{name}_{p}": x for p, x in zip((5, 50, 95), found)}


def _by_class(classes: np.ndarray, names: list[str]) -> dict[str, int]:
    return {names[i]: int(n) for i, n in enumerate(np.bincount(classes)) if n}
