"""Conversion of weights: what is refused, and that nothing in it is executed."""

from __future__ import annotations

import os
import pickle
import shlex
import subprocess
import sys
import tempfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfl_d2.conversion import (
    Checkpoint,
    check_config,
    from_mmdet,
    read_checkpoint,
    to_mmdet,
    write_checkpoint,
)
from mmdet_weights import (
    again,
    assert_same,
    checkpoint,
    detector,
    neck_and_head,
    refusal,
    resnet,
    run_tool,
    small_model,
    without,
)

# Refusals.


WEIGHTS = detector((0, 0, 27, 27), offset="conv2_offset")
NAMES = sorted(WEIGHTS)
REQUIRED = [n for n in NAMES if "num_batches_tracked" not in n and "project" not in n]
SOME = settings(max_examples=15)


@pytest.mark.slow
@SOME
@given(st.sampled_from(REQUIRED))
def test_missing_key_is_refused(name):
    weights = {n: v for n, v in WEIGHTS.items() if n != name}
    message = refusal(from_mmdet, checkpoint(weights))
    assert message.startswith("Weights file file.pth ")
    old_offset = f"{name.replace('conv2_', 'conv2.conv_')} or {name}"
    expected = old_offset if "offset" in name else name
    assert any(f"{what} {expected}" in message for what in ("Not in the file (1):", "lacks"))


@SOME
@given(
    st.one_of(
        st.sampled_from([f"{name}_" for name in REQUIRED]),
        st.sampled_from(REQUIRED).map(lambda name: name.replace(".0.", ".9.")).filter(
            lambda name: name not in WEIGHTS
        ),
        st.sampled_from(
            ["backbone.layer4.0.bn9.num_batches_tracked", "bbox_head.atss_centerness.weight",
             "neck.lateral_convs.3.conv.weight", "bbox_head.scales.5.scale", "fc.weight", "x"]
        ),
        st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).filter(
            lambda name: not name.startswith("ema_")
        ),
    )
)  # fmt: skip
@pytest.mark.slow
def test_extra_key_is_refused(name):
    message = refusal(from_mmdet, checkpoint({**WEIGHTS, name: torch.zeros(1)}))
    assert f"Not in the model (1): {name}" in message


@pytest.mark.slow
@SOME
@given(st.sampled_from(NAMES), st.data())
def test_wrong_shape_is_refused(name, data):
    value = WEIGHTS[name]
    shape = list(value.shape)
    axis = data.draw(st.integers(0, len(shape)))
    if axis == len(shape):
        shape.append(1)
    else:
        shape[axis] += data.draw(st.sampled_from([-1, 1, shape[axis]]))
    weights = {**WEIGHTS, name: torch.zeros(shape, dtype=value.dtype)}
    message = refusal(from_mmdet, checkpoint(weights))
    # Where the shape is what the model is built by, all that belongs to it is another.
    assert name in message or "Not as in the model (" in message or "no such model" in message


def test_every_wrong_key_is_named():
    weights = {n: v for n, v in WEIGHTS.items() if not n.startswith("bbox_head.scales.3")}
    weights["bbox_head.extra"] = torch.zeros(1)
    weights["neck.fpn_convs.0.conv.bias"] = torch.zeros(7)
    weights["backbone.conv1.weight"] = weights["backbone.conv1.weight"].long()
    message = refusal(from_mmdet, checkpoint(weights))
    assert "Not in the file (1): bbox_head.scales.3.scale. " in message
    assert "Not in the model (1): bbox_head.extra. " in message
    assert "Not as in the model (2): " in message
    assert "neck.fpn_convs.0.conv.bias is (7,), not (64,)" in message
    assert "backbone.conv1.weight is torch.int64, not floating-point" in message


def test_two_names_of_one_parameter_are_refused():
    name = "backbone.layer4.0.conv2_offset.weight"
    other = "backbone.layer4.0.conv2.conv_offset.weight"
    message = refusal(from_mmdet, checkpoint({**WEIGHTS, other: WEIGHTS[name]}))
    assert f"Not in the model (1): {name}" in message


@pytest.mark.parametrize("project", ["integral", "distribution_project"])
def test_other_bins_are_refused(project):
    name = f"bbox_head.{project}.project"
    for bins in (torch.arange(17.0) / 2, torch.arange(16.0)):
        weights = {**without(WEIGHTS, "project"), name: bins}
        assert f"{name} is not 0, 1, ..., 16" in refusal(from_mmdet, checkpoint(weights))


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"weight": torch.zeros(1)},
        lambda: {"bbox_head.retina_cls.weight": torch.zeros(1)},
        lambda: {n.replace("gfl_", "atss_"): v for n, v in WEIGHTS.items()},
        lambda: {**resnet(blocks=(2, 2, 2, 2)), **neck_and_head()},  # a depth that there is not
        lambda: {**resnet(), **neck_and_head(channels=48)},  # not for 32 groups
    ],
)
def test_other_models_are_refused(make):
    weights = make()
    message = refusal(from_mmdet, checkpoint(weights))
    assert "file.pth" in message


def test_wrong_direction_is_refused():
    result = from_mmdet(checkpoint(WEIGHTS))
    assert "--to mmdet" in refusal(from_mmdet, again(result.content))
    assert "no checkpoint of this project" in refusal(to_mmdet, checkpoint(WEIGHTS))


def test_incomplete_checkpoint_of_ours_is_refused():
    _, model = small_model()
    weights = model.state_dict()
    del weights["head.bbox_subnet.0.norm.bias"]
    weights["head.other"] = torch.zeros(1)
    message = refusal(to_mmdet, Checkpoint("here.pth", weights))
    assert "Not in the file (1): head.bbox_subnet.0.norm.bias. " in message
    assert "Not in the model (1): head.other" in message


def test_a_gaussian_is_not_taken_for_a_distribution():
    """Both have two numbers a side where there are two bins."""
    cfg, model = small_model("MODEL.GFL.BOX_REPRESENTATION", "gaussian")
    source = Checkpoint("here.pth", model.state_dict())
    assert "MODEL.GFL.BOX_REPRESENTATION decides" in refusal(to_mmdet, source)
    needed = to_mmdet(source, cfg).needed
    assert "BOX_REPRESENTATION is 'gaussian'" in refusal(check_config, needed, cfg, "c.yaml")
    cfg, model = small_model("MODEL.GFL.REG_MAX", 1)
    needed = to_mmdet(Checkpoint("here.pth", model.state_dict()), cfg).needed
    assert check_config(needed, cfg, "c.yaml") == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.GFL.BIN_WIDTH", 0.5),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5),
        ("MODEL.GFL.LEGACY_ANCHOR_CENTERS", True),
    ],
)
def test_what_mmdetection_does_not_have_is_refused_with_a_config(key, value):
    cfg, model = small_model(key, value)
    source = Checkpoint("here.pth", model.state_dict())
    assert key in refusal(check_config, to_mmdet(source, cfg).needed, cfg, "c.yaml")
    assert "Give --config-file" in " ".join(to_mmdet(source).notes)


# Files.


class Payload:
    """Executed by an ordinary unpickler."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def payloads(marker):
    command = f"touch {shlex.quote(str(marker))}"
    code = f"open({str(marker)!r}, 'w')"
    yield Payload(os.system, command)
    yield Payload(eval, code)
    yield Payload(exec, code)
    yield Payload(open, str(marker), "w")
    yield Payload(subprocess.call, ["touch", str(marker)])
    yield Payload(os.mkdir, str(marker))


def is_refused(path, content=None):
    """Through the tool: a plain message, nothing written."""
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    message = run_tool(path, path.with_name("out.pth"))
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    assert str(message).startswith("Error: ") and str(path) in message and "\n" not in message
    return message


def test_payloads_are_dangerous(tmp_path):
    for i, payload in enumerate(payloads(tmp_path / "executed")):
        torch.save(payload, tmp_path / f"{i}.pth")
        torch.load(tmp_path / f"{i}.pth", weights_only=False)
        assert (tmp_path / "executed").exists()
        marker = tmp_path / "executed"
        marker.rmdir() if marker.is_dir() else marker.unlink()


@pytest.mark.parametrize("place", ["state_dict", "meta", "weight", "top", "plain pickle", "legacy"])
def test_pickle_with_a_payload_is_refused_unexecuted(tmp_path, place):
    marker = tmp_path / "executed"
    for payload in payloads(marker):
        contents = {
            "state_dict": {"state_dict": payload},
            "meta": {"state_dict": WEIGHTS, "meta": {"a": [payload]}},
            "weight": {"state_dict": {**WEIGHTS, "bbox_head.gfl_cls.bias": payload}},
        }
        content = contents.get(place, payload)
        path = tmp_path / "in.pth"
        if place == "plain pickle":
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=place != "legacy")
        message = is_refused(path)
        assert not marker.exists()
        assert "nothing in it has been executed" in message
        assert "weights_only=True" not in message


def test_payload_under_names_that_are_read_as_nothing(tmp_path):
    """``getattr`` is one of them: it gets nothing."""
    for call in (Payload(getattr, os, "system"), Payload(getattr, [], "append")):
        path = tmp_path / "in.pth"
        try:
            torch.save({"state_dict": WEIGHTS, "meta": {"a": call}}, path)
        except TypeError:  # modules cannot be pickled
            continue
        assert type(read_checkpoint(path).meta["a"]).__name__ == "_Nothing"
        torch.save({"state_dict": {"a": call}}, path)
        assert "not map names to tensors, but 'a'" in is_refused(path)


def test_log_of_mmdetection_3_is_read_as_nothing(tmp_path, monkeypatch):
    class HistoryBuffer:
        def __init__(self):
            self.history = np.array([1.0, 2.0])
            self.methods = OrderedDict(mean=HistoryBuffer.mean)

        def mean(self):
            return self.history.mean()

    name = "mmengine.logging.history_buffer"
    module = types.ModuleType(name)
    module.HistoryBuffer = HistoryBuffer
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    HistoryBuffer.mean.__module__ = name
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    content = {
        "meta": {"epoch": 3, "score": np.float64(0.5), "dataset_meta": {"classes": tuple("abcde")}},
        "state_dict": WEIGHTS,
        "message_hub": {"log_scalars": {"loss": HistoryBuffer()}},
    }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
        patch.setitem(sys.modules, "mmengine.logging", types.ModuleType("mmengine.logging"))
        patch.setitem(sys.modules, name, module)
        torch.save(content, tmp_path / "in.pth")
    read = read_checkpoint(tmp_path / "in.pth")
    assert read.ignored == ("message_hub",)
    assert_same(read.weights, WEIGHTS)
    assert read.meta["dataset_meta"] == {"classes": tuple("abcde")}


def saved_bytes():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.pth"
        torch.save({"state_dict": neck_and_head(num_convs=0, channels=8)}, path)
        return path.read_bytes()


@SOME
@given(st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_refused(part):
    content = saved_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.pth"
        path.write_bytes(content[: int(part * len(content))])
        assert "cannot be read" in refusal(read_checkpoint, path)


@SOME
@given(st.binary())
def test_bytes_that_are_no_checkpoint_are_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.pth"
        path.write_bytes(content)
        assert str(path) in refusal(read_checkpoint, path)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / "in.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights")
    assert "cannot be read" in is_refused(path)
    for content in ([torch.zeros(1)], torch.zeros(1), {"state_dict": {"a": 1}}, {1: torch.zeros(1)},
                    {"epoch": 3}, {}, {"a": torch.zeros(2, 2).to_sparse()}):  # fmt: skip
        torch.save(content, path)
        is_refused(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    assert "in.pth is a TorchScript program: give the checkpoint" in is_refused(path)
    assert "does not exist" in run_tool(tmp_path / "none.pth", tmp_path / "out.pth")


def test_output_is_checked_before_anything_is_read(tmp_path):
    path = tmp_path / "in.pth"
    path.write_bytes(b"not even a checkpoint")
    for output, reason in (
        (path, "is not overwritten"),
        (tmp_path / "out.pkl", "must end in .pth"),
        (tmp_path / "none" / "out.pth", "there is no folder"),
    ):
        assert reason in run_tool(path, output)
    (tmp_path / "link.pth").symlink_to(path)
    assert "is not overwritten" in run_tool(path, tmp_path / "link.pth")
    assert path.read_bytes() == b"not even a checkpoint"


def test_failure_to_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.pth"
    path.write_bytes(b"before")

    def save_in_part(content, file):
        file.write(b"part")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", save_in_part)
    assert "No space left" in refusal(write_checkpoint, {}, path)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["out.pth"]
