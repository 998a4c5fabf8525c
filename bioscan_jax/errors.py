"""The exceptions that users see, how they are shown, and the library's logger."""

import logging
import unicodedata

_LONGEST = 300
"""Characters that are kept of another library's message."""

logger = logging.getLogger("bioscan_jax")
"""Takes the library's progress notes and warnings; silent below WARNING unless the program sets its level."""


class _OneLine(Exception):
    """An exception that notebooks show as its message, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class InputError(_OneLine, ValueError):
    """Reports in one line what is wrong with an input, flag, file or table, where, and how to fix it.

    The commands print its message and exit with code 2; any other exception is a bug and keeps its traceback.

    Example:
        >>> raise InputError("--embed.phases 7 is outside 1 to 6: a 6-mer frame has six starts")
        Traceback (most recent call last):
        ...
        bioscan_jax.errors.InputError: --embed.phases 7 is outside 1 to 6: a 6-mer frame has six starts
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class Interrupted(_OneLine):
    """Ends a run that was asked to stop by Ctrl-C or SIGTERM; everything committed before is safe.

    Attributes:
        exit_code: 128 plus the signal's number, as shells use it.

    Example:
        >>> Interrupted("stopped; the same command continues", 15).exit_code
        143
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def shown(value: object, most: int = 100) -> str:
    """Returns the repr of a value from a file, without control characters and cut to a length that fits a message.

    Example:
        >>> shown("x" * 100, most=10)
        "'xxxxxx..."
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def one_line(error: BaseException, most: int = _LONGEST) -> str:
    r"""Returns the type and message of another library's exception as one short line without control characters.

    Example:
        >>> one_line(OSError("disk full:\n/tmp"))
        'OSError disk full: /tmp'
    """
    text = printable(" ".join(f"{type(error).__name__} {error}".split()))
    return text if len(text) <= most else f"{text[:most]}..."


def printable(text: str) -> str:
    r"""Returns text with control characters, and others that do not print, as escapes.

    Example:
        >>> printable("a\x00b\x1b[31m")
        'a\\x00b\\x1b[31m'
    """
    if text.isprintable():
        return text
    kept = (c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" for c in text)
    return "".join(c if keep else ascii(c)[1:-1] for c, keep in zip(text, kept, strict=True))
