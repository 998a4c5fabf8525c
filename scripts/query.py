"""Asks a vector table in SQL: python scripts/query.py "SELECT ... FROM sequences" --uri DIR [--output FILE.csv]."""

import sys

from command import run


def main(
    sql: str,
    uri: str = "vectors",
    table: str = "sequences",
    output: str | None = None,
    show: int = 50,
    explain: bool = False,
) -> None:
    """Answer one SELECT over a vector table and its rejects, without writing anything to them; the SQL comes first.

    Args:
        sql: One SELECT or WITH over TABLE and TABLE_rejects; may stand first, without --sql.
        uri: Database directory or URL.
        table: Name of the vector table.
        output: FILE.csv or FILE.parquet to write all rows to; otherwise the first ones are printed.
        show: Rows to print.
        explain: Run the query and print how: DuckDB's plan and what Lance was asked for.
    """
    from bioscan_jax.table import query

    if explain:
        print(query.explain(sql, uri, table))
    elif output is not None:
        print(f"{output}: {query.write(sql, uri, table, output):,} rows")
    else:
        with query.reading(sql, uri, table) as reader:
            print(query.as_text(reader, show))


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("--"):
        sys.argv[1] = f"--sql={sys.argv[1]}"
    run(main)
