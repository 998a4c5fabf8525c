"""Writes a report of a vector table: python scripts/report.py --uri DIR --output report.html."""

from typing import Literal

from bioscan_jax.cli._command import from_flags


def main(
    uri: str,
    output: str,
    table: str = "sequences",
    identified: str | None = None,
    truth: str | None = None,
    pictures: str | None = None,
    rows: int = 50_000,
    projection: Literal["pacmap", "pca"] = "pacmap",
    seed: int = 0,
) -> None:
    """Write one HTML file that needs no network: maps of a vector table, its taxa, identifications and origin.

    Args:
        uri: Database directory or URL.
        output: FILE.html to write.
        table: Name of the vector table.
        identified: Parquet file that scripts/identify.py wrote.
        truth: Parquet file with sequence_id and the true lineages of what was identified.
        pictures: Directory for PNG files of the main pictures.
        rows: Most rows to show on the maps; of a larger table so many are drawn at random.
        projection: How vectors become points: PaCMAP, or the first two principal components.
        seed: Of the draw and of the map.
    """
    from bioscan_jax.reports.run import report

    told = report(
        uri,
        output,
        table,
        identified=identified,
        truth=truth,
        pictures=pictures,
        rows=rows,
        projection=projection,
        seed=seed,
    )
    print(told)


command = from_flags(main, "report")
