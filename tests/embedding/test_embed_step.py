"""The embedding step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from bioscan_jax import config
from bioscan_jax.checkpoints.keys import random_model
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.embedding.step import CACHED_TOKENS, CompiledSteps, cached_rows, make_embed_step
from bioscan_jax.model.config import PRESETS
from bioscan_jax.model.pooling import pool
from bioscan_jax.model.transformer import first_layers

DEEP = dataclasses.replace(PRESETS["tiny-v1"], num_hidden_layers=12, hidden_size=128, intermediate_size=512)


@pytest.mark.parametrize("mesh", [config.MeshConfig(data=1), config.MeshConfig(data=2)])
def test_bfloat16_layers_are_not_widened_all_at_once_on_cpu(mesh):
    """The vectors are those of the model itself, and the program keeps no second copy of the layers."""
    layout = make_layout(mesh)
    model = random_model(DEEP, jnp.bfloat16, layout, seed=0)
    ids = np.random.default_rng(0).integers(6, 4000, (8, 16)).astype(np.int32)
    vectors = CompiledSteps(model, layout, config.EmbedConfig())(ids)
    plain = pool(model.hidden_state(jnp.asarray(ids)), jnp.asarray(ids), "mean", 1)
    np.testing.assert_allclose(vectors, plain, rtol=2e-2, atol=2e-2)
    step, state = make_embed_step(model, layout, config.EmbedConfig())
    abstract = jax.ShapeDtypeStruct(ids.shape, jnp.int32, sharding=layout.batched(2))
    memory = step.lower(state, abstract).compile().memory_analysis()
    layers = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint16)
    assert layers > 12 * 12 * 128 * 128
    assert memory.temp_size_in_bytes < layers  # half of the layers' bytes; widened, they would take twice their bytes
    before = {s.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model) for s in leaf.addressable_shards}
    after = {s.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards}
    assert after <= before  # nothing was copied


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mesh", [config.MeshConfig(data=1), config.MeshConfig(data=2, params="fsdp")])
def test_lower_layers_cost_no_copy_of_the_weights_and_free_the_others(mesh, dtype):
    layout, embed = make_layout(mesh), config.EmbedConfig(layer=11)
    model = random_model(DEEP, dtype, layout, seed=0)
    ids = np.random.default_rng(0).integers(6, 4000, (8, 16)).astype(np.int32)
    some = first_layers(model, 11)
    temporaries, vectors = [], []
    for one, settings in ((model, config.EmbedConfig()), (model, embed), (some, embed)):
        step, state = make_embed_step(one, layout, settings)
        compiled = step.lower(state, jax.device_put(ids, layout.batched(2))).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        vectors.append(np.asarray(compiled(state, jax.device_put(ids, layout.batched(2)))))
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.layers))) / 12
    assert max(temporaries) - min(temporaries) < layer / 2
    np.testing.assert_array_equal(vectors[1], vectors[2])
    plain = pool(model.hidden_state(jnp.asarray(ids), layer=11), jnp.asarray(ids), "mean", 1)
    np.testing.assert_allclose(
        vectors[1], plain, **({"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 2e-2})
    )
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(some.layers))) == 11 * layer
    for whole, cut in zip(*(jax.tree.leaves(nnx.state(one)) for one in (model, some)), strict=True):
        assert whole.sharding == cut.sharding


@pytest.mark.parametrize("data", [1, 2])
def test_one_cpu_device_computes_a_layer_in_parts_that_stay_in_its_cache(data):
    """24 rows of 64 tokens are three parts of 512 tokens; the vectors are those of the model itself."""
    layout = make_layout(config.MeshConfig(data=data))
    model = random_model(dataclasses.replace(PRESETS["tiny-v2"], initializer_range=0.15), jnp.float32, layout, seed=0)
    ids = np.random.default_rng(0).integers(6, 4000, (24, 64)).astype(np.int32)
    step, state = make_embed_step(model, layout, config.EmbedConfig())
    assert ("length=3" in str(step.trace(state, ids).jaxpr)) == (data == 1)
    plain = np.asarray(pool(model.hidden_state(jnp.asarray(ids)), jnp.asarray(ids), "mean", 1))
    assert np.abs(CompiledSteps(model, layout, config.EmbedConfig())(ids) - plain).max() < 1e-5 * np.abs(plain).max()


@given(st.integers(1, 300), st.integers(1, 2048))
def test_rows_at_a_time_are_the_most_that_fit_and_divide(rows, tokens):
    fitting = [some for some in range(1, rows + 1) if rows % some == 0 and some * tokens <= CACHED_TOKENS]
    assert cached_rows(rows, tokens) == max(fitting, default=1)
