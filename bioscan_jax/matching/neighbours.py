"""Finds the k nearest rows of a vector table by cosine similarity: exactly, or with the table's index."""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64

from bioscan_jax import config
from bioscan_jax.embedding.encoder import unit
from bioscan_jax.errors import InputError
from bioscan_jax.matching.reference import Reference
from bioscan_jax.table.reading import vector_index

EXACT_ROWS = 50_000
"""Up to this many rows an exact search is as fast as the index."""
NPROBES = 50
"""Fewest partitions of the index to search: recall@10 is at least 0.99 on 60,000 barcodes (234 partitions)."""
REFINE_FACTOR = 2
"""The index proposes REFINE_FACTOR * k rows by quantised vectors; exact vectors choose among them."""
_PARTITION_ROWS = 256
_QUERIES = 2048
_GROUP = 16
"""Cosines whose maximum is taken before the best are sought: fewer leave more to sort, more let more of the rest pass."""
_THREADS = 4


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest rows of each query, nearest first."""

    rows: Int64[np.ndarray, "queries k"]
    """Positions in the table; -1 past the last one found."""
    similarity: Float32[np.ndarray, "queries k"]
    """Cosine; -inf where there is no row."""


def search_kind(reference: Reference, wanted: config.SearchKind) -> Literal["exact", "index"]:
    """Chooses exact search or the index: `auto` takes the index if there is one and the table has over 50,000 rows.

    Raises:
        InputError: The index is requested and there is none.
    """
    indexed = vector_index(reference.dataset) != "none"
    if wanted == "index" and not indexed:
        raise InputError(
            f"{reference.dataset.uri} has no vector index; run bioscan embed again with --sink.index ivf_sq, "
            "or pass --search exact"
        )
    if wanted == "auto":
        return "index" if indexed and reference.dataset.count_rows() > EXACT_ROWS else "exact"
    return wanted


def nearest(
    vectors: Float32[np.ndarray, "queries hidden"],
    reference: Reference,
    settings: config.IdentifyConfig,
    *,
    copies: bool = True,
) -> Neighbours:
    """Finds the `settings.k` nearest rows that pass the reference's filter.

    Args:
        vectors: Query vectors, made as the table's were.
        reference: The table.
        settings: Number of neighbours and kind of search.
        copies: Find all rows with the same DNA; only the first of them if False.

    Raises:
        InputError: The index is requested and the table has none.
    """
    if search_kind(reference, settings.search) == "exact":
        return exact(vectors, reference, settings.k, copies=copies)
    return by_index(vectors, reference, settings, copies=copies)


def exact(
    vectors: Float32[np.ndarray, "queries hidden"], reference: Reference, k: int, *, copies: bool = True
) -> Neighbours:
    """Compares the queries with every chosen row, block by block; of equal rows the first in the table comes first."""
    most = len(reference.chosen) if copies else reference.copies.distinct
    return exact_in_blocks(vectors, reference.blocks(copies=copies), min(k, most))


def exact_in_blocks(
    vectors: Float32[np.ndarray, "queries hidden"],
    blocks: Iterable[tuple[Int64[np.ndarray, " _"], Float32[np.ndarray, "_ hidden"]]],
    k: int,
) -> Neighbours:
    """Compares the queries with blocks of vectors; of equal rows the first position comes first.

    Args:
        vectors: Query vectors.
        blocks: Positions of rows and their vectors, of length 1.
        k: Number of neighbours; at most the number of rows.
    """
    asked = unit(vectors)
    rows = np.full((len(asked), k), -1, np.int64)
    scores = np.full((len(asked), k), -np.inf, np.float32)
    for positions, block in blocks:
        products = np.empty((min(_QUERIES, len(asked)), len(block)), np.float32)
        for start in range(0, len(asked), _QUERIES):
            part = slice(start, start + _QUERIES)
            cosines = np.matmul(asked[part], block.T, out=products[: len(asked[part])])
            rows[part], scores[part] = _merged(rows[part], scores[part], positions, cosines)
    return Neighbours(rows, scores)


def _merged(
    rows: Int64[np.ndarray, "queries k"],
    scores: Float32[np.ndarray, "queries k"],
    positions: Int64[np.ndarray, " _"],
    cosines: Float32[np.ndarray, "queries _"],
) -> tuple[Int64[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
    """Returns the best k of each query among those found so far and those of a block, best first."""
    k = rows.shape[1]
    near = cosines >= np.maximum(_kth_at_least(cosines, k), scores[:, -1])[:, None]
    query, place = np.divmod(np.flatnonzero(near), cosines.shape[1])  # a tenth of the time of nonzero
    found = np.concatenate([scores.reshape(-1), cosines[query, place]])
    query = np.concatenate([np.repeat(np.arange(len(rows)), k), query])
    row = np.concatenate([rows.reshape(-1), positions[place]])
    order = np.lexsort((row, -found, query))
    best = order[(np.searchsorted(query[order], np.arange(len(rows)))[:, None] + np.arange(k)).reshape(-1)]
    return row[best].reshape(rows.shape), found[best].reshape(rows.shape)


def _kth_at_least(cosines: Float32[np.ndarray, "queries n"], k: int) -> Float32[np.ndarray, " queries"]:
    """Returns a bound that the k-th largest cosine of each query is not below: the k-th of the maxima of small groups."""
    n = cosines.shape[1]
    if n < k:
        return np.full(len(cosines), -np.inf, np.float32)
    size = max(min(_GROUP, n // k), 1)
    groups = n // size
    maxima = cosines[:, : groups * size].reshape(len(cosines), size, groups).max(axis=1)
    return np.partition(maxima, groups - k, axis=1)[:, groups - k]


def by_index(
    vectors: Float32[np.ndarray, "queries hidden"],
    reference: Reference,
    settings: config.IdentifyConfig,
    *,
    copies: bool = True,
) -> Neighbours:
    """Searches Lance's index, which considers only rows that pass the filter.

    Where copies are left out, a query whose k rows hold fewer sequences is asked again for four times as many rows.
    """
    k = min(settings.k, len(reference.chosen) if copies else reference.copies.distinct)
    probes = settings.nprobes or max(NPROBES, math.ceil(4 * k / _PARTITION_ROWS))
    rows = np.full((len(vectors), k), -1, np.int64)
    scores = np.full((len(vectors), k), -np.inf, np.float32)

    def ask(query: int) -> None:
        wanted = {"column": "vector", "q": vectors[query], "k": k, "metric": "cosine", "nprobes": probes}
        wanted["refine_factor"] = settings.refine_factor or REFINE_FACTOR
        while True:
            found = reference.dataset.scanner(
                columns=["_distance"], nearest=wanted, prefilter=True, filter=reference.filter, with_row_address=True
            ).to_table()
            similarity = (1 - found["_distance"].to_numpy()).astype(np.float32)
            positions = reference.addresses.positions(found["_rowaddr"].to_numpy())
            order = np.lexsort((positions, -similarity))
            if not copies:
                place = np.unique(reference.copies.first[positions[order]], return_index=True)[1]
                order = order[np.sort(place)][:k]
                positions = reference.copies.first[positions]
            if len(order) == k or len(found) < wanted["k"]:
                break
            wanted["k"] *= 4
        rows[query, : len(order)], scores[query, : len(order)] = positions[order], similarity[order]

    if len(vectors):
        ask(0)  # alone, so that the threads do not all load the index and the row ids at once
    with ThreadPoolExecutor(_THREADS, "search") as threads:
        for _ in threads.map(ask, range(1, len(vectors))):
            pass
    return Neighbours(rows, scores)
