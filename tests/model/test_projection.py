import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.projections import project_in_float64, random_inputs, random_projection

from bioscan_jax.errors import InputError
from bioscan_jax.model.projection import ProjectionInputs

NETWORKS = ((16, 8, None), (12, 10, 3.0))


VECTORS = np.random.default_rng(1).standard_normal((7, 64)).astype(np.float32)


@pytest.mark.parametrize(
    ("networks", "weights", "dimension"),
    [
        ((), (1.0,), 24),
        (NETWORKS, (1.0, 0.5, 2.0), 42),
        (NETWORKS, (0.0, 1.0, 0.5), 18),
        (NETWORKS, (0.7, 0.0, 1.0), 34),
    ],
)
def test_projects_as_in_float64(networks, weights, dimension):
    projection = random_projection(networks=networks, weights=weights)
    assert (projection.features, projection.dimension) == (64, dimension)
    got = jax.jit(lambda projection, x: projection(x))(projection, jnp.asarray(VECTORS))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, project_in_float64(projection, VECTORS), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_half_precision_vectors_are_projected_in_float32():
    projection = random_projection()
    half = jnp.asarray(VECTORS, jnp.bfloat16)
    assert projection(half).dtype == jnp.float32
    np.testing.assert_array_equal(projection(half), projection(half.astype(jnp.float32)))


def test_a_vector_that_whitens_to_zero_stays_zero():
    projection = random_projection()
    assert not np.asarray(projection(jnp.asarray(projection.mean)[None])).any()


def test_gradients_reach_every_array():
    projection = random_projection(networks=NETWORKS)
    gradients = jax.grad(lambda one: jnp.sum(one(jnp.asarray(VECTORS))[:, :9]))(projection)
    assert all(np.asarray(array).any() for array in jax.tree.leaves(gradients))


def test_identity_covers_numbers_and_settings_but_not_the_description():
    projection = random_projection(networks=NETWORKS)
    assert projection.sha256 == random_projection(networks=NETWORKS, description="other").sha256
    others = [
        dataclasses.replace(projection, mean=projection.mean + 1e-6),
        dataclasses.replace(projection, weights=(1.0, 1.0, 0.5)),
        dataclasses.replace(projection, inputs=random_inputs(phases=1)),
        random_projection(networks=((16, 8, 2.0), NETWORKS[1])),
    ]
    assert len({projection.sha256, *(one.sha256 for one in others)}) == 5


def test_inputs_of_a_plan_and_what_differs():
    plan = {
        "model": {"weights_sha256": "0" * 64, "dtype": "float32"},
        "embed": {"pooling": "mean", "layer": 0, "strand": "forward", "phases": 6},
        "data": {"max_tokens": 2048, "overlong": "truncate", "block_rows": 8192},
    }
    assert ProjectionInputs.from_plan(plan) == random_inputs()
    random_inputs().check(ProjectionInputs.from_plan(plan), "table", "fix")
    with pytest.raises(InputError, match=r"table: .*phases 6.*fitted on phases 1; pass 6"):
        random_inputs(phases=1).check(random_inputs(), "table", "pass 6")
    with pytest.raises(InputError, match="weights_sha256 000000000000, .* weights_sha256 aaaaaaaaaaaa; fix"):
        random_inputs(weights_sha256="a" * 64).check(random_inputs(), "table", "fix")
    with pytest.raises(InputError, match="adapter_sha256 None"):
        random_inputs(adapter_sha256="a" * 64).check(random_inputs(), "table", "fix")
