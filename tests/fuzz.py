#!/usr/bin/env python3
"""
Give hostile files to all that reads files. Each has to be read, or refused in one line.

    python tests/fuzz.py --count 12000                   # of each target
    python tests/fuzz_by_coverage.py config 12000        # guided by coverage: pip install atheris

What a file makes the reader do (start a process, load a pickle that may name anything, open a
connection) is watched by an audit hook. tests/test_fuzz.py runs a few hundred of each target.
"""

from __future__ import annotations

import argparse
import collections
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import hostile
from gfl_d2.calibration import load_calibration
from gfl_d2.checkpoint import GFLCheckpointer, load_checkpoint_config
from gfl_d2.config import check_training_config, load_config
from gfl_d2.conversion import read_checkpoint
from gfl_d2.data import images, read_coco
from gfl_d2.errors import InputError
from gfl_d2.results import load_results

# Events of Python's audit hooks that no reader of a file has a reason for.
FORBIDDEN = {
    "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pickle.find_class",
    "shutil.rmtree", "socket.connect", "socket.getaddrinfo", "subprocess.Popen",
}  # fmt: skip
_events: list[str] = []
_watches = False


def _audit(event: str, _: tuple) -> None:
    if _watches and event in FORBIDDEN:
        _events.append(event)


sys.addaudithook(_audit)


class Target(NamedTuple):
    """What reads a file, how its name ends, and the contents to try."""

    read: Callable[[str], Any]
    suffix: str
    contents: Callable[[], st.SearchStrategy[bytes]]


def read_data(path: str) -> None:
    data = read_coco(path, Path(path).parent)
    assert np.isfinite(data.boxes).all() and (data.sizes > 0).all()
    data.to_records(), data.to_coco()


def read_picture(path: str) -> None:
    header = images._read_header(path, {})
    array = images.read_image(path, "BGR")
    assert array.shape[2:] == (3,) and array.dtype == np.uint8 and array.size
    assert array.shape[:2] == (header[3], header[2])


def read_weights(path: str) -> None:
    model = torch.nn.Linear(2, 2)
    GFLCheckpointer(model).load(path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def read_config(path: str) -> None:
    check_training_config(load_config(path, ["MODEL.DEVICE", "cpu"]))


TARGETS = {
    "annotations": Target(read_data, ".json", lambda: hostile.json_files(hostile.COCO)),
    "images": Target(read_picture, ".png", lambda: hostile.edited(hostile.image_samples())),
    "results": Target(
        lambda path: load_results(path, "pets", {1, 2}, {1, 2}),
        ".json",
        lambda: hostile.json_files(hostile.RESULTS),
    ),
    "calibration": Target(
        load_calibration, ".json", lambda: hostile.json_files(hostile.CALIBRATION)
    ),
    "config": Target(read_config, ".yaml", hostile.config_files),
    "weights .pth": Target(read_weights, ".pth", hostile.torch_files),
    "weights .pkl": Target(
        read_weights,
        ".pkl",
        lambda: st.one_of(hostile.edited(hostile.array_pickles()), hostile.CALLS),
    ),
    "config of weights": Target(load_checkpoint_config, ".pth", hostile.torch_files),
    "converter": Target(read_checkpoint, ".pth", hostile.torch_files),
}


def outcome(target: Target, content: bytes, folder: str) -> str:
    """Either "read" or "refused". Raises whatever else a file makes the reader raise."""
    global _watches
    path = str(Path(folder) / f"input{target.suffix}")
    Path(path).write_bytes(content)
    _events.clear()
    _watches = True
    try:
        target.read(path)
        return "read"
    except InputError as error:
        message = str(error)
        assert message and "\n" not in message, f"not one line: {message!r}"
        assert len(message) < 2000, f"{len(message)} characters: {message[:200]!r}"
        return "refused"
    finally:
        _watches = False
        assert not _events, f"the file made the reader do {_events}"


def make_folder(folder: str) -> None:
    """The two images of the annotations."""
    for i in (1, 2):
        Image.new("RGB", (24, 16)).save(Path(folder) / f"{i}.png")


def make_test(target: Target, count: int, folder: str, done: Callable[[str], None]) -> Callable:
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.contents())
    def test(content: bytes) -> None:
        done(outcome(target, content, folder))

    return test


def run(name: str, count: int, folder: str, keep_going: bool) -> dict:
    """How many files were read and refused, and how long the slowest took; and the faults."""
    counts: collections.Counter = collections.Counter()
    faults: dict[str, bytes] = {}
    target, slowest = TARGETS[name], 0.0

    def guarded(path: str) -> None:
        nonlocal slowest
        start = time.process_time()
        try:
            target.read(path)
        except InputError:
            raise
        except Exception as error:
            if not keep_going:
                raise
            kind = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            faults.setdefault(kind, Path(path).read_bytes())
            raise InputError("a fault") from None
        finally:
            slowest = max(slowest, time.process_time() - start)

    start = time.time()
    make_test(target._replace(read=guarded), count, folder, lambda kind: counts.update([kind]))()
    return {**counts, "seconds": time.time() - start, "slowest": slowest, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--count", type=int, default=12000, help="files for each")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    names = args.targets or list(TARGETS)
    with tempfile.TemporaryDirectory() as folder:
        make_folder(folder)
        for name in names:
            result = run(name, args.count, folder, keep_going=True)
            faults = result.pop("faults")
            print(name, {k: round(v, 3) for k, v in result.items()}, len(faults), flush=True)
            for kind, content in faults.items():
                print("   ", kind, content[:200] if len(content) < 4000 else "", flush=True)


if __name__ == "__main__":
    main()
