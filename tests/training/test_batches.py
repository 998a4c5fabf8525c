"""Training batches: each row once per epoch, and each batch computed from its number alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_examples import LINEAGES, V2, prepare, write

from bioscan_jax import config
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.training.batches import (
    TrainingBatches,
    augment,
    balanced_probabilities,
    epoch_order,
    evaluation_batches,
    genus_order,
)

PLAIN = config.TrainConfig(batch_size=8, epochs=3, reverse_complement=0.0, subsequence=0.0)


@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 3), st.integers(0, 2))
@settings(deadline=None)
def test_an_epoch_has_each_row_once(rows, batch_size, seed, epoch):
    ids = np.arange(rows) * 7
    tokens = np.random.default_rng(0).integers(2, 100, rows)
    order = epoch_order(ids, tokens, batch_size=batch_size, seed=seed, epoch=epoch)
    assert order.shape == (-(-rows // batch_size), batch_size)
    assert sorted(order[order >= 0].tolist()) == ids.tolist()
    assert (order < 0).sum() < batch_size


def test_rows_of_a_batch_are_of_similar_length_and_epochs_differ():
    rng = np.random.default_rng(0)
    tokens, rows = rng.integers(20, 220, 5000), np.arange(5000)
    first, second = (epoch_order(rows, tokens, batch_size=32, seed=0, epoch=e) for e in (0, 1))
    width = tokens[first[(first >= 0).all(axis=1)]].max(axis=1)
    assert width.sum() * 32 < 1.05 * tokens.sum()
    assert not np.array_equal(first, second)
    assert np.corrcoef(width[:-1], width[1:])[0, 1] < 0.3  # neighbouring batches are not of one length


def test_balanced_sampling_draws_taxa_equally():
    labels = np.full((103, 7), -1, np.int32)
    labels[:, 0] = 0
    labels[:90, 1], labels[90:100, 1] = 0, 1  # three rows are known to their kingdom alone
    probability = balanced_probabilities(labels, "phylum")
    assert probability.sum() == pytest.approx(1.0)
    for taxon in (labels[:, 1] == 0, labels[:, 1] == 1, labels[:, 1] == -1):
        assert probability[taxon].sum() == pytest.approx(1 / 3)
    drawn = epoch_order(np.arange(103), np.ones(103, int), batch_size=4, seed=0, epoch=0, probability=probability)
    assert 20 < (labels[drawn[drawn >= 0], 1] == 1).sum() < 50


@given(st.integers(1, 200), st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 3)]), st.integers(0, 2))
@settings(deadline=None)
def test_rows_of_a_species_and_species_of_a_genus_come_together(rows, together, epoch):
    species, individuals = together
    size = 2 * species * individuals
    rng = np.random.default_rng(rows)
    labels = np.zeros((rows, 7), np.int32)
    labels[:, 6] = rng.integers(0, 1 + rows // 3, rows)
    labels[:, 5] = labels[:, 6] // 5
    labels[rng.random(rows) < 0.1, 6] = -1
    ids, shape = np.arange(rows) * 7, {"batch_size": size, "species": species, "individuals": individuals}
    order = genus_order(ids, labels, **shape, seed=1, epoch=epoch)
    assert np.array_equal(order, genus_order(ids, labels, **shape, seed=1, epoch=epoch))
    assert len(order) == len(genus_order(ids, labels, **shape, seed=1, epoch=epoch + 1))
    drawn = order[order >= 0] // 7
    assert np.array_equal(np.unique(drawn), np.arange(rows))
    assert (order[:-1] >= 0).all()
    groups = labels[drawn].reshape(-1, individuals, 7)
    assert (groups == groups[:, :1]).all()  # of one species
    distinct = drawn.reshape(-1, individuals)
    counts = {tuple(path): (labels == path).all(axis=1).sum() for path in groups[:, 0]}
    for group, path in zip(distinct, groups[:, 0], strict=True):
        assert len(set(group.tolist())) == min(individuals, counts[tuple(path)])
    of_genus = groups[:, 0, 5]
    runs = 1 + (np.diff(of_genus) != 0).sum()
    needed = sum(-(-(of_genus == genus).sum() // species) for genus in np.unique(of_genus))
    assert runs <= needed
    if rows == 200:
        assert not np.array_equal(order, genus_order(ids, labels, **shape, seed=1, epoch=epoch + 1))


def test_neighbours_are_of_different_species():
    labels = np.zeros((24, 7), np.int32)
    labels[:, 5] = np.repeat(np.arange(2), 12)
    labels[:, 6] = np.repeat(np.arange(8), 3)
    order = genus_order(np.arange(24), labels, batch_size=8, species=4, individuals=2, seed=0, epoch=0)
    assert order.shape == (4, 8)  # three rows of a species make two groups
    for batch in order:
        assert len(set(labels[batch, 5].tolist())) == 1
        assert len(set(labels[batch, 6].tolist())) == 4


COMPLEMENT = bytes.maketrans(b"ACGTN", b"TGCAN")


@given(st.lists(st.text("ACGTN", min_size=1, max_size=40), min_size=1, max_size=6), st.integers(0, 99))
@settings(deadline=None)
def test_augmentation_yields_a_subsequence_of_either_strand(texts, seed):
    sequences = [text.encode() for text in texts]
    changed = augment(sequences, np.random.default_rng(seed), reverse=0.5, cut=0.7, shortest=5)
    for before, after in zip(sequences, changed, strict=True):
        assert after in before or after in before.translate(COMPLEMENT)[::-1]
        assert len(after) >= min(5, len(before))
        assert after.strip(b"N") or not before.strip(b"N")


def test_augmentation_at_probabilities_0_and_1():
    sequences = [b"ACGTACGTTTGC", b"ACG"]
    random = np.random.default_rng(0)
    assert augment(sequences, random, reverse=0.0, cut=0.0, shortest=5) == sequences
    turned = augment(sequences, random, reverse=1.0, cut=0.0, shortest=5)
    assert turned == [s.translate(COMPLEMENT)[::-1] for s in sequences]
    lengths, starts = set(), set()
    for _ in range(300):
        [cut] = augment(sequences[:1], random, reverse=0.0, cut=1.0, shortest=5)
        lengths.add(len(cut))
        starts.add(sequences[0].find(cut))
    assert lengths == set(range(5, 13))
    assert starts >= set(range(7))


def test_a_shifted_start_and_substitutions():
    sequences = [b"ACGTACGTTTGCNNACGT" * 20, b"ACG", b"ANNNNNN"]
    plain = {"reverse": 0.0, "cut": 0.0, "shortest": 5}
    starts = set()
    for seed in range(60):
        changed = augment(sequences, np.random.default_rng(seed), **plain, shift=1.0)
        assert changed[2] == sequences[2]  # nothing would be left
        assert all(before.endswith(after) and after for before, after in zip(sequences, changed, strict=True))
        starts.add(len(sequences[0]) - len(changed[0]))
    assert starts == set(range(6))
    assert augment(sequences, np.random.default_rng(0), **plain, shift=0.0, substitutions=0.0) == sequences
    long = [b"ACGTN" * 20_000]
    [changed] = augment(long, np.random.default_rng(0), **plain, substitutions=0.1)
    assert [changed] == augment(long, np.random.default_rng(0), **plain, substitutions=0.1)
    before, after = np.frombuffer(long[0], np.uint8), np.frombuffer(changed, np.uint8)
    assert (after[4::5] == ord("N")).all()
    assert set(changed) == set(b"ACGTN")
    assert (before != after).mean() == pytest.approx(0.08, abs=0.004)
    became = [(after[before == ord("A")] == ord(base)).mean() for base in "CGT"]
    assert became == pytest.approx([0.1 / 3] * 3, abs=0.005)


@pytest.fixture
def examples(tmp_path):
    lengths = [60 + 6 * (i % 9) for i in range(53)]
    text = np.random.default_rng(1).choice(list("ACGT"), (53, 120))
    sequences = ["".join(row[:n]) for row, n in zip(text, lengths, strict=True)]
    path = write(tmp_path / "b.parquet", 53, dna_sequence=sequences, taxonomy=[LINEAGES[i % 3] for i in range(53)])
    return prepare(path, tmp_path, validation=0.3)


def test_a_batch_depends_on_its_number_alone(examples):
    train = config.TrainConfig(batch_size=8, epochs=3, seed=4)
    batches = TrainingBatches(examples, train, V2, 200)
    again = TrainingBatches(examples, train, V2, 200)
    rows = len(examples.rows("train"))
    assert batches.steps_per_epoch == -(-rows // 8)
    assert len(batches) == 3 * batches.steps_per_epoch
    numbers = list(range(len(batches)))
    forwards = [batches[n] for n in numbers]
    for number in reversed(numbers):
        one, other = forwards[number], again[number]
        assert np.array_equal(one.rows, other.rows)
        assert np.array_equal(one.ids, other.ids)
    other = TrainingBatches(examples, config.TrainConfig(batch_size=8, epochs=3, seed=5), V2, 200)
    assert any(not np.array_equal(other[n].rows, forwards[n].rows) for n in numbers)


def test_a_batch_holds_the_labels_and_tokens_of_its_rows(examples):
    batches = TrainingBatches(examples, PLAIN, V2, 200)
    for batch in (batches[n] for n in range(batches.steps_per_epoch)):
        used = batch.rows >= 0
        assert np.array_equal(batch.labels[used], examples.labels[batch.rows[used]])
        assert (batch.labels[~used] == -1).all()
        assert ((batch.ids[used] != V2.pad_id).sum(axis=1) == examples.tokens[batch.rows[used]]).all()
        assert ((batch.ids[~used] != V2.pad_id).sum(axis=1) == 1).all()
        assert batch.ids.shape[1] in batches.widths
        assert np.isnan(batch.metadata).all()


def test_long_rows_are_cut(examples):
    batches = TrainingBatches(examples, PLAIN, V2, 12)
    assert max(batches[n].ids.shape[1] for n in range(len(batches))) == 12


def test_evaluation_reads_each_row_once(examples):
    rows = examples.rows("validation")
    shapes = [BatchShape(4, 12), BatchShape(4, 24)]
    batches = list(evaluation_batches(examples, rows, shapes, V2))
    seen = np.concatenate([batch.rows[batch.rows >= 0] for batch in batches])
    assert sorted(seen.tolist()) == rows.tolist()
    for batch in batches:
        used = batch.rows >= 0
        assert np.array_equal(batch.labels[used], examples.labels[batch.rows[used]])
