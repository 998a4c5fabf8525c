"""Joins later metadata onto a vector table by sequence_id."""

from bioscan_jax.cli._command import from_flags


def main(uri: str, metadata: str, table: str = "sequences", overwrite: bool = False) -> None:
    """Join a file's columns onto a vector table by sequence_id, in one commit.

    Args:
        uri: Database directory or URL.
        metadata: Parquet, CSV or TSV file with sequence_id; its other columns are added, or filled where null.
        table: Name of the vector table.
        overwrite: Replace values that differ from the file's; otherwise they are an error.
    """
    from bioscan_jax.table.annotate import annotate

    print(annotate(uri, metadata, table, overwrite=overwrite))


command = from_flags(main, "annotate")
