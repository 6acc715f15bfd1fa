"""What the documents show works as written."""

from __future__ import annotations

import re

import torch
from detectron2.modeling import build_model

from gfl_d2 import load_config
from gfl_d2.modeling import GFL
from scripts import ROOT


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
    assert model.anchor_generator.strides == [8, 16, 32, 64]


def test_commands_of_the_readme_name_files_that_exist():
    for command in code_blocks("README.md", "bash"):
        for path in re.findall(r"configs/\S+\.yaml|tools/\S+\.py|train_net\.py", command):
            assert (ROOT / path).is_file(), path
