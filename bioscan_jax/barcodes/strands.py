"""Which strand of DNA sequences are written on, judged by their words of 8 bases."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

# pyarrow.compute defines most of its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Float64, Int64, UInt16

from bioscan_jax.barcodes.cleaning import reverse_complement, row_blocks, string_bytes

_WORD = 8
_ROUNDS = 10
"""Most times that all sequences are turned."""
_NULL_SHARE = 0.99
"""A sequence's strand counts as known if its score exceeds this share of the scores of sequences read backwards."""


@dataclass(frozen=True, eq=False)
class StrandProfile:
    """How much more often each word of 8 bases occurs on one strand of some sequences than on the other.

    Example:
        >>> gene = pa.array(["ACGTTGCAACGTAGGATTACAGGC"], pa.large_string())
        >>> profile = StrandProfile.of(gene)
        >>> plus, minus = profile.scores(gene)[0], profile.scores(reverse_complement(gene))[0]
        >>> bool(plus > 0), bool(minus == -plus)
        (True, True)
    """

    log_odds: Float32[np.ndarray, "65536"]
    """Logarithm of (times + 1) / (times of the reverse complement + 1) for each word, by its number."""

    @staticmethod
    def of(sequences: pa.LargeStringArray) -> "StrandProfile":
        """Counts the words of cleaned sequences."""
        times = np.zeros(4**_WORD, np.int64)
        for words, inside, _ in _words(sequences):
            times += np.bincount(words[inside], minlength=len(times))
        opposite = times[reverse_words(_WORD)]
        return StrandProfile(np.log((times + 1) / (opposite + 1)).astype(np.float32))

    def scores(self, sequences: pa.LargeStringArray) -> Float64[np.ndarray, " rows"]:
        """Sums the log odds of the words of each cleaned sequence: below 0 where it reads like the other strand."""
        found = [np.zeros(0)]
        for words, inside, offsets in _words(sequences):
            summed = np.cumsum(np.where(inside, self.log_odds[words], 0.0), dtype=np.float64)
            found.append(np.diff(np.append(0.0, summed)[np.minimum(offsets, len(summed))]))
        return np.concatenate(found)


@functools.cache
def reverse_words(bases: int) -> Int64[np.ndarray, " words"]:
    """Returns the number of the reverse complement of each word, by the word's number.

    Words are numbered in base 4, most significant base first, with A 0, C 1, T 2 and G 3: the complement of a base is
    its number with the second bit flipped.
    """
    places = 4 ** np.arange(bases)
    digits = np.arange(4**bases)[:, None] // places[::-1] % 4
    return (digits ^ 2) @ places


def _words(
    sequences: pa.LargeStringArray,
) -> Iterator[tuple[UInt16[np.ndarray, " words"], Bool[np.ndarray, " words"], Int64[np.ndarray, " rows_plus_1"]]]:
    """Yields, for some rows at a time, the word at each base, whether it is in one row and without N, and the offsets."""
    text, offsets = string_bytes(sequences)
    for first, last in row_blocks(offsets):
        bounds = offsets[first : last + 1] - offsets[first]
        block = text[offsets[first] : offsets[last]]
        positions = max(len(block) - _WORD + 1, 0)
        words, known = np.zeros(positions, np.uint16), np.ones(positions, bool)
        bases, not_n = (block >> 1) & 3, block != ord("N")
        for place in range(_WORD):
            words = (words << 2) | bases[place : place + positions]
            known &= not_n[place : place + positions]
        across = bounds[1:-1, None] - np.arange(1, _WORD)
        known[across[(across >= 0) & (across < positions)]] = False
        yield words, known, bounds


@dataclass(frozen=True)
class StrandSurvey:
    """How many of some sequences are on the strand that most of them are on; see `survey_strands`."""

    alike: int
    reversed: int
    unknown: int


def survey_strands(sequences: pa.LargeStringArray) -> StrandSurvey:
    """Counts how many sequences read like the reverse complements of most others.

    The sequences are divided into halves. In turns, each half is oriented by the words it shares with the other, until
    the scores no longer change, or for a few rounds. As a control, the sequences are also read backwards without
    complement: these have the same bases, but share words by chance alone. A score counts only if it exceeds nearly all
    scores of the control; the other sequences, such as those of another gene, are counted as unknown.

    Args:
        sequences: Cleaned; a few hundred at least.

    Example:
        >>> from bioscan_jax.barcodes.simulate import simulate
        >>> genes = simulate(species=10, per_species=4, length=300, seed=0)["dna_sequence"].cast(pa.large_string())
        >>> genes = genes.combine_chunks()
        >>> mixed = pa.concat_arrays([genes.slice(0, 30), reverse_complement(genes.slice(30))])
        >>> survey_strands(mixed)
        StrandSurvey(alike=30, reversed=10, unknown=0)
    """
    halves = [sequences.take(pa.array(np.arange(first, len(sequences), 2))) for first in (0, 1)]
    opposite = [reverse_complement(half) for half in halves]
    profile, scores = StrandProfile.of(sequences.slice(0, 1)), [np.zeros(0)] * 2
    for _ in range(_ROUNDS):
        before = scores
        scores, nulls = [], []
        for half, other in zip(halves, opposite, strict=True):
            scores.append(profile.scores(half))
            nulls.append(profile.scores(pc.call_function("ascii_reverse", [half])))
            profile = StrandProfile.of(pc.if_else(pa.array(scores[-1] < 0), other, half))
        if all(map(np.array_equal, before, scores)):
            break
    found = np.concatenate(scores)
    least = np.quantile(np.abs(np.concatenate(nulls)), _NULL_SHARE) if len(found) else 0.0
    plus, minus = int((found > least).sum()), int((found < -least).sum())
    return StrandSurvey(max(plus, minus), min(plus, minus), len(found) - plus - minus)
