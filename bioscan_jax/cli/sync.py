"""Keeps a folder of tables and files and a copy of it elsewhere in step, both ways."""

from collections.abc import Sequence

from bioscan_jax.cli._command import from_flags, printed, with_paths


def command(words: Sequence[str]) -> None:
    """Runs `bioscan sync`; `--with PATH`, which may be repeated, names files outside the folder to copy too."""
    from bioscan_jax.bundles.sync import sync

    from_flags(printed(sync), "sync")(with_paths(words))
