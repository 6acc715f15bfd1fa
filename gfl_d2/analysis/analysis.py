"""All figures of the datasets of a config, at the sizes that it trains with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from ..errors import InputError
from .advice import (
    Advice,
    SizeFigures,
    advise_anchor_scale,
    advise_detections,
    advise_reg_max,
    advise_size,
    covering_reg_max,
)
from .assignment import REASONS, Assignment, AssignmentRule, assign_boxes
from .boxes import BoxTable, InputSize, box_roots, boxes_at, input_shapes, read_boxes
from .checks import Suspicion, check_files, find_duplicates, find_suspicious

__all__ = ["Analysis", "analyze"]

# Items of a list in the JSON file.
_MAX_LISTED = 1000
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Analysis:
    """What :func:`analyze` finds."""

    facts: dict[str, Any]  # can be written as JSON
    advice: list[Advice]
    train: BoxTable
    test: BoxTable | None
    learned: BoxTable  # what of the training data is trained on
    assignment: Assignment  # of it
    # In train and test, the worst first: which of the two, its boxes, and the one that is meant.
    suspicious: list[tuple[str, BoxTable, Suspicion]]

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
    train = read_boxes(cfg.DATASETS.TRAIN)
    test = read_boxes(cfg.DATASETS.TEST) if cfg.DATASETS.TEST else None
    size, test_size = (InputSize.from_config(cfg, is_train=x) for x in (True, False))
    rule = AssignmentRule.from_config(cfg)
    learned = _learned(train, size)
    if not len(learned.boxes):
        raise InputError(
            f"Dataset {', '.join(train.names)} has no box to learn: {len(train.boxes)} boxes, "
            f"{int(train.is_crowd.sum())} of them crowds"
        )
    images = _draw(learned, max_images, seed)
    now = assign_boxes(learned, images, size, rule, "anchors of the training data")
    longest_in_test = 0.0
    if test is not None:
        evaluated = _learned(test, test_size)
        drawn = _draw(evaluated, max_images, seed)
        if len(drawn):
            in_test = assign_boxes(evaluated, drawn, test_size, rule, "anchors of the test data")
            longest_in_test = float(in_test.longest_target.max())

    figures = SizeFigures.of_assignment(learned, now, size, rule)
    on_size, sizes = advise_size(cfg, learned, images, figures, rule)
    # The other rules hold for the size and the scale that are recommended.
    then, then_size = now, size
    if on_size.opts:
        then_size = sizes[-1].size
        then = assign_boxes(learned, images, then_size, rule, "anchors at the new size")
        longest_in_test *= then_size.short[-1] / size.short[-1]
    on_scale, scales, then = advise_anchor_scale(cfg, learned, images, then, then_size, rule)
    per_image = np.concatenate([_boxes_per_image(x) for x in (train, test) if x is not None])
    advice = [
        on_size,
        on_scale,
        advise_reg_max(cfg, then, longest_in_test),
        advise_detections(cfg, per_image),
    ]
    suspicious, duplicates = _check_boxes({"train": (train, size), "test": (test, test_size)})
    facts = {
        "reg_max": cfg.MODEL.GFL.REG_MAX,
        "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "train": _count(train, size, cfg),
        "test": _count(test, test_size, cfg) if test is not None else None,
        "input": {"train": asdict(size), "test": asdict(test_size)},
        "anchors": {
            "images": len(images),
            "images_with_boxes": len(np.unique(learned.image)),
            "boxes": len(now.box),
            "without_anchor": {
                reason: int((now.reason == i).sum()) for i, reason in enumerate(REASONS) if i
            },
            "without_anchor_by_class": _without_by_class(learned, now),
            "anchors_per_box": float(now.positives.sum(axis=1).mean()),
        },
        "levels": _levels(now, rule, cfg.MODEL.GFL.REG_MAX),
        "sizes_tried": [asdict(x) for x in (figures, *sizes)],
        "anchor_scales_tried": {f"{scale:g}": values for scale, values in scales.items()},
        "duplicate_boxes": duplicates,
        "files": _check_all_files(train, test),
        "suspicious": _describe_suspicious(suspicious),
        "advice": [asdict(x) for x in advice],
    }
    return Analysis(facts, advice, train, test, learned, now, suspicious)


def _learned(table: BoxTable, size: InputSize) -> BoxTable:
    """Without crowds and boxes that have no area at every input size: training drops them."""
    keep = ~table.is_crowd
    for short in size.short:
        boxes = boxes_at(table, input_shapes(table.sizes, short, size.longest))
        keep &= (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(axis=1)
    return table.take(keep)


def _draw(table: BoxTable, max_images: int, seed: int) -> np.ndarray:
    """Some images that have boxes, in order."""
    images = np.unique(table.image)
    if max_images and len(images) > max_images:
        images = np.random.default_rng(seed).choice(images, max_images, replace=False)
    return np.sort(images)


def _boxes_per_image(table: BoxTable) -> np.ndarray:
    return np.bincount(table.image[~table.is_crowd], minlength=len(table.files))


def _count(table: BoxTable, size: InputSize, cfg: CfgNode) -> dict[str, Any]:
    """Images and boxes of a table, as annotated."""
    each = table.take(~table.is_crowd)
    counts = np.bincount(each.classes, minlength=len(table.class_names))
    pairs = np.unique(np.stack([each.classes, each.image]), axis=1)
    with_class = np.bincount(pairs[0], minlength=len(table.class_names))
    shapes = input_shapes(table.sizes, int(np.median(size.short)), size.longest)
    boxes = boxes_at(each, shapes)
    roots, sides = box_roots(boxes), boxes[:, 2:] - boxes[:, :2]
    aspects = sides[:, 0] / sides[:, 1].clip(min=1e-6)
    per_image = _boxes_per_image(table)
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    return {
        "datasets": list(table.names),
        "images": len(table.files),
        "images_without_boxes": int((per_image == 0).sum()),
        "boxes": len(each.boxes),
        "crowds": int(table.is_crowd.sum()),
        "classes": {
            name: {
                "boxes": int(counts[i]),
                "images": int(with_class[i]),
                "median_size": float(np.median(roots[each.classes == i])) if counts[i] else None,
            }
            for i, name in enumerate(table.class_names)
        },
        "classes_without_boxes": [n for n, c in zip(table.class_names, counts) if c == 0],
        "size_percentiles": _percentiles(roots),
        "aspect_percentiles": _percentiles(aspects),
        "boxes_per_image": {
            "max": int(per_image.max()),
            "percentile_99": float(np.percentile(per_image, 99)),
            "images_above_limit": int((per_image > limit).sum()),
        },
        "median_enlargement": float(np.median(shapes.min(axis=1) / table.sizes.min(axis=1))),
    }


def _check_boxes(
    parts: dict[str, tuple[BoxTable | None, InputSize]],
) -> tuple[list[tuple[str, BoxTable, Suspicion]], dict[str, dict[str, int]]]:
    """Suspicious boxes, the worst first, and how many duplicates each part has."""
    suspicious, counts = [], {}
    for name, (table, size) in parts.items():
        if table is None:
            continue
        each = table.take(~table.is_crowd)
        duplicates = find_duplicates(each)
        counts[name] = duplicates.counts()
        shapes = input_shapes(table.sizes, int(np.median(size.short)), size.longest)
        found = find_suspicious(each, boxes_at(each, shapes), duplicates)
        suspicious += [(name, each, suspicion) for suspicion in found]
    return sorted(suspicious, key=lambda x: -x[2].score), counts


def _describe_suspicious(suspicious: list[tuple[str, BoxTable, Suspicion]]) -> dict[str, Any]:
    worst = []
    for part, table, suspicion in suspicious[:_MAX_LISTED]:
        x0, y0, x1, y1 = table.boxes[suspicion.row].tolist()
        worst.append({
            "part": part,
            "file": table.files[table.image[suspicion.row]],
            "class": table.class_names[table.classes[suspicion.row]],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": suspicion.score,
            "reasons": list(suspicion.reasons),
        })  # fmt: skip
    return {"boxes": len(suspicious), "worst": worst}


def _check_all_files(train: BoxTable, test: BoxTable | None) -> dict[str, Any]:
    """Images that cannot be read, and those of the same content."""
    test_files = test.files if test is not None else []
    hashes, problems = check_files([*train.files, *test_files])
    same: dict[str, dict[str, list[str]]] = {}
    for part, files in (("train", train.files), ("test", test_files)):
        for file in files:
            if file in hashes:
                same.setdefault(hashes[file], {"train": [], "test": []})[part].append(file)
    in_both = [x for x in same.values() if x["train"] and x["test"]]
    in_train = [x["train"] for x in same.values() if len(x["train"]) > 1]
    return {
        "unreadable": problems,
        "in_train_and_test": len(in_both),
        "in_train_and_test_files": in_both[:_MAX_LISTED],
        "several_times_in_train": len(in_train),
        "several_times_in_train_files": in_train[:_MAX_LISTED],
    }


def _percentiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return dict(zip(map(str, _PERCENTILES), np.percentile(values, _PERCENTILES).tolist()))


def _without_by_class(table: BoxTable, assignment: Assignment) -> dict[str, int]:
    classes = table.classes[assignment.box[assignment.reason > 0]]
    counts = np.bincount(classes, minlength=len(table.class_names))
    return {name: int(n) for name, n in zip(table.class_names, counts) if n}


def _levels(assignment: Assignment, rule: AssignmentRule, reg_max: int) -> dict[str, dict]:
    """Of each level: its anchors, the boxes that have most of theirs there, and its targets."""
    main = np.where(assignment.reason == 0, assignment.positives.argmax(axis=1), -1)
    roots = box_roots(assignment.boxes)
    levels = {}
    for i, name in enumerate(rule.level_names):
        targets, here = assignment.targets[i], roots[main == i]
        total = int(targets.sum())
        levels[name] = {
            "stride": rule.strides[i],
            "anchors": int(assignment.positives[:, i].sum()),
            "boxes": len(here),
            "size_percentiles": _percentiles(here),
            "sides": total,
            "sides_beyond": int(targets[reg_max + 1 :].sum()),
            "longest_side": float(assignment.longest_target[i]),
            "reg_max": covering_reg_max(targets) if total else None,
        }
    return levels
