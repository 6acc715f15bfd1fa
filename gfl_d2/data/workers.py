"""Which image a worker process of a DataLoader was at when it died."""

from __future__ import annotations

import contextlib
import glob
import multiprocessing
import os
import re
from collections.abc import Iterator

from torch.utils.data import get_worker_info

from ..errors import InputError, first_line, name_some
from .images import cache_folder

__all__ = ["naming_images_of_dead_workers", "note_image"]


def note_image(name: str) -> None:
    """
    Leave the name of the image that is read next where :func:`naming_images_of_dead_workers` finds
    it. Does nothing in a process that is not a worker.
    """
    parent = multiprocessing.parent_process()
    if parent is None or get_worker_info() is None:
        return
    # The file is not emptied before: some file systems then wait for the disk.
    file = os.open(_path(parent.pid, os.getpid()), os.O_WRONLY | os.O_CREAT)
    os.write(file, os.fsencode(f"{name}\0"))
    os.close(file)


@contextlib.contextmanager
def naming_images_of_dead_workers() -> Iterator[None]:
    """
    Around code that uses DataLoaders whose mapper calls :func:`note_image`.

    Raises:
        InputError: in the place of PyTorch's error, when a worker was killed or crashed.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        names = [_read_name(int(pid)) for pid in found[1].split(",")] if found else []
        if not any(names):
            raise
        raise InputError(
            f"{first_line(error)} It was at {name_some(filter(None, names))}: is that image "
            "damaged, or too large for the memory (then lower DATALOADER.NUM_WORKERS)?"
        ) from error
    finally:
        for path in glob.glob(glob.escape(_path(os.getpid(), "")) + "*"):
            with contextlib.suppress(OSError):
                os.remove(path)


def _path(main: int, worker: int | str) -> str:
    return os.path.join(cache_folder("workers"), f"{main}-{worker}")


def _read_name(worker: int) -> str:
    try:
        with open(_path(os.getpid(), worker), "rb") as file:
            return os.fsdecode(file.read().partition(b"\0")[0])
    except OSError:
        return ""
