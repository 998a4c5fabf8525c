"""The one exception for what a user can mend: wrong input, flags, files, tables."""


class InputError(ValueError):
    """Says in one line what is wrong, where, and how to mend it.

    The scripts print its message and leave with exit code 2; any other exception is a bug and keeps its
    traceback.
    """
