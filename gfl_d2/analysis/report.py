"""The figures of an analysis as text."""

from __future__ import annotations

from typing import Any

import yaml

from ..errors import name_some
from ..tables import format_table
from .analysis import Analysis

__all__ = ["format_report"]

_MAX_SUSPICIOUS = 5


def format_report(analysis: Analysis) -> str:
    """Tables in Markdown, and what is recommended."""
    facts = analysis.facts
    note = "Sizes are roots of areas in pixels at the input, in percentiles; targets are in bins."
    tables = [facts["images"], facts["classes"], facts["levels"], _findings(facts)]
    worst = [{**x, "reasons": ", ".join(x["reasons"])} for x in facts["suspicious"]]
    tables += [worst[:_MAX_SUSPICIOUS]] if worst else []
    return "\n\n".join([note, *map(format_table, tables), *_advice(analysis)])


def _findings(facts: dict) -> list[dict[str, Any]]:
    anchors, files = facts["anchors"], facts["files"]
    unreadable = [f"{file} ({reason})" for file, reason in files["unreadable"].items()]
    drawn = f"{anchors['images']} of {anchors['images_with_boxes']}"
    rows = [
        ("images that anchors are assigned in (--max-images)", drawn),
        ("anchors of a box", f"{anchors['anchors_per_box']:.1f}"),
        *((f"boxes without anchor: {x}", n) for x, n in anchors["without_anchor"].items()),
        ("images in train and test", files["in_train_and_test"]),
        ("images several times in train", files["several_times_in_train"]),
        ("images that cannot be read", name_some(unreadable) or 0),
        ("suspicious boxes", facts["suspicious_boxes"]),
    ]
    for part, counts in facts["duplicate_boxes"].items():
        rows += [(f"duplicate boxes in {part}: {kind}", n) for kind, n in counts.items()]
    return [{"finding": finding, "number": number} for finding, number in rows]


def _advice(analysis: Analysis) -> list[str]:
    """Each rule's, and all as keys and values behind a command, and as lines of a config file."""
    lines = ["Recommended:" if analysis.opts else "Nothing to change:", ""]
    for advice in analysis.advice:
        what = ", ".join(f"{k} {v}" for k, v in advice.opts.items()) or "no change"
        lines.append(f"- {what}: {advice.reason}.")
    if not analysis.opts:
        return ["\n".join(lines)]
    tree: dict[str, Any] = {}
    for key, value in analysis.opts.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = str(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(tree, sort_keys=False).replace("'", "").rstrip()
    pairs = " ".join(f'{key} "{value}"' for key, value in analysis.opts.items())
    return ["\n".join(lines), pairs, "or, in a config file:", text]
