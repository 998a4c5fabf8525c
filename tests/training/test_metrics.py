import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.training.metrics import add_predictions, dashboard_metrics, embedding_moments, no_counts

SIZES = (1, 2, 3, 4, 5, 6, 7)


def batch(seed, rows):
    rng = np.random.default_rng(seed)
    draw = [np.stack([rng.integers(-1, size, rows) for size in SIZES], axis=1).astype(np.int32) for _ in range(2)]
    return draw[0], draw[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_metrics_of_accumulated_batches_equal_the_formulas(seed, lengths):
    predicted, labels = batch(seed, sum(lengths))
    counts, start = no_counts(SIZES), 0
    for rows in lengths:
        counts = add_predictions(counts, predicted[start : start + rows], labels[start : start + rows])
        start += rows
    numbers = dashboard_metrics(counts)
    for rank, name in enumerate(RANKS):
        known = labels[:, rank] >= 0
        if not known.any():
            assert not [key for key in numbers if name in key]
            continue
        label, hit = labels[known, rank], (predicted == labels)[known, rank]
        assert numbers[f"eval/{name}_accuracy"] == pytest.approx(hit.mean())
        assert numbers[f"eval/{name}_known"] == known.sum()
        assert numbers[f"eval/{name}_majority"] == pytest.approx(
            np.unique(label, return_counts=True)[1].max() / len(label)
        )
        assert numbers[f"eval/{name}_macro_accuracy"] == pytest.approx(
            np.mean([hit[label == taxon].mean() for taxon in np.unique(label)])
        )


def test_metrics_have_the_names_of_the_dashboards():
    labels = np.zeros((2, 7), np.int32)
    labels[:, 6] = -1
    moments = embedding_moments(jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([True, True]))
    numbers = dashboard_metrics(add_predictions(no_counts(SIZES), labels, labels), moments)
    assert {key.removeprefix("eval/").rsplit("_accuracy", 1)[0] for key in numbers if key.endswith("_accuracy")} == {
        name for rank in RANKS[:6] for name in (rank, f"{rank}_macro")
    }
    assert numbers["eval/genus_accuracy"] == 1
    assert numbers["metrics/embedding_norm"] == 3
    assert numbers["metrics/embedding_mean"] == 2
    assert numbers["metrics/embedding_std"] == pytest.approx(np.std([3, 4, 0, 1]))
    assert all(type(value) is float for value in numbers.values())


def test_unmeasured_metrics_are_absent():
    assert dashboard_metrics() == {}
    nothing = embedding_moments(jnp.ones((2, 3)), jnp.zeros(2, bool))
    assert dashboard_metrics(no_counts(SIZES), nothing) == {}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 100.0]))
def test_moments_are_those_of_the_used_vectors(seed, shift):
    """Also where the mean is far larger than the spread, which a sum of squares would lose."""
    rng = np.random.default_rng(seed)
    vectors = (rng.standard_normal((20, 3)) + shift).astype(np.float32)
    used = rng.random(20) < 0.7
    used[0] = True
    kept = vectors[used].astype(np.float64)
    numbers = dashboard_metrics(moments=jax.jit(embedding_moments)(vectors, used))
    assert numbers["metrics/embedding_norm"] == pytest.approx(np.linalg.norm(kept, axis=1).mean(), rel=1e-5)
    assert numbers["metrics/embedding_mean"] == pytest.approx(kept.mean(), rel=1e-5, abs=1e-6)
    assert numbers["metrics/embedding_std"] == pytest.approx(kept.std(), rel=1e-4)


def test_filler_that_is_not_finite_does_not_matter():
    vectors = jnp.array([[3.0, 4.0], [jnp.nan, jnp.inf]])
    numbers = dashboard_metrics(moments=embedding_moments(vectors, jnp.array([True, False])))
    assert numbers["metrics/embedding_norm"] == 5
    assert np.isfinite(numbers["metrics/embedding_std"])
