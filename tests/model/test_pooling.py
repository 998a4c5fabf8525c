import jax.numpy as jnp
import numpy as np
import pytest

from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.barcodes.views import Views
from bioscan_jax.embedding.step import sequence_vectors
from bioscan_jax.model.pooling import pool

IDS = jnp.array([[3, 7, 8, 9], [3, 7, 1, 1], [3, 1, 1, 1]])
HIDDEN = jnp.array(np.random.default_rng(0).standard_normal((3, 4, 5)), jnp.float32)


def expected(pooling):
    h = np.asarray(HIDDEN)
    return {
        "mean": [h[0].mean(0), h[1, :2].mean(0), h[2, 0]],
        "mean_no_cls": [h[0, 1:].mean(0), h[1, 1], h[2, 0]],
        "cls": [h[0, 0], h[1, 0], h[2, 0]],
        "max": [h[0].max(0), h[1, :2].max(0), h[2, 0]],
    }[pooling]


@pytest.mark.parametrize("pooling", ["mean", "mean_no_cls", "cls", "max"])
def test_pools_over_real_tokens_only(pooling):
    got = pool(HIDDEN, IDS, pooling, 1)
    np.testing.assert_allclose(got, np.stack(expected(pooling)), atol=1e-6)
    padded = pool(
        jnp.pad(HIDDEN, ((0, 0), (0, 3), (0, 0)), constant_values=1e9),
        jnp.pad(IDS, ((0, 0), (0, 3)), constant_values=1),
        pooling,
        1,
    )
    np.testing.assert_array_equal(got, padded)


def test_bfloat16_states_are_summed_in_float32():
    ones = jnp.ones((1, 1001, 1), jnp.bfloat16)
    ids = jnp.full((1, 1001), 7)
    assert pool(ones, ids, "mean", 1).dtype == jnp.float32
    assert pool(ones, ids, "mean", 1)[0, 0] == 1.0


def views(lengths, owner):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sequences = max(owner) + 1
    return Views(TokenRows(np.zeros(offsets[-1], np.int32), offsets), np.array(owner), np.zeros(sequences, bool))


def test_views_are_weighted_by_their_tokens():
    vectors = np.array([[1.0], [4.0], [9.0]], np.float32)
    got = sequence_vectors(vectors, views([3, 1 + 5, 4], [0, 0, 1]), range(2), "mean")
    np.testing.assert_allclose(got, [[(3 * 1 + 6 * 4) / 9], [9.0]])
    got = sequence_vectors(vectors, views([3, 1 + 5, 4], [0, 0, 1]), range(2), "mean_no_cls")
    np.testing.assert_allclose(got, [[(2 * 1 + 5 * 4) / 7], [9.0]])


def test_a_lone_view_among_many_passes_bit_for_bit():
    vectors = np.random.default_rng(0).standard_normal((30, 7)).astype(np.float32)
    owner = [0, 0, *range(1, 29)]
    got = sequence_vectors(vectors, views(list(range(2, 32)), owner), range(29), "mean")
    np.testing.assert_array_equal(got[1:], vectors[2:])
