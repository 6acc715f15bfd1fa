"""Writing files, and folders that one process has for itself."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import socket
import uuid
import weakref
from collections.abc import Iterator
from typing import IO, Any

from detectron2.utils.file_io import PathManager

from .errors import InputError

__all__ = ["AtomicPathManager", "atomic_write", "lock_folder", "remove_unfinished"]

logger = logging.getLogger(__name__)

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_LOCK = "training.lock"
# The locks of this process, by folder: a second one would be refused like that of another process.
_HELD: weakref.WeakValueDictionary[str, IO] = weakref.WeakValueDictionary()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """
    Open a file for writing that appears under its name only when it is whole. A process that is
    killed, or a disk that is full, leaves what was there before.

    The bytes go into a hidden temporary file in the same folder, which has to exist. The file is
    renamed at the end, and removed after an error. A process that is killed leaves it behind: see
    :func:`remove_unfinished`. Pipes and devices (``/dev/stdout``) are written to as
    they are.
    """
    encoding = None if "b" in mode else "utf-8"
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode, encoding=encoding) as file:
            yield file
        return
    path = os.path.realpath(path)  # what a link names is replaced, not the link
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def remove_unfinished(folder: str) -> None:
    """Remove what killed processes left of :func:`atomic_write`. No process may write there."""
    for name in os.listdir(folder):
        if _UNFINISHED.fullmatch(name):
            os.remove(os.path.join(folder, name))


class AtomicPathManager:
    """Detectron2's, but that it writes local files by :func:`atomic_write`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> contextlib.AbstractContextManager:
        """Raises InputError if a local file cannot be written: the disk is full, for instance."""
        if mode not in ("w", "wb") or "://" in path:
            return PathManager.open(path, mode, **kwargs)
        return _write(path, mode)


@contextlib.contextmanager
def _write(path: str, mode: str) -> Iterator[IO]:
    try:
        with atomic_write(path, mode) as file:
            yield file
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own when it cannot write.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise InputError(
            f"{path} cannot be written: {reason.strerror or reason}. What was there before is "
            "whole. Mend that, and go on with --resume"
        ) from None


def lock_folder(folder: str) -> IO:
    """
    Make the folder if need be, and lock it for this process.

    Returns:
        file: it holds the lock until it is closed or collected, or its process dies. If this
        process has the lock already, it is the same file. Processes that are forked from this one
        do not have it.

    Raises:
        InputError: another process has the lock, or the folder cannot be written to.
    """
    key, path = os.path.realpath(folder), os.path.join(folder, _LOCK)
    held = _HELD.get(key)
    try:
        if held is not None and _is_at(held, path):
            return held
        os.makedirs(folder, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"OUTPUT_DIR {folder} cannot be written to: {error.strerror}") from None
    try:
        # Not lockf: its lock is lost when this process closes the file after any other use of it.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise InputError(
            f"OUTPUT_DIR {folder} is that of a training which runs ({owner}): wait for its end, "
            "stop it, or name another OUTPUT_DIR"
        ) from None
    except OSError as error:  # some network drives have no locks
        logger.warning(f"No lock on OUTPUT_DIR {folder}: {error.strerror}")
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    # A process that is forked would hold the lock as long as it lives.
    os.register_at_fork(after_in_child=functools.partial(_close, weakref.ref(file)))
    _HELD[key] = file
    return file


def _is_at(file: IO, path: str) -> bool:
    """Whether an open file still has this path: its folder may have been deleted or moved."""
    try:
        return not file.closed and os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _close(reference: weakref.ref) -> None:
    file = reference()
    if file is not None:
        file.close()
