"""Builds the indexes of a finished vector table: sequence_id by value, vectors by cosine distance."""

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import lance

_PQ_LEAST_ROWS = 256
"""A product quantiser has 2**8 centroids; with fewer rows Lance silently builds an empty index."""
_ROWS_TO_TRAIN_A_PARTITION = 256
"""Lance's k-means reduces the number of partitions to keep this many rows in each, with a warning."""
_PQ_WIDTH = 8
"""Preferred number of dimensions in a sub-vector, which takes one byte."""


def sub_vectors(hidden_size: int) -> int:
    """Returns the number of PQ sub-vectors: their width divides `hidden_size` and is nearest to 8, the smaller of two."""
    widths = [width for width in range(1, hidden_size + 1) if hidden_size % width == 0]
    return hidden_size // min(widths, key=lambda width: (abs(width - _PQ_WIDTH), width))


def build_indexes(
    dataset: "lance.LanceDataset", kind: Literal["none", "ivf_sq", "ivf_pq"]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Indexes `sequence_id` (BTREE) and, on request, `vector` with sqrt(rows) partitions (fewer below 65,536 rows).

    An existing index that covers all rows is kept.

    Args:
        dataset: The finished vector table.
        kind: Type of the vector index.

    Returns:
        The indexes that the table now has, as `column: TYPE`, and a note for each requested one that was not built.
    """
    rows = dataset.count_rows()
    whole = {i.name: i.index_type.upper() for i in dataset.describe_indices() if i.num_rows_indexed == rows}
    if rows == 0:
        return (), ("no index was built: the table has no vectors",)
    notes = ()
    if whole.get("sequence_id_idx") != "BTREE":
        dataset.create_scalar_index("sequence_id", "BTREE", name="sequence_id_idx", replace=True)
    if kind == "ivf_pq" and rows < _PQ_LEAST_ROWS:
        note = f"ivf_pq was not built: it needs {_PQ_LEAST_ROWS} vectors and the table has {rows}; search works"
        notes = (f"{note} without it",)
    elif kind != "none" and whole.get("vector_idx") != kind.upper():
        partitions = max(1, min(round(math.sqrt(rows)), rows // _ROWS_TO_TRAIN_A_PARTITION))
        width = dataset.schema.field("vector").type.list_size
        dataset.create_index(
            "vector",
            kind.upper(),
            name="vector_idx",
            metric="cosine",
            num_partitions=partitions,
            replace=True,
            num_sub_vectors=sub_vectors(width) if kind == "ivf_pq" else None,
        )
    dataset.checkout_latest()
    return tuple(f"{i.field_names[0]}: {i.index_type.upper()}" for i in dataset.describe_indices()), notes
