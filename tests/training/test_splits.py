import hashlib
import random
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.barcodes.simulate import simulate
from bioscan_jax.errors import InputError
from bioscan_jax.training.splits import (
    HELD_OUT_RANK,
    LEFT_OUT,
    SPLITS,
    assign_splits,
    check_leakage,
    fingerprints,
    read_given_splits,
)

# Other work on the machine must not fail a test.
unhurried = settings(deadline=None, max_examples=100)

TRAIN, VALIDATION, TEST = range(3)
HALF, QUARTER = np.uint64(2**63), np.uint64(2**62)

# Few sequences and few species, so that copies and contradictions abound; "" is rejected or unknown.
sequence = st.sampled_from(["", *(f"ACGT{letter}" for letter in ("A", "C", "G", "T", "AA", "CC"))])
species = st.sampled_from([None, "", "Aus bus", "Aus cus", "Dus eus", "Dus fus"])
labelled = st.lists(st.tuples(sequence, species), max_size=30)
shares = st.tuples(st.floats(0, 0.49), st.floats(0, 0.49))


def splits_of(
    rows: list[tuple[str, str | None]], *, seed: int = 0, held_out: bool, validation: float, test: float
) -> np.ndarray:
    sequences = fingerprints(pa.array([row[0] for row in rows], pa.large_string()), seed=seed)
    taxa = fingerprints(pa.array([row[1] for row in rows], pa.string()), seed=seed) if held_out else None
    splits = assign_splits(sequences, taxa, validation=validation, test=test)
    check_leakage(sequences, splits)
    return splits


@given(st.lists(st.none() | st.text(max_size=8)), st.integers(0, 2**64 - 1), st.integers(1, 5))
@unhurried
def test_a_fingerprint_is_the_keyed_blake2b_of_the_text_alone(texts: list[str | None], seed: int, block: int):
    wanted = [
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")
        if text
        else 0
        for text in texts
    ]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        column = pa.array(texts, kind)
        blocks = pa.chunked_array([column.slice(at, block) for at in range(0, len(texts), block)], kind)
        assert fingerprints(column, seed=seed).tolist() == wanted
        assert fingerprints(blocks, seed=seed).tolist() == wanted


def test_fingerprints_never_change():
    assert fingerprints(pa.array(["ACGT", None, "ACGT"]), seed=7).tolist() == [
        10405577972429292976,
        0,
        10405577972429292976,
    ]
    assert fingerprints(pa.array([], pa.string()), seed=7).dtype == np.uint64


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int):
    with pytest.raises(InputError, match=f"the split's seed {seed} is out of range; pass one from 0 to {2**64 - 1}"):
        fingerprints(pa.array(["ACGT"]), seed=seed)


@given(labelled, st.booleans(), shares, st.integers(0, 9), st.randoms(use_true_random=False))
@unhurried
def test_row_order_does_not_matter_and_copies_stay_together(
    rows: list[tuple[str, str | None]],
    held_out: bool,
    shares: tuple[float, float],
    seed: int,
    order: random.Random,
):
    validation, test = shares
    splits = splits_of(rows, seed=seed, held_out=held_out, validation=validation, test=test)
    assert splits.dtype == np.int8
    of_row = dict(zip(rows, splits.tolist(), strict=True))
    of_sequence = {row[0]: split for row, split in of_row.items()}
    assert splits.tolist() == [of_sequence[row[0]] for row in rows], "copies are in one split"
    assert of_sequence.get("", LEFT_OUT) == LEFT_OUT
    shuffled = order.sample(rows, len(rows))
    again = splits_of(shuffled, seed=seed, held_out=held_out, validation=validation, test=test)
    assert again.tolist() == [of_row[row] for row in shuffled]


@given(labelled, shares, st.integers(0, 9))
@unhurried
def test_a_taxon_is_never_in_two_splits_and_only_contradictions_are_left_out(
    rows: list[tuple[str, str | None]], shares: tuple[float, float], seed: int
):
    validation, test = shares
    splits = splits_of(rows, seed=seed, held_out=True, validation=validation, test=test).tolist()
    # Without other rows, each taxon has the split of its hash.
    alone = {
        name: splits_of([("ACGT", name)], seed=seed, held_out=True, validation=validation, test=test)[0]
        for _, name in rows
    }
    for (letters, name), split in zip(rows, splits, strict=True):
        sides = {alone[other] for copy, other in rows if copy == letters and other}
        if not letters:
            assert split == LEFT_OUT
        elif not sides:
            assert split == TRAIN
        elif len(sides) > 1:
            assert split == LEFT_OUT
        else:
            assert split == sides.pop()
            assert not name or split == alone[name]


def test_unlabelled_copies_follow_and_contradicted_ones_are_left_out():
    low, high = np.uint64(1), np.uint64(2**64 - 1)
    sequences = np.array([5, 5, 6, 6, 6, 7, 8, 0], np.uint64)
    taxa = np.array([low, 0, low, high, 0, 0, high, low], np.uint64)
    splits = assign_splits(sequences, taxa, validation=0.1, test=0.1)
    assert splits.tolist() == [TEST, TEST, LEFT_OUT, LEFT_OUT, LEFT_OUT, TRAIN, TRAIN, LEFT_OUT]


def test_the_hash_is_cut_into_test_validation_and_train():
    one = np.uint64(1)
    edges = np.array([one, QUARTER - one, QUARTER, HALF - one, HALF, np.uint64(2**64 - 1)], np.uint64)
    wanted = [TEST, TEST, VALIDATION, VALIDATION, TRAIN, TRAIN]
    assert assign_splits(edges, validation=0.25, test=0.25).tolist() == wanted
    assert assign_splits(np.arange(1, 7, dtype=np.uint64), edges, validation=0.25, test=0.25).tolist() == wanted
    assert assign_splits(edges, validation=0.0, test=0.0).tolist() == [TRAIN] * 6
    assert assign_splits(np.empty(0, np.uint64), np.empty(0, np.uint64), validation=0.1, test=0.1).tolist() == []


def test_shares_are_as_requested_and_a_larger_test_keeps_the_test_rows():
    sequences = fingerprints(pa.array([f"{i:x}" for i in range(20_000)]), seed=3)
    splits = assign_splits(sequences, validation=0.1, test=0.2)
    # Five standard deviations of a binomial share.
    np.testing.assert_allclose(np.bincount(splits) / 20_000, [0.7, 0.1, 0.2], atol=5 * (0.25 / 20_000) ** 0.5)
    larger = assign_splits(sequences, validation=0.1, test=0.3)
    assert (larger[splits == TEST] == TEST).all()
    assert (
        assign_splits(fingerprints(pa.array([f"{i:x}" for i in range(20_000)]), seed=4), validation=0.1, test=0.2)
        != splits
    ).any()


@pytest.mark.parametrize(
    ("validation", "test"), [(-0.1, 0.1), (0.1, -0.1), (0.5, 0.5), (1.0, 0.0), (float("nan"), 0.1)]
)
def test_impossible_shares_are_refused(validation: float, test: float):
    with pytest.raises(InputError, match="^--data.validation .* and --data.test .* must be at least 0 and"):
        assign_splits(np.ones(1, np.uint64), validation=validation, test=test)


@pytest.mark.parametrize(("kind", "rank"), HELD_OUT_RANK.items())
def test_simulated_barcodes_with_copies_split_without_leaking(kind: str, rank: str | None):
    table = simulate(species=60, per_species=4, length=60, seed=0)
    # A second, lower-case and RNA copy of each row: the same sequence once it is cleaned.
    copies = [text.lower().replace("t", "u") for text in table["dna_sequence"].to_pylist()]
    cleaned = clean(pa.array(table["dna_sequence"].to_pylist() + copies)).sequences
    sequences = fingerprints(cleaned, seed=0)
    taxa = None if rank is None else np.tile(fingerprints(table[rank], seed=0), 2)
    splits = assign_splits(sequences, taxa, validation=0.25, test=0.25)
    check_leakage(sequences, splits)
    assert set(splits.tolist()) >= {TRAIN, VALIDATION, TEST}
    np.testing.assert_array_equal(splits[: len(table)], splits[len(table) :])
    if taxa is not None:
        assert rank in RANKS
        for left, right in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
            assert not set(taxa[splits == left]) & set(taxa[splits == right])
    by_row = np.random.default_rng(0).integers(0, 3, len(splits)).astype(np.int8)
    with pytest.raises(InputError, match="are the same sequence, and"):
        check_leakage(sequences, by_row)


def test_given_splits_are_read_in_their_usual_forms():
    values = [
        "train",
        "Training",
        " VAL ",
        "valid",
        "validation",
        "dev",
        "test",
        "testing",
        "test_unseen_genus",
        "unused",
    ]
    wanted = [0, 0, 1, 1, 1, 1, 2, 2, 2, LEFT_OUT]
    assert read_given_splits(pa.array(values)).tolist() == wanted
    assert read_given_splits(pa.array(values).dictionary_encode()).tolist() == wanted
    assert read_given_splits(pa.chunked_array([values[:3], [], values[3:]], pa.large_string())).tolist() == wanted
    assert read_given_splits(pa.array([], pa.string())).dtype == np.int8
    assert [SPLITS[split] for split in read_given_splits(pa.array(["train", "val", "test"]))] == list(SPLITS)


def test_the_splits_of_bioscan_5m_are_known():
    values = ["pretrain", "train", "val", "test", "key_unseen", "val_unseen", "test_unseen", "other_heldout"]
    assert read_given_splits(pa.array(values)).tolist() == [0, 0, 1, 2, LEFT_OUT, 1, 2, LEFT_OUT]


@pytest.mark.parametrize("value", ["holdout", "unseen", "", "2", None])
def test_an_unknown_given_value_is_named_with_its_row(value: str | None):
    column = pa.chunked_array([["train"], ["test", value, "train", value]], pa.string())
    with pytest.raises(InputError, match=re.escape(f"row 2 has the split {value!r} in --data.split_column; write")):
        read_given_splits(column)


def test_a_leak_names_two_rows_and_counts_the_sequences():
    sequences = np.array([0, 4, 5, 5, 6, 4, 6, 4, 0], np.uint64)
    splits = np.array([0, 1, 0, 0, 0, 2, LEFT_OUT, 0, 1], np.int8)
    with pytest.raises(
        InputError,
        match=r"^row 1 \(validation\) and row 5 \(test\) are the same sequence, and 1 sequences .*split_column",
    ):
        check_leakage(sequences, splits)
    with pytest.raises(InputError, match=r"^a\.parquet:1 \(validation\) and a\.parquet:5 \(test\) are the same"):
        check_leakage(sequences, splits, locate=lambda row: f"a.parquet:{row}")
    splits[[5, 7]] = LEFT_OUT
    check_leakage(sequences, splits)
    check_leakage(sequences[:0], splits[:0])
