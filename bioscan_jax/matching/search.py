"""Nearest neighbours in a vector table: of a sequence, or of one of its rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import LINEAGE_COLUMN, RANKS
from bioscan_jax.errors import InputError
from bioscan_jax.matching.neighbours import nearest as nearest_rows
from bioscan_jax.matching.queries import Embedder, embed_sequences, make_embedder
from bioscan_jax.matching.reference import Reference, open_reference
from bioscan_jax.table.storage import table_path


@dataclass(frozen=True, eq=False)
class Table:
    """A vector table that answers to DNA; the model that made it is loaded at the first search."""

    where: config.ReferenceConfig
    model: config.ModelConfig | None = None
    """Where that model is now, if not where the table says."""
    mesh: config.MeshConfig | None = None

    @cached_property
    def _whole(self) -> Reference:
        return open_reference(self.where)

    @property
    def columns(self) -> list[str]:
        """Names of the table's columns."""
        return self._whole.dataset.schema.names

    @cached_property
    def _embedder(self) -> Embedder:
        return make_embedder(self._whole, self.model, self.mesh)

    def search(
        self,
        sequence: str | Sequence[str],
        k: int = 10,
        *,
        filter: str | None = None,
        columns: Sequence[str] | None = None,
        search: config.SearchKind = "auto",
    ) -> pa.Table:
        """The k rows nearest to a sequence, or to each of several.

        Args:
            sequence: DNA; cleaned as the table's was.
            k: Rows for each sequence.
            filter: SQL condition on the columns, such as "depth > 200"; other rows are not looked at.
            columns: To give; all but the vector if absent.
            search: `auto` takes the vector index, where there is one, from 50,000 rows on.

        Returns:
            `query` (0 for the first sequence), the columns, and `similarity` (cosine), the nearest first.

        Raises:
            InputError: The sequence has no vector, the filter or a column is wrong, or the model is another.
        """
        settings = config.IdentifyConfig(k=k, filter=filter, search=search)
        reference = self._whole if filter is None else open_reference(self.where, filter)
        there = reference.dataset.schema.names
        wanted = [name for name in there if name != "vector"] if columns is None else list(columns)
        if unknown := [name for name in wanted if name not in there]:
            raise InputError(f"{reference.dataset.uri} has no column {unknown[0]!r}; choose from: {', '.join(there)}")
        vectors = embed_sequences(self._embedder, [sequence] if isinstance(sequence, str) else list(sequence))
        found = nearest_rows(vectors, reference, settings)
        query, place = np.nonzero(found.rows >= 0)
        rows = found.rows[query, place]
        distinct, back = np.unique(rows, return_inverse=True)
        taken = reference.dataset.take(distinct, columns=wanted).take(pa.array(back))
        return taken.add_column(0, "query", pa.array(query)).append_column(
            "similarity", pa.array(found.similarity[query, place])
        )


def open_table(
    uri: str,
    table: str = "sequences",
    *,
    model: config.ModelConfig | None = None,
    mesh: config.MeshConfig | None = None,
) -> Table:
    """Opens a vector table to search it: `open_table(uri).search("ACGT...")`.

    Args:
        uri: Database directory or URL.
        table: Name of the vector table.
        model: Where the model that made it is now, if not where the table says.
        mesh: Devices.

    Raises:
        InputError: There is no such table, or it has no vectors.
    """
    found = Table(config.ReferenceConfig(uri=uri, table=table), model, mesh)
    _ = found._whole
    return found


def short_columns(table: Table) -> list[str]:
    """Those that fit a terminal: the id, the marker, and the lineage or what there is of the ranks."""
    names = table.columns
    lineage = [LINEAGE_COLUMN] if LINEAGE_COLUMN in names else [rank for rank in RANKS if rank in names]
    return [name for name in ("sequence_id", "marker_gene", *lineage) if name in names]


def nearest(uri: str, table: str, row: int, k: int) -> pa.Table:
    """The k nearest rows to one row of the table by cosine distance, that row left out.

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
    """The k nearest neighbours of a table's first row, as lines of text."""
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
