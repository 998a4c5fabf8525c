"""Runs on whatever `jax.devices()` gives: an accelerator that is here, or the CPU.

`pytest -m device tests/device` needs JAX, flax, optax, orbax and pyarrow; not Lance, grain or DuckDB.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden import golden_config
from support.places import GOLDEN
from support.projections import project_in_float64, write_projected_model
from support.taxa import flat_tree

import bioscan_jax as bj
from bioscan_jax import config
from bioscan_jax.checkpoints.keys import random_model
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.errors import InputError
from bioscan_jax.model.attention import attention_function, attention_setting, choose_attention
from bioscan_jax.model.classifier import make_classifier, named_arrays
from bioscan_jax.model.config import PRESETS
from bioscan_jax.training.batches import ExampleBatch
from bioscan_jax.training.run_directory import RunDirectory
from bioscan_jax.training.state import Progress, open_checkpoints
from bioscan_jax.training.step import init_optimizer, make_train_step, place, split_trainable

pytestmark = pytest.mark.device

TREE = flat_tree(48, (1, 2, 2, 4, 8, 16))
STEPS = 20


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_fifty_rows_are_embedded_as_by_pytorch(family, dtype, bound):
    """Ten copies of five sequences, each computed, against float32 vectors that PyTorch wrote into a file."""
    model = bj.load(GOLDEN / family, dtype=dtype)
    assert model.config == golden_config(family)
    sequences = json.loads((GOLDEN / family / "sequences.json").read_text())
    vectors = model.encode(sequences * 10, deduplicate=False)
    expected = np.load(GOLDEN / family / "outputs.npz")["pooled"]
    assert relative(vectors, np.tile(expected, (10, 1))) < bound


def fused_kind(setting):
    """The kernel that this device has instead of dense attention; splash emulated where it has none."""
    for kind in ("splash", "cudnn"):
        try:
            return choose_attention(kind, setting, 512)
        except InputError:
            continue
    return "interpreted"


@functools.partial(jax.jit, static_argnums=2)
def attended_with_gradients(qkv, mask, kind):
    def loss(qkv):
        attended = attention_function(kind, None)(*qkv, mask)
        real = jnp.where(mask[:, :, None, None], attended.astype(jnp.float32), 0.0)
        return jnp.sum(jnp.sin(real)), real

    gradients, real = jax.grad(loss, has_aux=True)(qkv)
    return real, gradients


@pytest.mark.parametrize(("head_dim", "tokens"), [(32, 512), (64, 1000), (128, 1000)])
def test_fused_attention_is_dense_attention(head_dim, tokens):
    """In bfloat16, values and gradients no further from float32 than twice what dense attention is."""
    heads, kind = 2, fused_kind(attention_setting(None, heads=2, head_dim=head_dim, dtype=jnp.bfloat16))
    if kind == "interpreted":
        heads, tokens = 1, tokens // 4  # emulation is slow
    lengths = jnp.array([tokens, 1, tokens // 3, tokens - 1])
    exact = [jax.random.normal(jax.random.key(i), (4, tokens, heads, head_dim)) for i in range(3)]
    exact = tuple(x.astype(jnp.bfloat16).astype(jnp.float32) for x in exact)
    mask = jnp.arange(tokens)[None] < lengths[:, None]
    with jax.default_matmul_precision("highest"):
        truth = attended_with_gradients(exact, mask, "dense")
    rounded = exact[0], *(x.astype(jnp.bfloat16) for x in exact[1:])
    dense, fused = (attended_with_gradients(rounded, mask, one) for one in ("dense", kind))
    for ours, theirs, right in zip(*map(jax.tree.leaves, (fused, dense, truth)), strict=True):
        assert np.isfinite(np.asarray(ours, np.float32)).all()
        assert relative(ours, right) < max(2 * relative(theirs, right), 0.01)


@functools.cache
def trainable(dtype):
    train = config.TrainConfig(learning_rate=5e-3, warmup_steps=2, seed=3)
    layout, loss = make_layout(config.MeshConfig()), config.LossConfig()
    transformer = dataclasses.replace(PRESETS["tiny-v2"], initializer_range=0.1)
    trunk = random_model(transformer, dtype, layout, seed=0)
    lora = config.LoRAConfig(rank=4)
    classifier = make_classifier(trunk, loss, lora, TREE, layout, seed=train.seed)
    return split_trainable(classifier, layout, loss, train, tree=TREE, special_ids=(0, 1, 2, 3))


def placed_batch(model, number):
    """Rows whose labels can be read off their second token."""
    rng = np.random.default_rng(number % 2)
    ids = rng.integers(6, model.transformer.vocab_size, (8, 112)).astype(np.int32)
    ids[:, 0] = 3
    ids[np.arange(112)[None] >= rng.integers(8, 113, 8)[:, None]] = 1
    labels, metadata = TREE.leaf_paths[ids[:, 1] % 48], np.full((8, 3), np.nan, np.float32)
    return place(ExampleBatch(np.arange(8), ids, labels, metadata), model.layout, 1 << 20, pad=1)


step_of = functools.cache(make_train_step)
"""One compiled step for each model."""


def trained(model, params, state, numbers):
    """Parameters, the optimizer's state and the losses after the steps of these numbers."""
    step, losses = step_of(model, STEPS), []
    for number in numbers:
        params, state, metrics = step(params, state, model.frozen, jnp.uint32(number), placed_batch(model, number))
        losses.append(float(metrics.loss))
        assert bool(metrics.finite)
    return params, state, losses


def start(model):
    params = jax.tree.map(jnp.copy, named_arrays(model.trained))
    return params, init_optimizer(model, STEPS, params)


def test_adapters_and_heads_learn_and_the_rest_is_kept():
    losses = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = trainable(dtype)
        frozen, before = jax.device_get((model.frozen, named_arrays(model.trained)))
        params, _, losses[dtype] = trained(model, *start(model), range(8))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.frozen), frozen)
        assert all(np.any(np.asarray(params[name]) != value) for name, value in before.items())
        assert losses[dtype][-1] < 0.95 * losses[dtype][0]
    np.testing.assert_allclose(losses[jnp.bfloat16][:3], losses[jnp.float32][:3], rtol=0.02)


def test_a_run_that_is_resumed_continues_as_if_it_had_not_stopped(tmp_path):
    directory = RunDirectory(name=str(tmp_path), local=tmp_path)
    model = trainable(jnp.bfloat16 if jax.default_backend() != "cpu" else jnp.float32)
    whole, _, losses = trained(model, *start(model), range(4))
    params, state, _ = trained(model, *start(model), range(2))
    with open_checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(Progress(step=2), {"params": params, "optimizer": state}, wait=True)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), {"params": params, "optimizer": state}
    )
    del params, state
    with open_checkpoints(directory, keep=1) as checkpoints:
        assert checkpoints.latest().step == 2
        again = checkpoints.restore(2, shapes)
    params, _, after = trained(model, again["params"], again["optimizer"], range(2, 4))
    np.testing.assert_allclose(after, losses[2:], rtol=1e-5)
    for name, value in whole.items():
        np.testing.assert_allclose(np.asarray(params[name]), np.asarray(value), rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("layers", [0, 2])
def test_vectors_are_projected_in_float32(tmp_path, layers):
    """Also without layers, where token counts are multiplied with the embeddings instead of pooling them."""
    projection = write_projected_model(tmp_path, layers=layers, networks=((16, 8, None), (12, 10, 3.0)), layer=layers)
    sequences = ["".join(np.random.default_rng(n).choice(list("ACGT"), 60 + 7 * n)) for n in range(50)]
    raw = bj.load(tmp_path, projection="none", dtype="float32")
    settings = {"pooling": "mean", "layer": layers, "phases": 6}
    expected = project_in_float64(projection, raw.encode(sequences, **settings))
    got = bj.load(tmp_path, dtype="float32").encode(sequences)
    np.testing.assert_allclose(got, expected, atol=1e-5)
