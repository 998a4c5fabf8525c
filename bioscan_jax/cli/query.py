"""`bioscan query "SELECT ... FROM sequences" --uri DIR [--output FILE.csv]`: asks a vector table in SQL."""

from collections.abc import Sequence

from bioscan_jax.cli._command import from_flags, positional


def main(
    sql: str,
    uri: str = "vectors",
    table: str = "sequences",
    output: str | None = None,
    show: int = 50,
    explain: bool = False,
) -> None:
    """Answer one SELECT over a vector table and its rejects, which stay as they are; the SQL comes first.

    Args:
        sql: One SELECT or WITH over TABLE and TABLE_rejects; may stand first, without --sql.
        uri: Database directory or URL.
        table: Name of the vector table.
        output: FILE.csv or FILE.parquet for all rows; without it the first rows are printed.
        show: Rows to print.
        explain: Run the query and print how: DuckDB's plan and what Lance was asked for.
    """
    from bioscan_jax.table import query

    if explain:
        print(query.explain(sql, uri, table))
    elif output is not None:
        print(f"{output}: {query.write(sql, uri, table, output):,} rows")
    else:
        with query.stream(sql, uri, table) as reader:
            print(query.format_table(reader, show))


def command(words: Sequence[str]) -> None:
    """Runs `bioscan query`."""
    from_flags(main, "query")(positional(words, "sql"))
