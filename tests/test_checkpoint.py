import os
import pickle
import signal
import subprocess
import sys
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model

from gfl_d2 import load_config
from gfl_d2.checkpoint import GFLCheckpointer, describe_model, load_checkpoint_config
from gfl_d2.config import parse_config
from gfl_d2.errors import InputError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CONFIG = CONFIGS / "Base-GFL.yaml"


def build(num_classes: int = 3, depth: int = 18, conv_dim: int = 64, num_convs: int = 1):
    opts = [
        *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", depth),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 32),
        *("MODEL.GFL.CONV_DIM", conv_dim, "MODEL.GFL.NUM_CONVS", num_convs),
        *("MODEL.GFL.NUM_CLASSES", num_classes),
    ]
    return build_model(load_config(str(CONFIG), opts))


def save(model, path, drop: str = ""):
    weights = model.state_dict()
    for name in [name for name in weights if drop and name.startswith(drop)]:
        del weights[name]
    torch.save({"model": weights}, path)
    return str(path)


def save_imagenet(model, path):
    """The backbone alone and a classifier, in the form of Detectron2's ImageNet weights."""
    prefix = "backbone.bottom_up."
    weights = {
        k[len(prefix) :]: v.numpy() for k, v in model.state_dict().items() if k.startswith(prefix)
    }
    weights["stem.fc.weight"] = np.zeros((1000, 512), dtype=np.float32)
    content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    with open(path, "wb") as file:
        pickle.dump(content, file)
    return str(path)


def load_error(model, path, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        GFLCheckpointer(model, **kwargs).load(str(path))
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("complete", [False, True])
def test_same_model_loads_every_parameter(tmp_path, complete):
    source, target = build(), build()
    GFLCheckpointer(target, complete=complete).load(save(source, tmp_path / "model.pth"))
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name]), name


def test_other_number_of_classes_starts_the_classifier_anew(tmp_path, caplog):
    source, target = build(num_classes=3), build(num_classes=7)
    before = target.head.cls_score.weight.clone()
    GFLCheckpointer(target).load(save(source, tmp_path / "model.pth"))
    assert torch.equal(target.head.cls_score.weight, before)
    assert torch.equal(target.head.bbox_pred.weight, source.head.bbox_pred.weight)
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert "2 parameters start anew: head.cls_score.weight, head.cls_score.bias" in warning


def test_other_number_of_classes_is_an_error_in_evaluation(tmp_path):
    path = save(build(num_classes=3), tmp_path / "model.pth")
    message = load_error(build(num_classes=7), path, complete=True)
    assert "head.cls_score.weight is (3, 64, 3, 3), not (7, 64, 3, 3)" in message


def test_other_width_is_an_error(tmp_path):
    path = save(build(conv_dim=64), tmp_path / "model.pth")
    message = load_error(build(conv_dim=96), path)
    assert "head.cls_subnet.0.weight is (64, 32, 3, 3), not (96, 32, 3, 3)" in message


@pytest.mark.parametrize(
    ("there", "here", "what"),
    [
        ({"depth": 18}, {"depth": 34}, "Not in the file (48): backbone.bottom_up.res2.2"),
        ({"depth": 34}, {"depth": 18}, "Not in the model (80): backbone.bottom_up.res2.2"),
        ({"num_convs": 1}, {"num_convs": 2}, "Not in the file (6): head.cls_subnet.1"),
        ({"num_convs": 2}, {"num_convs": 1}, "Not in the model (6): head.cls_subnet.1"),
    ],
)
def test_other_depth_is_an_error(tmp_path, there, here, what):
    message = load_error(build(**here), save(build(**there), tmp_path / "model.pth"))
    assert what in message


def test_imagenet_weights_load(tmp_path):
    source, target = build(), build()
    GFLCheckpointer(target).load(save_imagenet(source, tmp_path / "R-18.pkl"))
    expected = source.backbone.bottom_up.state_dict()
    for name, value in target.backbone.bottom_up.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("there", "here", "what"),
    [
        (18, 34, "Not in the file (48): backbone.bottom_up.res2.2"),
        (34, 18, "Not in the model (80): res2.2.conv1"),
        (18, 50, "in the model (8): backbone.bottom_up.res2.0.conv1.weight is (64, 64, 3, 3), "
                 "not (64, 64, 1, 1)"),
    ],
)  # fmt: skip
def test_imagenet_weights_of_another_depth_are_an_error(tmp_path, there, here, what):
    path = save_imagenet(build(depth=there), tmp_path / "weights.pkl")
    model = build(depth=here)
    assert what in load_error(model, path)


def test_imagenet_weights_are_not_enough_to_evaluate(tmp_path):
    path = save_imagenet(build(), tmp_path / "R-18.pkl")
    assert "Not in the file" in load_error(build(), path, complete=True)


def test_file_without_head_starts_training_but_not_evaluation(tmp_path):
    path = save(build(), tmp_path / "model.pth", drop="head.")
    GFLCheckpointer(build()).load(path)
    assert "Not in the file (11): head." in load_error(build(), path, complete=True)


def test_unrelated_weights_are_an_error(tmp_path):
    torch.save({"model": {"other.weight": torch.zeros(3)}}, tmp_path / "model.pth")
    message = load_error(build(), tmp_path / "model.pth")
    assert "Not in the model (1): other.weight" in message


def test_missing_file(tmp_path):
    assert "does not exist" in load_error(build(), tmp_path / "model.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", pickle.dumps([1, 2])])
def test_file_that_is_no_checkpoint(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    message = load_error(build(), path)
    assert "cannot be read" in message or "is not a checkpoint" in message


def test_truncated_checkpoint(tmp_path):
    path = tmp_path / "model.pth"
    save(build(), path)
    path.write_bytes(path.read_bytes()[:10000])
    assert "cannot be read" in load_error(build(), path)


def test_checkpoint_of_something_else(tmp_path):
    torch.save({"model": {"iteration": 3}}, tmp_path / "model.pth")
    assert "is not a checkpoint of a model" in load_error(build(), tmp_path / "model.pth")


def test_evaluation_of_random_weights_warns(caplog):
    assert GFLCheckpointer(build(), complete=True).load("") == {}
    assert "MODEL.WEIGHTS is empty" in caplog.text


def test_training_from_scratch_needs_none():
    assert GFLCheckpointer(build()).load("") == {}


def test_resuming_needs_every_parameter(tmp_path):
    save(build(num_classes=3), tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    checkpointer = GFLCheckpointer(build(num_classes=7), str(tmp_path))
    with pytest.raises(InputError, match=r"model_0000001\.pth .*head\.cls_score\.weight"):
        checkpointer.resume_or_load("", resume=True)


def test_last_checkpoint_is_gone(tmp_path):
    checkpointer = GFLCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    for name in ("model_1", "model_2", "model_best", "model_3"):
        checkpointer.save(name)
    (tmp_path / "model_3.pth").unlink()
    match = r"names 'model_3\.pth', .* into it \(model_2\.pth, model_1\.pth\)"
    with pytest.raises(InputError, match=match):
        checkpointer.resume_or_load("")


def test_weights_alone_cannot_be_resumed(tmp_path):
    model, step = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    GFLCheckpointer(model, str(tmp_path)).save("model_best")
    match = r"model_best\.pth has weights, but no state of a training"
    with pytest.raises(InputError, match=match):
        GFLCheckpointer(model, str(tmp_path), trainer=step).resume_or_load("")
    training = GFLCheckpointer(model, str(tmp_path), trainer=step)
    training.resume_or_load(str(tmp_path / "model_best.pth"), resume=False)
    training.save("model_1")
    training.resume_or_load("")


def test_resuming_with_classes_in_another_order(tmp_path):
    model = build(num_classes=2)
    for names in (["cat", "dog"], ["dog", "cat"], ["dog", "Cat"]):
        checkpointer = GFLCheckpointer(model, str(tmp_path), description={"class_names": names})
        if names == ["dog", "cat"]:
            with pytest.raises(InputError, match=r"set DATASETS\.CLASSES \['cat', 'dog'\]"):
                checkpointer.resume_or_load("")
        else:
            checkpointer.resume_or_load("")
            checkpointer.save("model_1")


class Stateful:
    def __init__(self, **state):
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        assert state == self.state


@pytest.mark.parametrize("value", [np.float64(0.5), np.zeros(2), Path("x"), deque([1])])
def test_states_that_could_not_be_resumed(tmp_path, value):
    hook = Stateful(best=[0, value])
    checkpointer = GFLCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), hook=hook)
    with pytest.raises(InputError, match=r"resumed: hook\.best\[1\] is a .*state_dict\(\)"):
        checkpointer.save("model_1")
    hook.state = {"best": {np.int64(3): 1.0}}
    with pytest.raises(InputError, match=r"resumed: hook\.best\.3 is a numpy\.int64"):
        checkpointer.save("model_1")
    assert list(tmp_path.iterdir()) == []


def test_states_that_can_be_resumed(tmp_path):
    state = {"a": Counter("aab"), "b": (1, None), "c": torch.Size([2]), "d": b"x", "e": {True}}
    checkpointer = GFLCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), hook=Stateful(**state))
    checkpointer.save("model_1")
    checkpointer.resume_or_load("")


def test_failed_load_writes_nothing(tmp_path):
    path = save(build(conv_dim=64), tmp_path / "model.pth")
    content = (tmp_path / "model.pth").read_bytes()
    load_error(build(conv_dim=96), path, save_dir=str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == content


# Writing


class Bomb:
    """Ends the process, or raises, when it is saved."""

    def __init__(self, error=None):
        self.error = error

    def __reduce__(self):
        if self.error is not None:
            raise self.error
        os.kill(os.getpid(), signal.SIGKILL)


class Unchecked(GFLCheckpointer):
    """A bomb is no plain data."""

    def check_states(self, **others) -> None:
        pass


def save_twice(folder, bomb):
    """Once well, then once with what cannot be saved, under the same name."""
    model = torch.nn.Linear(1, 1)
    checkpointer = Unchecked(model, str(folder))
    checkpointer.save("model_final", iteration=3)
    with torch.no_grad():
        model.weight.fill_(9.0)
    # Large, so that bytes of it are in the file already.
    checkpointer.save("model_final", iteration=4, large=np.zeros(10**6), bomb=bomb)


def check_first_is_whole(folder):
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    model = torch.nn.Linear(1, 1)
    assert GFLCheckpointer(model, str(folder)).resume_or_load("")["iteration"] == 3
    assert model.weight.item() != 9.0


def test_error_while_saving_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(InputError, match="disk full"):
        save_twice(tmp_path, Bomb(OSError("disk full")))
    check_first_is_whole(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"last_checkpoint", "model_final.pth"}


@pytest.mark.slow
def test_kill_while_saving_leaves_the_last_checkpoint(tmp_path):
    code = f"import test_checkpoint as t; t.save_twice({str(tmp_path)!r}, t.Bomb())"
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert process.returncode == -signal.SIGKILL
    check_first_is_whole(tmp_path)


def test_tag_moves_when_it_is_whole(tmp_path):
    """And after the file that it names."""
    checkpointer = GFLCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000001")
    tag = str(tmp_path / "last_checkpoint")
    with checkpointer.path_manager.open(tag, "w") as file:
        file.write("model_0000002.pth")
        file.flush()
        assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000002.pth")


# What describes the model


def config_error(path, *opts) -> str:
    with pytest.raises(InputError) as error:
        load_checkpoint_config(path, opts)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def save_config(path, text):
    torch.save({"model": {}, "config": text}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_config_of_a_checkpoint_is_the_one_that_was_saved(config):
    cfg = load_config(str(config), ["MODEL.DEVICE", "cpu"])
    expected = cfg.clone()
    expected.defrost()
    expected.MODEL.WEIGHTS = "model.pth"
    text = describe_model(cfg)["config"]
    parsed = parse_config(text, "model.pth", ["MODEL.DEVICE", "cpu"])
    assert parsed.is_frozen()
    assert not parsed.is_new_allowed()
    assert yaml.safe_load(parsed.dump()) == yaml.safe_load(expected.dump())


@pytest.mark.parametrize("description", [None, {"config": "a: 1", "class_names": ["cat", "dog"]}])
def test_checkpoints_are_resumed_with_and_without_a_description(tmp_path, description):
    model = torch.nn.Linear(1, 1)
    GFLCheckpointer(model, str(tmp_path), description=description).save("model_1", iteration=3)
    content = torch.load(tmp_path / "model_1.pth", weights_only=True)
    saved = {key: content[key] for key in content if key not in ("model", "iteration")}
    assert saved == (description or {})
    for other in (None, {"config": "a: 2"}):
        target = torch.nn.Linear(1, 1)
        checkpointer = GFLCheckpointer(target, str(tmp_path), description=other)
        assert checkpointer.resume_or_load("")["iteration"] == 3
        assert torch.equal(target.weight, model.weight)
        assert checkpointer.description == (other or {})  # of the training that goes on


def test_description_is_plain_data():
    cfg = load_config(str(CONFIG))
    assert describe_model(cfg) == describe_model(cfg, ()) == {"config": cfg.dump()}
    names = describe_model(cfg, (np.str_("cat"), 7))["class_names"]
    assert [(type(name), name) for name in names] == [(str, "cat"), (str, "7")]


def test_config_of_another_version(tmp_path):
    """It lacks keys, and has some that are unknown here."""
    text = "MODEL: {META_ARCHITECTURE: GFL, GFL: {NUM_CLASSES: 3, NEW: [1]}, MINE: {X: 2.0}}"
    path = save_config(tmp_path / "model.pth", text)
    cfg = load_checkpoint_config(path, ["MODEL.GFL.REG_MAX", "7", "MODEL.MINE.X", "3.0"])
    assert str(path) == cfg.MODEL.WEIGHTS
    assert (cfg.MODEL.GFL.NUM_CLASSES, cfg.MODEL.GFL.REG_MAX) == (3, 7)
    assert (cfg.MODEL.GFL.NEW, cfg.MODEL.MINE.X) == ([1], 3.0)
    assert cfg.MODEL.GFL.ATSS_TOPK == load_config(str(CONFIG)).MODEL.GFL.ATSS_TOPK
    assert "MODEL.GFL.REGMAX" in config_error(path, "MODEL.GFL.REGMAX", "7")
    with pytest.raises(InputError, match=r"MODEL\.GFL\.REG_MAX must be >= 1"):
        load_checkpoint_config(path, ["MODEL.GFL.REG_MAX", "0"])


def test_device_is_that_of_this_machine(tmp_path, monkeypatch):
    path = save_config(tmp_path / "model.pth", "MODEL: {DEVICE: cpu}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_checkpoint_config(path).MODEL.DEVICE == "cuda"
    save_config(path, "MODEL: {DEVICE: cuda:7}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_checkpoint_config(path).MODEL.DEVICE == "cpu"


@pytest.mark.parametrize(
    "text", ["a: [1\nb: 2", "- 1", "MODEL: 3", "MODEL: {GFL: {NUM_CLASSES: many}}", "_BASE_: x"]
)
def test_config_that_cannot_be_used(tmp_path, text):
    path = save_config(tmp_path / "model.pth", text)
    assert config_error(path).startswith("The config in weights file")


@pytest.mark.parametrize("content", [{"model": {}}, {"model": {}, "config": {"a": 1}}, [1]])
def test_checkpoint_without_a_config(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    message = config_error(tmp_path / "model.pth")
    assert "carries no config: give a config, as --config-file" in message
    assert "does not exist" in config_error(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    "protocol, reason",
    # The latter has instructions that PyTorch does not know.
    [(2, "holds more than tensors and plain data: it names posix.mkdir"), (4, "cannot be read")],
)
def test_nothing_is_executed_to_read_a_config(tmp_path, protocol, reason):
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    content = {"model": {}, "config": "MODEL: {}", "other": Call()}
    torch.save(content, tmp_path / "model.pth", pickle_protocol=protocol)
    message = config_error(tmp_path / "model.pth")
    assert reason in message
    assert not (tmp_path / "executed").exists()
