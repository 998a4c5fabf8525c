from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from support.taxa import random_tree

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.model.heads import RankLogProbs, make_head, pick
from bioscan_jax.training.losses import (
    DEFAULT_RANK_WEIGHTS,
    combine,
    contrastive_loss,
    known_rows,
    mask_tokens,
    masked_lm_loss,
    neighbour_loss,
    rank_losses,
    total_loss,
)

SIZES = (2, 3, 5, 8, 13, 21, 34)
CLS, PAD, MASK, UNK = 3, 1, 2, 0
MASKING = {"mask_id": MASK, "special_ids": (UNK, PAD, MASK, CLS), "vocab_size": 40}
# Compiled once per shape: each operation by itself would take longer.
losses_of = jax.jit(lambda ranks, labels, *parts: rank_losses(pick(ranks, labels), labels, *parts))
mask = jax.jit(partial(mask_tokens, **MASKING))
lm_loss = jax.jit(masked_lm_loss)


def logits_and_labels(seed=0, rows=9):
    rng = np.random.default_rng(seed)
    logits = [rng.standard_normal((rows, size)).astype(np.float32) * 3 for size in SIZES]
    labels = np.stack([rng.integers(-1, size, rows) for size in SIZES], axis=1).astype(np.int32)
    return logits, labels


@jax.jit
def as_ranks(logits):
    return RankLogProbs(tuple(jax.nn.log_softmax(jnp.asarray(x), axis=1) for x in logits))


def test_each_rank_is_a_mean_over_its_known_rows():
    logits, labels = logits_and_labels()
    expected = []
    for rank, x in enumerate(logits):
        known = np.flatnonzero(labels[:, rank] >= 0)
        expected.append(-log_softmax(x, axis=1)[known, labels[known, rank]].mean())
    np.testing.assert_allclose(losses_of(as_ranks(logits), labels), expected, rtol=1e-5)


@pytest.mark.parity
def test_cross_entropy_is_that_of_pytorch():
    import torch

    logits, labels = logits_and_labels()
    ours = jax.jit(jax.grad(lambda xs: jnp.sum(losses_of(as_ranks(xs), jnp.asarray(labels)))))(logits)
    theirs = [torch.tensor(x, requires_grad=True) for x in logits]
    losses = [
        torch.nn.functional.cross_entropy(x, torch.tensor(labels[:, r]).long(), ignore_index=-1)
        for r, x in enumerate(theirs)
    ]
    torch.stack(losses).sum().backward()
    np.testing.assert_allclose(losses_of(as_ranks(logits), labels), [x.item() for x in losses], rtol=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other.grad, atol=1e-6)


@pytest.mark.parametrize("kind", ["independent", "marginal", "cosine"])
def test_masked_ranks_have_exactly_no_gradient(kind):
    """Without labels no gradient is nonzero; with one known rank only the gradient of its head is."""
    tree = random_tree(3)
    graph, state = nnx.split(make_head(kind, 4, tree, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)), jnp.float32)

    def loss(state, x, labels):
        losses = rank_losses(nnx.merge(graph, state).of_labels(x, labels), labels)
        return total_loss(losses), losses

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    unknown = jnp.full((5, 7), -1, jnp.int32)
    (value, losses), gradients = step(state, x, unknown)
    assert value == 0
    assert not np.any(losses)
    assert all(not np.any(g) for g in jax.tree.leaves(gradients))
    (value, losses), (by_state, by_x) = step(state, x, unknown.at[2, 3].set(0))
    assert value > 0
    assert np.flatnonzero(losses).tolist() == [3]
    assert np.flatnonzero(np.any(np.asarray(by_x) != 0, axis=1)).tolist() == [2]
    moved = {path for path, g in nnx.to_flat_state(by_state) if np.any(np.asarray(g.get_value()) != 0)}
    layer = ("leaves", "linear") if kind == "marginal" else ("ranks", "order", "linear")
    assert moved == {(*layer, name) for name in (["kernel"] if kind == "cosine" else ["kernel", "bias"])}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_parts_of_a_batch_add_up_to_it(seed):
    logits, labels = logits_and_labels(seed, rows=8)
    labels[:, 5] = -1
    whole = losses_of(as_ranks(logits), labels)
    denominators = jax.jit(known_rows)(labels)
    parts = [
        losses_of(as_ranks([x[i : i + 4] for x in logits]), labels[i : i + 4], denominators) for i in range(0, 8, 4)
    ]
    np.testing.assert_allclose(np.add(*parts), whole, rtol=1e-5)
    assert whole[5] == 0


def test_gradients_of_parts_add_up_to_the_batch():
    logits, labels = logits_and_labels(1, rows=8)

    @jax.jit
    @jax.grad
    def gradient(logits, rows):
        part = [x[rows] for x in logits]
        return total_loss(losses_of(as_ranks(part), jnp.asarray(labels)[rows], known_rows(jnp.asarray(labels))))

    logits = [jnp.asarray(x) for x in logits]
    whole = gradient(logits, np.arange(8))
    halves = [gradient(logits, np.arange(i, i + 4)) for i in (0, 4)]
    for a, b, c in zip(whole, *halves, strict=True):
        np.testing.assert_allclose(a, np.asarray(b) + np.asarray(c), atol=1e-6)


def test_total_and_combined_loss():
    losses = jnp.arange(1.0, 8.0)
    assert total_loss(losses) == pytest.approx(np.dot(np.arange(1, 8), [2.0, 1.8, 1.5, 1.2, 1.0, 0.8, 0.6]))
    assert len(DEFAULT_RANK_WEIGHTS) == len(RANKS)
    assert total_loss(losses, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)) == 7
    assert combine(jnp.array(2.0), jnp.array(10.0)) == pytest.approx(0.7 * 2 + 0.3 * 10)
    assert combine(jnp.array(2.0), jnp.array(10.0), 1.0) == 10
    with pytest.raises(ValueError, match=r"2 rank weights \(1.0, 2.0\).*seven"):
        total_loss(losses, [1.0, 2.0])


def test_positives_of_a_rank_are_of_other_taxa_of_the_finer_one():
    taxa = np.full((4, 7), -1, np.int32)
    taxa[:, 3:] = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 2], [0, -1, -1, -1]]
    taxa = jnp.asarray(taxa)
    similarity = jax.random.normal(jax.random.key(0), (4, 4))
    s = np.exp(np.asarray(similarity, float))
    genus = -np.log([s[0, 1] / s[0, [1, 2]].sum(), s[1, 0] / s[1, [0, 2]].sum()]).mean()
    found = neighbour_loss(similarity, taxa, (0.0, 0.0, 1.0, 0.0))
    assert float(found) == pytest.approx(genus, abs=1e-5)
    family = [1.0, 1.0, 1.0]  # the only other genus of known family is the positive
    found = neighbour_loss(similarity, taxa, (0.0, 1.0, 0.0, 0.0))
    assert float(found) == pytest.approx(float(-np.log(family).mean()), abs=1e-5)
    species = -np.log([s[i, i] / s[i, :3].sum() for i in range(3)]).mean()
    found = neighbour_loss(similarity, taxa, (0.0, 0.0, 0.0, 1.0))
    assert float(found) == pytest.approx(species, abs=1e-5)


def reference_contrastive(vectors, taxa, scale, weights):
    """The formula, pair by pair in float64."""
    rows = np.asarray(vectors, np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    total = 0.0
    for rank, weight in zip((3, 4, 5, 6), weights, strict=True):
        found = []
        for i, mine in enumerate(taxa):
            shares = {True: 0.0, False: 0.0}
            for j, other in enumerate(taxa):
                unknown = i == j or mine[rank] < 0 or other[rank] < 0
                if unknown or (rank < 6 and mine[rank + 1] == other[rank + 1] >= 0):
                    continue
                shares[bool(mine[rank] == other[rank])] += np.exp(scale * rows[i] @ rows[j])
            if shares[True]:
                found.append(-np.log(shares[True] / sum(shares.values())))
        total += weight * np.mean(found)
    return total


def test_the_contrastive_loss_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    species = rng.integers(0, 12, 24)
    taxa = np.stack([species * 0, species * 0, species * 0, *(species // n for n in (6, 4, 2, 1))], axis=1)
    taxa[rng.random(taxa.shape) < 0.1] = -1
    taxa[-2:] = -1
    taxa = taxa.astype(np.int32)
    vectors = rng.standard_normal((24, 8)).astype(np.float32) * 3
    vectors[-1] = 0.0  # a filler row
    weights = (0.1, 0.3, 1.0, 0.3)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: contrastive_loss(x, jnp.asarray(taxa), 16.0, weights)))(
        vectors
    )
    expected = reference_contrastive(vectors[:-1], taxa[:-1].tolist(), 16.0, weights)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[-2:])
    assert np.all(np.any(np.asarray(gradient[:-2]) != 0, axis=1))


def rows_of(lengths, tokens=12, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, MASKING["vocab_size"], (len(lengths), tokens)).astype(np.int32)
    ids[:, 0] = CLS
    return np.where(np.arange(tokens)[None, :] < np.array(lengths)[:, None], ids, PAD)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.lists(st.integers(1, 12), min_size=5, max_size=5))
def test_masking_selects_ordinary_tokens_and_at_least_one_per_row(seed, lengths):
    ids = rows_of(lengths)
    seen, selected = mask(jax.random.key(seed), ids)
    again, _ = mask(jax.random.key(seed), ids)
    np.testing.assert_array_equal(seen, again)
    seen, selected, ids = (np.asarray(x) for x in (seen, selected, ids))
    assert not np.any(selected & np.isin(ids, MASKING["special_ids"]))
    np.testing.assert_array_equal(selected.any(axis=1), np.array(lengths) > 1)
    np.testing.assert_array_equal(seen[~selected], ids[~selected])
    assert not np.any(np.isin(seen[selected], [UNK, PAD, CLS]))


def test_masking_shares():
    """15% of the tokens; of these 80% masked, 10% random (one in 36 by chance the same), 10% kept."""
    ids = rows_of([501] * 200, tokens=501)
    seen, selected = (np.asarray(x) for x in mask(jax.random.key(0), ids))
    ids, chosen = np.asarray(ids), selected.sum()
    assert chosen / (200 * 500) == pytest.approx(0.15, abs=0.005)
    assert (seen[selected] == MASK).sum() / chosen == pytest.approx(0.8, abs=0.015)
    assert (seen[selected] == ids[selected]).sum() / chosen == pytest.approx(0.1 + 0.1 / 36, abs=0.012)
    replaced = seen[selected & (seen != ids) & (seen != MASK)]
    assert set(replaced) == set(range(4, MASKING["vocab_size"]))


def test_another_key_masks_other_tokens():
    ids = rows_of([12] * 5)
    seen = [mask(jax.random.key(seed), ids)[0] for seed in (0, 1)]
    assert np.any(np.asarray(seen[0]) != np.asarray(seen[1]))


@pytest.mark.parametrize("special", [(UNK, PAD, CLS), tuple(range(40))])
def test_invalid_special_ids_are_refused(special):
    with pytest.raises(ValueError, match="must have mask_id 2 and leave ordinary tokens"):
        mask_tokens(jax.random.key(0), jnp.asarray(rows_of([4])), mask_id=MASK, special_ids=special, vocab_size=40)


def test_masked_lm_loss():
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((2, 5, 40)) * 4).astype(jnp.bfloat16)
    targets = rng.integers(0, 40, (2, 5)).astype(np.int32)
    selected = rng.random((2, 5)) < 0.5
    log_probs = log_softmax(np.asarray(logits, np.float64), axis=-1)
    picked = np.take_along_axis(log_probs, np.asarray(targets)[:, :, None], axis=2)[:, :, 0]
    loss = lm_loss(logits, targets, selected)
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(-picked[np.asarray(selected)].mean(), rel=1e-5)
    halves = [lm_loss(logits[i : i + 1], targets[i : i + 1], selected[i : i + 1], selected.sum()) for i in (0, 1)]
    assert sum(halves) == pytest.approx(float(loss), rel=1e-5)
    none = np.zeros_like(selected)
    value, gradient = jax.jit(jax.value_and_grad(masked_lm_loss))(logits, targets, none)
    assert value == 0
    assert not np.any(gradient)
