"""Errors that are the user's to mend, told apart from bugs."""

from collections.abc import Iterable

__all__ = ["InputError", "first_line", "name_some"]


class InputError(ValueError):
    """
    A mistake in what the user gave: config, data or weights. The message names the file or key
    and the item, and is meant to be shown without a stack trace. It is one line of printable text,
    whatever the names in it, and of a very long one the middle is left out.
    """

    def __init__(self, message: object = ""):
        # A worker process of a DataLoader hands an error on as text with its whole traceback.
        text = str(message).rpartition(_MARK)[2].strip()
        text = "".join(map(_to_printable, text))
        super().__init__(text if len(text) <= _LONGEST else f"{text[:900]} ... {text[-300:]}")


# How a traceback ends before the message of an InputError.
_MARK = f"{InputError.__module__}.{InputError.__qualname__}: "
_LONGEST = 1500  # characters


def first_line(error: BaseException) -> str:
    """What kind of error it is, and how its message begins: for errors of other code."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def name_some(items: Iterable[object], number: int = 5) -> str:
    """The first ``number`` items, for a message of one line, and how many more there are."""
    names = [str(item) for item in items]
    rest = len(names) - number
    shown = ("".join(map(_to_printable, name)) for name in names[:number])
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _to_printable(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]
