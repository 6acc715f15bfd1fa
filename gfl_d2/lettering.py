"""Text in any script, as matplotlib draws it."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

__all__ = ["find_fonts", "make_plain", "set_fonts", "spell"]

# One has a box with a number for every character, the others pictures that matplotlib cannot draw.
_UNFIT = ("Last Resort", "Color Emoji")


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


def set_fonts(axes: Axes, families: list[str]) -> None:
    """Draw all texts of these axes in fonts of :func:`find_fonts`; a ``$`` is a dollar."""
    for text in axes.texts:
        text.set_fontfamily(families)
        text.set_parse_math(False)
        text.set_usetex(False)


def make_plain(text: str, length: int) -> str:
    """The text in one line of at most ``length`` characters, without invisible ones."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def spell(text: str, missing: set[str], otherwise: str = "") -> str:
    """
    The text with those characters that are ``missing`` in Latin letters. Where the package anyascii
    is absent, which knows them: ``otherwise``, or the text with their numbers in Unicode.
    """
    if missing.isdisjoint(text):
        return text
    try:
        from anyascii import anyascii
    except ImportError:
        if otherwise:
            return otherwise

        def anyascii(c: str) -> str:
            return c.encode("ascii", "backslashreplace").decode()

    return "".join(anyascii(c) if c in missing else c for c in text).strip()


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
