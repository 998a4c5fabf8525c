"""`bioscan report --uri DIR --output report.html`: writes a report of a vector table."""

from collections.abc import Sequence
from typing import Literal

from bioscan_jax.cli._command import from_flags, path_flags
from bioscan_jax.config import SideTableConfig


def main(
    uri: str,
    output: str,
    table: str = "sequences",
    identified: str | None = None,
    truth: SideTableConfig | str | None = None,
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
        identified: Parquet file written by bioscan identify; with its --details also the queries' points and alignments.
        truth: File with sequence_id and the true lineages of what was identified; `--truth FILE` is short for
            `--truth.path FILE`.
        pictures: Directory for PNG files of the main pictures.
        rows: Most rows to show on the maps; a larger table is sampled at random.
        projection: How vectors become points: PaCMAP, or the first two principal components.
        seed: Seed of the sample and of the map.
    """
    from bioscan_jax.reports.run import report

    summary = report(
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
    print(summary)


def command(words: Sequence[str]) -> None:
    """Runs `report` with the words that follow its name on the command line."""
    from_flags(main, "report")(path_flags(words, "--truth"))
