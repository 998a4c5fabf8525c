"""The exceptions that users see, how they are shown, and the library's logger."""

import logging

logger = logging.getLogger("bioscan_jax")
"""Takes the library's progress notes and warnings; silent below WARNING unless the program sets its level."""


class InputError(ValueError):
    """Reports in one line what is wrong with an input, flag, file or table, where, and how to fix it.

    The commands print its message and exit with code 2; any other exception is a bug and keeps its traceback.

    Example:
        >>> raise InputError("--embed.phases 7 is outside 1 to 6: a 6-mer frame has six starts")
        Traceback (most recent call last):
        ...
        bioscan_jax.errors.InputError: --embed.phases 7 is outside 1 to 6: a 6-mer frame has six starts
    """


class Interrupted(Exception):
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


def one_line(error: BaseException) -> str:
    r"""Returns the type and message of an exception as one line of text.

    Example:
        >>> one_line(OSError("disk full:\n/tmp"))
        'OSError disk full: /tmp'
    """
    return " ".join(f"{type(error).__name__} {error}".split())
