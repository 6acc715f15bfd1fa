import os
import subprocess

import pytest
import torch

from gfl_d2.errors import InputError
from gfl_d2.files import atomic_write
from gfl_d2.registry import Registry


def test_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        torch.save({"x": torch.ones(3)}, file)
        assert path.read_bytes() == b"old"
    assert torch.equal(torch.load(path)["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def test_link_stays_a_link(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_pipes_and_devices_are_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        with atomic_write(pipe, "w") as file:
            file.write("text")
        assert reader.stdout.read() == b"text"
    assert pipe.is_fifo()


def test_mode_is_that_of_a_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(tmp_path / "atomic"):
        pass
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_registry():
    registry = Registry("MODEL.GFL.QUALITY")

    @registry.register("toy")
    class Toy:
        pass

    assert registry.get("toy") is Toy
    assert "toy" in registry
    assert "Toy" not in registry
    with pytest.raises(InputError, match=r"MODEL\.GFL\.QUALITY must be one of 'toy', got 'other'"):
        registry.get("other")
    with pytest.raises(AssertionError):  # a name is registered once
        registry.register("toy")(Toy)
