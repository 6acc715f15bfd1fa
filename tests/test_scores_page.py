"""The figures of docs/scores.md that real predictions give."""

from __future__ import annotations

import json
import re

import pytest
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from gfl_d2.result_analysis import analyze_results, load_result_set
from gfl_d2.result_analysis.tide import KINDS
from real_outputs import detect_real_outputs
from scripts import ROOT

pytestmark = pytest.mark.usefixtures("clean_catalogs")


def test_column_of_coco(real_data, tmp_path):
    found = detect_real_outputs(real_data, "real_val")
    ids = MetadataCatalog.get("real_val").thing_dataset_id_to_contiguous_id
    ids = {index: id for id, index in ids.items()}
    results = [x for id, one in found.items() for x in instances_to_coco_json(one, id)]
    results = [{**x, "category_id": ids[x["category_id"]]} for x in results]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    analysis = analyze_results(load_result_set("real_val", path), 100)

    text = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")
    table = re.search(r"\| BCCD \| demo \| COCO \|.*?\n\n", text, flags=re.DOTALL)[0]
    column = [row.split("|")[4] for row in table.strip().splitlines()[2:]]
    shown = [float(x) for cell in column for x in re.findall(r"[\d.]+", cell)]
    overall = analysis.overall()
    keys = ("AP", "AP50", "oLRP", "LaECE0", "LaACE0", "threshold_lrp", "threshold_f1")
    expected = [overall[key] for key in keys] + [analysis.tide.costs[kind] for kind in KINDS]
    digits = [1] * 5 + [2] * 2 + [1] * 6
    assert shown == [round(x, n) for x, n in zip(expected, digits)]
