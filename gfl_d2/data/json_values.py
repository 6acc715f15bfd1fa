"""JSON files, and the ways to write a value in them."""

from __future__ import annotations

import functools
import json
import math
import re
from typing import Any

from ..errors import InputError

__all__ = [
    "MAX_NUMBER", "is_bbox", "read_bytes", "read_json", "to_flag", "to_number", "to_scalar",
    "to_size",
]  # fmt: skip

# Lists of COCO's format. Of two with one name, a parser takes the last without a word.
_LISTS = ("annotations", "categories", "images")
# What files begin with that are no JSON.
_BEGINNINGS = {
    b"": "it is empty",
    b"\x1f\x8b": "it is compressed: unpack it with gunzip",
    b"BZh": "it is compressed: unpack it with bunzip2",
    b"\xfd7zXZ": "it is compressed: unpack it with unxz",
    b"PK\x03\x04": "it is compressed: unpack it with unzip",
    b"version https://git-lfs": "it is a placeholder of Git LFS: run 'git lfs pull'",
    b"<": "it is XML or HTML; docs/data.md tells how to convert other formats",
}
_INTEGER = re.compile(r"\s*(\d{1,100})(?:\.0*)?\s*")
MAX_NUMBER = 1e150  # the area of a larger box would be infinite
# What is read as 0 or 1. Hashing takes true and 1.0 for 1.
_FLAGS = {0: 0, 1: 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


def read_bytes(path: str) -> bytes:
    """The content of a file. Raises InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def read_json(json_file: str) -> tuple[Any, str]:
    """
    The content of a JSON file, and its encoding.

    Raises:
        InputError: the file is missing, or no JSON. The message says what it seems to be. Or an
            object in it has two of COCO's lists by one name.
    """
    content = read_bytes(json_file)
    try:
        encoding = json.detect_encoding(content)
        text = content.decode(encoding)
        content = content[:100]  # COCO's own file has half a gigabyte
        may_repeat = any(text.count(f'"{name}"') > 1 for name in _LISTS)
        # A hook is slow: few files need it.
        hook = functools.partial(_refuse_repeated, json_file) if may_repeat else None
        return json.loads(text, object_pairs_hook=hook), encoding
    except (ValueError, RecursionError) as error:
        reason = _why_no_json(content, error)
        raise InputError(f"{json_file} cannot be read as JSON: {reason}") from None


def _refuse_repeated(json_file: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs if key in _LISTS]
    for key in keys:
        count = keys.count(key)
        if count > 1:
            raise InputError(f"{json_file} has '{key}' {count} times: join them, or delete one")
    return dict(pairs)


def _why_no_json(content: bytes, error: Exception) -> str:
    """Why a file cannot be read that begins with this content, in one line."""
    beginning = content.lstrip()
    for start, reason in _BEGINNINGS.items():
        if beginning.startswith(start) if start else not beginning:
            return reason
    if isinstance(error, UnicodeDecodeError):
        return f"{error}. Save it as UTF-8"
    if str(error).startswith("Extra data"):
        return f"{error}. It holds several JSON values, or more than them, and must be one object"
    return f"{error}. Was it copied or written in full, and is it JSON there?"


def to_scalar(value: Any) -> Any:
    """An id that has no equal of another type: 1.0 is 1, and true is not."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else value


def to_number(value: Any) -> Any:
    """An id as an integer if it is written as one in whatever way."""
    if isinstance(value, str) and (match := _INTEGER.fullmatch(value)):
        return int(match[1])
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None if isinstance(value, bool) else value


def to_size(value: Any) -> int:
    """Width or height, 0 if it is not written or no size that an image may have."""
    number = _to_float(value)
    return math.ceil(number) if 0 < number < 2**31 else 0


def _to_float(value: Any) -> float:
    """A number, also one written as text; NaN for anything else."""
    if type(value) not in (int, float, str):
        return math.nan
    try:
        return float(value)
    except (OverflowError, ValueError):
        return math.nan


def to_flag(value: Any) -> int | None:
    """0 or 1, also for what lacks; None if the value says neither."""
    if value is None:
        return 0
    return _FLAGS.get(value.strip().lower() if isinstance(value, str) else value)


def is_bbox(value: Any) -> bool:
    """Whether it is a list of four finite numbers, whose squares are finite too."""
    is_list = isinstance(value, list) and len(value) == 4
    # Numbers as text, which _to_float reads, are common in sizes; in a box they are a mistake.
    return is_list and all(not isinstance(v, str) and abs(_to_float(v)) < MAX_NUMBER for v in value)
