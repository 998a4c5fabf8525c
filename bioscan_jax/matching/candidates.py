"""Finds and ranks the candidates of each query: embeds it, searches the table, aligns, runs the taxonomic heads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

# pyarrow.compute defines most of its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.lineage import RANKS, lineage_columns, read_lineages
from bioscan_jax.checkpoints.head_files import HEADS_FILE, Heads
from bioscan_jax.checkpoints.hub import resolve_part
from bioscan_jax.checkpoints.readers import sha256_of
from bioscan_jax.data.encode import EncodedBlock
from bioscan_jax.data.fasta import SIZE_COLUMN
from bioscan_jax.data.parquet import ParquetBlocks
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.errors import InputError, logger
from bioscan_jax.matching.alignment import Floors, Pool, align_cigar, compared, edit_distances, none_nearer
from bioscan_jax.matching.neighbours import by_index, exact, search_kind
from bioscan_jax.matching.queries import QueryEncoder, encoder_of_table
from bioscan_jax.matching.reference import Reference, Taxa, open_reference
from bioscan_jax.matching.strands import has_dna, is_strand_invariant, orient, reference_profile
from bioscan_jax.matching.vote import (
    HeadVotes,
    Votes,
    Voting,
    default_voting,
    head_votes,
    open_heads,
    same_taxon,
    vote,
    without_names,
)

_NEAREST_COSINE_DISTANCE = 1e-6
"""Smallest cosine distance that float32 resolves."""
_RANKED = 512
"""Queries whose candidates are ordered at a time, which bounds the memory with many candidates."""
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
    """Queries with their candidates, distinct sequences of the reference, nearest by vector first."""

    ids: pa.Array
    """Ids of all rows, including rejected ones."""
    kept: Bool[np.ndarray, " rows"]
    """Which rows have a vector; the fields below hold these rows only."""
    rejects: pa.Table
    texts: list[str]
    """Cleaned DNA, on the strand that is compared; so are the vectors."""
    vectors: Float32[np.ndarray, "queries hidden"]
    rows: Int64[np.ndarray, "queries candidates"]
    """Positions in the table; -1 past the last."""
    similarity: Float32[np.ndarray, "queries candidates"]
    edit_distances: Float64[np.ndarray, "queries candidates"] | None
    """1 - identity by `alignment.edit_distances`, inf without evidence; None with `rerank` none."""
    transversions: Float64[np.ndarray, "queries candidates"] | None
    """The same without transitions, where all of a query's are above the least `Voting.saturation` there may be."""
    heads: HeadVotes | None
    truth: Int32[np.ndarray, "queries 7"] | None
    """Codes of the labels that the queries came with, if any; see `Taxa.truth`."""
    reverse: Bool[np.ndarray, " queries"] | None = None
    """Which queries are compared as reverse complements; None if the strand is unknown."""
    size: pa.Array | None = None
    """Abundance of all rows, such as 12 for the id `asv1;size=12;`; None if the input has no such column."""


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
    encoder = encoder_of_table(opened, model, mesh, settings.batch_tokens)
    heads = None if settings.heads is None else open_heads(settings.heads, encoder)
    digest = None if settings.heads is None else sha256_of([resolve_part(settings.heads, "heads") / HEADS_FILE])
    taxa = Taxa.of(opened) if heads is None else Taxa.of(opened, heads.space.names)
    return Matcher(opened, taxa, encoder, heads, digest, settings, search)


def find_candidates(
    matcher: Matcher,
    source: ParquetBlocks,
    pool: Pool,
    on_rows: Callable[[int], Any] = lambda rows: None,
    *,
    first_block: int = 0,
) -> Iterator[Candidates]:
    """Finds the candidates of each query, block by block; the devices embed the next block meanwhile.

    Args:
        matcher: From `open_matcher`.
        source: The queries.
        pool: Processes for the alignments.
        on_rows: Called with the number of rows just finished.
        first_block: Block to begin with.

    Raises:
        InputError: A value of the input cannot be read.
    """
    noted: set[str] = set()
    invariant = is_strand_invariant(matcher.encoder)
    guess = matcher.settings.strand == "both" and not invariant and has_dna(matcher.reference)
    profile = reference_profile(matcher.reference) if guess else None
    queries = QueryEncoder(matcher.encoder, source, profile, first_block)
    for encoded, vectors, reverse in queries:
        table = encoded.block.table
        texts = _cleaned(table[source.sequence_column].take(pa.array(encoded.kept)))
        again = None if invariant else queries.encode
        oriented = orient(matcher.reference, matcher.settings, texts, vectors, reverse, again, pool, copies=False)
        texts, vectors, found = oriented.texts, oriented.vectors, oriented.found
        edits = transversions = None
        if matcher.settings.rerank == "alignment":
            floors = floors_of(matcher.settings)
            sequences = _sequences(matcher, found.rows)
            least = default_voting(matcher.settings, heads=False).saturation
            edits, transversions = edit_distances(
                texts, found.rows, *sequences, pool, floors, on_rows, saturation=least
            )
        else:
            on_rows(len(texts))
        on_rows(table.num_rows - len(texts))
        kept = np.zeros(table.num_rows, bool)
        kept[encoded.kept] = True
        yield Candidates(
            ids=table["sequence_id"].cast(pa.string()).combine_chunks(),
            kept=kept,
            rejects=encoded.rejects,
            texts=texts,
            vectors=vectors,
            rows=found.rows,
            similarity=found.similarity,
            edit_distances=edits,
            transversions=transversions,
            heads=None if matcher.heads is None else head_votes(matcher.heads, vectors, matcher.taxa),
            truth=_truth(matcher, encoded, source, noted),
            reverse=oriented.reverse,
            size=table[SIZE_COLUMN].combine_chunks() if SIZE_COLUMN in table.column_names else None,
        )


@dataclass(frozen=True, eq=False)
class Ranked:
    """The candidates that vote, best first."""

    rows: Int64[np.ndarray, "queries voters"]
    """Positions in the table; -1 past the last."""
    similarity: Float32[np.ndarray, "queries voters"]
    distances: Float64[np.ndarray, "queries voters"]
    """By `rank_candidates`; inf past the last, and without evidence."""


def rank_candidates(candidates: Candidates, voting: Voting, most: int) -> Ranked:
    """Orders candidates by their score: cosine + identity_weight * identity, beyond `saturation` without transitions.

    Its complement is the distance, (1 - cosine) + identity_weight * (1 - identity), which is above 0. Of equal scores
    the first in the table comes first. Without alignment all candidates vote, at distance 1 - cosine.

    Args:
        candidates: Queries with their candidates, nearest by vector first.
        voting: The weight of the identity, and where transitions cease to count.
        most: Most candidates to keep where they are aligned.
    """
    edits, transversions = candidates.edit_distances, candidates.transversions
    if edits is None or transversions is None or voting.identity_weight is None:
        return Ranked(candidates.rows, candidates.similarity, _cosine_distances(candidates.similarity))
    far = edits.min(axis=1, keepdims=True, initial=np.inf) > voting.saturation
    with np.errstate(invalid="ignore"):  # 0 * inf
        differences = np.where(far, transversions, edits) * voting.identity_weight
    distances = np.where(np.isfinite(edits), differences, np.inf)
    parts = [slice(start, start + _RANKED) for start in range(0, max(len(distances), 1), _RANKED)]
    ranked = [_best(candidates.rows[part], candidates.similarity[part], distances[part], most) for part in parts]
    return Ranked(
        np.concatenate([part.rows for part in ranked]),
        np.concatenate([part.similarity for part in ranked]),
        np.concatenate([part.distances for part in ranked]),
    )


def _best(rows: np.ndarray, similarity: np.ndarray, distances: np.ndarray, most: int) -> Ranked:
    with np.errstate(invalid="ignore"):
        distances = np.where(rows >= 0, _cosine_distances(similarity) + distances, np.inf)
        order = np.argsort(distances, axis=1, kind="stable")
        steps = ~(np.diff(np.take_along_axis(distances, order, 1), axis=1, prepend=0.0) <= _SAME_COSINE)
    equal_first = np.lexsort((np.take_along_axis(rows, order, 1), steps.cumsum(axis=1)), axis=1)
    order = np.take_along_axis(order, equal_first, 1)[:, :most]
    return Ranked(*(np.take_along_axis(field, order, 1) for field in (rows, similarity, distances)))


def _cosine_distances(similarity: np.ndarray) -> np.ndarray:
    return np.maximum(1 - similarity.astype(np.float64), _NEAREST_COSINE_DISTANCE)


def count_votes(matcher: Matcher, ranked: Ranked, voting: Voting, heads: HeadVotes | None) -> Votes:
    """Names each query by the vote of its candidates; see `vote.vote`. No candidate, no name, whatever a head says."""
    _, lineages, distances, shares = _voters(matcher, ranked)
    result = vote(lineages, distances, voting, heads, shares)
    return without_names(result, np.isinf(ranked.distances.min(axis=1, initial=np.inf)))


def count_support(matcher: Matcher, ranked: Ranked, votes: Votes) -> Int64[np.ndarray, " queries"]:
    """Counts the distinct sequences among the voters that have the lowest name of each answer; 0 without a name."""
    places, lineages, distances, _ = _voters(matcher, ranked)
    lowest = len(RANKS) - 1 - (votes.taxa[:, ::-1] >= 0).argmax(axis=1)
    same = same_taxon(lineages, votes.taxa)[np.arange(len(lowest)), :, lowest] & np.isfinite(distances)
    query, voter = np.nonzero(same)
    holds = np.zeros(ranked.rows.shape, bool)
    holds[query, places[query, voter]] = True
    return holds.sum(axis=1)


def _voters(matcher: Matcher, ranked: Ranked) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the lineages of the candidates, with each one's candidate, distance and shares of its vote."""
    places, found = matcher.taxa.voters(ranked.rows)
    there = found[:, :, None] >= 0
    lineages = np.where(there, matcher.taxa.lineages[found], -1)
    distances = np.where(found >= 0, np.take_along_axis(ranked.distances, places, 1), np.inf)
    return places, lineages, distances, np.where(there, matcher.taxa.shares[found], 0.0)


def floors_of(settings: config.IdentifyConfig) -> Floors:
    """Returns what counts as evidence by the settings of a run."""
    return Floors(settings.min_overlap, settings.min_identity)


@dataclass(frozen=True, eq=False)
class Evidence:
    """How queries compare with their nearest references."""

    identity: Float32[np.ndarray, " queries"]
    """Matches / compared columns; NaN where the table has no DNA."""
    overlap: Int64[np.ndarray, " queries"]
    """Compared columns; of a table without DNA, the query's known bases, the most that can be compared."""
    coverage: Float64[np.ndarray, " queries"]
    """Overlap / bases of the query, at most 1."""
    lacks: list[str | None]
    """`overlap` or `identity` where it is below its floor."""

    @property
    def missing(self) -> Bool[np.ndarray, " queries"]:
        """Which queries have no evidence."""
        return np.array([reason is not None for reason in self.lacks], bool)


def nearest_evidence(matcher: Matcher, texts: Sequence[str], ranked: Ranked, pool: Pool) -> Evidence:
    """Aligns each query with its nearest reference in full, and tells where that is no evidence for a name."""
    floors, rows = floors_of(matcher.settings), ranked.rows[:, :1]
    lengths = np.array([len(text) for text in texts], np.int64)
    if has_dna(matcher.reference) and len(texts):
        distinct, sequences = _sequences(matcher, rows)
        matches, overlap = compared(texts, rows, distinct, sequences, pool)[:, 0].T
        of_reference = np.array([len(text) for text in sequences], np.int64)[np.searchsorted(distinct, rows[:, 0])]
        shorter = np.minimum(lengths, of_reference)
        identity = matches / np.maximum(overlap, 1)
    else:
        overlap, shorter = np.array([len(text) - text.count("N") for text in texts], np.int64), lengths
        identity = np.full(len(texts), np.nan)
    few = overlap < floors.required(shorter)
    unlike = (identity < floors.identity) | np.isinf(ranked.distances.min(axis=1, initial=np.inf))
    lacks = ["overlap" if one else "identity" if other else None for one, other in zip(few, unlike, strict=True)]
    return Evidence(identity.astype(np.float32), overlap, np.minimum(overlap / np.maximum(lengths, 1), 1), lacks)


def nearest_alignments(matcher: Matcher, texts: Sequence[str], ranked: Ranked) -> list[tuple[int, str] | None]:
    """Aligns each query with its nearest reference as `nearest_evidence` does; returns `alignment.align_cigar` of each.

    None where there is no reference, or no DNA of it.
    """
    if not has_dna(matcher.reference) or not len(texts):
        return [None] * len(texts)
    rows = ranked.rows[:, 0]
    distinct, sequences = _sequences(matcher, rows)
    dna = dict(zip(distinct.tolist(), sequences, strict=True))
    pairs = [(text, dna.get(row)) for text, row in zip(texts, rows.tolist(), strict=True)]
    return [align_cigar(text, reference) if reference else None for text, reference in pairs]


def in_reference(matcher: Matcher, candidates: Candidates) -> Bool[np.ndarray, " queries"]:
    """Tells which queries have the id or the cleaned DNA of a row that may be matched."""
    ids = candidates.ids.filter(pa.array(candidates.kept))
    known = pc.call_function("is_in", [ids], pc.SetLookupOptions(matcher.reference.ids)).to_numpy(zero_copy_only=False)
    return known | matcher.reference.copies.have(candidates.texts)


def _sequences(matcher: Matcher, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Returns the distinct rows and their DNA."""
    distinct = np.unique(rows[rows >= 0])
    return distinct, _cleaned(pa.array(matcher.reference.sequences(distinct), pa.string()))


def _cleaned(column: pa.ChunkedArray | pa.Array) -> list[str]:
    """Returns DNA as the model reads it: upper-case A, C, G, T and N; nothing for a missing one."""
    return [text or "" for text in clean(column).sequences.to_pylist()]


def _truth(
    matcher: Matcher, encoded: EncodedBlock, source: ParquetBlocks, noted: set[str]
) -> Int32[np.ndarray, "queries 7"] | None:
    """Codes the labels of a block, if any; notes once what cannot be read, which identification does not need."""
    table, first = encoded.block.table.take(pa.array(encoded.kept)), encoded.block.first_row
    if not lineage_columns(table.column_names):
        return None

    def note(row: int, text: str) -> None:
        if "lineage" not in noted:
            noted.add("lineage")
            where = source.locate(first + int(encoded.kept[row]))
            logger.warning(f"{where} (counted from 0): the lineage {text[:120]!r} cannot be read and counts as unknown")

    try:
        return matcher.taxa.truth(read_lineages(table, unreadable=note))
    except InputError as error:
        if "column" not in noted:
            noted.add("column")
            logger.warning(f"the labels of the queries are not used: {error}")
        return None


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
    assert candidates.edit_distances is not None
    texts = [candidates.texts[i] for i in sample.tolist()]
    nearest = candidates.edit_distances[sample].min(axis=1, initial=np.inf).tolist()
    _, references = _sequences(matcher, matcher.reference.chosen)
    return float(
        np.mean(none_nearer(texts, nearest, list(dict.fromkeys(references)), pool, floors_of(matcher.settings)))
    )


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
    wanted = exact(vectors, matcher.reference, matcher.settings.k, copies=False).similarity
    found = by_index(vectors, matcher.reference, matcher.settings, copies=False).similarity
    return float(np.mean(found >= wanted[:, -1:] - _SAME_COSINE))
