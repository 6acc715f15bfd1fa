"""Hostile files, a few hundred of each kind; tests/fuzz.py tries as many as it is told to."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import fuzz
import hostile
from gfl_d2 import load_config
from gfl_d2.checkpoint import GFLCheckpointer
from gfl_d2.data import images
from gfl_d2.errors import InputError
from gfl_d2.plain_data import load_pickle

COUNTS = {"config": 100}


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_hostile_files_are_read_or_refused(tmp_path, name):
    fuzz.make_folder(tmp_path)
    outcomes = []
    fuzz.make_test(fuzz.TARGETS[name], COUNTS.get(name, 400), tmp_path, outcomes.append)()
    assert set(outcomes) == {"read", "refused"}


def test_a_fault_would_be_found(tmp_path):
    def execute(path):
        os.system("true")

    def fail(path):
        raise KeyError(path)

    for read, error in ((execute, "os.system"), (fail, "input.json")):
        target = fuzz.TARGETS["results"]._replace(read=read)
        with pytest.raises((AssertionError, KeyError), match=error):
            fuzz.outcome(target, b"", tmp_path)


# Images.


def read_picture(content: bytes, folder) -> str:
    return fuzz.outcome(fuzz.TARGETS["images"], content, folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_an_image_cut_at_every_byte(tmp_path, format):
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (9, 7, 3), np.uint8)).save(
        file, format
    )
    content = file.getvalue()
    assert read_picture(content, tmp_path) == "read"
    outcomes = [read_picture(content[:end], tmp_path) for end in range(len(content))]
    # What is cut may be no more than the end mark.
    assert set(outcomes[: len(content) * 2 // 3]) == {"refused"}


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (1, 5000)])
def test_sizes_of_images(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert images.read_image(str(tmp_path / "a.png"), "BGR").shape == (size[1], size[0], 3)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b""))
    with pytest.raises(InputError, match=r"bomb\.png: .*decompression bomb"):
        images.read_image(str(path), "BGR")
    assert "decompression bomb" in images.read_headers(str(tmp_path), [str(path)])[0]


# Weights.


def load(path) -> torch.nn.Module:
    model = torch.nn.Linear(2, 2)
    GFLCheckpointer(model).load(str(path))
    return model


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
@pytest.mark.parametrize("legacy", [True, False])
def test_payloads_are_never_executed(tmp_path, suffix, legacy):
    """By :class:`GFLCheckpointer`, which is what ``MODEL.WEIGHTS`` goes through."""
    marker, path = tmp_path / "executed", tmp_path / f"model{suffix}"
    content = {**hostile.CONTENT, "other": hostile.Call(os.mkdir, str(marker))}
    if suffix == ".pkl":
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path.write_bytes(pickle.dumps({"model": {}, "a": content["other"]}, protocol))
            with pytest.raises(InputError, match=r"names posix\.mkdir\. .* has been executed"):
                load(path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match=r"names posix\.mkdir\. .* has been executed"):
            load(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_model_zoos(tmp_path, protocol):
    """Detectron2's, with names and without matching, and Caffe2's with and without "blobs"."""
    arrays = {
        "weight": np.asfortranarray(np.arange(4, dtype=np.float32).reshape(2, 2)),
        "bias": np.array([1, -2], dtype=">f4"),
    }
    rest = {"weight_momentum": np.zeros(1), "lr": np.float32(0.1)}
    contents = [
        {"model": arrays, "__author__": "Detectron2 Model Zoo"},
        {"model": arrays, "__author__": "torchvision", "matching_heuristics": True},
        {"blobs": {**arrays, "weight_momentum": np.zeros(1)}, "cfg": "a: 1"},
    ]
    for content in contents:
        path = tmp_path / "model.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        model = load(path)
        assert model.weight.tolist() == [[0, 1], [2, 3]] and model.bias.tolist() == [1, -2]
    path.write_bytes(pickle.dumps({**arrays, **rest}, protocol))
    read = load_pickle(path, "model.pkl")
    assert read["lr"] == np.float32(0.1)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)


def test_a_pickle_of_python_2(tmp_path):
    """Bytes are texts there: what Python 2.7 and NumPy 1.7 wrote for np.float32([1, 2])."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
        b"U\x08\x00\x00\x80?\x00\x00\x00@tb"
    )
    (tmp_path / "model.pkl").write_bytes(b"(dS'a'\n" + array + b"s.")
    assert load_pickle(tmp_path / "model.pkl", "model.pkl")["a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.array(["text"]), "are no plain numbers"),
        (np.array([{}]), "are no plain numbers"),
        (np.zeros(2, dtype=[("a", "f4"), ("b", "f8")]), "are no plain numbers"),
    ],
)
def test_arrays_of_other_things_are_refused(tmp_path, array, reason):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": {"a": array}}))
    with pytest.raises(InputError, match=reason):
        load(tmp_path / "model.pkl")


def test_a_pickle_without_weights(tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"blobs": {"weight_momentum": 1}}))
    with pytest.raises(InputError, match="does not map names to tensors"):
        load(tmp_path / "model.pkl")


def test_a_pickle_that_would_fill_the_memory(tmp_path):
    (tmp_path / "model.pkl").write_bytes(b"}r\xff\xff\xff\xff.")  # stores object 4,294,967,295
    with pytest.raises(InputError, match="numbers more objects than it has bytes"):
        load(tmp_path / "model.pkl")


def test_a_compressed_checkpoint_is_refused(tmp_path):
    content = hostile.with_other_pickle(lambda old: old + bytes(10**6), compression=8)
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pth is compressed, to 1\d{6} bytes"):
        load(tmp_path / "model.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    weights = {"weight": torch.ones(2, 2), "bias": torch.tensor([0, value])}
    torch.save({"model": weights}, tmp_path / "model.pth")
    with pytest.raises(InputError, match=r"model\.pth: 'bias' has NaN or infinity in it"):
        load(tmp_path / "model.pth")


# Configs.


def test_a_config_executes_nothing(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path}/executed']")
    with pytest.raises(InputError, match="could not determine a constructor"):
        load_config(str(path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("WRITERS: null", "WRITERS has no value"),
        ("TEST: {AUG: {MAX_SIZE: }}", r"TEST\.AUG\.MAX_SIZE has no value, but a default: 4000"),
        ("MODEL: null", "config.yaml"),
        ("MODEL: {PIXEL_STD: [null, null, null]}", r"MODEL\.PIXEL_STD must be 3 numbers"),
        ("MODEL: {PIXEL_MEAN: [a, b, c]}", r"MODEL\.PIXEL_MEAN must be 3 numbers"),
    ],
)
def test_values_that_are_none(tmp_path, text, reason):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=reason):
        load_config(str(tmp_path / "config.yaml"))


def test_a_config_that_grows_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(f"MODEL: {{PIXEL_MEAN: {hostile.alias_bomb()}}}")
    with pytest.raises(InputError, match=r"config\.yaml.* aliases"):
        load_config(str(tmp_path / "config.yaml"))
    (tmp_path / "config.yaml").write_text("_BASE_: config.yaml")
    with pytest.raises(InputError, match=r"config\.yaml.* recursion"):
        load_config(str(tmp_path / "config.yaml"))
