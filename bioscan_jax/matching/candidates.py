"""Queries to candidates: embedded, searched, aligned, asked of the heads; everything but the vote."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.lineage import LINEAGE_COLUMN, RANKS, read_lineages
from bioscan_jax.checkpoints.head_files import HEADS_FILE, Heads
from bioscan_jax.checkpoints.readers import sha256_of
from bioscan_jax.data.encode import EncodedBlock
from bioscan_jax.data.parquet import ParquetBlocks
from bioscan_jax.matching.alignment import Worker, align
from bioscan_jax.matching.neighbours import by_index, exact, nearest, search_kind
from bioscan_jax.matching.queries import Embedder, embed_blocks, make_embedder
from bioscan_jax.matching.reference import Reference, Taxa, open_reference
from bioscan_jax.matching.vote import NEAREST_COSINE_DISTANCE, HeadVotes, Votes, head_votes, open_heads, vote

_SAME_COSINE = 1e-6
"""Cosines this near are the same: float32, summed in another order."""


@dataclass(frozen=True, eq=False)
class Matcher:
    """All that is settled before the first query."""

    reference: Reference
    taxa: Taxa
    embedder: Embedder
    heads: Heads | None
    heads_sha256: str | None
    settings: config.IdentifyConfig
    search: Literal["exact", "index"]


@dataclass(frozen=True, eq=False)
class Matched:
    """Queries with their candidates, the best first."""

    ids: pa.Array
    """Of all rows, rejected ones too."""
    kept: Bool[np.ndarray, " rows"]
    """Which rows have a vector; what follows is theirs."""
    rejects: pa.Table
    texts: list[str]
    """The cleaned DNA."""
    vectors: Float32[np.ndarray, "queries hidden"]
    rows: Int64[np.ndarray, "queries candidates"]
    """Positions in the table, -1 past the last."""
    similarity: Float32[np.ndarray, "queries candidates"]
    identity: Float32[np.ndarray, "queries candidates"]
    """NaN where it was not aligned."""
    distances: Float64[np.ndarray, "queries candidates"]
    """What the vote goes by; inf past the last."""
    heads: HeadVotes | None
    truth: Int32[np.ndarray, "queries 7"] | None
    """The names that the queries came with; see `Taxa.truth`."""


def prepare(
    reference: config.ReferenceConfig,
    settings: config.IdentifyConfig,
    model: config.ModelConfig | None,
    mesh: config.MeshConfig | None,
) -> Matcher:
    """Opens the table and loads its model.

    Raises:
        InputError: One of them is not there or not right, or they do not belong together.
    """
    opened = open_reference(reference, settings.filter)
    search = search_kind(opened, settings.search)
    if settings.rerank == "alignment":
        opened.sequences(opened.chosen[:1])
    opened.lineages  # noqa: B018 - read before the model, which takes longer
    embedder = make_embedder(opened, model, mesh)
    heads = None if settings.heads is None else open_heads(settings.heads, embedder)
    digest = None if settings.heads is None else sha256_of([Path(settings.heads).expanduser() / HEADS_FILE])
    taxa = Taxa.of(opened) if heads is None else Taxa.of(opened, heads.space.names)
    return Matcher(opened, taxa, embedder, heads, digest, settings, search)


def match(
    matcher: Matcher, source: ParquetBlocks, worker: Worker, on_rows: Callable[[int], Any] = lambda rows: None
) -> Iterator[Matched]:
    """Finds the candidates of each query, block by block.

    Args:
        matcher: From `prepare`.
        source: The queries.
        worker: To align in.
        on_rows: Called with the number of rows just done.

    Raises:
        InputError: A value of the input cannot be read.
    """
    for encoded, vectors in embed_blocks(matcher.embedder, source):
        texts = cleaned(encoded.block.table[source.sequence_column].take(pa.array(encoded.kept)))
        found = nearest(vectors, matcher.reference, matcher.settings)
        rows, similarity = found.rows, found.similarity
        if matcher.settings.rerank == "alignment":
            rows, similarity, identity, distances = _aligned(matcher, texts, rows, similarity, worker, on_rows)
        else:
            identity = _nearest_identity(matcher, texts, rows, worker)
            distances = np.maximum(1 - similarity.astype(np.float64), NEAREST_COSINE_DISTANCE)
            on_rows(len(texts))
        on_rows(encoded.block.table.num_rows - len(texts))
        kept = np.zeros(encoded.block.table.num_rows, bool)
        kept[encoded.kept] = True
        yield Matched(
            ids=encoded.block.table["sequence_id"].cast(pa.string()).combine_chunks(),
            kept=kept,
            rejects=encoded.rejects,
            texts=texts,
            vectors=vectors,
            rows=rows,
            similarity=similarity,
            identity=identity,
            distances=distances,
            heads=None if matcher.heads is None else head_votes(matcher.heads, vectors, matcher.taxa),
            truth=_truth(matcher, encoded),
        )


def votes(matcher: Matcher, matched: Matched, power: float, head_weight: float) -> Votes:
    """Lets the candidates vote."""
    lineages = np.where(matched.rows[:, :, None] >= 0, matcher.taxa.codes[matched.rows], -1)
    return vote(lineages, matched.distances, power, matched.heads, head_weight)


def cleaned(column: pa.ChunkedArray | pa.Array) -> list[str]:
    """DNA as the model reads it: upper-case A, C, G, T and N."""
    return clean(column).sequences.to_pylist()


def _aligned(
    matcher: Matcher,
    texts: Sequence[str],
    rows: np.ndarray,
    similarity: np.ndarray,
    worker: Worker,
    on_rows: Callable[[int], Any] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The candidates that were aligned in full, best first: rows, similarities, identities, distances."""
    distinct = np.unique(rows[rows >= 0])
    sequences = cleaned(pa.array(matcher.reference.sequences(distinct), pa.string()))
    references = [text or "" for text in sequences]
    found = align(texts, rows, distinct, references, matcher.settings.aligned, worker, on_rows)
    there = found.place >= 0
    place = np.maximum(found.place, 0)
    return (
        np.where(there, np.take_along_axis(rows, place, 1), -1),
        np.where(there, np.take_along_axis(similarity, place, 1), -np.inf).astype(np.float32),
        found.identity,
        found.distances,
    )


def _nearest_identity(matcher: Matcher, texts: Sequence[str], rows: np.ndarray, worker: Worker) -> np.ndarray:
    """The identity of the nearest reference alone, where the table has its DNA."""
    identity = np.full(rows.shape, np.nan, np.float32)
    if matcher.reference.sequence_column in matcher.reference.dataset.schema.names and len(rows):
        only = _aligned(matcher, texts, rows[:, :1], np.zeros((len(rows), 1), np.float32), worker)
        identity[:, 0] = only[2][:, 0]
    return identity


def _truth(matcher: Matcher, encoded: EncodedBlock) -> Int32[np.ndarray, "queries 7"] | None:
    table = encoded.block.table
    names = table.column_names
    if LINEAGE_COLUMN not in names and not all(rank in names for rank in RANKS):
        return None
    return matcher.taxa.truth(read_lineages(table.take(pa.array(encoded.kept))))


def best_in_reach(matcher: Matcher, every: Matched, sample: Int64[np.ndarray, " sample"], worker: Worker) -> float:
    """Share of some queries whose best alignment with the whole reference is among the k candidates.

    Args:
        matcher: That found the candidates, with `rerank` alignment.
        every: The queries.
        sample: Which of them.
        worker: To align in.
    """
    chosen = matcher.reference.chosen
    rows = np.broadcast_to(chosen, (len(sample), len(chosen)))
    texts = [every.texts[i] for i in sample.tolist()]
    *_, distances = _aligned(matcher, texts, rows, np.zeros(rows.shape, np.float32), worker)
    return float(np.mean(every.distances[sample, 0] <= distances[:, 0]))


def index_recall(matcher: Matcher, every: Matched, sample: Int64[np.ndarray, " sample"]) -> float:
    """Share of the neighbours found by the index that are as near as the k-th of an exact search.

    Rows at the same distance are as good as each other, so duplicates do not count as missed (as in ann-benchmarks,
    Aumueller et al. 2020, doi:10.1016/j.is.2019.02.006).

    Args:
        matcher: Its search is `index`.
        every: The queries.
        sample: Which of them.
    """
    vectors = every.vectors[sample]
    wanted = exact(vectors, matcher.reference, matcher.settings.k).similarity
    found = by_index(vectors, matcher.reference, matcher.settings).similarity
    return float(np.mean(found >= wanted[:, -1:] - _SAME_COSINE))
