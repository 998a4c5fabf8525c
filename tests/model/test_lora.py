"""Adapters: nothing changes at first, they merge exactly, and they learn as PEFT's do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.taxa import random_tree

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.checkpoints.keys import load_model, random_model
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.errors import InputError
from bioscan_jax.model.classifier import make_classifier, named_arrays
from bioscan_jax.model.config import PRESETS
from bioscan_jax.model.lora import TARGETS, LoRALinear, add_adapters, merge_adapters, resolve_targets
from bioscan_jax.training.losses import rank_losses, total_loss
from bioscan_jax.training.step import MicroBatches, split_trainable

ONE = config.MeshConfig(data=1)
EVERY = config.LoRAConfig(rank=4, alpha=8.0, dropout=0.0, targets=("all_linear",))
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_a_new_adapter_changes_nothing(family, dtype):
    transformer = dataclasses.replace(PRESETS[f"tiny-{family}"], initializer_range=0.15)
    model = random_model(transformer, dtype, make_layout(ONE), seed=0)
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
    add_adapters(model, config.LoRAConfig(rank=3, targets=("query", "feed_forward_in")), nnx.Rngs(0))
    up = model.layers.feed_forward.up
    assert up.a[...].shape == (2, 64, 3)
    assert up.b[...].shape == (2, 3, *up.base.kernel[...].shape[2:])
    assert model.layers.attention.query.scaling == 32.0 / 3
    assert not isinstance(model.layers.attention.key, LoRALinear)


def test_targets():
    assert resolve_targets(("value", "query")) == ("query", "value")
    assert resolve_targets(("all_linear",)) == tuple(TARGETS)
    with pytest.raises(InputError, match=r"--lora.targets 'dense' is unknown; pass some of query, key"):
        resolve_targets(("dense",))
    with pytest.raises(InputError, match="names no layer"):
        resolve_targets(())


def test_a_second_adapter_is_refused(model):
    add_adapters(model, EVERY, nnx.Rngs(0))
    with pytest.raises(InputError, match="'query' already has an adapter"):
        add_adapters(model, EVERY, nnx.Rngs(0))


def torch_ranks(kind, tree, linears, pooled):
    """Log-probabilities of the taxa of each rank, written out in PyTorch."""
    import torch

    if kind == "independent":
        return [torch.log_softmax(linears[rank](pooled), dim=1) for rank in RANKS]
    leaves = torch.log_softmax(linears["leaves"](pooled), dim=1)
    below = [torch.tensor(np.arange(n)[:, None] == tree.leaf_paths[None, :, r]) for r, n in enumerate(tree.sizes)]
    return [torch.logsumexp(leaves[:, None].masked_fill(~taxa[None], -torch.inf), dim=2) for taxa in below]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("kind", ["independent", "marginal"])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_gradients_and_sgd_agree_with_peft(family, kind, tmp_path):
    """The weighted loss of seven ranks, float32: each gradient within 1e-4 of PyTorch's, and 20 steps of SGD later."""
    import torch
    from peft import LoraConfig, get_peft_model
    from support.torch_models import save_checkpoint, torch_model

    transformer, tree, layout = PRESETS[f"tiny-{family}"], random_tree(3), make_layout(ONE)
    reference = torch_model(transformer, seed=2)
    save_checkpoint(reference, transformer, tmp_path, "safetensors")
    trunk = load_model(tmp_path, transformer, jnp.float32, layout)
    loss = config.LossConfig(head=kind)
    classifier = make_classifier(trunk, loss, EVERY, tree, layout, seed=3)
    randomised(classifier.trunk, 0.05)
    model = split_trainable(classifier, layout, loss, config.TrainConfig(), tree=tree, special_ids=())
    targets = r"esm\.encoder\.layer\.\d+\.(" + "|".join(PEFT_NAMES.values()).replace(".", r"\.") + ")"
    theirs = get_peft_model(reference, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)).eval()
    sizes = dict(zip(RANKS, tree.sizes, strict=True)) if kind == "independent" else {"leaves": len(tree.leaf_paths)}
    linears = {name: torch.nn.Linear(transformer.hidden_size, size) for name, size in sizes.items()}

    def pairs(params):
        """Our array in PyTorch's layout and their parameter, for each matrix of each layer and each head."""
        named = dict(theirs.named_parameters())
        for name, (parent, attribute) in TARGETS.items():
            for matrix in ("a", "b"):
                stacked = np.asarray(params[f"trunk.layers.{parent}.{attribute}.{matrix}"])
                for i, value in enumerate(stacked):
                    stem = f"base_model.model.esm.encoder.layer.{i}.{PEFT_NAMES[name]}"
                    other = named[f"{stem}.lora_{matrix.upper()}.default.weight"]
                    yield f"{stem}.{matrix}", value.reshape(value.shape[0], -1).T, other
        for name, linear in linears.items():
            stem = f"head.ranks.{name}" if kind == "independent" else "head.leaves"
            yield f"{name} kernel", np.asarray(params[f"{stem}.linear.kernel"])[:, : sizes[name]].T, linear.weight
            yield f"{name} bias", np.asarray(params[f"{stem}.linear.bias"])[: sizes[name]], linear.bias

    params = named_arrays(model.trained)
    with torch.no_grad():
        for _, value, parameter in pairs(params):
            parameter.copy_(torch.tensor(value.copy()))
    ids = rows(transformer)
    labels = tree.leaf_paths[[0, 5, 5, len(tree.leaf_paths) - 1]].copy()
    labels[1, 3:] = -1
    mask = torch.tensor(ids != 1)
    batch = MicroBatches(jnp.asarray(ids, jnp.int32), jnp.asarray(labels), jnp.full((4, 3), jnp.nan))

    def torch_loss():
        hidden = theirs.base_model.model.esm(torch.tensor(ids), attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        total = torch.zeros(())
        for r, log_probs in enumerate(torch_ranks(kind, tree, linears, pooled)):
            if (labels[:, r] >= 0).any():
                target = torch.tensor(labels[:, r]).long()
                total = total + loss.rank_weights[r] * torch.nn.functional.nll_loss(log_probs, target, ignore_index=-1)
        return total

    @jax.jit
    def value_and_gradient(params):
        def of(params):
            classifier = model.merge(params, model.frozen)
            pooled, _ = classifier.vectors(batch.ids, layout)
            return total_loss(
                rank_losses(classifier.head.of_labels(pooled, batch.labels), batch.labels), loss.rank_weights
            )

        return jax.value_and_grad(of)(params)

    def compare(arrays, of):
        for name, mine, parameter in pairs(arrays):
            other = of(parameter).detach().numpy()
            assert np.abs(mine - other).max() <= 1e-4 * np.abs(other).max(), name

    optimizer = torch.optim.SGD([p for _, _, p in pairs(params)], lr=0.02)
    for step in range(20):
        value, gradient = value_and_gradient(params)
        optimizer.zero_grad()
        expected = torch_loss()
        expected.backward()
        assert float(value) == pytest.approx(expected.item(), rel=1e-4)
        if step == 0:
            first = expected.item()
            compare(gradient, lambda p: p.grad)
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient)
        optimizer.step()
    assert expected.item() < 0.9 * first
    compare(params, lambda p: p)
