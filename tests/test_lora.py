"""Adapters: nothing changes at first, they merge exactly, and they learn as PEFT's do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bioscan_jax import config
from bioscan_jax.errors import InputError
from bioscan_jax.model.config import PRESETS
from bioscan_jax.model.lora import TARGETS, LoRALinear, add_adapters, merge_adapters, resolve_targets
from bioscan_jax.model.weights import load_model, random_model
from bioscan_jax.pooling import pool
from bioscan_jax.sharding import make_layout

ONE = config.Mesh(data=1)
EVERY = config.LoRA(rank=4, alpha=8.0, dropout=0.0, targets=("all_linear",))
PEFT_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "feed_forward_in": "intermediate.dense",
    "feed_forward_out": "output.dense",
}


def rows(transformer, seed=0):
    ids = np.random.default_rng(seed).integers(6, transformer.vocab_size, (4, 19))
    ids[:, 0] = 3
    ids[1, 11:] = 1
    ids[3, 5:] = 1
    return ids


@pytest.fixture(params=["v1", "v2"])
def model(request):
    transformer = dataclasses.replace(PRESETS[f"tiny-{request.param}"], initializer_range=0.15)
    return random_model(transformer, jnp.float32, make_layout(ONE), seed=0)


def adapters(model):
    return nnx.state(model, nnx.LoRAParam)


def randomised(model, scale=0.1):
    """Gives b values, as training would."""
    rng = np.random.default_rng(1)
    for attribute in TARGETS.values():
        layer = getattr(getattr(model.layers, attribute[0]), attribute[1])
        if isinstance(layer, LoRALinear):
            layer.b[...] = jnp.asarray(scale * rng.standard_normal(layer.b[...].shape), jnp.float32)


def test_a_new_adapter_changes_nothing(model):
    ids = jnp.asarray(rows(model.config))
    before = model.hidden_state(ids)
    add_adapters(model, EVERY, nnx.Rngs(0))
    np.testing.assert_array_equal(before, model.hidden_state(ids))
    shapes = {leaf.dtype for leaf in jax.tree.leaves(adapters(model))}
    assert shapes == {jnp.dtype("float32")}
    assert len(jax.tree.leaves(adapters(model))) == 2 * len(TARGETS)


def test_merging_gives_the_same_states(model):
    ids = jnp.asarray(rows(model.config))
    plain = model.hidden_state(ids)
    add_adapters(model, EVERY, nnx.Rngs(0))
    randomised(model)
    adapted = model.hidden_state(ids)
    merge_adapters(model)
    assert not jax.tree.leaves(adapters(model))
    merged = model.hidden_state(ids)
    assert np.abs(adapted - plain).max() > 0.1
    assert np.abs(merged - adapted).max() / np.abs(adapted).max() < 1e-5


def test_only_adapters_get_gradients_and_dropout_acts(model):
    add_adapters(model, dataclasses.replace(EVERY, dropout=0.5), nnx.Rngs(0))
    randomised(model)
    ids = jnp.asarray(rows(model.config))
    graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)

    direction = jnp.cos(jnp.arange(64.0))[None, None, :]

    def loss(trainable, keys, remat=True):
        hidden = nnx.merge(graph, trainable, frozen).hidden_state(ids, keys=keys, remat=remat)
        return jnp.sum(hidden * direction)

    gradient = jax.grad(loss)(trainable, None)
    assert jax.tree.structure(gradient) == jax.tree.structure(trainable)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    first, again, other = (loss(trainable, jax.random.split(jax.random.key(k), len(ids))) for k in (0, 0, 1))
    assert first == again != other
    kept = jax.grad(lambda t: loss(t, None, remat=False))(trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), kept, gradient)


def test_what_is_dropped_for_a_row_does_not_depend_on_its_batch(model):
    add_adapters(model, dataclasses.replace(EVERY, dropout=0.5), nnx.Rngs(0))
    randomised(model)
    ids, keys = jnp.asarray(rows(model.config)), jax.random.split(jax.random.key(0), 4)
    whole = model.hidden_state(ids, keys=keys)
    part = model.hidden_state(ids[2:], keys=keys[2:])
    np.testing.assert_allclose(part, whole[2:], rtol=1e-5, atol=1e-5)


def test_adapters_are_stacked_with_the_layers(model):
    add_adapters(model, config.LoRA(rank=3, targets=("query", "feed_forward_in")), nnx.Rngs(0))
    up = model.layers.feed_forward.up
    assert up.a[...].shape == (2, 64, 3)
    assert up.b[...].shape == (2, 3, *up.base.kernel[...].shape[2:])
    assert model.layers.attention.query.scaling == 32.0 / 3
    assert not isinstance(model.layers.attention.key, LoRALinear)


def test_targets():
    assert resolve_targets(("value", "query")) == ("query", "value")
    assert resolve_targets(("all_linear",)) == tuple(TARGETS)
    with pytest.raises(InputError, match=r"--lora.targets 'dense' is unknown; known are query, key"):
        resolve_targets(("dense",))
    with pytest.raises(InputError, match="names no layer"):
        resolve_targets(())


def test_a_second_adapter_is_refused(model):
    add_adapters(model, EVERY, nnx.Rngs(0))
    with pytest.raises(InputError, match="'query' has an adapter already"):
        add_adapters(model, EVERY, nnx.Rngs(0))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_gradients_and_sgd_agree_with_peft(family, tmp_path):
    """Every target, float32: gradients within 1e-4 relative, and the adapters still after 20 steps of SGD."""
    import torch
    from peft import LoraConfig, get_peft_model
    from reference import save_checkpoint, torch_model

    transformer = PRESETS[f"tiny-{family}"]
    reference = torch_model(transformer, seed=2)
    save_checkpoint(reference, transformer, tmp_path, "safetensors")
    ours = load_model(tmp_path, transformer, jnp.float32, make_layout(ONE))
    add_adapters(ours, EVERY, nnx.Rngs(3))
    randomised(ours, 0.05)
    targets = r"esm\.encoder\.layer\.\d+\.(" + "|".join(PEFT_NAMES.values()).replace(".", r"\.") + ")"
    theirs = get_peft_model(reference, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)).eval()

    def pairs():
        """Our array, their parameter, whether one is the other's transpose, for each adapter of each layer."""
        named = dict(theirs.named_parameters())
        for name, (parent, attribute) in TARGETS.items():
            for i in range(transformer.num_hidden_layers):
                stem = f"base_model.model.esm.encoder.layer.{i}.{PEFT_NAMES[name]}"
                path = ("layers", parent, attribute)
                yield (*path, "a"), i, named[f"{stem}.lora_A.default.weight"]
                yield (*path, "b"), i, named[f"{stem}.lora_B.default.weight"]

    state = dict(nnx.to_flat_state(adapters(ours)))
    with torch.no_grad():
        for path, i, parameter in pairs():
            value = np.asarray(state[path].get_value()[i])
            parameter.copy_(torch.tensor(value.reshape(value.shape[0], -1).T.copy()))
    ids = rows(transformer)
    target = np.random.default_rng(5).standard_normal((4, transformer.hidden_size)).astype(np.float32)
    mask = torch.tensor(ids != 1)

    def torch_loss():
        hidden = theirs.base_model.model.esm(torch.tensor(ids), attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return ((pooled - torch.tensor(target)) ** 2).mean()

    graph, trainable, frozen = nnx.split(ours, nnx.LoRAParam, ...)

    @jax.jit
    def value_and_gradient(trainable):
        def loss(trainable):
            hidden = nnx.merge(graph, trainable, frozen).hidden_state(jnp.asarray(ids))
            return jnp.mean((pool(hidden, jnp.asarray(ids), "mean", 1) - target) ** 2)

        return jax.value_and_grad(loss)(trainable)

    def compare(state, of, bound):
        flat = dict(nnx.to_flat_state(state))
        largest = max(np.abs(of(p).detach().numpy()).max() for _, _, p in pairs())
        for path, i, parameter in pairs():
            mine = np.asarray(flat[path].get_value()[i])
            other = of(parameter).detach().numpy().T.reshape(mine.shape)
            assert np.abs(mine - other).max() / largest < bound, path

    optimizer = torch.optim.SGD([p for _, _, p in pairs()], lr=0.1)
    for step in range(20):
        value, gradient = value_and_gradient(trainable)
        optimizer.zero_grad()
        expected = torch_loss()
        expected.backward()
        assert float(value) == pytest.approx(expected.item(), rel=1e-4)
        if step == 0:
            compare(gradient, lambda p: p.grad, 1e-4)
        trainable = jax.tree.map(lambda p, g: p - 0.1 * g, trainable, gradient)
        optimizer.step()
    compare(trainable, lambda p: p, 1e-4)
