"""Python configs build what the yaml configs of the same names build."""

from __future__ import annotations

import re

import detectron2.modeling.backbone
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler
from detectron2.utils.events import EventStorage
from omegaconf import ListConfig, OmegaConf

from gfl_d2 import load_config, model_zoo
from gfl_d2.data import GFLDatasetMapper
from gfl_d2.engine.solver import build_optimizer
from models import make_input
from scripts import ROOT
from test_docs import code_blocks

FOLDER = ROOT / "configs" / "lazy"
CONFIGS = sorted(
    str(path.relative_to(FOLDER).with_suffix(""))
    for path in FOLDER.rglob("*.py")
    if "common" not in path.parts
)
# One of each kind of model.
FAMILIES = (
    "gfl_R_50_FPN_1x", "gfl_v2_R_50_FPN_1x", "gfl_R_18_FPN_bccd", "ablations/table_3_atss",
    "ablations/dynamic_atss", "ablations/sapd_R_50_FPN_1x", "gfl_R_50_FPN_tiny_objects",
    "gfl_swin_tiny_FPN_1x", "gfl_regnetx_4gf_FPN_1x",
)  # fmt: skip
SCHEDULES = (
    "gfl_R_50_FPN_1x", "gfl_R_50_FPN_ms_2x", "gfl_R_18_FPN_bccd_reference", "gfl_R_18_FPN_bccd",
    "gfl_swin_tiny_FPN_1x",
)  # fmt: skip


def load_yaml(name: str, *opts):
    opts = ["MODEL.DEVICE", "cpu", *opts]
    return load_config(model_zoo.get_config_file(f"{name}.yaml"), opts)


def load_lazy(name: str):
    if "swin" in name or "convnext" in name or "vitdet" in name:
        pytest.importorskip("timm")
    if "vitdet" in name and not hasattr(detectron2.modeling.backbone, "ViT"):
        pytest.skip("Detectron2 0.6 has no ViT")
    return model_zoo.get_config(f"lazy/{name}.py")


def plain(value):
    """Sequences of all kinds as lists, objects by what they are made of."""
    if isinstance(value, (list, tuple, ListConfig)):
        return [plain(item) for item in value]
    if isinstance(value, torch.nn.Module):
        return type(value)  # compared under its own name
    is_made = hasattr(value, "augs") or "transforms" in type(value).__module__
    if is_made or type(value).__name__ == "FeatureInfo":  # timm's
        return [type(value), {k: plain(v) for k, v in vars(value).items()}]
    return value


def describe(model: torch.nn.Module) -> dict:
    """What each module is: its type and its own settings."""
    return {
        name: (type(module), {k: plain(v) for k, v in vars(module).items() if k[0] != "_"})
        for name, module in model.named_modules()
    }


def test_published_models_are_there():
    published = {path.stem for path in (ROOT / "configs").glob("gfl*_R*_2x.yaml")}
    published |= {path.stem for path in (ROOT / "configs").glob("gfl*_X*_2x.yaml")}
    assert len(published) == 10
    rows = {f"ablations/{path.stem}" for path in (ROOT / "configs/ablations").glob("[!B]*.yaml")}
    assert len(rows) == 17
    one_each = {path.stem for path in (ROOT / "configs").glob("gfl*_1x.yaml")}
    assert published | rows | one_each | set(FAMILIES) <= set(CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_same_modules_and_optimizer(name):
    cfg = load_lazy(name)
    device = "cpu" if "vitdet" in name else "meta"  # Detectron2's ViT reads values as it is made
    with torch.device(device):
        model = instantiate(cfg.model)
        expected = build_model(load_yaml(name, "MODEL.DEVICE", device))
    parameters, buffers = (
        [{n: (p.shape, p.requires_grad) for n, p in getattr(m, which)()} for m in (model, expected)]
        for which in ("named_parameters", "named_buffers")
    )
    assert parameters[0] == parameters[1]
    assert list(parameters[0]) == list(parameters[1])
    assert buffers[0] == buffers[1]
    modules = describe(model)
    assert len(modules) > 50
    assert modules == describe(expected)
    compare_optimizers(cfg, load_yaml(name), model, expected)


def make_small(cfg, backbone):
    """In place."""
    if "stages" in backbone.bottom_up:
        backbone.bottom_up.stages.depth = 18
        del backbone.bottom_up.stages.stride_in_1x1
    backbone.out_channels = 32
    cfg.model.head.num_classes, cfg.model.head.num_convs, cfg.model.head.conv_dim = 3, 1, 64
    return cfg


SMALL = (
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.GFL.NUM_CLASSES", 3, "MODEL.GFL.NUM_CONVS", 1),
    *("MODEL.GFL.CONV_DIM", 64),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_same_values(name):
    """Weights, losses and detections are equal by the bit, from the same seed."""
    cfg = load_lazy(name)
    make_small(cfg, cfg.model.backbone)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    torch.manual_seed(0)
    expected = build_model(load_yaml(name, *SMALL))
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    assert torch.equal(model.pixel_mean, expected.pixel_mean)
    assert torch.equal(model.pixel_std, expected.pixel_std)
    batch = [make_input()]
    with EventStorage():
        losses, expected_losses = (seeded(m, batch) for m in (model, expected))
    assert list(losses) == list(expected_losses)
    for key, loss in expected_losses.items():
        assert torch.equal(losses[key], loss), key
    model.test_score_thresh = expected.test_score_thresh = 0.001
    with torch.no_grad():
        a, b = (m.eval()(batch)[0]["instances"] for m in (model, expected))
    assert len(a) > 0
    assert torch.equal(a.scores, b.scores)
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def seeded(model, batch) -> dict:
    torch.manual_seed(0)  # layers that are left out at random
    return model(batch)


def hyperparameters(optimizer, model) -> dict:
    names = {parameter: name for name, parameter in model.named_parameters()}
    keys = ("lr", "weight_decay", "momentum", "nesterov", "dampening", "betas", "eps", "maximize")
    return {
        names[parameter]: {key: group.get(key) for key in keys}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def compare_optimizers(cfg, yaml_cfg, model, yaml_model) -> None:
    cfg.optimizer.params.model = model
    optimizer, expected = instantiate(cfg.optimizer), build_optimizer(yaml_cfg, yaml_model)
    ours, theirs = hyperparameters(optimizer, model), hyperparameters(expected, yaml_model)
    trained = [name for name, p in yaml_model.named_parameters() if p.requires_grad]
    assert set(theirs) == set(trained)
    assert ours == theirs


@pytest.mark.parametrize("name", SCHEDULES)
def test_same_learning_rates(name):
    """At every tenth iteration."""
    cfg, yaml_cfg = load_lazy(name), load_yaml(name)
    rates = []
    for is_lazy in (True, False):
        lr = cfg.optimizer.lr if is_lazy else yaml_cfg.SOLVER.BASE_LR
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        if is_lazy:
            multiplier = instantiate(cfg.lr_multiplier)
            scheduler = LRMultiplier(optimizer, multiplier, cfg.train.max_iter)
        else:
            scheduler = build_lr_scheduler(yaml_cfg, optimizer)
        rates.append([])
        for iteration in range(0, yaml_cfg.SOLVER.MAX_ITER, 10):
            scheduler.last_epoch = iteration
            rates[-1] += scheduler.get_lr()
    assert rates[0] == rates[1]
    assert rates[0][0] < rates[0][5] < yaml_cfg.SOLVER.BASE_LR  # the warm-up
    assert rates[0][-1] < 0.02 * yaml_cfg.SOLVER.BASE_LR


@pytest.fixture(scope="module")
def compared():
    """What determines the learning rates that are compared."""
    return [rates_of(load_lazy(name)) for name in SCHEDULES]


def rates_of(cfg) -> tuple:
    return cfg.lr_multiplier, cfg.optimizer.lr, cfg.train.max_iter


@pytest.mark.parametrize("name", CONFIGS)
def test_same_training(name, compared):
    cfg, yaml_cfg = load_lazy(name), load_yaml(name)
    solver, train = yaml_cfg.SOLVER, cfg.train
    assert rates_of(cfg) in compared
    assert train.max_iter == solver.MAX_ITER
    clip = solver.CLIP_GRADIENTS
    assert (train.clip_gradients > 0) == clip.ENABLED
    assert not clip.ENABLED or train.clip_gradients == clip.CLIP_VALUE
    loader, test = cfg.dataloader.train, cfg.dataloader.test
    ours = {
        "BF16": train.bf16,
        "CHANNELS_LAST": train.channels_last,
        "CHECKPOINT_PERIOD": train.checkpointer.period,
        "IMS_PER_BATCH": loader.total_batch_size,
    }
    assert ours == {key: solver[key] for key in ours}
    assert train.init_checkpoint == yaml_cfg.MODEL.WEIGHTS
    assert train.eval_period == yaml_cfg.TEST.EVAL_PERIOD
    assert train.best_metric == yaml_cfg.TEST.BEST_CHECKPOINT_METRIC
    assert OmegaConf.to_container(cfg.datasets.register) == list(yaml_cfg.DATASETS.REGISTER)
    assert (loader.dataset.names,) == tuple(yaml_cfg.DATASETS.TRAIN)
    assert (test.dataset.names,) == tuple(yaml_cfg.DATASETS.TEST)
    assert loader.num_workers == test.num_workers == yaml_cfg.DATALOADER.NUM_WORKERS
    ema = {key.lower(): value for key, value in yaml_cfg.MODEL_EMA.items()}
    assert OmegaConf.to_container(train.ema) == ema


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("is_train", [True, False])
def test_same_mapper(name, is_train):
    cfg = load_lazy(name).dataloader
    mapper = instantiate(cfg.train.mapper if is_train else cfg.test.mapper)
    expected = GFLDatasetMapper(load_yaml(name), is_train=is_train)
    assert plain(list(vars(mapper).items())) == plain(list(vars(expected).items()))


def test_model_zoo_builds_a_python_config():
    with torch.device("meta"):
        model = model_zoo.get("lazy/gfl_v2_R_50_FPN_1x.py", device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    file = model_zoo.get_config_file("lazy/common/optim.py")
    assert "optimizer" in LazyConfig.load(file)


def test_notes_name_files():
    """Comments that refer to yaml files."""
    for path in FOLDER.rglob("*.py"):
        for name in re.findall(r"see (\S+\.yaml)", path.read_text(encoding="utf-8")):
            assert (path.parent / name).is_file(), (path, name)


def test_config_of_a_user(tmp_path):
    """As the document shows it."""
    path = tmp_path / "cells.py"
    path.write_text(code_blocks("docs/lazyconfig.md", "python")[0], encoding="utf-8")
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(path)), ["train.output_dir=elsewhere"])
    assert cfg.dataloader.evaluator.output_folder == "elsewhere/inference"
    assert cfg.dataloader.evaluator.name == cfg.datasets.register[1][0] == "cells_valid"
    with torch.device("meta"):
        assert instantiate(cfg.model).num_classes == 2
