"""What the documents show works as written."""

from __future__ import annotations

import json
import re

import pytest
import torch
from detectron2.modeling import build_model

from gfl_d2 import load_config
from gfl_d2.modeling import GFL
from scripts import ROOT

DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
COMPLEXITY = json.loads((ROOT / "tests" / "complexity.json").read_text())


def code_blocks(path: str, language: str) -> list[str]:
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@torch.no_grad()
def test_building_without_a_config():
    """It is the model that the config builds."""
    scope = {}
    exec(code_blocks("docs/backbones.md", "python")[-1], scope)
    model = scope["model"].eval()
    assert isinstance(model, GFL)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    configured = build_model(load_config(str(ROOT / "configs/gfl_R_50_FPN_1x.yaml"), opts)).eval()
    configured.load_state_dict(model.state_dict())
    model.test_score_thresh = configured.test_score_thresh = 0.005
    inputs = [{"image": torch.rand(3, 96, 128) * 255}]
    expected, actual = (m(inputs)[0]["instances"] for m in (configured, model))
    assert len(actual) > 0
    assert torch.equal(actual.scores, expected.scores)
    assert torch.equal(actual.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_another_backbone(tmp_path):
    path = tmp_path / "config.yaml"
    text = code_blocks("docs/backbones.md", "yaml")[0]
    path.write_text(text.replace("Base-GFL.yaml", str(ROOT / "configs" / "Base-GFL.yaml")))
    model = build_model(load_config(str(path), ["MODEL.DEVICE", "cpu"]))
    assert model.grid.strides.tolist() == [8, 16, 32, 64]


@pytest.mark.parametrize("document", ["README.md", "MODEL_ZOO.md", *DOCS])
def test_files_that_documents_name_exist(document):
    """In commands and in links."""
    commands = "".join(code_blocks(document, "bash"))
    for path in re.findall(r"(?:configs|tools|demo)/[\w/.*]+\.(?:yaml|py)|train_net\.py", commands):
        assert list(ROOT.glob(path)), path
    text = (ROOT / document).read_text(encoding="utf-8")
    assert "@@" not in text  # what was to be filled in
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / document).parent.joinpath(path).exists(), path


def read_model_zoo() -> dict[str, list[str]]:
    """Config -> the cells after it, for those that are named by a link."""
    text = (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| \[[\w]+\]\(configs/([\w/]+)\.yaml\) \| (.*) \|$", text, flags=re.MULTILINE
    )
    return {config: [cell.strip() for cell in cells.split("|")] for config, cells in rows}


def test_model_zoo_has_every_config():
    configs = (ROOT / "configs").rglob("[!B]*.yaml")
    names = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in configs}
    assert set(read_model_zoo()) == names


@pytest.mark.parametrize("config", sorted(COMPLEXITY))
def test_model_zoo_agrees_with_configs(config):
    cells = read_model_zoo()[config]
    assert float(cells[-3]) == pytest.approx(COMPLEXITY[config]["parameters"] / 1e6, abs=0.005)
    text = (ROOT / "configs" / f"{config}.yaml").read_text(encoding="utf-8")
    published = re.search(
        r"Published: ([\d.]+) AP on COCO val2017(?:, ([\d.]+) on test-dev)?", text
    )
    assert cells[0] == published[1]
    assert published[2] in (cells[1], None)


@pytest.mark.parametrize("config", [c for c in read_model_zoo() if c.startswith("ablations/table")])
def test_model_zoo_agrees_with_ablations(config):
    text = (ROOT / "configs" / f"{config}.yaml").read_text(encoding="utf-8")
    assert f"val2017: {read_model_zoo()[config][0]} / " in text
