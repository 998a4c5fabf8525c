"""The optimizer step: which parameters it changes, and that devices and micro-batches do not matter."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.taxa import flat_tree

from bioscan_jax import config
from bioscan_jax.checkpoints.keys import random_model
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.model.classifier import abstract_classifier, make_classifier, named_arrays
from bioscan_jax.model.config import PRESETS
from bioscan_jax.training.batches import ExampleBatch
from bioscan_jax.training.losses import rank_losses, total_loss
from bioscan_jax.training.step import (
    abstract_arguments,
    init_optimizer,
    learning_rate,
    make_optimizer,
    make_train_step,
    microbatch_shape,
    place,
    split_trainable,
)

TINY = dataclasses.replace(PRESETS["tiny-v2"], hidden_size=32, intermediate_size=64, initializer_range=0.1)
TREE = flat_tree(48, (1, 2, 2, 4, 8, 16))
STEPS = 100
TRAIN = config.TrainConfig(learning_rate=5e-3, warmup_steps=2, seed=3)
LORA = config.LoRAConfig(rank=4, dropout=0.3)


def batch_of(number, rows=12, width=24):
    """A batch with unknown ranks, missing metadata and a filler row at its end."""
    rng = np.random.default_rng(number)
    ids = rng.integers(6, TINY.vocab_size, (rows, width)).astype(np.int32)
    ids[:, 0] = 3
    lengths = rng.integers(6, width, rows)
    lengths[-1] = 1
    ids[np.arange(width)[None] >= lengths[:, None]] = 1
    labels = TREE.leaf_paths[ids[:, 1] % 48].copy()
    labels[rng.random(labels.shape) < 0.2] = -1
    labels[-1] = -1
    metadata = rng.uniform(0, 80, (rows, 3)).astype(np.float32)
    metadata[rng.random(metadata.shape) < 0.2] = np.nan
    return ExampleBatch(np.append(np.arange(rows - 1), -1), ids, labels, metadata)


def model_on(mesh, loss=None, train=TRAIN, lora=LORA, dtype=jnp.float32):
    return cached_model(mesh, loss or config.LossConfig(), train, lora, dtype)


@functools.cache
def cached_model(mesh, loss, train, lora, dtype):
    taxonomic = train.objective == "taxonomy"
    layout = make_layout(mesh)
    trunk = random_model(TINY, dtype, layout, seed=0, lm_head=not taxonomic)
    tree = TREE if taxonomic else None
    classifier = make_classifier(trunk, loss, lora if train.mode == "lora" else None, tree, layout, seed=train.seed)
    return split_trainable(classifier, layout, loss, train, tree=tree, special_ids=(0, 1, 2, 3))


step_of = functools.cache(make_train_step)
"""One compiled step for each model, shared by the tests."""


def train_on(model, steps, batches=batch_of, params=None):
    params = params or jax.tree.map(jnp.copy, named_arrays(model.trained))
    state = init_optimizer(model, STEPS, params)
    step = step_of(model, STEPS)
    found = []
    for number in range(steps):
        placed = place(batches(number), model.layout, model.train.batch_tokens, pad=1)
        params, state, metrics = step(params, state, model.frozen, jnp.uint32(number), placed)
        found.append(jax.device_get(metrics))
    return params, found


@pytest.fixture(scope="module")
def alone():
    """Losses and parameters on one device, without micro-batches."""
    params, metrics = train_on(model_on(config.MeshConfig(data=1)), 20)
    return jax.device_get(params), [n.loss for n in metrics]


MESHES = [
    config.MeshConfig(data=8, params="fsdp"),
    pytest.param(config.MeshConfig(data=1, params="fsdp"), marks=pytest.mark.slow),
    pytest.param(config.MeshConfig(data=2), marks=pytest.mark.slow),
    pytest.param(config.MeshConfig(data=8), marks=pytest.mark.slow),
    pytest.param(config.MeshConfig(data=2, params="fsdp"), marks=pytest.mark.slow),
    pytest.param(config.MeshConfig(data=4, model=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh", MESHES)
def test_devices_and_micro_batches_do_not_change_20_steps(alone, mesh):
    """Losses within 1e-5 relative; a budget of one row per device divides each batch into micro-batches."""
    train = dataclasses.replace(TRAIN, batch_tokens=24)
    model = model_on(mesh, train=train)
    assert microbatch_shape(12, 24, mesh.data, 24) == {8: (2, 8), 2: (6, 2), 4: (3, 4), 1: (12, 1)}[mesh.data]
    params, metrics = train_on(model, 20)
    np.testing.assert_allclose([n.loss for n in metrics], alone[1], rtol=1e-5)
    for name, value in jax.device_get(params).items():
        np.testing.assert_allclose(value, alone[0][name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_devices_and_micro_batches_do_not_change_cosine_and_contrastive_losses():
    """One device with whole batches, and eight with micro-batches, whose vectors are computed before their gradients."""
    loss, found = config.LossConfig(head="cosine", contrastive=0.5), []
    for mesh, train in (
        (config.MeshConfig(data=1), TRAIN),
        (config.MeshConfig(data=8, params="fsdp"), dataclasses.replace(TRAIN, batch_tokens=24)),
    ):
        params, metrics = train_on(model_on(mesh, loss, train), 12, lambda number: batch_of(number % 2))
        found.append((jax.device_get(params), np.array([(n.loss, n.contrastive, n.gradient_norm) for n in metrics])))
    (params, alone), (others, divided) = found
    np.testing.assert_allclose(alone, divided, rtol=1e-4)
    np.testing.assert_allclose(alone[:, :2], divided[:, :2], rtol=1e-5)
    for name, value in params.items():
        if "kingdom" not in name:  # a softmax over one class, whose gradient is rounding that Adam scales up
            np.testing.assert_allclose(value, others[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert np.all(alone[-2:].mean(axis=0)[:2] < 0.9 * alone[:2].mean(axis=0)[:2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_learns_and_keeps_frozen_parameters(dtype):
    model = model_on(config.MeshConfig(data=1), dtype=dtype)
    before = jax.device_get(jax.tree.leaves(model.frozen))
    assert {leaf.dtype for leaf in before} == {jnp.dtype(dtype)}
    params, metrics = train_on(model, 20, lambda number: batch_of(number % 2))
    assert metrics[-1].loss < 0.6 * metrics[0].loss
    for old, new in zip(before, jax.device_get(jax.tree.leaves(model.frozen)), strict=True):
        np.testing.assert_array_equal(old, new)
    started = named_arrays(model.trained)
    assert {name.rpartition(".")[2] for name in params} == {"a", "b", "kernel", "bias"}
    assert all(np.abs(params[name] - started[name]).max() > 0 for name in params)
    assert all(value.dtype == jnp.float32 for value in params.values())


def test_the_first_loss_is_that_of_the_heads_on_the_unadapted_model():
    model = model_on(config.MeshConfig(data=1))  # with dropout: b is zero, so nothing that is dropped matters yet
    _, [metrics] = train_on(model, 1)
    batch = batch_of(0)
    classifier = model.merge(named_arrays(model.trained), model.frozen)
    plain = random_model(TINY, jnp.float32, model.layout, seed=0)
    hidden = np.asarray(jax.jit(plain.hidden_state)(batch.ids))
    real = (batch.ids != 1)[:, :, None]
    pooled = np.where(real, hidden, 0).sum(axis=1) / real.sum(axis=1).astype(np.float32)
    losses = jax.jit(lambda vectors, labels: rank_losses(classifier.head.of_labels(vectors, labels), labels))(
        pooled, batch.labels
    )
    np.testing.assert_allclose(metrics.rank_losses, losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, total_loss(losses), rtol=1e-5)
    np.testing.assert_array_equal(metrics.known_rows, (batch.labels >= 0).sum(axis=0))
    assert metrics.moments.rows == 11  # the filler row is not counted
    np.testing.assert_allclose(metrics.moments.norm, np.linalg.norm(pooled[:11], axis=1).mean(), rtol=1e-5)


def test_a_loss_that_is_not_finite_changes_nothing():
    model = model_on(config.MeshConfig(data=1))
    started = jax.device_get(named_arrays(model.trained))
    name = "trunk.layers.attention.query.b"
    started[name] = np.full_like(started[name], np.nan)
    params, [metrics] = train_on(model, 1, params={n: jnp.asarray(value) for n, value in started.items()})
    assert not metrics.finite
    assert np.isnan(metrics.loss)
    for name, value in params.items():
        np.testing.assert_array_equal(value, started[name])


def test_metadata_is_a_share_of_the_loss_and_learns():
    loss = config.LossConfig(metadata=True, head="independent", metadata_weight=0.4)
    model = model_on(config.MeshConfig(data=1), loss, lora=dataclasses.replace(LORA, dropout=0.0))
    params, metrics = train_on(model, 2)
    batch = batch_of(0)
    classifier = model.merge(named_arrays(model.trained), model.frozen)
    others = jax.jit(lambda given, labels: rank_losses(classifier.encoder.of_labels(given, labels), labels))(
        batch.metadata, batch.labels
    )
    total = 0.6 * (metrics[0].rank_losses * np.array(loss.rank_weights)).sum() + 0.4 * total_loss(others)
    np.testing.assert_allclose(metrics[0].loss, total, rtol=1e-5)
    moved = [name for name, value in named_arrays(model.trained).items() if np.abs(params[name] - value).max() > 0]
    assert any(name.startswith("encoder.first") for name in moved)


def test_masked_language_modelling_trains_the_whole_model():
    train = dataclasses.replace(TRAIN, mode="full", objective="mlm", learning_rate=2e-2)
    model = model_on(config.MeshConfig(data=1), train=train)
    assert not jax.tree.leaves(model.frozen)
    params, metrics = train_on(model, 25, lambda number: batch_of(number % 3))
    assert metrics[0].loss == pytest.approx(np.log(TINY.vocab_size), rel=0.1)
    assert metrics[-1].loss < metrics[0].loss - 1.0
    assert np.all(metrics[0].rank_losses == 0)
    still = {n for n, value in named_arrays(model.trained).items() if np.abs(params[n] - value).max() == 0}
    assert not still, still


def test_the_learning_rate_warms_up_and_falls():
    rate = learning_rate(config.TrainConfig(), 5000)
    assert float(rate(0)) == 0.0
    np.testing.assert_allclose([rate(250), rate(500), rate(2750), rate(5000)], [1e-4, 2e-4, 1e-4, 0.0], atol=1e-9)
    assert float(learning_rate(config.TrainConfig(), 100)(50)) == pytest.approx(2e-4)  # a short run still gets there


def test_biases_and_norms_do_not_decay():
    params = {"x.kernel": jnp.ones(2), "x.bias": jnp.ones(2), "norm.scale": jnp.ones(2), "x.a": jnp.ones(2)}
    optimizer = make_optimizer(config.TrainConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), 10)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {name for name, update in updates.items() if np.abs(update).max() > 0}
    assert moved == {"x.kernel", "x.a"}
    clipped, _ = optax.clip_by_global_norm(1.0).update({"g": jnp.full(4, 5.0)}, optax.EmptyState())
    assert float(optax.tree.norm(clipped)) == pytest.approx(1.0)


def test_the_2_5b_step_sums_nothing_but_gradients_of_adapters_and_heads():
    """NT-2.5B, bfloat16, eight devices, full size without allocation: what the devices send each other."""
    layout, loss, train = make_layout(config.MeshConfig()), config.LossConfig(), config.TrainConfig(remat="layer")
    tree = flat_tree(5000)
    abstract = abstract_classifier(PRESETS["nt-v1-2.5b"], jnp.bfloat16, loss, config.LoRAConfig(), tree)
    model = split_trainable(abstract, layout, loss, train, tree=tree, special_ids=(0, 1, 2, 3))
    frozen = {leaf.dtype for leaf in jax.tree.leaves(model.frozen)}
    assert frozen == {jnp.dtype(jnp.bfloat16)}
    lowered = make_train_step(model, STEPS).lower(*abstract_arguments(model, STEPS, 1, 32, 128))
    hlo = lowered.compile().as_text()
    sent = re.findall(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", hlo)
    assert {kind for _, kind in sent} == {"all-reduce"}
    shapes = [shape for shape, _ in sent]
    assert not re.search(r"bf16|f16", " ".join(shapes))
    sizes = {tuple(map(int, dims.split(","))) for s in shapes for dims in re.findall(r"f32\[([\d,]+)\]", s)}
    adapters = {(2560, 16), (16, 2560)}
    heads = {(2560, 5120), (5120, 2560), (5120,)}
    assert sizes <= adapters | heads | {(7,)}
    assert adapters <= sizes
    assert sizes & heads


def test_frozen_parameters_are_not_differentiated():
    """The backward pass of a LoRA step costs what the forward one does: no product for a frozen kernel's gradient."""
    model = model_on(config.MeshConfig(data=1))
    text = step_of(model, STEPS).lower(*abstract_arguments(model, STEPS, 1, 8, 24)).as_text()
    outputs = re.findall(r"dot_general.*-> tensor<([^>]*)>", text)
    assert outputs
    assert not [o for o in outputs if o in ("32x32xf32", "32x2x64xf32", "64x32xf32", "2x64x32xf32")]
    whole = model_on(config.MeshConfig(data=1), train=dataclasses.replace(TRAIN, mode="full"))
    text = make_train_step(whole, STEPS).lower(*abstract_arguments(whole, STEPS, 1, 8, 24)).as_text()
    outputs = re.findall(r"dot_general.*-> tensor<([^>]*)>", text)
    assert [o for o in outputs if o == "32x32xf32"]


def test_trained_parameters_are_plain_arrays(alone):
    model = model_on(config.MeshConfig(data=1))
    assert set(named_arrays(model.trained)) == set(alone[0])
    assert not isinstance(next(iter(named_arrays(model.trained).values())), nnx.Variable)
