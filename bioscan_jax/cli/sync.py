"""Keeps a folder of tables and files and a copy of it elsewhere in step, both ways."""

from collections.abc import Sequence

from bioscan_jax.cli._command import from_flags, printed, repeated


def command(words: Sequence[str]) -> None:
    """Runs `bioscan sync`; `--with PATH` and `--skip PATTERN` may be repeated."""
    from bioscan_jax.bundles.sync import sync

    from_flags(printed(sync), "sync")(repeated(words, **{"with": "beside", "skip": "skip"}))
