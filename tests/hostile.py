"""Hostile files of every kind that is read: strategies that make their bytes."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import get_cfg
from hypothesis import strategies as st
from PIL import Image

from gfl_d2 import add_gfl_config

DEEP = "[" * 20000 + "]" * 20000
# What may stand where something else is expected.
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63) - 1, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *("", "0", "1.5", " 7 ", "nan", "true", "cat", "a.png", "../a.png", "/", "\0", "\ud800", "é"),
    *("x" * 5000, "None", "a\nb", "%00", "a?b", "(1, 2)", "1e999", "cpu", "cuda:9", "general"),
    *([], [0], [[]], [1, 2, 3], [0, 0, 4, 4], [math.nan] * 4, [1e308] * 4, ["a"], [None] * 4),
    *({}, {"id": 1}, {"a": {"b": []}}, [{}], [[1, 2], [3]], [10**400] * 4, [True] * 4, [-1] * 4),
]  # fmt: skip
ABSENT = object()


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all items of a tree of lists and dicts, and that of itself."""
    yield path
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield from places(value, (*path, key))


def replaced(tree: Any, path: tuple, value: Any) -> Any:
    """The tree with another value at a path, in place where it can be; unchanged if it is gone."""
    if not path:
        return tree if value is ABSENT else value
    parent = tree
    try:
        for key in path[:-1]:
            parent = parent[key]
        if not isinstance(parent, (dict, list)):
            return tree
        if value is ABSENT:
            del parent[path[-1]]
        else:
            parent[path[-1]] = value
    except (IndexError, KeyError, TypeError):
        pass
    return tree


@st.composite
def changed(draw, tree: Any, values: list = VALUES) -> Any:
    """A tree with other values at one to three places."""
    tree, where = copy.deepcopy(tree), list(places(tree))
    for _ in range(draw(st.integers(1, 3))):
        path = where[draw(st.integers(0, len(where) - 1))]
        index = draw(st.integers(0, len(values)))
        value = ABSENT if index == len(values) else copy.deepcopy(values[index])
        tree = replaced(tree, path, value)
    return tree


@st.composite
def edited(draw, samples: list[bytes]) -> bytes:
    """A sample with some bytes changed, added or gone, or cut."""
    content = bytearray(samples[draw(st.integers(0, len(samples) - 1))])
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        kind, new = draw(st.integers(0, 4)), draw(st.binary(min_size=1, max_size=4))
        if kind == 0:
            content[at : at + len(new)] = new
        elif kind == 1:
            content[at:at] = new
        elif kind == 2:
            del content[at : at + len(new)]
        elif kind == 3:
            del content[at:]
        else:  # the largest and the smallest numbers are the likeliest to do harm
            content[at : at + len(new)] = bytes([255 * (new[0] % 2)]) * len(new)
    return bytes(content)


def to_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


COCO = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 24, "height": 16} for i in (1, 2)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {"id": i, "image_id": i, "category_id": i, "bbox": [1, 2, 8, 9], "area": 72, "iscrowd": 0}
        for i in (1, 2)
    ],
}
RESULTS = [
    {"image_id": i, "category_id": i, "bbox": [1.5, 2, 8, 9.25], "score": 0.5} for i in (1, 2)
]
CURVE = {"scores": [0.1, 0.5], "calibrated": [0.2, 0.4]}
CALIBRATION = {
    "format": 1, "kind": "isotonic", "thing_classes": ["cat", "dog"], "fitted_on": "pets",
    "curves": {"cat": CURVE},
}  # fmt: skip


def json_files(tree: Any) -> st.SearchStrategy[bytes]:
    text = to_json(tree)
    samples = [text, text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text, DEEP.encode(), b"NaN"]
    return st.one_of(changed(tree).map(to_json), changed(tree).map(to_json), edited(samples))


# Images.


def image_samples() -> list[bytes]:
    """Small images of all formats and modes that people have."""
    noise = np.random.RandomState(0).randint(0, 256, (16, 24, 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "a picture", 0x8769: {0x9003: "2020:01:01 00:00:00"}})
    ways = [
        *(("PNG", mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
        *(("JPEG", mode, {"exif": exif}) for mode in ("RGB", "L", "CMYK")),
        *(("JPEG", "RGB", {"progressive": True}), ("PNG", "RGB", {"exif": exif})),
        *(("TIFF", mode, {}) for mode in ("RGB", "CMYK", "F", "P")),
        *(("TIFF", "RGB", {"compression": way}) for way in ("tiff_lzw", "jpeg", "packbits")),
        *(("GIF", "P", {}), ("GIF", "RGB", {"save_all": True, "append_images": [picture] * 2})),
        *(("WEBP", "RGB", {}), ("WEBP", "RGB", {"save_all": True, "append_images": [picture]})),
        *((format, "RGB", {}) for format in ("BMP", "PPM", "JPEG2000", "TGA", "ICO", "PCX", "EPS")),
    ]
    samples = []
    for format, mode, options in ways:
        file = io.BytesIO()
        grey = picture.convert("L")
        image = grey.convert("I").convert("I;16") if mode == "I;16" else picture.convert(mode)
        image.save(file, format, **options)
        samples.append(file.getvalue())
    return samples


# Weights.

CONTENT = {
    "model": {"weight": torch.ones(2, 2), "bias": torch.zeros(2)},
    "config": "VERSION: 2\n",
    "class_names": ["cat", "dog"],
    "iteration": 7,
}
TENSORS = [
    torch.tensor([math.nan]), torch.zeros(0), torch.ones(1).expand(10**9),
    torch.zeros(2, dtype=torch.int64),
    torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2, 2).t(),
    torch.full((2, 2), math.inf), torch.zeros(2, dtype=torch.complex64), torch.tensor(1.0),
]  # fmt: skip


def saved(content: Any, is_zip: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


def with_other_pickle(change: Callable[[bytes], bytes], compression: int) -> bytes:
    """A checkpoint whose pickle is another; the rest of the archive is sound."""
    file = io.BytesIO()
    old = zipfile.ZipFile(io.BytesIO(saved(CONTENT)))
    with old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return file.getvalue()


class Call:
    """Pickled as a call."""

    def __init__(self, function: Callable, *args: Any):
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def call(module: bytes, name: bytes, argument: bytes) -> bytes:
    """A pickle that calls a function by its name with a text, and puts what it gives in a dict."""
    return b"}(Vmodel\nc" + module + b"\n" + name + b"\n(V" + argument + b"\ntRVconfig\nVa\nu."


CALLS = st.builds(
    call,
    *(
        st.sampled_from([word.encode() for word in words.split()])
        for words in (
            "os posix builtins subprocess numpy numpy.core.multiarray torch collections _codecs "
            "torch.storage torch._utils importlib gfl_d2",
            "system eval exec Popen ndarray dtype _reconstruct load OrderedDict encode "
            "_load_from_bytes import_module getattr __import__",
            "true 1 __import__('os').system('true') f8 os",
        )
    ),
)


def array_pickles() -> list[bytes]:
    """Of model zoos, by every protocol of pickles."""
    arrays = {"weight": np.ones((2, 2), np.float32), "bias": np.zeros(2, np.float32)}
    zoo = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    odd = {"a": np.float64(1.5), "b": np.array(["x"]), "c": np.array([{}]), "weight_momentum": 1}
    contents = [zoo, {"blobs": {**arrays, **odd}}, arrays, {"model": CONTENT, "__author__": 1}]
    return [
        pickle.dumps(c, protocol=p) for p in range(pickle.HIGHEST_PROTOCOL + 1) for c in contents
    ]


@st.composite
def torch_files(draw) -> bytes:
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return draw(edited([saved(CONTENT), saved(CONTENT, is_zip=False)]))
    if kind == 1:
        return saved(draw(changed(CONTENT, [*VALUES, *TENSORS])), draw(st.booleans()))
    if kind == 2:
        return with_other_pickle(lambda _: draw(CALLS), zipfile.ZIP_STORED)
    way = zipfile.ZIP_STORED if kind == 3 else zipfile.ZIP_DEFLATED
    return with_other_pickle(lambda old: draw(edited([old])), way)


# Configs.


def default_config() -> dict:
    cfg = get_cfg()
    add_gfl_config(cfg)
    return yaml.safe_load(cfg.dump())


@st.composite
def configs(draw, tree: dict, where: list[tuple]) -> bytes:
    """One or two keys with other values; sometimes a text of other YAML."""
    content: dict = {}
    for _ in range(draw(st.integers(1, 2))):
        node, path = content, where[draw(st.integers(0, len(where) - 1))]
        for key in path[:-1]:
            node = node[key] if isinstance(node.get(key), dict) else node.setdefault(key, {})
            node = node if isinstance(node, dict) else {}
        node[path[-1]] = copy.deepcopy(VALUES[draw(st.integers(0, len(VALUES) - 1))])
    return yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")


def alias_bomb() -> str:
    """A list of 10^9 numbers."""
    text = "&a0 [1.0]"
    for i in range(9):
        text = f"&a{i + 1} [{text}{f', *a{i}' * 9}]"
    return text


YAML = [
    b"", b"a", b"[1, 2]", b"MODEL: &a {GFL: *a}", b"MODEL: [", b"_BASE_: 5",
    f"MODEL: {{PIXEL_MEAN: {alias_bomb()}}}".encode(),
    b"_BASE_: input.yaml", b"_BASE_: [a, b]", b"_BASE_: absent.yaml", b"\x00",
    b"MODEL:\n  GFL: 3\n",
    DEEP.encode(), b"? [1]\n: 2", b"? {a: b}\n: 2", b"1: 2", b"MODEL: {1: 2}", b"VERSION: 1",
    b"VERSION: x", b"MODEL: {WEIGHTS: !!python/object/apply:os.system ['true']}",
    b"!!python/object/new:os.system [true]", b"MODEL: !!binary aGFsbG8=", b"MODEL: 2020-01-01",
    b"MODEL:\n  GFL:\n    NUM_CLASSES: 5\n    IN_FEATURES: [p3]\n", b"OUTPUT_DIR: !!set {a, b}",
]  # fmt: skip


def config_files() -> st.SearchStrategy[bytes]:
    tree = default_config()
    where = [path for path in places(tree) if path and isinstance(path[-1], str)]
    ours = [path for path in where if path[:2] == ("MODEL", "GFL") or path[0] in ("TEST", "INPUT")]
    return st.one_of(configs(tree, where), configs(tree, ours), edited(YAML))
