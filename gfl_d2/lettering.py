"""Text in any script, as matplotlib draws it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from anyascii import anyascii
from detectron2.utils.logger import log_first_n
from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

from .errors import name_some

__all__ = ["choose_letters", "find_fonts", "make_plain"]

# One has a box with a number for every character, the others pictures that matplotlib cannot draw.
_UNFIT = ("Last Resort", "Color Emoji")


def choose_letters(texts: Iterable[str], length: int) -> tuple[list[str], dict[str, str]]:
    """
    Make texts fit to be drawn: in one line of at most ``length`` characters, and what no font of
    this system has in Latin letters, with one warning.

    Returns:
        list[str]: font families, in order of preference.
        dict: text -> the text to draw.
    """
    plain = {text: make_plain(text, length) for text in texts}
    families, missing = find_fonts("".join(plain.values()))
    if missing:
        log_first_n(
            logging.WARNING,
            f"No font has the characters {name_some(sorted(missing), 20)}, so they are drawn in "
            "Latin letters: install a font that has them (Noto, for instance).",
            key="message",
        )
    spelled = {c: anyascii(c) for c in missing}
    return families, {
        text: "".join(spelled.get(c, c) for c in line).strip() for text, line in plain.items()
    }


def find_fonts(text: str) -> tuple[list[str], set[str]]:
    """
    Choose fonts of this system for a text: matplotlib's ``font.sans-serif``, and others for the
    characters that it lacks.

    Returns:
        list[str]: font families, in order of preference.
        set[str]: the characters that no font has.
    """
    families = ["sans-serif"]
    missing = _lacking(findfont(FontProperties(family=families)), set(text))
    for font in sorted(fontManager.ttflist, key=_oddity):
        if missing and not any(word in font.name for word in _UNFIT):
            lacking = _lacking(font.fname, missing)
            if len(lacking) < len(missing):
                families.append(font.name)
            missing = lacking
    return families, missing


def make_plain(text: str, length: int) -> str:
    """The text in one line of at most ``length`` characters, without invisible ones."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _lacking(file: str, characters: set[str]) -> set[str]:
    """Which characters a font lacks: all if it cannot be read, as where it has been removed."""
    try:
        font = FT2Font(file)
    except (OSError, RuntimeError):
        return characters
    return {c for c in characters if not font.get_char_index(ord(c))}


def _oddity(font: FontEntry) -> tuple:
    """Sorts upright sans-serif fonts of regular weight first."""
    return font.style != "normal", font.weight != 400, "Sans" not in font.name, font.name
