"""Errors that are the user's to mend, told apart from bugs."""

from collections.abc import Iterable

__all__ = ["InputError", "first_line", "name_some", "user_message"]


class InputError(ValueError):
    """
    A mistake in what the user gave: config, data or weights. The message names the file or key
    and the item, and is meant to be shown without a stack trace, see :func:`user_message`.
    """


# How a traceback ends before the message of an InputError.
_MARK = f"{InputError.__module__}.{InputError.__qualname__}: "


def user_message(error: BaseException) -> str:
    """
    The plain message of an error. A worker process of a DataLoader hands an error on as text with
    its whole traceback: of that, only the message of the :class:`InputError` is kept.
    """
    text = str(error)
    _, found, message = text.rpartition(_MARK)
    return (message if found else text).strip()


def first_line(error: BaseException) -> str:
    """What kind of error it is, and how its message begins: for errors of other code."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def name_some(items: Iterable[object], number: int = 5) -> str:
    """The first ``number`` items, for a message of one line, and how many more there are."""
    names = [str(item) for item in items]
    rest = len(names) - number
    shown = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in n) for n in names[:number])
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
