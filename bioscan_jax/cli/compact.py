"""Joins the small files of a finished table."""

from collections.abc import Sequence

from bioscan_jax.cli._command import from_flags


def main(uri: str, table: str = "sequences") -> None:
    """Join the small files of a finished table into few large ones, which makes it faster to open and to scan.

    Args:
        uri: Database directory or URL.
        table: Name of the vector table.
    """
    from bioscan_jax.table.compact import compact

    print(compact(uri, table))


def command(words: Sequence[str]) -> None:
    """Runs `compact` with the words that follow its name on the command line."""
    from_flags(main, "compact")(words)
