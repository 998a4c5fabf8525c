"""Searches a vector table for the nearest neighbours of sequences or of its own rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.lineage import LINEAGE_COLUMN, RANKS, lineage_columns
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.errors import InputError
from bioscan_jax.matching.queries import encoder_of_table
from bioscan_jax.matching.reference import Reference, open_reference
from bioscan_jax.matching.strands import is_strand_invariant, orient
from bioscan_jax.notebook import Html, Shown, facts_html, rows_html, show_arrow_tables
from bioscan_jax.reports.projection import Method
from bioscan_jax.reports.run import map_html
from bioscan_jax.table.columns import CLASH_SUFFIX, SEARCH_COLUMNS
from bioscan_jax.table.reading import take_rows
from bioscan_jax.table.storage import table_path

_HEAD = 5
"""Rows of a table that a notebook shows."""


@dataclass(frozen=True, eq=False)
class Table(Shown):
    r"""A vector table that can be searched by DNA; its model is loaded at the first search.

    Example:
        >>> import bioscan_jax as bj
        >>> from pathlib import Path
        >>> _ = Path("barcodes.fasta").write_text(">a\nACGTTGCAACGT\n>b\nTTGACATTGACA\n")
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path="barcodes.fasta")
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri="vectors"), progress=False)
        >>> bj.Table(bj.ReferenceConfig(uri="vectors")).search("ACGTTGCAACGT", k=1)["sequence_id"].to_pylist()
        ['a']
    """

    location: config.ReferenceConfig
    model: config.ModelConfig | None = None
    """Where the model that made it is now, if not where the table says."""
    mesh: config.MeshConfig | None = None

    @cached_property
    def _reference(self) -> Reference:
        return open_reference(self.location)

    @property
    def columns(self) -> list[str]:
        """Names of the table's columns."""
        return self._reference.dataset.schema.names

    @cached_property
    def encoder(self) -> Encoder:
        """The model that made the table, with the table's settings."""
        return encoder_of_table(self._reference, self.model, self.mesh)

    def __str__(self) -> str:
        """The rows, the length of the vectors and what made them, in a few lines."""
        return "\n".join(f"{name:>10}  {text}" for name, text in self._facts().items())

    def _repr_html_(self) -> str:
        shown = [name for name in self.columns if name != "vector"]
        head = self._reference.dataset.head(_HEAD, columns=shown)
        return facts_html(self._facts()) + rows_html(head)

    def _facts(self) -> dict[str, str]:
        dataset, facts = self._reference.dataset, self._reference.facts
        made = ("model", "revision", "adapter", "projection", "dtype", "pooling", "strand", "phases", "license")
        return {
            "table": dataset.uri,
            "rows": f"{dataset.count_rows():,}",
            "vectors": f"{dataset.schema.field('vector').type.list_size:,} numbers each",
            "columns": ", ".join(self.columns),
            **{name: facts[name] for name in made if name in facts},
        }

    def map(
        self,
        *,
        identified: str | None = None,
        rows: int = 10_000,
        projection: Method = "pacmap",
        seed: int = 0,
        height: int = 1000,
    ) -> Html:
        """Draws the map of the vectors that `report` has in its page; a notebook shows it.

        Args:
            identified: Parquet file of `identify`.
            rows: Most rows to show; of a larger table a random sample is shown.
            projection: How vectors become points of a plane: PaCMAP, or the first two principal components.
            seed: Random seed of the sample and of the map.
            height: Height of the map and its texts, in pixels.

        Raises:
            InputError: The table has no rows, PaCMAP is not installed, or `identified` cannot be read.
        """
        uri, table = self.location.uri, self.location.table
        page = map_html(uri, table, identified=identified, rows=rows, projection=projection, seed=seed, height=height)
        return Html(page, f"map of {table_path(uri, table)}: shown in a notebook; bioscan report writes it to a file")

    def search(
        self,
        sequence: str | Sequence[str],
        k: int = 10,
        *,
        filter: str | None = None,
        columns: Sequence[str] | None = None,
        search: config.SearchKind = "auto",
        strand: config.QueryStrand = "both",
    ) -> pa.Table:
        """Finds the k rows nearest to a sequence, or to each of several.

        Args:
            sequence: DNA; cleaned as the table's was.
            k: Rows per sequence.
            filter: SQL condition on the columns, such as "depth > 200"; only rows that fulfil it are compared.
            columns: Columns to return; all but the vector if absent.
            search: `auto` uses the vector index, where there is one, from 50,000 rows on.
            strand: `plus` compares sequences as they are written, `both` also the reverse complement of those that
                resemble no row as they are written.

        Returns:
            `query` (0 for the first sequence), the columns, `similarity` (cosine), and `strand` (+, - where the reverse
            complement was compared, null if unknown), the nearest row first. A column of the table that is called like
            one of ours has "_in_table" appended here, such as `query_in_table`.

        Raises:
            InputError: The sequence has no vector, the filter or a column is wrong, or the model is not the table's.
        """
        settings = config.IdentifyConfig(k=k, filter=filter, search=search, strand=strand)
        reference = self._reference if filter is None else open_reference(self.location, filter)
        names = reference.dataset.schema.names
        wanted = [name for name in names if name != "vector"] if columns is None else list(columns)
        if unknown := [name for name in wanted if name not in names]:
            raise InputError(f"{reference.dataset.uri} has no column {unknown[0]!r}; choose from: {', '.join(names)}")
        given = [sequence] if isinstance(sequence, str) else list(sequence)
        vectors, texts = self.encoder.encode(given), clean(pa.array(given, pa.large_string())).sequences.to_pylist()
        again = None if is_strand_invariant(self.encoder) else self.encoder.encode
        oriented = orient(reference, settings, texts, vectors, np.zeros(len(texts), bool), again)
        found, reverse = oriented.found, oriented.reverse
        query, place = np.nonzero(found.rows >= 0)
        taken = take_rows(reference.dataset, found.rows[query, place], wanted).rename_columns(_without_clashes(wanted))
        strands = pa.nulls(len(query), pa.string()) if reverse is None else pa.array(np.where(reverse[query], "-", "+"))
        show_arrow_tables()
        return (
            taken.add_column(0, "query", pa.array(query))
            .append_column("similarity", pa.array(found.similarity[query, place]))
            .append_column("strand", strands)
        )


def _without_clashes(names: Sequence[str]) -> list[str]:
    """Returns the names with a suffix where results have a column of that name."""
    found: list[str] = []
    for name in names:
        renamed = name
        while renamed in SEARCH_COLUMNS or (renamed != name and renamed in names):
            renamed += CLASH_SUFFIX
        found.append(renamed)
    return found


def open_table(
    uri: str,
    table: str = "sequences",
    *,
    model: config.ModelConfig | None = None,
    mesh: config.MeshConfig | None = None,
) -> Table:
    r"""Opens a vector table for searching: `open_table(uri).search("ACGT...")`.

    Args:
        uri: Database directory or URL.
        table: Name of the vector table.
        model: Where the model that made the table is now, if not where the table says.
        mesh: Devices.

    Raises:
        InputError: There is no such table, or it has no vectors.

    Example:
        >>> import bioscan_jax as bj
        >>> from pathlib import Path
        >>> _ = Path("barcodes.fasta").write_text(">a\nACGTTGCAACGT\n>b\nTTGACATTGACA\n")
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path="barcodes.fasta")
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri="vectors"), progress=False)
        >>> bj.open_table("vectors").search("ACGTTGCAACGT", k=1)["sequence_id"].to_pylist()
        ['a']
    """
    found = Table(config.ReferenceConfig(uri=uri, table=table), model, mesh)
    _ = found._reference
    return found


def short_columns(table: Table) -> list[str]:
    """Returns the columns that fit a terminal: id, marker, and the lineage or the ranks that the table has."""
    names = table.columns
    lineage = [LINEAGE_COLUMN] if LINEAGE_COLUMN in names else lineage_columns(names)
    lineage = lineage or [rank for rank in RANKS if rank in names]
    return [name for name in ("sequence_id", "marker_gene", *lineage) if name in names]


def nearest(uri: str, table: str, row: int, k: int) -> pa.Table:
    """Finds the k rows nearest to one row of the table by cosine distance, that row left out.

    Args:
        uri: Database directory or URL.
        table: Name of the vector table.
        row: Position in the table.
        k: Number of neighbours.

    Returns:
        All columns but the vector, and `_distance` (1 - cosine), nearest first.
    """
    import lance

    dataset = lance.dataset(table_path(uri, table))
    query = dataset.take([row], columns=["vector", "source_row"])
    columns = [name for name in dataset.schema.names if name != "vector"]
    nearby = {"column": "vector", "q": query["vector"][0].values, "k": k + 1, "metric": "cosine"}
    found = dataset.to_table(columns=[*columns, "_distance"], nearest=nearby)
    keep = [i for i, source in enumerate(found["source_row"].to_pylist()) if source != query["source_row"][0].as_py()]
    return found.take(keep[:k])


def describe_neighbours(uri: str, table: str, k: int) -> str:
    """Describes the k nearest neighbours of a table's first row, as lines of text."""
    import lance

    first = lance.dataset(table_path(uri, table)).take([0], columns=_shown(uri, table)).to_pylist()[0]
    lines = [f"nearest neighbours of {_line(first)}"]
    for found in nearest(uri, table, 0, k).to_pylist():
        lines.append(f"  cosine {1 - found['_distance']:.4f}  {_line(found)}")
    return "\n".join(lines)


def _shown(uri: str, table: str) -> list[str]:
    import lance

    names = lance.dataset(table_path(uri, table)).schema.names
    return ["sequence_id", *(["taxonomy"] if "taxonomy" in names else [])]


def _line(row: dict) -> str:
    return "  ".join(str(row[name]) for name in ("sequence_id", "taxonomy") if row.get(name) is not None)
