"""
What a real detector predicts for real photographs, decoded, suppressed and evaluated here.

Its AP is in the README beside the file. The figures of docs/uncertainty.md are computed from it.
"""

from __future__ import annotations

import re

import pytest

from gfl_d2.distributions import ground_truth
from gfl_d2.distributions.measures import collect_errors, summarize
from gfl_d2.engine import BoxEvaluator
from real_outputs import detect_real_outputs, register_real_outputs
from scripts import ROOT

pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("real_val", (25.70, 43.66, 25.46)), ("real_train", (24.37, 42.80, 23.24))],
)
def test_average_precision(real_data, tmp_path, name, expected):
    found = detect_real_outputs(real_data, name)
    evaluator = BoxEvaluator(name, str(tmp_path))
    evaluator.reset()
    for image_id, instances in found.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    result = evaluator.evaluate()["bbox"]
    assert round(result["AP"], 2) == expected[0]
    # Rounding scores to 3 digits, or boxes to float16, changes these by so much.
    assert [result["AP50"], result["AP75"]] == pytest.approx(expected[1:], abs=0.07)


@pytest.mark.slow
def test_figures_of_the_uncertainty(real_data):
    """The column "COCO" of the first table, and the first two rows of the second."""
    pairs = []
    for name in ("real_val", "real_train"):
        records = {r["image_id"]: r for r in register_real_outputs(real_data, name)}
        found = detect_real_outputs(real_data, name, test_uncertainty=True)
        for i, instances in found.items():
            pairs.append((instances[instances.scores >= 0.3], *ground_truth(records[i])))
    figures = summarize(collect_errors(pairs))

    text = (ROOT / "docs" / "uncertainty.md").read_text(encoding="utf-8")
    table = re.search(r"\| COCO \| BCCD .*?\n\n", text, flags=re.DOTALL)[0]
    column = [row.split("|")[2] for row in table.strip().splitlines()[2:]]
    shown = [float(x) for cell in column for x in re.findall(r"[\d.]+", cell)]
    keys = list(figures)[:8]
    assert [round(figures[key], 2) for key in keys[:4]] == shown[:4]
    assert [round(figures[key], 1) for key in keys[4:7]] == shown[4:7]
    assert round(100 * figures[keys[7]]) == shown[7]
    for what, row in (("all detections", "COCO, all"), ("matched ones", "COCO, matched")):
        cells = re.search(rf"^\| {row} \|(.*)$", text, flags=re.MULTILINE)[1]
        areas = [value for key, value in figures.items() if key.startswith(f"{what}: ")]
        assert [round(x, 3) for x in areas] == [float(x) for x in re.findall(r"[\d.]+", cells)]
