"""`bioscan search ACGT... --reference.uri DIR`: prints the rows of a vector table nearest to a sequence."""

from collections.abc import Sequence

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags, positional


def main(
    sequence: str,
    reference: config.ReferenceConfig,
    k: int = 10,
    filter: str | None = None,
    columns: list[str] | None = None,
    search: config.SearchKind = "auto",
    strand: config.QueryStrand = "both",
    model: config.ModelConfig | None = None,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
) -> None:
    """Print the nearest rows of a vector table to a sequence; the sequence comes first.

    Args:
        sequence: DNA; may stand first, without --sequence.
        reference: Which table.
        k: Rows to print.
        filter: SQL condition on the columns, such as "depth > 200".
        columns: Columns to print; sequence_id, marker and names if absent.
        search: auto takes the table's vector index, where it has one, from 50,000 rows on.
        strand: plus compares the sequence as it is written; both also its reverse complement, if it resembles no row.
        model: Where the table's model is now, if not where the table records it.
        mesh: Which devices.
    """
    from bioscan_jax.matching.search import open_table, short_columns
    from bioscan_jax.table.query import format_table

    table = open_table(reference.uri, reference.table, model=model, mesh=mesh)
    found = table.search(
        sequence, k, filter=filter, columns=columns or short_columns(table), search=search, strand=strand
    )
    print(format_table(found.drop_columns(["query"]).to_reader(), k))


def command(words: Sequence[str]) -> None:
    """Runs `bioscan search`."""
    from_flags(main, "search")(positional(words, "sequence"))
