"""Finds the strand on which each query resembles the reference: the other one is tried only where one does not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int64, Shaped

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean, reverse_complement
from bioscan_jax.barcodes.strands import StrandProfile, reverse_words
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.embedding.step import can_count_tokens
from bioscan_jax.matching.alignment import Pool, distance, edit_counts, is_near
from bioscan_jax.matching.neighbours import Neighbours, nearest
from bioscan_jax.matching.reference import Reference

POOR = 0.2
"""Edits per base to the nearest reference above which a query is compared on its other strand, too.

The wrong strand is far from it: 1,000 random pairs of a COI barcode and the reverse complement of another differ by 0.43
edits per base or more, those of 18S by 0.48.
"""
_PROFILED = 2048
"""References whose words tell on which strand a query is compared first."""
_PAIRS = 256


@dataclass(frozen=True, eq=False)
class Oriented:
    """Queries on the strand on which they resemble their nearest reference more."""

    texts: list[str]
    """Cleaned DNA of that strand."""
    vectors: Float32[np.ndarray, "queries hidden"]
    found: Neighbours
    reverse: Bool[np.ndarray, " queries"] | None
    """Whether that strand is the reverse complement of the query as written; None if nothing tells."""


def orient(
    reference: Reference,
    settings: config.IdentifyConfig,
    texts: list[str],
    vectors: Float32[np.ndarray, "queries hidden"],
    reverse: Bool[np.ndarray, " queries"],
    embed: Callable[[list[str]], Float32[np.ndarray, "some hidden"]] | None,
    pool: Pool = None,
    *,
    copies: bool = True,
) -> Oriented:
    """Finds the nearest references of each query and the strand on which the query resembles the nearest one more.

    A query that differs from its nearest reference by less than `POOR` edits per base is on the right strand. The
    reverse complement of any other one is tried, too: it is embedded and searched for, unless its vector is the same,
    and the strand with fewer edits to its nearest reference is taken. Where the table has no DNA, both strands of every
    query are searched for and the one with the greater cosine is taken; with vectors of both strands, nothing tells.

    Args:
        reference: The table.
        settings: Neighbours, kind of search, and strands.
        texts: Cleaned DNA of the queries, on the strand to try first.
        vectors: Their vectors.
        reverse: Which of them are reverse complements of what was written.
        embed: Embeds cleaned DNA; None where the vectors of both strands are equal (`is_strand_invariant`).
        pool: Processes for the alignments.
        copies: Find all rows with the same DNA; only the first of them if False.
    """
    found = nearest(vectors, reference, settings, copies=copies)
    given = Oriented(texts, vectors, found, reverse)
    if settings.strand == "plus" or not texts:
        return given
    aligned = has_dna(reference)
    if not aligned and embed is None:
        return Oriented(texts, vectors, found, None)
    here, poor = found.rows[:, 0], np.arange(len(texts))
    if aligned:
        poor = np.flatnonzero(~_compared(_near, reference, texts, here, pool, absent=False))
    if not len(poor):
        return given
    others = _reverse_complements([texts[i] for i in poor])
    other_vectors, there = vectors[poor], Neighbours(found.rows[poor], found.similarity[poor])
    if embed is not None:
        other_vectors = embed(others)
        there = nearest(other_vectors, reference, settings, copies=copies)
    better = there.similarity[:, 0] > found.similarity[poor, 0]
    if aligned:
        better = _compared(_near, reference, others, there.rows[:, 0], pool, absent=False)
        both = np.flatnonzero(~better).tolist()
        one = _compared(_distances, reference, [texts[i] for i in poor[both]], here[poor[both]], pool, absent=np.inf)
        other = _compared(_distances, reference, [others[i] for i in both], there.rows[both, 0], pool, absent=np.inf)
        better[both] = other < one
    turned = poor[better]
    texts, vectors, reverse = texts.copy(), vectors.copy(), reverse.copy()
    rows, similarity = found.rows.copy(), found.similarity.copy()
    for place, text in zip(turned.tolist(), (others[i] for i in np.flatnonzero(better)), strict=True):
        texts[place] = text
    vectors[turned], rows[turned], similarity[turned] = (
        other_vectors[better],
        there.rows[better],
        there.similarity[better],
    )
    reverse[turned] = ~reverse[turned]
    return Oriented(texts, vectors, Neighbours(rows, similarity), reverse)


def has_dna(reference: Reference) -> bool:
    """Returns whether the table has the DNA of its rows."""
    return reference.sequence_column in reference.dataset.schema.names


def reference_profile(reference: Reference) -> StrandProfile:
    """Counts the words of a sample of the references, evenly spread over the table."""
    rows = reference.chosen
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), _PROFILED)).astype(np.int64)]
    return StrandProfile.of(clean(pa.array(reference.sequences(sample), pa.large_string())).sequences)


def is_strand_invariant(encoder: Encoder) -> bool:
    """Returns whether a sequence and its reverse complement have the same vector, up to rounding.

    So it is where both strands are averaged, and where a model counts the 6-mers of all frames and its embeddings of a
    6-mer and its reverse complement are equal, like those of the model in the package.
    """
    embed, vocabulary = encoder.settings, encoder.vocabulary
    if embed.strand == "both":
        return True
    if embed.phases != 6 or not can_count_tokens(encoder.config, embed):
        return False
    table = np.asarray(encoder.loaded.model.word_embeddings.get_value())
    sixmers, bases = table[vocabulary.sixmer_ids], table[vocabulary.letter_ids[list(b"ACGT")]]
    return bool((sixmers == sixmers[reverse_words(6)]).all() and (bases == bases[:1]).all())


def _reverse_complements(texts: Sequence[str]) -> list[str]:
    return reverse_complement(pa.array(texts, pa.large_string())).to_pylist()


_Pairs = list[tuple[str, str]]


def _compared(
    work: Callable[[_Pairs], list],
    reference: Reference,
    texts: Sequence[str],
    rows: Int64[np.ndarray, " queries"],
    pool: Pool,
    *,
    absent: bool | float,
) -> Shaped[np.ndarray, " queries"]:
    """Compares each query with one row; returns `absent` where that is -1."""
    found, there = np.full(len(texts), absent), np.flatnonzero(rows >= 0)
    references = clean(pa.array(reference.sequences(rows[there]), pa.large_string())).sequences.to_pylist()
    pairs = list(zip((texts[i] for i in there.tolist()), references, strict=True))
    jobs = [pairs[first : first + _PAIRS] for first in range(0, len(pairs), _PAIRS)]
    done = map(work, jobs) if pool is None else pool.map(work, jobs)
    found[there] = [one for some in done for one in some]
    return found


def _near(pairs: _Pairs) -> list[bool]:
    """Tells which pairs differ by at most `POOR` edits per base."""
    return [is_near(*pair, POOR) for pair in pairs]


def _distances(pairs: _Pairs) -> list[float]:
    """Returns `alignment.distance` of each pair, by `edit_counts`."""
    counts = [edit_counts(query, [reference])[0] for query, reference in pairs]
    return [np.inf if one is None else distance(one[1] - one[0], one[1]) for one in counts]
