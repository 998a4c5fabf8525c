"""Finds the candidates of each query: embeds it, searches the table, aligns, and runs the taxonomic heads."""

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
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.matching.alignment import Pool, align
from bioscan_jax.matching.neighbours import by_index, exact, nearest, search_kind
from bioscan_jax.matching.queries import encode_queries, encoder_of_table
from bioscan_jax.matching.reference import Reference, Taxa, open_reference
from bioscan_jax.matching.vote import NEAREST_COSINE_DISTANCE, HeadVotes, Votes, head_votes, open_heads, vote

_SAME_COSINE = 1e-6
"""Cosines that differ by less count as equal: float32 sums depend on their order."""


@dataclass(frozen=True, eq=False)
class Matcher:
    """The opened reference, its model and heads, and the settings of a run."""

    reference: Reference
    taxa: Taxa
    encoder: Encoder
    heads: Heads | None
    heads_sha256: str | None
    settings: config.IdentifyConfig
    search: Literal["exact", "index"]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Queries with their candidates, best first."""

    ids: pa.Array
    """Ids of all rows, including rejected ones."""
    kept: Bool[np.ndarray, " rows"]
    """Which rows have a vector; the fields below hold these rows only."""
    rejects: pa.Table
    texts: list[str]
    """Cleaned DNA."""
    vectors: Float32[np.ndarray, "queries hidden"]
    rows: Int64[np.ndarray, "queries candidates"]
    """Positions in the table; -1 past the last."""
    similarity: Float32[np.ndarray, "queries candidates"]
    identity: Float32[np.ndarray, "queries candidates"]
    """NaN where nothing was aligned."""
    distances: Float64[np.ndarray, "queries candidates"]
    """Distances that weight the vote; inf past the last."""
    heads: HeadVotes | None
    truth: Int32[np.ndarray, "queries 7"] | None
    """Codes of the labels that the queries came with, if any; see `Taxa.truth`."""


def open_matcher(
    reference: config.ReferenceConfig,
    settings: config.IdentifyConfig,
    model: config.ModelConfig | None,
    mesh: config.MeshConfig | None,
) -> Matcher:
    """Opens the reference table and loads its model and the heads.

    Raises:
        InputError: One of them is missing or invalid, or they do not belong together.
    """
    opened = open_reference(reference, settings.filter)
    search = search_kind(opened, settings.search)
    if settings.rerank == "alignment":
        opened.sequences(opened.chosen[:1])
    opened.lineages  # noqa: B018 - missing labels raise before the model is loaded, which takes longer
    encoder = encoder_of_table(opened, model, mesh)
    heads = None if settings.heads is None else open_heads(settings.heads, encoder)
    digest = None if settings.heads is None else sha256_of([Path(settings.heads).expanduser() / HEADS_FILE])
    taxa = Taxa.of(opened) if heads is None else Taxa.of(opened, heads.space.names)
    return Matcher(opened, taxa, encoder, heads, digest, settings, search)


def find_candidates(
    matcher: Matcher, source: ParquetBlocks, pool: Pool, on_rows: Callable[[int], Any] = lambda rows: None
) -> Iterator[Candidates]:
    """Finds the candidates of each query, block by block.

    Args:
        matcher: From `open_matcher`.
        source: The queries.
        pool: Processes for the alignments.
        on_rows: Called with the number of rows just finished.

    Raises:
        InputError: A value of the input cannot be read.
    """
    for encoded, vectors in encode_queries(matcher.encoder, source):
        texts = _cleaned(encoded.block.table[source.sequence_column].take(pa.array(encoded.kept)))
        found = nearest(vectors, matcher.reference, matcher.settings)
        rows, similarity = found.rows, found.similarity
        if matcher.settings.rerank == "alignment":
            rows, similarity, identity, distances = _align_candidates(matcher, texts, rows, similarity, pool, on_rows)
        else:
            identity = _nearest_identity(matcher, texts, rows, pool)
            distances = np.maximum(1 - similarity.astype(np.float64), NEAREST_COSINE_DISTANCE)
            on_rows(len(texts))
        on_rows(encoded.block.table.num_rows - len(texts))
        kept = np.zeros(encoded.block.table.num_rows, bool)
        kept[encoded.kept] = True
        yield Candidates(
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


def count_votes(matcher: Matcher, candidates: Candidates, power: float, head_weight: float) -> Votes:
    """Names each query by the vote of its candidates; see `vote.vote`."""
    lineages = np.where(candidates.rows[:, :, None] >= 0, matcher.taxa.codes[candidates.rows], -1)
    return vote(lineages, candidates.distances, power, candidates.heads, head_weight)


def _cleaned(column: pa.ChunkedArray | pa.Array) -> list[str]:
    """Returns DNA as the model reads it: upper-case A, C, G, T and N."""
    return clean(column).sequences.to_pylist()


def _align_candidates(
    matcher: Matcher,
    texts: Sequence[str],
    rows: np.ndarray,
    similarity: np.ndarray,
    pool: Pool,
    on_rows: Callable[[int], Any] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Aligns the candidates; returns rows, similarities, identities and distances of the best, best first."""
    distinct = np.unique(rows[rows >= 0])
    sequences = _cleaned(pa.array(matcher.reference.sequences(distinct), pa.string()))
    references = [text or "" for text in sequences]
    found = align(texts, rows, distinct, references, matcher.settings.aligned, pool, on_rows)
    there = found.index >= 0
    index = np.maximum(found.index, 0)
    return (
        np.where(there, np.take_along_axis(rows, index, 1), -1),
        np.where(there, np.take_along_axis(similarity, index, 1), -np.inf).astype(np.float32),
        found.identity,
        found.distances,
    )


def _nearest_identity(matcher: Matcher, texts: Sequence[str], rows: np.ndarray, pool: Pool) -> np.ndarray:
    """Aligns the nearest reference alone, where the table has its DNA, for its identity."""
    identity = np.full(rows.shape, np.nan, np.float32)
    if matcher.reference.sequence_column in matcher.reference.dataset.schema.names and len(rows):
        only = _align_candidates(matcher, texts, rows[:, :1], np.zeros((len(rows), 1), np.float32), pool)
        identity[:, 0] = only[2][:, 0]
    return identity


def _truth(matcher: Matcher, encoded: EncodedBlock) -> Int32[np.ndarray, "queries 7"] | None:
    table = encoded.block.table
    names = table.column_names
    if LINEAGE_COLUMN not in names and not all(rank in names for rank in RANKS):
        return None
    return matcher.taxa.truth(read_lineages(table.take(pa.array(encoded.kept))))


def alignment_recall(
    matcher: Matcher, candidates: Candidates, sample: Int64[np.ndarray, " sample"], pool: Pool
) -> float:
    """Measures for which share of sampled queries the best alignment with the whole reference is among the candidates.

    Args:
        matcher: The one that found the candidates, with `rerank` alignment.
        candidates: Queries and their candidates.
        sample: Indices of the sampled queries.
        pool: Processes for the alignments.
    """
    chosen = matcher.reference.chosen
    rows = np.broadcast_to(chosen, (len(sample), len(chosen)))
    texts = [candidates.texts[i] for i in sample.tolist()]
    *_, distances = _align_candidates(matcher, texts, rows, np.zeros(rows.shape, np.float32), pool)
    return float(np.mean(candidates.distances[sample, 0] <= distances[:, 0]))


def index_recall(matcher: Matcher, candidates: Candidates, sample: Int64[np.ndarray, " sample"]) -> float:
    """Measures the share of neighbours found by the index that are as near as the k-th of an exact search.

    Rows at the same distance are equally good, so duplicates do not count as missed (as in ann-benchmarks,
    Aumueller et al. 2020, doi:10.1016/j.is.2019.02.006).

    Args:
        matcher: One whose search is `index`.
        candidates: Queries and their candidates.
        sample: Indices of the sampled queries.
    """
    vectors = candidates.vectors[sample]
    wanted = exact(vectors, matcher.reference, matcher.settings.k).similarity
    found = by_index(vectors, matcher.reference, matcher.settings).similarity
    return float(np.mean(found >= wanted[:, -1:] - _SAME_COSINE))
