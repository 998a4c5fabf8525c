"""Live comparison with PyTorch: every file form, every hidden state, logits, pooled vector; both precisions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bioscan_jax import config
from bioscan_jax.checkpoints.keys import load_model
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.model.config import PRESETS, read_config
from bioscan_jax.model.pooling import pool

pytestmark = pytest.mark.parity

FLOAT32_BOUND = 1e-5
"""Largest difference over largest value."""
BFLOAT16_BOUND = 3e-2
"""The same for bfloat16 parameters and activations, two layers, against float32 PyTorch."""

LENGTHS = (40, 23, 7, 2, 33)


@pytest.fixture(scope="module", params=["v1", "v2"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def ids(family):
    """Random rows with every kind of token: 6-mers, single letters, N, mask."""
    transformer = PRESETS[f"tiny-{family}"]
    rng = np.random.default_rng(7)
    ids = rng.integers(4 if family == "v1" else 6, transformer.vocab_size, (len(LENGTHS), max(LENGTHS)))
    ids[:, 0] = 3
    ids[0, [5, 9]] = transformer.mask_token_id
    ids[1, 3:6] = transformer.vocab_size - 1
    for row, length in enumerate(LENGTHS):
        ids[row, length:] = transformer.pad_token_id
    return ids


def relative(ours, theirs, real=None):
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
    if real is not None:
        ours, theirs = ours[..., real, :], theirs[..., real, :]
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
    ("form", "eps"),
    [
        ("safetensors", 1e-12),
        ("sharded safetensors", 1e-12),
        ("bin", 1e-12),
        ("sharded bin", 1e-12),
        pytest.param("bin", 1e-5, id="eps of the original JAX code"),
    ],
)
def test_float32_agrees(family, form, eps, ids, tmp_path):
    from support.golden import reference_outputs
    from support.torch_models import save_checkpoint, torch_model

    transformer = dataclasses.replace(PRESETS[f"tiny-{family}"], layer_norm_eps=eps)
    reference = torch_model(transformer, seed=3)
    save_checkpoint(reference, transformer, tmp_path, form.replace(" ", "-"))
    assert read_config(tmp_path) == transformer
    model = load_model(tmp_path, transformer, jnp.float32, make_layout(config.MeshConfig(data=1)), lm_head=True)
    expected = reference_outputs(reference, ids, transformer.pad_token_id)
    real = ids != transformer.pad_token_id
    states = np.asarray(model.hidden_states(jnp.asarray(ids)))
    for ours, theirs in zip(states, expected["hidden"], strict=True):
        assert relative(ours, theirs, real) < FLOAT32_BOUND
    last = model.hidden_state(jnp.asarray(ids))
    assert relative(model.logits(last), expected["logits"], real) < FLOAT32_BOUND
    assert relative(pool(last, jnp.asarray(ids), "mean", transformer.pad_token_id), expected["pooled"]) < FLOAT32_BOUND
    middle = model.hidden_state(jnp.asarray(ids), layer=1)
    assert relative(middle, expected["hidden"][1], real) < FLOAT32_BOUND


def test_bfloat16_stays_within_its_bound(family, ids, tmp_path):
    from support.golden import reference_outputs
    from support.torch_models import save_checkpoint, torch_model

    transformer = PRESETS[f"tiny-{family}"]
    reference = torch_model(transformer, seed=4)
    save_checkpoint(reference, transformer, tmp_path, "safetensors")
    model = load_model(tmp_path, transformer, jnp.bfloat16, make_layout(config.MeshConfig(data=1)))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    expected = reference_outputs(reference, ids, transformer.pad_token_id)
    last = model.hidden_state(jnp.asarray(ids))
    pooled = pool(last, jnp.asarray(ids), "mean", transformer.pad_token_id)
    assert pooled.dtype == jnp.float32
    assert relative(last, expected["hidden"][-1], ids != transformer.pad_token_id) < BFLOAT16_BOUND
    assert relative(pooled, expected["pooled"]) < BFLOAT16_BOUND
