"""Tables of figures as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

__all__ = ["format_table"]

# Longer tables are cut.
_MAX_ROWS = 15


def format_table(rows: Sequence[dict[str, Any]], floatfmt: str | Sequence[str] = ".3g") -> str:
    """
    A table in Markdown, of 15 rows at most. All rows have the keys of the first, or fewer.
    ``floatfmt`` is that of :func:`tabulate.tabulate`.
    """
    names = {key: key.replace("_", " ") for key in rows[0]}
    if len(rows) > _MAX_ROWS:
        more = dict.fromkeys(names, "") | {next(iter(names)): f"({len(rows) - _MAX_ROWS} more)"}
        rows = [*rows[: _MAX_ROWS - 5], more, *rows[-5:]]
    return tabulate(rows, names, tablefmt="pipe", floatfmt=floatfmt, missingval="–")
