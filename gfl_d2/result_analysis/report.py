"""An analysis of results as text, as plain data, and as one page that needs no network."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..files import atomic_write
from ..tables import format_table
from .analysis import ResultAnalysis
from .charts import CHARTS, draw_chart
from .images import draw_images

__all__ = ["format_comparison", "format_report", "write_report"]

_MAX_LISTED = 1000  # of confused classes in the JSON file
_MAX_SHOWN = 10  # of them elsewhere
_LISTED_IMAGES = 100  # of the worst and of the best

# What the headings of tables mean.
_AP_NOTE = "AP as COCO's, in percent; s, m and l are small, medium and large objects."
_AP_KEYS = ("class", "objects", "detections", "AP", "AP50", "AP75", "APs", "APm", "APl")
_CLASS_NOTE = (
    "At IoU 0.5 and in percent, but thresholds. Precision and recall are those of the threshold "
    "with the highest F1. oLRP is the LRP error at threshold lrp, where it is lowest. Its parts: "
    "the mean of 1 - IoU of found objects (loc), the share of detections that is false (FP) and of "
    "objects that is not found (FN). LaECE0 and LaACE0: how far scores are from IoUs."
)
_ERROR_NOTE = (
    "TIDE's kinds of errors at IoU 0.5: how many there are, and by how much AP50 would rise if all "
    "of a kind were mended. False detections of low scores are many and cost little."
)


def format_report(analysis: ResultAnalysis) -> str:
    """Tables in Markdown."""
    parts = [
        _format([analysis.overall()]),
        *(part for note, rows in _class_tables(analysis) for part in (note, _format(rows))),
        _ERROR_NOTE,
        _format(analysis.errors()),
    ]
    confused = analysis.confused()[:_MAX_SHOWN]
    if confused:
        parts += [_where(analysis), format_table(confused)]
    return "\n\n".join(parts)


def format_comparison(analyses: Mapping[str, ResultAnalysis]) -> str:
    """A row for each analysis, by its name."""
    keys = ("AP", "AP50", "AP75", "oLRP", "LaECE0", "LaACE0", "threshold_lrp", "threshold_f1")
    rows = []
    for name, analysis in analyses.items():
        overall = analysis.overall()
        rows.append({"results": name} | {key: overall[key] for key in keys})
    return _format(rows)


def write_report(
    folder: Path, analysis: ResultAnalysis, about: Mapping[str, Any], num_images: int
) -> list[Path]:
    """
    Write ``report.json``, ``report.html`` and the pictures that are in it into a folder.

    Args:
        about: what the analysis is of, by the name of what is told.
        num_images: of the worst, and of the best, to draw.

    Raises:
        OSError: a file cannot be written.
    """
    pictures = {f"{name}.png": draw_chart(name, analysis) for name in CHARTS}
    for name, ranked in (("worst", analysis.images), ("best", analysis.images[::-1])):
        limits = analysis.lrp_thresholds
        picture = draw_images(analysis.results, ranked, limits, num_images) if num_images else None
        if picture is not None:
            pictures[f"{name}.jpg"] = _encode(picture)
    page = _make_page(analysis, about, pictures).encode()
    facts = json.dumps(_to_facts(analysis, about), indent=1, allow_nan=False).encode()
    files = {"report.html": page, "report.json": facts, **pictures}
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return [folder / name for name in files]


def _to_facts(analysis: ResultAnalysis, about: Mapping[str, Any]) -> dict[str, Any]:
    bins = analysis.reliability
    worst, best = analysis.images[:_LISTED_IMAGES], analysis.images[::-1][:_LISTED_IMAGES]
    ids = analysis.results.image_ids
    facts = {
        **about,
        "overall": analysis.overall(),
        "classes": _even(analysis.classes()),
        "errors": analysis.errors(),
        "confusion": {
            "score_thresh": analysis.score_thresh,
            "tp_iou_thresh": analysis.tp_iou_thresh,
            "classes": [*analysis.results.class_names, None],
            "matrix": analysis.confusion.tolist(),
            "most_frequent": analysis.confused()[:_MAX_LISTED],
        },
        "reliability": {
            name: getattr(bins, name).tolist() for name in ("counts", "mean_scores", "mean_ious")
        },
        "ranked_images": {
            name: [{**x._asdict(), "image": ids[x.image]} for x in images]
            for name, images in (("worst", worst), ("best", best))
        },
    }
    return _without_nan(facts)


def _make_page(
    analysis: ResultAnalysis, about: Mapping[str, Any], pictures: Mapping[str, bytes]
) -> str:
    title = f"Results on {analysis.results.dataset}"
    told = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in about.items() if value)
    confused = analysis.confused()[:_MAX_SHOWN]
    sections = [
        f"<h1>{html.escape(title)}</h1><p class=hint>{html.escape(told)}</p>",
        _table([analysis.overall()]),
        "<h2>Classes</h2>",
        *(
            f"<p class=hint>{html.escape(note)}</p>{_table(rows)}"
            for note, rows in _class_tables(analysis)
        ),
        _image(pictures, "precision_recall.png"),
        "<h2>Kinds of errors</h2>",
        f"<p class=hint>{html.escape(_ERROR_NOTE)}</p>",
        _image(pictures, "errors.png"),
        "<h2>Confusion</h2>",
        f"<p class=hint>{html.escape(_where(analysis))}</p>",
        _table(confused) if confused else "",
        _image(pictures, "confusion_matrix.png"),
        "<h2>Scores and IoU</h2>",
        "<p class=hint>Detections above the threshold of their class (threshold lrp). A score that "
        "is the IoU has its bar end on the dotted line.</p>",
        _image(pictures, "reliability.png"),
    ]
    for name in ("worst", "best"):
        if f"{name}.jpg" in pictures:
            sections += [
                f"<h2>The {name} images</h2>",
                "<p class=hint>Ground truth, left, and detections above the threshold of their "
                "class, right, by the LRP error of the image: 0 is perfect, 1 the worst.</p>",
                _image(pictures, f"{name}.jpg"),
            ]
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    head, _, tail = template.partition("$BODY")
    return head.replace("$TITLE", html.escape(title)) + "\n".join(sections) + tail


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in rows[0])
    lines = [
        "".join(f"<td>{html.escape(_cell(key, row[key]))}</td>" for key in rows[0]) for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=table><table><tr>{heads}</tr>{body}</table></div>"


def _image(pictures: Mapping[str, bytes], name: str) -> str:
    kind = "png" if name.endswith(".png") else "jpeg"
    data = base64.b64encode(pictures[name]).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{name.partition(".")[0]}">'


def _encode(picture: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", np.ascontiguousarray(picture[:, :, ::-1]))[1].tobytes()


def _where(analysis: ResultAnalysis) -> str:
    where = f"{analysis.score_thresh:g} or more, by an IoU of {analysis.tp_iou_thresh:g} or more"
    return f"Classes that are taken for others, in detections that score {where}."


def _even(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same keys in all rows; what is missing is NaN."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key, math.nan) for key in keys} for row in rows]


def _class_tables(analysis: ResultAnalysis) -> list[tuple[str, list[dict[str, Any]]]]:
    """Notes, and the rows of classes that they explain."""
    rows = _even(analysis.classes())
    ap = [{key: row[key] for key in _AP_KEYS} for row in rows]
    rest = [{k: v for k, v in row.items() if k == "class" or k not in _AP_KEYS} for row in rows]
    return [(_AP_NOTE, ap), (_CLASS_NOTE, rest)]


def _format(rows: Sequence[Mapping[str, Any]]) -> str:
    return format_table([{key: _cell(key, value) for key, value in row.items()} for row in rows])


def _cell(key: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "–"
    return f"{value:.2f}" if key.startswith("threshold") else f"{value:.1f}"


def _without_nan(value: Any) -> Any:
    """None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
