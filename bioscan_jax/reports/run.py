"""The report of a vector table: one HTML page with maps, taxa, the accuracy of identifications, and the origin."""

from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import metadata
from pathlib import Path

import numpy as np

from bioscan_jax.config import SideTableConfig
from bioscan_jax.errors import InputError
from bioscan_jax.location import Directory, check_output, locate, output_file
from bioscan_jax.notebook import Shown
from bioscan_jax.reports.charts import write_pictures
from bioscan_jax.reports.contents import TableContents, contains_all, read_contents
from bioscan_jax.reports.identifications import rank_metrics, read_identifications, read_truth
from bioscan_jax.reports.page import render, render_map
from bioscan_jax.reports.projection import Method, Projection, project
from bioscan_jax.reports.queries import Queries, read_queries

_SHOWN_ROWS = 50_000
_NOTEBOOK_ROWS = 10_000
_SHOWN_QUERIES = 5_000
"""Most queries on a map; of more a random sample is shown."""


@dataclass(frozen=True)
class ReportSummary(Shown):
    """The files that `report` wrote.

    Example:
        >>> import bioscan_jax as bj
        >>> print(bj.ReportSummary("r.html", size=1_200_000, rows=10, shown=10, pictures=(), left_out=()))
        r.html: 10 of 10 rows, 1.2 MB
    """

    output: str
    size: int
    """Bytes of the HTML file."""
    rows: int
    """Rows of the table."""
    shown: int
    """Rows on the maps."""
    pictures: tuple[str, ...]
    left_out: tuple[str, ...]
    """Why parts of the report are missing."""

    def __str__(self) -> str:
        """The result in one line, and one line for each part left out."""
        pictures = f"; {', '.join(self.pictures)}" if self.pictures else ""
        first = f"{self.output}: {self.shown:,} of {self.rows:,} rows, {self.size / 1e6:.1f} MB{pictures}"
        return "\n".join([first, *(f"left out: {reason}" for reason in self.left_out)])


def report(
    uri: str,
    output: str,
    table: str = "sequences",
    *,
    identified: str | None = None,
    truth: str | SideTableConfig | None = None,
    pictures: str | None = None,
    rows: int = _SHOWN_ROWS,
    projection: Method = "pacmap",
    seed: int = 0,
) -> ReportSummary:
    """Writes a report of a vector table: one HTML file that needs no network.

    Args:
        uri: Database directory or URL.
        output: FILE.html to write, here or in a bucket; an existing file is replaced once the new one is complete.
        table: Name of the vector table.
        identified: Parquet file that `identify` wrote, about this table's rows or with this table as reference; if with
            `details`, the queries are on the map too, up to 5,000 of them, with their alignments.
        truth: Parquet, CSV or TSV file with `sequence_id` and the true lineages of the queries; see `SideTableConfig`.
        pictures: Directory or URL for PNG files of the main charts; created if absent.
        rows: Most rows to show on the maps; of a larger table a random sample is shown. Counts are of all rows.
        projection: How vectors become points of a plane: PaCMAP, or the first two principal components.
        seed: Random seed of the sample and of the map.

    Raises:
        InputError: There is no such table, it has no rows, a file cannot be read or written, or a setting is wrong.

    Example:
        >>> import bioscan_jax as bj, lance, numpy as np, pyarrow as pa
        >>> vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.eye(3, dtype=np.float32).ravel()), 3)
        >>> rows = pa.table({"sequence_id": ["a", "b", "c"], "vector": vectors})
        >>> _ = lance.write_dataset(rows, "demo/sequences.lance")
        >>> summary = bj.report("demo", "report.html", projection="pca")
        >>> summary.shown, "there is no sequences.run.json beside the table" in summary.left_out
        (3, True)
    """
    if Path(output).suffix not in (".html", ".htm"):
        raise InputError(f"--output {output}: pass FILE.html")
    check_output(output)
    place = None if pictures is None else locate(pictures, "pictures")
    _check(rows, seed)
    if truth is not None and identified is None:
        raise InputError("--truth without --identified: pass the Parquet file that identify wrote")
    results = None if identified is None else read_identifications(identified)
    true = None if results is None or truth is None else read_truth(truth, results.ids)
    contents, queries, points = _place(uri, table, identified, rows, projection, seed)
    searched = results is not None and contains_all(uri, table, results.nearest)
    metrics = () if results is None else rank_metrics(results, true, contents.taxa if searched else None)
    made = f"Made by bioscan_jax {metadata.version('bioscan_jax')} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    page = render(contents, points, results, queries, metrics, made).encode()
    with output_file(output) as partial:
        partial.write_bytes(page)
    drawn: list[str] = []
    if place is not None:
        with place.scratch() as directory:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                names = write_pictures(directory, contents, points, results, metrics)
            except OSError as error:
                raise InputError(
                    f"--pictures {pictures}: cannot be written ({error}); pass another directory"
                ) from error
            if not isinstance(place, Directory):
                for name in names:
                    place.put(directory / name, name)
        drawn = [f"{place.name}/{name}" for name in names]
    return ReportSummary(
        output=output,
        size=len(page),
        rows=contents.total,
        shown=len(contents.rows),
        pictures=tuple(drawn),
        left_out=tuple(contents.notes.values()),
    )


def map_html(
    uri: str,
    table: str = "sequences",
    *,
    identified: str | None = None,
    rows: int = _NOTEBOOK_ROWS,
    projection: Method = "pacmap",
    seed: int = 0,
    height: int = 900,
) -> str:
    """Returns the report's map of a vector table as an HTML element for a notebook: a frame that needs no network.

    Args:
        uri: Database directory or URL.
        table: Name of the vector table.
        identified: Parquet file that `identify` wrote, about this table's rows or with this table as reference; if with
            `details`, the queries are on the map too, up to 5,000 of them, with their alignments.
        rows: Most rows to show; of a larger table a random sample is shown.
        projection: How vectors become points of a plane: PaCMAP, or the first two principal components.
        seed: Random seed of the sample and of the map.
        height: Height of the frame in pixels.

    Raises:
        InputError: There is no such table, it has no rows, or a setting is wrong.

    Example:
        >>> import bioscan_jax as bj, lance, numpy as np, pyarrow as pa
        >>> vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.eye(3, dtype=np.float32).ravel()), 3)
        >>> rows = pa.table({"sequence_id": ["a", "b", "c"], "vector": vectors})
        >>> _ = lance.write_dataset(rows, "mapped/sequences.lance")
        >>> bj.map_html("mapped", projection="pca")[:20]
        '<iframe title="Map o'
    """
    _check(rows, seed)
    results = None if identified is None else read_identifications(identified)
    contents, queries, points = _place(uri, table, identified, rows, projection, seed)
    page = render_map(contents, points, results, queries)
    return (
        f'<iframe title="Map of {escape(table)}" srcdoc="{escape(page)}" width="100%" height="{height}" '
        'sandbox="allow-scripts allow-downloads" allow="clipboard-write" style="border: 0"></iframe>'
    )


def _place(
    uri: str, table: str, identified: str | None, rows: int, projection: Method, seed: int
) -> tuple[TableContents, Queries | None, Projection]:
    """Reads the table and the queries, and projects the vectors of both together."""
    queries = None if identified is None else read_queries(identified, _SHOWN_QUERIES, seed)
    wanted = () if queries is None else {key for key in queries.nearest if key is not None}
    contents = read_contents(uri, table, rows, seed, wanted)
    vectors = contents.rows.vectors
    if identified is not None and queries is None:
        contents.notes["queries"] = "queries have a point of their own only if identify wrote their --details"
    if queries is not None:
        if queries.vectors.shape[1] != vectors.shape[1]:
            raise InputError(
                f"--identified {identified} has vectors of {queries.vectors.shape[1]} numbers, those of {uri} have "
                f"{vectors.shape[1]}; pass the file that was identified with this table"
            )
        vectors = np.concatenate([vectors, queries.vectors])
    if not any(contents.rows.sequences):
        contents.notes["dna"] = "the table holds no DNA, to search in or to align with"
    return contents, queries, project(vectors, projection, seed)


def _check(rows: int, seed: int) -> None:
    if rows < 1:
        raise InputError(f"--rows {rows}: pass how many rows the maps may show, such as {_SHOWN_ROWS}")
    if not 0 <= seed < 2**31:
        raise InputError(f"--seed {seed}: pass a number from 0 to {2**31 - 1}")
