"""A vector table as one HTML file to look at and pass on: maps, taxa, how right its identifications are, its origin."""

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from bioscan_jax.errors import InputError
from bioscan_jax.output import output_file, output_path
from bioscan_jax.reports.contents import gather, has_all
from bioscan_jax.reports.identifications import read_identified, read_truth
from bioscan_jax.reports.measure import figures
from bioscan_jax.reports.page import render
from bioscan_jax.reports.projection import Method, project

SHOWN_ROWS = 50_000


@dataclass(frozen=True)
class Reported:
    """What was written."""

    output: str
    size: int
    """Bytes."""
    rows: int
    """Of the table."""
    shown: int
    """Of them, on the maps."""
    pictures: tuple[str, ...]
    left_out: tuple[str, ...]
    """Reasons why parts are missing."""

    def __str__(self) -> str:
        """The result in one line, and one for each part left out."""
        pictures = f"; {', '.join(self.pictures)}" if self.pictures else ""
        first = f"{self.output}: {self.shown:,} of {self.rows:,} rows, {self.size / 1e6:.1f} MB{pictures}"
        return "\n".join([first, *(f"left out: {reason}" for reason in self.left_out)])


def report(
    uri: str,
    output: str,
    table: str = "sequences",
    *,
    identified: str | None = None,
    truth: str | None = None,
    pictures: str | None = None,
    rows: int = SHOWN_ROWS,
    projection: Method = "pacmap",
    seed: int = 0,
) -> Reported:
    """Writes a report of a vector table: one HTML file that needs no network, whole or not at all.

    Args:
        uri: Database directory or URL.
        output: FILE.html to write; one that is there is replaced.
        table: Name of the vector table.
        identified: Parquet file that identify wrote, about this table's rows or with this table as reference.
        truth: Parquet file with `sequence_id` and the true lineages of the queries.
        pictures: Directory for PNG files of the main pictures; made if absent.
        rows: Most rows to show on the maps; of a larger table so many are drawn at random. Counts are of all rows.
        projection: How vectors become points.
        seed: Of the draw and of the map.

    Raises:
        InputError: There is no such table, it has no rows, a file cannot be read or written, or a setting is wrong.
    """
    if Path(output).suffix not in (".html", ".htm"):
        raise InputError(f"--output {output}: pass FILE.html")
    path = output_path(output)
    if rows < 1:
        raise InputError(f"--rows {rows}: pass how many rows the maps may show, such as {SHOWN_ROWS}")
    if not 0 <= seed < 2**31:
        raise InputError(f"--seed {seed}: pass a number from 0 to {2**31 - 1}")
    if truth is not None and identified is None:
        raise InputError("--truth without --identified: pass the Parquet file that scripts/identify.py wrote")
    answers = None if identified is None else read_identified(identified)
    true = None if answers is None or truth is None else read_truth(truth, answers.ids)
    gathered = gather(uri, table, rows, seed)
    searched = answers is not None and has_all(uri, table, answers.nearest)
    found = () if answers is None else figures(answers, true, gathered.taxa if searched else None)
    points = project(gathered.rows.vectors, projection, seed)
    made = f"Made by bioscan_jax {metadata.version('bioscan_jax')} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    page = render(gathered, points, answers, found, made).encode()
    with output_file(output) as partial:
        partial.write_bytes(page)
    drawn: list[str] = []
    if pictures is not None:
        from bioscan_jax.reports.pictures import draw

        directory = Path(pictures).expanduser()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            drawn = [str(directory / name) for name in draw(directory, gathered, points, answers, found)]
        except OSError as error:
            raise InputError(f"--pictures {pictures}: cannot be written ({error}); pass another directory") from error
    left_out = tuple(gathered.notes.values())
    return Reported(str(path), len(page), gathered.total, len(gathered.rows), tuple(drawn), left_out)
