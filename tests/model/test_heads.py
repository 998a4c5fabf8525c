import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp
from support.taxa import flat_tree, random_labels, random_tree

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.model import heads
from bioscan_jax.model.heads import MarginalHead, RankLogProbs, make_head, padded_size, pick, predict
from bioscan_jax.training.losses import rank_losses, total_loss

WIDTH = 16
TREE = random_tree(3)
KINDS = ("independent", "marginal", "cosine")


def vectors(rows=6, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, WIDTH)) * scale, jnp.float32)


def head_of(kind, tree=TREE, scale=20.0, **kwargs):
    """A head whose kernels are large enough for far-apart probabilities."""
    head = make_head(kind, WIDTH, tree, rngs=nnx.Rngs(0), **kwargs)
    nnx.update(head, jax.tree.map(lambda p: p * scale, nnx.state(head)))
    return head


def leaf_log_probs(head, x):
    linear = head.leaves.linear
    logits = np.asarray(x, np.float64) @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...])
    return log_softmax(logits[:, : len(head.tree.leaf_paths)], axis=1)


@pytest.mark.parametrize(("classes", "length"), [(0, 128), (1, 128), (128, 128), (129, 256), (100_000, 100_096)])
def test_class_axes_divide_over_devices(classes, length):
    assert padded_size(classes) == length


def test_independent_is_a_softmax_a_rank():
    head, x = head_of("independent"), vectors()
    for rank, size, got in zip(RANKS, TREE.sizes, head(x).log_probs, strict=True):
        linear = head.ranks[rank].linear
        logits = np.asarray(x, np.float64) @ np.asarray(linear.kernel[...], np.float64)[:, :size]
        assert got.shape == (6, padded_size(size))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got[:, :size], log_softmax(logits, axis=1), rtol=1e-5, atol=1e-5)
        assert np.all(np.isneginf(got[:, size:]))


def test_cosine_is_a_softmax_of_scaled_cosines_a_rank():
    head, x = head_of("cosine", scale=3.0), vectors(scale=50.0)
    of_unit = np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True)
    for rank, size, got in zip(RANKS, TREE.sizes, head(x).log_probs, strict=True):
        kernel = np.asarray(head.ranks[rank].linear.kernel[...], np.float64)[:, :size]
        logits = config.COSINE_SCALE * of_unit @ (kernel / np.linalg.norm(kernel, axis=0))
        np.testing.assert_allclose(got[:, :size], log_softmax(logits, axis=1), rtol=1e-5, atol=1e-5)
        assert np.all(np.isneginf(got[:, size:]))
    layer = head.ranks["order"].linear
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(layer(x)))(jnp.zeros((1, WIDTH)))))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 100.0, 3000.0]))
def test_marginal_sums_the_leaves_of_each_taxon(seed, scale):
    """Also where a whole clade has a probability far below the smallest float32."""
    tree = random_tree(seed, branching=2)
    head, x = head_of("marginal", tree, scale), vectors(seed=seed)
    leaves = leaf_log_probs(head, x)
    for rank, got in enumerate(head(x).log_probs):
        size = tree.sizes[rank]
        expected = (
            np.stack([logsumexp(leaves[:, tree.leaf_paths[:, rank] == taxon], axis=1) for taxon in range(size)], axis=1)
            if size
            else np.empty((6, 0))
        )
        np.testing.assert_allclose(got[:, :size], expected, rtol=1e-5, atol=1e-5 * scale)
        assert np.all(np.isneginf(got[:, size:]))


def test_a_parent_is_the_sum_of_what_is_below_it():
    """The probabilities of the taxa right below a taxon sum to its own."""
    head = head_of("marginal", scale=5.0)
    probs = [np.exp(p) for p in head(vectors()).log_probs]
    nodes = np.concatenate([p[:, :size] for p, size in zip(probs, TREE.sizes, strict=True)], axis=1)
    above = np.concatenate(TREE.ancestors)
    for node in range(1, nodes.shape[1] + 1):
        below = above == node
        if below.any():
            np.testing.assert_allclose(nodes[:, below].sum(1), nodes[:, node - 1], rtol=1e-5)
    np.testing.assert_allclose(nodes[:, above == 0].sum(1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_padding_has_none(kind, scale):
    graph, state = nnx.split(head_of(kind, scale=scale))
    labels = jnp.asarray(random_labels(1, TREE))

    def loss(state, x):
        return total_loss(rank_losses(nnx.merge(graph, state).of_labels(x, labels), labels))

    value, (by_state, by_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, vectors())
    assert np.isfinite(value)
    assert np.all(np.isfinite(by_x))
    assert np.any(np.asarray(by_x) != 0)
    widths = {"leaves": len(TREE.leaf_paths)} | dict(zip(RANKS, TREE.sizes, strict=True))
    for path, variable in nnx.to_flat_state(by_state):
        size = widths[[part for part in path if part in widths][-1]]
        gradient = np.asarray(variable.get_value())
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient[..., :size] != 0) or size == 1 or scale > 1
        assert not np.any(gradient[..., size:])


@pytest.mark.parametrize("kind", KINDS)
def test_no_nan_arises_on_the_way(kind):
    """Nor one that is masked later: a search for the origin of a NaN must not end here."""
    graph, state = nnx.split(head_of(kind))
    with jax.debug_nans(True):
        gradient = jax.grad(partial(summed_loss, graph))(state, jnp.asarray(random_labels(1, TREE)))
    assert np.any(jax.tree.leaves(gradient)[-1])


def test_marginal_gradient_is_that_of_the_formula():
    """d(-log p_taxon)/d(logit): softmax over all leaves less softmax over the taxon's own."""
    head = head_of("marginal", scale=5.0)
    graph, state = nnx.split(head)
    leaves = leaf_log_probs(head, vectors(1))[0]
    gradient_of = jax.jit(jax.grad(partial(summed_loss, graph)))
    for rank in range(7):
        taxon = TREE.sizes[rank] - 1
        labels = jnp.full((1, 7), -1, jnp.int32).at[0, rank].set(taxon)
        gradient = gradient_of(state, labels)
        mine = TREE.leaf_paths[:, rank] == taxon
        own = np.where(mine, np.exp(leaves - logsumexp(leaves[mine])), 0.0)
        bias = gradient["leaves"]["linear"]["bias"].get_value()
        np.testing.assert_allclose(bias[: len(leaves)], np.exp(leaves) - own, atol=1e-6)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 100.0, 3000.0]))
def test_labels_get_what_the_taxa_of_all_ranks_get(seed, scale):
    """Log-probabilities and gradients of the loss: summing the leaves of one taxon is summing them up the tree."""
    tree = random_tree(seed, branching=2)
    graph, state = nnx.split(head_of("marginal", tree, scale))
    x, labels = vectors(seed=seed), jnp.asarray(random_labels(seed, tree))
    known = np.asarray(labels) >= 0

    def loss(state, x, all_taxa):
        head = nnx.merge(graph, state)
        log_probs = pick(head(x), labels) if all_taxa else head.of_labels(x, labels)
        return total_loss(rank_losses(log_probs, labels)), log_probs

    gradient_of = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (gradients, ours), (others, expected) = (gradient_of(state, x, all_taxa) for all_taxa in (False, True))
    np.testing.assert_allclose(ours[known], expected[known], rtol=1e-5, atol=1e-5 * scale)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(others))
    for mine, other in zip(*map(jax.tree.leaves, (gradients, others)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    graph, state = nnx.split(head_of(kind))
    bare, shapes = nnx.split(nnx.eval_shape(lambda: make_head(kind, WIDTH, TREE, rngs=nnx.Rngs(0), multiple=1)))
    cut = jax.tree.map(lambda large, small: np.asarray(large)[..., : small.shape[-1]], state, shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(cut)) < sum(leaf.size for leaf in jax.tree.leaves(state))
    labels = jnp.asarray(random_labels(1, TREE))
    with_padding, without = (
        jax.jit(partial(rank_losses_of, graph))(state, labels) for graph, state in [(graph, state), (bare, cut)]
    )
    np.testing.assert_allclose(without, with_padding, rtol=1e-6)


def rank_losses_of(graph, state, labels):
    return rank_losses(nnx.merge(graph, state).of_labels(vectors(len(labels)), labels), labels)


def summed_loss(graph, state, labels):
    return jnp.sum(rank_losses_of(graph, state, labels))


def test_a_rank_without_taxa():
    paths = TREE.leaf_paths.copy()
    paths[:, 4] = -1
    tree = dataclasses.replace(TREE, sizes=(*TREE.sizes[:4], 0, *TREE.sizes[5:]), leaf_paths=np.unique(paths, axis=0))
    labels = jnp.asarray(random_labels(2, tree))
    for kind in KINDS:
        graph, state = nnx.split(head_of(kind, tree))
        ranks = nnx.merge(graph, state)(vectors())
        assert np.all(np.isneginf(ranks.log_probs[4]))
        chosen, confidence = predict(ranks, tree, kind)
        assert np.all(chosen[:, 4] == -1)
        assert np.all(confidence[:, 4] == 0)
        loss = partial(summed_loss, graph, labels=labels)
        gradient = jax.jit(jax.grad(loss))(state)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([0.1, 3.0, 1e3]))
def test_marginal_predictions_are_always_the_path_to_a_leaf(seed, gap, scale):
    tree = random_tree(seed, branching=2, gap=gap)
    ranks = MarginalHead(WIDTH, tree, rngs=nnx.Rngs(seed))(vectors(20, seed, scale))
    chosen, confidence = (np.asarray(x) for x in predict(ranks, tree, "marginal"))
    paths = {tuple(path) for path in tree.leaf_paths.tolist()}
    for path, sure in zip(chosen.tolist(), confidence, strict=True):
        assert tuple(path) in paths
        known = np.array(path) >= 0
        assert np.all(sure[~known] == 0)
        assert np.all(np.diff(sure[known]) <= 1e-5)


def test_arbitrary_numbers_still_give_a_path():
    """Whatever the model gives, infinities and NaN included."""
    for value in (-np.inf, np.nan, 0.0):
        ranks = RankLogProbs(tuple(jnp.full((2, padded_size(size)), value) for size in TREE.sizes))
        chosen, _ = predict(ranks, TREE, "marginal")
        assert tuple(np.asarray(chosen[0]).tolist()) in {tuple(path) for path in TREE.leaf_paths.tolist()}


def test_marginal_goes_down_to_the_most_probable_child():
    ranks = head_of("marginal")(vectors())
    chosen, confidence = (np.asarray(x) for x in predict(ranks, TREE, "marginal"))
    for row in range(6):
        last = 0
        for rank, log_probs in enumerate(ranks.log_probs):
            children = np.flatnonzero(TREE.ancestors[rank] == last)
            if len(children):
                best = children[np.argmax(np.asarray(log_probs)[row, children])]
                assert chosen[row, rank] == best
                np.testing.assert_allclose(confidence[row, rank], np.exp(log_probs[row, best]), rtol=1e-6)
                last = TREE.first_node(rank) + best
            else:
                assert chosen[row, rank] == -1


def test_independent_predicts_each_rank_by_itself():
    ranks = head_of("independent")(vectors())
    chosen, confidence = predict(ranks, TREE, "independent")
    assert chosen.dtype == jnp.int32
    for rank, log_probs in enumerate(ranks.log_probs):
        np.testing.assert_array_equal(chosen[:, rank], np.argmax(log_probs, axis=1))
        np.testing.assert_allclose(confidence[:, rank], np.exp(np.max(log_probs, axis=1)), rtol=1e-6)


def gradient_step(kind, tree, width, layout):
    """A loss and its gradient on the mesh, the state as shapes with their places."""
    abstract = nnx.eval_shape(lambda: make_head(kind, width, tree, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)

    def place(variable):
        axes = variable.get_metadata()["logical_axes"]
        value = variable.get_value()
        return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=layout.stored(axes)))

    state = jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def loss(state, x, labels):
        return total_loss(rank_losses(nnx.merge(graph, state).of_labels(x, labels, layout), labels))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), state


@pytest.mark.parametrize("kind", ["independent", "marginal"])
def test_100_000_species_are_split_over_eight_devices(kind):
    """Nothing of leaves x taxa, no kernel on one device, an eighth of the head on each."""
    species, width, rows = 100_000, 2560, 32
    layout = make_layout(config.MeshConfig(data=8))
    step, state = gradient_step(kind, flat_tree(species), width, layout)
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=layout.batched(2))
    labels = jax.ShapeDtypeStruct((rows, 7), jnp.int32, sharding=layout.batched(2))
    largest = max(
        value.aval.size
        for equation in jax.make_jaxpr(step)(state, x, labels).jaxpr.eqns[0].params["jaxpr"].jaxpr.eqns
        for value in equation.outvars
    )
    assert largest == width * padded_size(species)
    compiled = step.lower(state, x, labels).compile()
    memory = compiled.memory_analysis()
    here = {leaf.shape: leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state)}
    assert here[width, padded_size(species)] == (width, padded_size(species) // 8)
    assert (width, padded_size(species)) == max(here, key=math.prod)
    mine = 4 * sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state))
    assert mine < 1.35 * 4 * width * species / 8  # the independent head keeps its 3,000 genera whole
    assert memory.argument_size_in_bytes == pytest.approx(mine, rel=0.01)
    assert memory.output_size_in_bytes == pytest.approx(mine, rel=0.01)
    assert memory.temp_size_in_bytes < mine


@pytest.mark.parametrize(
    ("kind", "split"),
    [("independent", True), ("independent", False), ("marginal", True), ("marginal", False), ("cosine", True)],
)
def test_devices_do_not_change_the_loss_or_the_gradient(kind, split, monkeypatch):
    if split:
        monkeypatch.setattr(heads, "SHARD_MIN_CLASSES", 0)
    results = []
    x, labels = vectors(8), random_labels(1, TREE, 8)
    for devices in (1, 2, 8):
        layout = make_layout(config.MeshConfig(data=devices, params="fsdp"))
        step, abstract = gradient_step(kind, TREE, WIDTH, layout)
        state = jax.tree.map(lambda p, at: jax.device_put(p, at.sharding), nnx.state(head_of(kind)), abstract)
        kernel = jax.tree.leaves(state)[-1]
        assert kernel.addressable_shards[0].data.shape == (WIDTH, kernel.shape[1] // (devices if split else 1))
        value, gradients = step(state, jax.device_put(x, layout.batched(2)), jax.device_put(labels, layout.batched(2)))
        results.append(jax.device_get((value, gradients)))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), results[0], other)
