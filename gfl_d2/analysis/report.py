"""The figures of an analysis as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from ..errors import name_some
from .analysis import Analysis

__all__ = ["format_opts", "format_report"]

# Longer tables are cut: the JSON file has all.
_MAX_ROWS = 15
_MAX_SUSPICIOUS = 5


def format_report(analysis: Analysis) -> str:
    """Tables in Markdown, and what is recommended."""
    facts = analysis.facts
    parts = [_images(facts), _classes(facts), _levels(facts), _anchors(facts), _checks(facts)]
    return "\n\n".join([*parts, _advice(analysis)])


def format_opts(opts: dict[str, Any]) -> str:
    """Keys and values to paste behind a command, and as lines of a config file."""
    pairs = " ".join(f'{key} "{value}"' for key, value in opts.items())
    tree: dict[str, Any] = {}
    for key, value in opts.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = str(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(tree, sort_keys=False).replace("'", "")
    return f"{pairs}\n\nor, in a config file:\n\n{text.rstrip()}"


def _images(facts: dict) -> str:
    rows = []
    for name in ("train", "test"):
        part = facts[name]
        if part is None:
            continue
        crowd, size = part["boxes_per_image"], part["size_percentiles"]
        rows.append([
            f"{name}: {', '.join(part['datasets'])}", part["images"], part["images_without_boxes"],
            part["boxes"], part["crowds"], crowd["max"], f"{crowd['percentile_99']:.0f}",
            crowd["images_above_limit"],
            f"{size['5']:.0f} / {size['50']:.0f} / {size['95']:.0f}" if size else "–",
            f"{part['median_enlargement']:.2f}",
        ])  # fmt: skip
    header = [
        "images", "number", "without boxes", "boxes", "crowds", "most boxes", "99 % have at most",
        "above DETECTIONS_PER_IMAGE", "size of boxes at input, 5/50/95 %", "scale of input",
    ]  # fmt: skip
    return _table(header, rows)


def _classes(facts: dict) -> str:
    train, test = facts["train"]["classes"], (facts["test"] or {}).get("classes", {})
    names = sorted(train, key=lambda name: -train[name]["boxes"])
    rows = []
    for name in names:
        median = train[name]["median_size"]
        rows.append([
            name, train[name]["boxes"], train[name]["images"], test.get(name, {}).get("boxes", "–"),
            "–" if median is None else f"{median:.0f}",
        ])  # fmt: skip
    if len(rows) > _MAX_ROWS:
        left = len(rows) - _MAX_ROWS
        rows = [*rows[: _MAX_ROWS - 5], [f"({left} more)", "", "", "", ""], *rows[-5:]]
    header = ["class", "boxes", "images", "boxes in test", "median size at input"]
    return _table(header, rows)


def _levels(facts: dict) -> str:
    rows = []
    for name, level in facts["levels"].items():
        size, total = level["size_percentiles"], level["sides"]
        rows.append([
            name, level["stride"], level["boxes"], level["anchors"],
            f"{size['5']:.0f} to {size['95']:.0f}" if size else "–",
            f"{level['longest_side']:.1f}" if total else "–",
            f"{level['sides_beyond'] / total:.2%}" if total else "–",
            level["reg_max"] or "–",
        ])  # fmt: skip
    header = [
        "level", "stride", "boxes", "anchors", "sizes of boxes", "longest target, bins",
        "targets beyond REG_MAX", "REG_MAX for 99.9 %",
    ]  # fmt: skip
    return _table(header, rows)


def _anchors(facts: dict) -> str:
    anchors = facts["anchors"]
    reasons = ", ".join(f"{n} {reason}" for reason, n in anchors["without_anchor"].items())
    lost = sum(anchors["without_anchor"].values())
    text = (
        f"Boxes without an anchor: {lost} of {anchors['boxes']} ({reasons}). Others have "
        f"{anchors['anchors_per_box']:.1f} anchors on average."
    )
    if anchors["images"] < anchors["images_with_boxes"]:
        text += (
            f"\nAnchors are those of {anchors['images']} images, drawn from the "
            f"{anchors['images_with_boxes']} that have boxes (--max-images)."
        )
    return text


def _checks(facts: dict) -> str:
    lines = []
    for part, counts in facts["duplicate_boxes"].items():
        lines.append(
            f"Boxes with an IoU above 0.95 in {part}: {counts['exact']} pairs are equal, "
            f"{counts['near']} nearly; {counts['other_class']} more are of different classes."
        )
    files = facts["files"]
    lines.append(
        f"Images by content: {files['in_train_and_test']} are in train and test, "
        f"{files['several_times_in_train']} several times in train."
    )
    if files["unreadable"]:
        named = name_some(f"{file} ({reason})" for file, reason in files["unreadable"].items())
        lines.append(f"Images that cannot be read: {len(files['unreadable'])}: {named}.")
    suspicious = facts["suspicious"]
    lines.append(f"Suspicious boxes: {suspicious['boxes']}.")
    for x in suspicious["worst"][:_MAX_SUSPICIOUS]:
        box = ", ".join(f"{value:.0f}" for value in x["bbox"])
        lines.append(f"- {x['class']} at {box} in {x['file']}: {', '.join(x['reasons'])}")
    return "\n".join(lines)


def _advice(analysis: Analysis) -> str:
    lines = ["Recommended:" if analysis.opts else "Nothing to change:", ""]
    for advice in analysis.advice:
        what = ", ".join(f"{k} {v}" for k, v in advice.opts.items()) or "no change"
        lines.append(f"- {what}: {advice.reason}.")
    if analysis.opts:
        lines += ["", format_opts(analysis.opts)]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown, its columns aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
