"""Which strand sequences are on, by their words."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from bioscan_jax.barcodes.cleaning import reverse_complement
from bioscan_jax.barcodes.simulate import simulate
from bioscan_jax.barcodes.strands import StrandProfile, StrandSurvey, reverse_words, survey_strands


def test_reverse_words_are_reverse_complements():
    words = pa.array(["".join(word) for word in itertools.product("ACTG", repeat=4)], pa.large_string())
    assert words.take(pa.array(reverse_words(4))).equals(reverse_complement(words))


def random_dna(rows: int, length: int) -> pa.LargeStringArray:
    bases = np.random.default_rng(0).choice(list("ACGT"), (rows, length))
    return pa.array(["".join(row) for row in bases], pa.large_string())


def test_scores_add_up_the_words_inside_each_row_and_skip_n():
    texts = ["ACGTTGCAAC", "", "ACG", "ACGTTGNAACCGGTTAC", "TTGACATTGA"]
    sequences = pa.array(texts, pa.large_string())
    profile = StrandProfile(np.random.default_rng(0).normal(size=4**8).astype(np.float32))
    wanted = []
    for text in texts:
        words = [text[start : start + 8] for start in range(len(text) - 7)]
        numbers = [int("".join(str("ACTG".index(base)) for base in word), 4) for word in words if "N" not in word]
        wanted.append(sum(float(profile.log_odds[number]) for number in numbers))
    np.testing.assert_allclose(profile.scores(sequences), wanted, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_reversed_sequences_are_counted(share: float):
    genes = simulate(species=20, per_species=5, length=300, seed=0)["dna_sequence"].cast(pa.large_string())
    genes, number = genes.combine_chunks(), int(share * 100)
    mixed = pa.concat_arrays([reverse_complement(genes.slice(0, number)), genes.slice(number)])
    order = np.random.default_rng(1).permutation(100)
    assert survey_strands(mixed.take(pa.array(order))) == StrandSurvey(100 - number, number, 0)


def test_random_sequences_have_no_strand():
    found = survey_strands(random_dna(400, 300))
    assert found.unknown > 380
