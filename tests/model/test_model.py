"""The forward pass against PyTorch's recorded numbers, and what must not change it: batch, padding, devices."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from support.golden import LOGIT_STEP, golden_config
from support.places import GOLDEN

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.tokenizer import encode
from bioscan_jax.checkpoints.keys import abstract_model, random_model
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.embedding.step import make_embed_step
from bioscan_jax.errors import InputError
from bioscan_jax.model.config import PRESETS, TransformerConfig, parse_config, read_config
from bioscan_jax.model.pooling import pool

BOUND = 1e-5


@pytest.fixture(params=["v1", "v2"])
def family(request):
    return request.param


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def test_there_are_eight_devices():
    assert jax.device_count() == 8


def test_golden_outputs_of_pytorch(family):
    """Ids, every hidden state, logits and the pooled vector, from files that PyTorch wrote (v1 a .bin)."""
    loaded = load_weights(
        config.ModelConfig(checkpoint=str(GOLDEN / family)), make_layout(config.MeshConfig(data=1)), lm_head=True
    )
    assert loaded.config == golden_config(family)
    expected = np.load(GOLDEN / family / "outputs.npz")
    sequences = clean(pa.array(json.loads((GOLDEN / family / "sequences.json").read_text()))).sequences
    tokens = encode(sequences, loaded.vocabulary)
    ids = expected["ids"]
    for i, row in enumerate(ids):
        np.testing.assert_array_equal(tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]], row[row != 1])
    real = ids != 1
    ids = jnp.asarray(ids)
    for ours, theirs in zip(loaded.model.hidden_states(ids), expected["hidden"], strict=True):
        assert relative(ours[real], theirs[real]) < BOUND
    last = loaded.model.hidden_state(ids)
    assert relative(loaded.model.logits(last)[..., ::LOGIT_STEP][real], expected["logits"][real]) < BOUND
    assert relative(pool(last, ids, "mean", 1), expected["pooled"]) < BOUND


def rows(transformer, lengths, width=None, seed=0):
    ids = np.random.default_rng(seed).integers(6, transformer.vocab_size, (len(lengths), max(lengths)))
    ids[:, 0] = 3
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = 1
    return np.pad(ids, ((0, 0), (0, (width or ids.shape[1]) - ids.shape[1])), constant_values=1).astype(np.int32)


def embed_on(model_state, transformer, ids, mesh, **changes):
    """Vectors of `ids` with the same parameter values laid out on another mesh."""
    layout = make_layout(mesh)
    graph, abstract = nnx.split(abstract_model(transformer, jnp.float32, lm_head=False))
    from bioscan_jax.devices.sharding import stored_shardings

    shardings = stored_shardings(abstract, layout)
    placed = [(p, v.replace(jax.device_put(model_state[p], shardings[p]))) for p, v in nnx.to_flat_state(abstract)]
    step, state = make_embed_step(
        nnx.merge(graph, nnx.from_flat_state(placed)), layout, dataclasses.replace(config.EmbedConfig(), **changes)
    )
    return np.asarray(step(state, jax.device_put(ids, layout.batched(2))))


@pytest.fixture(scope="module", params=["v1", "v2"])
def tiny(request):
    """A model with weights of ordinary size, so that layers matter, and its values by path."""
    transformer = dataclasses.replace(PRESETS[f"tiny-{request.param}"], initializer_range=0.15, num_attention_heads=8)
    model = random_model(transformer, jnp.float32, make_layout(config.MeshConfig(data=1)), seed=1)
    return transformer, {p: np.asarray(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(model))}


def test_a_vector_does_not_depend_on_batch_or_padding(tiny):
    transformer, values = tiny
    lengths = (30, 2, 17, 9, 30, 5, 24, 11)
    one = config.MeshConfig(data=1)
    together = embed_on(values, transformer, rows(transformer, lengths), one)
    wide = embed_on(values, transformer, rows(transformer, lengths, width=64), one)
    alone = [embed_on(values, transformer, rows(transformer, lengths)[i : i + 1, : lengths[i]], one) for i in (0, 1, 5)]
    assert relative(wide, together) < BOUND
    assert relative(np.concatenate(alone), together[[0, 1, 5]]) < BOUND
    assert np.abs(together[0] - together[4]).max() > 0.01


@pytest.mark.parametrize(
    "mesh",
    [
        config.MeshConfig(data=2),
        config.MeshConfig(data=8),
        config.MeshConfig(data=2, params="fsdp"),
        config.MeshConfig(data=8, params="fsdp"),
        config.MeshConfig(data=1, model=8),
        config.MeshConfig(data=2, model=4, params="fsdp"),
    ],
    ids=["data 2", "data 8", "fsdp 2", "fsdp 8", "model 8", "fsdp 2 x model 4"],
)
def test_a_vector_does_not_depend_on_the_devices(tiny, mesh):
    transformer, values = tiny
    ids = rows(transformer, (30, 2, 17, 9, 30, 5, 24, 11))
    one = embed_on(values, transformer, ids, config.MeshConfig(data=1))
    assert relative(embed_on(values, transformer, ids, mesh), one) < BOUND


@pytest.mark.parametrize("layer", [0, 1, -1, 2])
def test_a_layer_is_that_hidden_state(tiny, layer):
    transformer, values = tiny
    ids = rows(transformer, (12, 7))
    model = abstract_model(transformer, jnp.float32, lm_head=False)
    graph, state = nnx.split(model)
    model = nnx.merge(graph, nnx.from_flat_state([(p, v.replace(values[p])) for p, v in nnx.to_flat_state(state)]))
    states = np.asarray(model.hidden_states(jnp.asarray(ids)))
    expected = pool(jnp.asarray(states[layer]), jnp.asarray(ids), "mean", 1)
    assert relative(embed_on(values, transformer, ids, config.MeshConfig(data=1), layer=layer), expected) < BOUND


def test_a_layer_may_take_some_rows_at_a_time(tiny):
    """The same states; two rows of the six at a time are three turns."""
    transformer, values = tiny
    ids = jnp.asarray(rows(transformer, (30, 2, 17, 9, 30, 5)))
    graph, state = nnx.split(abstract_model(transformer, jnp.float32, lm_head=False))
    state = nnx.from_flat_state([(p, v.replace(values[p])) for p, v in nnx.to_flat_state(state)])

    def states(at_once):
        return lambda state: nnx.merge(graph, state).hidden_state(ids, rows=at_once)

    assert "length=3" in str(jax.make_jaxpr(states(2))(state))
    assert "length=3" not in str(jax.make_jaxpr(states(None))(state))
    assert relative(states(2)(state), states(None)(state)) < BOUND


def test_the_step_is_traced_once_a_shape():
    transformer = PRESETS["tiny-v2"]
    chex.clear_trace_counter()
    layout = make_layout(config.MeshConfig(data=8))
    model = random_model(transformer, jnp.float32, layout, seed=0)
    graph, state = nnx.split(model)

    @jax.jit
    @chex.assert_max_traces(n=2)
    def step(state, ids):
        return nnx.merge(graph, state).hidden_state(ids, layout=layout)

    for seed in range(3):
        for width in (16, 32):
            step(state, jax.device_put(rows(transformer, (9,) * 8, width, seed), layout.batched(2)))


def lowered(name, mesh, shape):
    """The full-size embed step on eight devices, lowered for a TPU; no weights are made."""
    transformer, layout = PRESETS[name], make_layout(mesh)
    from bioscan_jax.devices.sharding import stored_shardings

    graph, state = nnx.split(abstract_model(transformer, jnp.bfloat16, lm_head=False))
    shardings = stored_shardings(state, layout)
    flat = [
        (p, v.replace(jax.ShapeDtypeStruct(v.get_value().shape, v.get_value().dtype, sharding=shardings[p])))
        for p, v in nnx.to_flat_state(state)
    ]
    step, state = make_embed_step(nnx.merge(graph, nnx.from_flat_state(flat)), layout, config.EmbedConfig())
    return step, state, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.batched(2))


SIZES = {
    "nt-v1-500m": 486e6,
    "nt-v1-2.5b": 2548e6,
    "nt-v2-50m": 56e6,
    "nt-v2-100m": 98e6,
    "nt-v2-250m": 235e6,
    "nt-v2-500m": 498e6,
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    """Parameters of the published models, language-model head and v2's unused position table included."""
    transformer = PRESETS[name]
    leaves = jax.tree.leaves(nnx.state(abstract_model(transformer, jnp.bfloat16, lm_head=True)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    unused = transformer.max_position_embeddings * transformer.hidden_size if transformer.gated else 0
    assert sum(leaf.size for leaf in leaves) + unused == pytest.approx(SIZES[name], rel=0.002)


@pytest.mark.parametrize(("rows", "tokens"), [(128, 1000), (1024, 128)])
def test_the_2_5b_step_compiles_without_collectives_when_replicated(rows, tokens):
    step, state, ids = lowered("nt-v1-2.5b", config.MeshConfig(data=8), (rows, tokens))
    out = jax.eval_shape(step, state, ids)
    assert (out.shape, out.dtype) == ((rows, 2560), jnp.float32)
    text = step.trace(state, ids).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.while") == 1
    assert not any(op in text for op in ("all_gather", "all_reduce", "all_to_all", "collective_permute"))


def test_collectives_of_a_compiled_step():
    """Replicated has none; FSDP gathers parameters and never moves activations."""
    text = {}
    for params in ("replicated", "fsdp"):
        step, state, ids = lowered("tiny-v1", config.MeshConfig(data=8, params=params), (8, 32))
        text[params] = step.lower(state, ids).compile().as_text()
    for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert op not in text["replicated"]
    assert "all-gather" in text["fsdp"]
    for op in ("all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert op not in text["fsdp"]


def test_weight_products_take_bfloat16_and_give_float32():
    step, state, ids = lowered("nt-v1-2.5b", config.MeshConfig(data=8), (1024, 128))
    jaxpr = str(jax.make_jaxpr(step)(state, ids))
    assert "preferred_element_type=float32" in jaxpr
    text = step.trace(state, ids).lower(lowering_platforms=("tpu",)).as_text()
    products = [
        line for line in text.splitlines() if "stablehlo.dot_general" in line and "contracting_dims = [2] x [0]" in line
    ]
    assert len(products) == 6
    for line in products:
        left, right = line.split(":")[-1].split("->")
        assert left.count("bf16>") == 2
        assert right.strip().endswith("xf32>")


def test_parameters_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match=r"heads 64 is not divisible by --mesh.model 3"):
        random_model(PRESETS["tiny-v2"], jnp.float32, make_layout(config.MeshConfig(data=1, model=3)), seed=0)
    with pytest.raises(InputError, match="needs more than the 8 cpu"):
        make_layout(config.MeshConfig(data=9))


def test_fsdp_splits_every_matrix_over_the_data_axis():
    layout = make_layout(config.MeshConfig(data=8, params="fsdp"))
    model = random_model(PRESETS["tiny-v2"], jnp.float32, layout, seed=0)
    kernel = model.layers.attention.query.kernel.get_value()
    assert isinstance(kernel.sharding, NamedSharding)
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_random_weights_do_not_depend_on_the_devices():
    one = random_model(PRESETS["tiny-v2"], jnp.float32, make_layout(config.MeshConfig(data=1)), seed=5)
    many = random_model(PRESETS["tiny-v2"], jnp.float32, make_layout(config.MeshConfig(data=8, params="fsdp")), seed=5)
    chex.assert_trees_all_equal(jax.device_get(nnx.state(one)), jax.device_get(nnx.state(many)))


PUBLISHED = Path(__file__).with_name("published_configs.json")


@pytest.mark.parametrize("name", ["nt-v1-2.5b", "nt-v2-50m", "nt-v2-500m"])
def test_published_config_files_are_the_presets(name):
    """`config.json` as the hub has it, for three of the six."""
    assert parse_config(json.loads(PUBLISHED.read_text())[name], name) == PRESETS[name]


def test_config_round_trip(family, tmp_path):
    (tmp_path / "config.json").write_text(PRESETS[f"tiny-{family}"].to_json())
    assert read_config(tmp_path) == PRESETS[f"tiny-{family}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": 2}, "unknown key 'rope_scaling' = 2"),
        ({"emb_layer_norm_before": True}, "emb_layer_norm_before = True is not supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
        ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob = 0.1 is not supported, only 0.0"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"hidden_size": "64"}, "hidden_size = '64' is not a number"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"model_type": "bert"}, "model_type = 'bert' is not supported"),
    ],
)
def test_configs_that_are_not_implemented_are_refused(change, message):
    raw = json.loads(PRESETS["tiny-v1"].to_json()) | change
    with pytest.raises(InputError, match=message):
        parse_config(raw, "config.json")


def test_a_config_without_a_field_is_refused():
    raw = json.loads(PRESETS["tiny-v1"].to_json())
    del raw["vocab_size"]
    with pytest.raises(InputError, match="no vocab_size"):
        parse_config(raw, "config.json")


def test_positions_bound_the_tokens():
    assert PRESETS["nt-v1-2.5b"].max_tokens == 1000
    assert PRESETS["nt-v2-50m"].max_tokens == 2048


def test_flops_of_the_headline_model():
    """The analytic figure: 2 x 2.517e9 weights a token and the attention's 4 x width x 2560 a layer."""
    transformer: TransformerConfig = PRESETS["nt-v1-2.5b"]
    tokens, width = 128 * 1000, 1000
    expected = tokens * (2 * 2.517e9 + 32 * 4 * width * 2560)
    assert transformer.forward_flops(tokens, width) == pytest.approx(expected, rel=1e-3)
