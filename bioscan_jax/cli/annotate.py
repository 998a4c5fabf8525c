"""Joins later metadata onto a vector table by sequence_id."""

from collections.abc import Sequence

from bioscan_jax.cli._command import from_flags, path_flags
from bioscan_jax.config import SideTableConfig


def main(
    uri: str, metadata: SideTableConfig | str, table: str = "sequences", overwrite: bool = False, dry_run: bool = False
) -> None:
    """Join a file's columns onto a vector table by sequence_id, in one commit.

    Args:
        uri: Database directory or URL.
        metadata: File with sequence_id; its other columns are added, or filled where null. `--metadata FILE` is short
            for `--metadata.path FILE`.
        table: Name of the vector table.
        overwrite: Replace values that differ from the file's; otherwise they are an error.
        dry_run: Show how the file is read and what would change, but write nothing.
    """
    from bioscan_jax.table.annotate import annotate

    print(annotate(uri, metadata, table, overwrite=overwrite, dry_run=dry_run))


def command(words: Sequence[str]) -> None:
    """Runs `annotate` with the words that follow its name on the command line."""
    from_flags(main, "annotate")(path_flags(words, "--metadata"))
