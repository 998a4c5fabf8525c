"""Groups barcodes of unknown species: candidate new taxa."""

import warnings

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from bioscan_jax.embedding.encoder import unit

GROUPS = pa.schema(
    [
        pa.field("sequence_id", pa.string(), nullable=False),
        pa.field("group", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("representative", pa.string()),
    ]
)
"""`group` is null for a barcode in no group."""


def group_novel(ids: list[str], vectors: Float32[np.ndarray, "rows hidden"], least: int) -> pa.Table:
    """Groups novel barcodes by density (HDBSCAN; Campello et al. 2013, doi:10.1007/978-3-642-37456-2_14).

    The distance is Euclidean between unit vectors, which orders pairs as the cosine does. The groups are the leaves of
    the hierarchy, the tightest ones; a single group of all barcodes does not count. A group's representative is the
    member with the highest mean cosine to the group.

    Args:
        ids: Ids of the barcodes.
        vectors: Their vectors.
        least: Fewest barcodes in a group.

    Returns:
        Columns `GROUPS`, in the order of `ids`; groups are numbered by size, the largest first.
    """
    labels = np.full(len(ids), -1, np.int64)
    units = unit(vectors)
    if len(ids) >= max(least, 2):
        from sklearn.cluster import HDBSCAN

        with warnings.catch_warnings():
            # HDBSCAN warns of a new default of `copy`, which older versions do not accept.
            warnings.simplefilter("ignore", FutureWarning)
            found = HDBSCAN(min_cluster_size=max(least, 2), cluster_selection_method="leaf").fit(units.copy())
        labels = _by_size(np.asarray(found.labels_, np.int64))
    sizes, chosen = {}, {}
    for label in np.unique(labels[labels >= 0]).tolist():
        members = np.flatnonzero(labels == label)
        mean = units[members].mean(axis=0)
        sizes[label], chosen[label] = len(members), ids[members[int(np.argmax(units[members] @ mean))]]
    of = [None if label < 0 else label for label in labels.tolist()]
    columns = [ids, of, [sizes.get(label) for label in of], [chosen.get(label) for label in of]]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, GROUPS, strict=True)], schema=GROUPS)


def _by_size(labels: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """Renumbers groups by size, the largest first; of equal ones, the first to occur comes first."""
    found, first, counts = np.unique(labels[labels >= 0], return_index=True, return_counts=True)
    number = dict(zip(found[np.lexsort((first, -counts))].tolist(), range(len(found)), strict=True))
    return np.array([number.get(label, -1) for label in labels.tolist()], np.int64)
