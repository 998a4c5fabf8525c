"""Shapes are chosen from the whole input, whatever the order of its rows."""

import numpy as np
import pyarrow as pa
import pytest

from bioscan_jax import EmbedConfig
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.data.batching import fitted_shapes, make_batches
from bioscan_jax.data.encode import Encoding, encode_block
from bioscan_jax.data.in_memory import SequencesInMemory
from bioscan_jax.embedding.sample import _spread, sample_blocks

BLOCK_ROWS, EMBED = 256, EmbedConfig(batch_tokens=1024, deduplicate=False)
ENCODING = Encoding(
    sequence_column="dna_sequence",
    vocabulary=Vocabulary.published("v2"),
    max_tokens=2048,
    overlong="truncate",
    strand="forward",
    phases=1,
    deduplicate=False,
)
LENGTHS = {"coi": (640, 659), "18s": (1500, 1590), "reads": (300, 501)}


def rows_of(kind, blocks):
    random = np.random.default_rng(blocks)
    return [
        "ACGTTG" * (length // 6) + "A" * (length % 6) for length in random.integers(*LENGTHS[kind], blocks * BLOCK_ROWS)
    ]


def padding(source, sample):
    """Computed over real tokens of all blocks but the last, and the shapes added to those of the sample."""
    shapes, spare = sample.shapes(EMBED, 1), sample.spare_shapes(EMBED, 1)
    computed = real = 0
    added = set()
    for index in range(len(source) - 1):
        tokens = encode_block(source[index], ENCODING).views.tokens
        fitted = fitted_shapes(tokens.lengths, shapes, spare)
        computed += sum(batch.ids.size for batch in make_batches(tokens, fitted, cls=3, pad=1))
        real += int(tokens.lengths.sum())
        added |= {*fitted} - {*shapes}
    return computed / real, added


@pytest.mark.parametrize(
    "kinds", [("coi", "18s"), ("18s", "coi"), ("reads",), ("reads", "coi"), ("coi", "reads", "coi")], ids="-".join
)
def test_mixed_lengths_are_padded_little_in_any_order(kinds):
    source = SequencesInMemory(pa.array([row for kind in kinds for row in rows_of(kind, 36 // len(kinds))]), BLOCK_ROWS)
    sample = sample_blocks(source, ENCODING, EMBED, 8 * BLOCK_ROWS)
    assert not sample.whole
    ratio, added = padding(source, sample)
    assert ratio <= 1.12
    assert not added


def test_rows_that_the_sample_missed_add_a_bounded_number_of_shapes():
    few = 16 * BLOCK_ROWS
    rows = rows_of("coi", 64)
    [missed] = [index for index in range(64) if index not in _spread(64, 16, 16)][20:21]
    rows[missed * BLOCK_ROWS : (missed + 1) * BLOCK_ROWS] = rows_of("18s", 1)
    source = SequencesInMemory(pa.array(rows), BLOCK_ROWS)
    sample = sample_blocks(source, ENCODING, EMBED, few)
    ratio, added = padding(source, sample)
    assert ratio <= 1.12
    assert 0 < len(added) <= 2
    assert added <= {*sample.spare_shapes(EMBED, 1)}


@pytest.mark.parametrize(
    ("blocks", "wanted", "stretches"), [(100, 8, 16), (100, 40, 16), (17, 16, 16), (5, 8, 16), (9, 1, 1)]
)
def test_sampled_blocks_are_spread_evenly(blocks, wanted, stretches):
    found = _spread(blocks, wanted, stretches)
    assert found == sorted(set(found))
    assert min(wanted, blocks) <= len(found) <= blocks
    assert found[0] == 0
    assert stretches == 1 or found[-1] == blocks - 1
    gaps = np.diff(found)
    assert not len(gaps) or gaps.max() <= -(-blocks // min(stretches, blocks)) + 1
