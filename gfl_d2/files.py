"""Writing files."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import IO

__all__ = ["atomic_write"]


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """
    Open a file for writing that appears under its name only when it is whole. A process that is
    killed, or a disk that is full, leaves what was there before.

    The bytes go into a hidden temporary file in the same folder, which has to exist. The file is
    renamed at the end, and removed after an error. A process that is killed leaves it behind.
    """
    path = os.path.realpath(path)  # what a link names is replaced, not the link
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        encoding = None if "b" in mode else "utf-8"
        with open(temporary, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
