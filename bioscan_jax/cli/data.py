"""`bioscan data get NAME --output DIR`: published reference sequences with lineages, as Parquet.

The names are greengenes_16s (pip fetches it) and ncbi_18s (apt-get fetches it, on Debian and Ubuntu; the lineages need
pip install 'bioscan_jax[data]').

`bioscan data parquet FILE --output FILE.parquet`: your own reference as Parquet: CSV or TSV with a column of DNA, as from
BOLD or GBIF, or FASTA whose headers hold lineages, as those of UNITE, SILVA, PR2, MIDORI2 and SINTAX.
"""

from collections.abc import Sequence

from bioscan_jax import config
from bioscan_jax.cli._command import UsageError, from_flags, positional


def get(name: str, output: str, downloads: str = "~/.cache/bioscan_jax/downloads") -> None:
    """Write published reference sequences with their lineages to OUTPUT/NAME.parquet; a file that is there is kept.

    Args:
        name: greengenes_16s or ncbi_18s; it may stand first, without its flag.
        output: Directory of the Parquet file.
        downloads: Directory of the packages that they come from; one that is there is not fetched again.
    """
    from bioscan_jax.data.published import get_published

    print(get_published(name, output, downloads))


def parquet(table: config.SideTableConfig, output: str, sequence_column: str | None = None) -> None:
    """Write a CSV or TSV file, or FASTA whose headers hold lineages, as Parquet; the file may stand first.

    Args:
        table: Which file, and how its text is written; --table.path may stand first, without its flag.
        output: FILE.parquet.
        sequence_column: Column with the DNA of a CSV or TSV file; BOLD's and others' names of it are known.
    """
    from bioscan_jax.table.as_parquet import write_parquet

    print("\n".join(write_parquet(table, output, sequence_column)))


def command(words: Sequence[str]) -> None:
    """Runs `bioscan data`."""
    mode, *flags = words or [""]
    if mode in ("-h", "--help"):
        print((__doc__ or "").strip())
    elif mode == "get":
        from_flags(get, "data get")(positional(flags, "name"))
    elif mode == "parquet":
        from_flags(parquet, "data parquet")(positional(flags, "table.path"))
    else:
        raise UsageError(f"no mode {mode!r}; pass get or parquet first")
