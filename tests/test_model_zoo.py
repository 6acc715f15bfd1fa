"""Models by name, from the checkout and from a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from gfl_d2 import model_zoo
from gfl_d2.errors import InputError
from scripts import ROOT

DEMO = "gfl_R_18_FPN_demo.yaml"

# Run where nothing but the wheel and the environment's packages are. Named are models that a user
# can build, not the bases of their configs.
BUILD_ALL = """
import sys
from pathlib import Path
import torch
from gfl_d2 import model_zoo
from gfl_d2.errors import InputError

folder = Path(model_zoo.__file__).resolve().parent
assert folder == Path(sys.argv[1], "gfl_d2", "model_zoo").resolve(), folder
for file in sorted((folder / "configs").glob("**/*.yaml")):
    if not file.name.startswith("Base-"):
        name = file.relative_to(folder / "configs").as_posix()
        device = "cpu" if "vit" in name else "meta"  # Detectron2's ViT reads values
        try:
            with torch.device(device):
                model = model_zoo.get(name, device=device)
        except InputError as error:  # what not every environment has
            assert "pip install timm" in str(error) or "needs Detectron2's main" in str(error)
            print(name, error)
            continue
        assert {p.device.type for p in model.parameters()} == {device}
        print(name, type(model).__name__)
for file in sorted((folder / "configs" / "lazy").glob("**/*.py")):
    name = file.relative_to(folder / "configs").as_posix()
    if "common" in name:
        continue
    try:
        print(name, model_zoo.get_config(name).model._target_.__name__)
    except ImportError as error:  # of Detectron2's main branch
        assert "vit" in name and "'ViT'" in str(error)
        print(name, error)
"""


def test_config():
    file = model_zoo.get_config_file("ablations/table_3_qfl.yaml")
    assert os.path.samefile(file, ROOT / "configs" / "ablations" / "table_3_qfl.yaml")
    cfg = model_zoo.get_config("gfl_v2_R_50_FPN_1x.yaml")
    assert cfg.MODEL.GFL.QUALITY == "dgqp"
    assert cfg.MODEL.WEIGHTS.endswith("R-50.pkl")
    cfg.OUTPUT_DIR = "elsewhere"  # not frozen


def test_unknown_config():
    with pytest.raises(InputError, match=r"no config 'gfl_R_50'.*gfl_R_50_FPN_1x\.yaml"):
        model_zoo.get_config_file("gfl_R_50")


def test_model_with_weights(tmp_path):
    path = str(tmp_path / "model.pth")
    model = model_zoo.get(DEMO, device="cpu")
    assert type(model).__name__ == "GFL"
    assert model.training
    torch.save({"model": model.state_dict()}, path)
    loaded = model_zoo.get(DEMO, path, device="cpu")
    assert torch.equal(loaded.head.cls_score.weight, model.head.cls_score.weight)
    del model.head.cls_score.bias
    torch.save({"model": model.state_dict()}, path)
    with pytest.raises(InputError, match=r"model\.pth does not fit the model"):
        model_zoo.get(DEMO, path, device="cpu")


@pytest.mark.slow
def test_every_model_is_built_from_a_wheel(tmp_path):
    source, site, elsewhere = (tmp_path / name for name in ("source", "site", "elsewhere"))
    # What setuptools leaves beside the sources is left beside a copy, links as links.
    source.mkdir()
    for name in ("gfl_d2", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*arguments, **kwargs):
        command = [sys.executable, *map(str, arguments)]
        kwargs = {"env": environment, "cwd": tmp_path, **kwargs}
        result = subprocess.run(command, capture_output=True, text=True, **kwargs)
        assert result.returncode == 0, result.stderr
        return result.stdout

    pip = ("-m", "pip", "--disable-pip-version-check", "--no-input")
    options = ("-q", "--no-deps", "--no-index")
    run(*pip, "wheel", *options, "--no-build-isolation", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "install", *options, "--target", site, wheel)
    shutil.rmtree(source)
    elsewhere.mkdir()
    built = run(
        *("-c", BUILD_ALL, site), env={**environment, "PYTHONPATH": str(site)}, cwd=elsewhere
    )
    files = [*(ROOT / "configs").glob("**/*.yaml"), *(ROOT / "configs" / "lazy").glob("**/*.py")]
    files = [x for x in files if x.name[:5] != "Base-" and "common" not in x.parts]
    names = [x.relative_to(ROOT / "configs").as_posix() for x in files]
    assert sorted(line.split()[0] for line in built.splitlines()) == sorted(names)
    assert len(names) > 20
