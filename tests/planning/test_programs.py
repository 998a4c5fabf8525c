"""The planned program is the one that runs: the same jaxpr, the same bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bioscan_jax import config
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.keys import random_model
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.embedding import dispatch
from bioscan_jax.embedding.step import make_embed_step
from bioscan_jax.model.classifier import make_classifier, named_arrays
from bioscan_jax.model.config import PRESETS
from bioscan_jax.model.transformer import first_layers
from bioscan_jax.planning.programs import EmbedProgram, FinetuneProgram, argument_bytes, regular_tree
from bioscan_jax.training.batches import ExampleBatch
from bioscan_jax.training.step import init_optimizer, make_train_step, place, split_trainable

TINY = PRESETS["tiny-v2"]


def test_the_embedding_program_is_the_step_of_a_real_model():
    layout = make_layout(config.MeshConfig(params="fsdp"))
    program = EmbedProgram(transformer=TINY, dtype="float32", embed=config.EmbedConfig(layer=1, pooling="max"))
    step, arguments = program.build(layout, BatchShape(16, 24))
    model = first_layers(random_model(TINY, jnp.float32, layout, seed=0), 1)  # as a run keeps of it
    real, state = make_embed_step(model, layout, program.embed)
    ids = jax.device_put(np.ones((16, 24), np.int32), layout.batched(2))
    assert str(step.trace(*arguments).jaxpr) == str(real.trace(state, ids).jaxpr)
    assert jax.tree.map(lambda leaf: leaf.sharding, arguments[0]) == jax.tree.map(lambda leaf: leaf.sharding, state)
    on_first = [
        shard.data.nbytes
        for leaf in (*jax.tree.leaves(state), ids)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    ]
    assert argument_bytes(arguments) == sum(on_first)


def test_batches_ahead_are_part_of_the_memory():
    program = EmbedProgram(transformer=TINY, dtype="float32", embed=config.EmbedConfig())
    assert program.bytes_ahead(BatchShape(16, 24), 8) == dispatch.BYTES_AHEAD // 8
    large = BatchShape(1 << 20, 192)
    assert program.bytes_ahead(large, 8) == (1 << 20) * (192 + 64) * 4 // 8


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_training_program_is_the_step_of_a_real_classifier(mode):
    """Traced on the arrays that `finetune` makes; 9 species as in `regular_tree`."""
    layout = make_layout(config.MeshConfig(params="fsdp"))
    lora, loss, train = (
        config.LoRAConfig(rank=4),
        config.LossConfig(),
        config.TrainConfig(mode=mode, batch_tokens=64, remat="layer"),
    )
    program = FinetuneProgram(transformer=TINY, dtype="float32", lora=lora, loss=loss, train=train, species=9)
    step, arguments = program.build(layout, BatchShape(32, 32))

    adapters = lora if mode == "lora" else None
    tree = regular_tree(9)
    model = random_model(TINY, jnp.float32, layout, seed=0, lm_head=False)
    vocabulary = Vocabulary.published("v2")
    special = (vocabulary.cls_id, vocabulary.pad_id, vocabulary.mask_id, vocabulary.unk_id)
    classifier = make_classifier(model, loss, adapters, tree, layout, seed=train.seed)
    model = split_trainable(classifier, layout, loss, train, tree=tree, special_ids=special)
    params = named_arrays(model.trained)
    rows = np.arange(32)
    batch = ExampleBatch(
        rows, np.ones((32, 32), np.int32), np.zeros((32, 7), np.int32), np.full((32, 3), np.nan, np.float32)
    )
    real = (
        params,
        init_optimizer(model, 1000, params),
        model.frozen,
        jax.device_put(np.uint32(0), layout.replicated()),
        place(batch, layout, train.batch_tokens, pad=TINY.pad_token_id),
    )
    assert str(step.trace(*arguments).jaxpr) == str(make_train_step(model, 1000).trace(*real).jaxpr)
    planned, made = (jax.tree.map(lambda leaf: leaf.sharding, tuple(found)) for found in (arguments[:2], real[:2]))
    assert planned == made


def test_programs_use_the_requested_attention():
    layout, shape = make_layout(config.MeshConfig(data=1)), BatchShape(2, 16)
    embed = EmbedProgram(transformer=TINY, dtype="float32", embed=config.EmbedConfig())
    finetune = FinetuneProgram(
        transformer=TINY,
        dtype="float32",
        lora=config.LoRAConfig(),
        loss=config.LossConfig(),
        train=config.TrainConfig(),
        species=9,
    )
    for program in (embed, finetune):
        for attention, kernel in (("dense", False), ("interpreted", True)):
            step, arguments = dataclasses.replace(program, attention=attention).build(layout, shape)
            assert ("pallas_call" in str(step.trace(*arguments).jaxpr)) == kernel


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("objective", ["taxonomy", "mlm"])
def test_the_training_program_takes_only_what_is_trained_as_float32(mode, objective):
    program = FinetuneProgram(
        transformer=TINY,
        dtype="bfloat16",
        lora=config.LoRAConfig(rank=4),
        loss=config.LossConfig(),
        train=config.TrainConfig(objective=objective, mode=mode, batch_tokens=64),
        species=300,
    )
    layout = make_layout(config.MeshConfig())
    step, (params, moments, frozen, number, batch) = program.build(layout, BatchShape(32, 32))
    assert batch.ids.shape == (2, 16, 32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == ({"bfloat16"} if mode == "lora" else set())
    names = set(optax.tree_utils.tree_get(moments, "mu"))
    assert names == set(params)
    assert any("trunk.word_embeddings" in name for name in names) == (mode == "full")
    assert any("head" in name.split(".")[0] for name in names) == (objective == "taxonomy")
    out = jax.eval_shape(step, params, moments, frozen, number, batch)
    assert jax.tree.map(lambda leaf: leaf.shape, out[0]) == jax.tree.map(lambda leaf: leaf.shape, params)


def test_a_regular_tree_has_the_requested_species():
    for species in (1, 7, 10_000):
        tree = regular_tree(species)
        assert tree.sizes[-1] == len(tree.leaf_paths) == species
        assert list(tree.sizes) == sorted(tree.sizes)
        assert len(tree.levels) == 7


def test_argument_bytes_count_a_device_s_share():
    layout = make_layout(config.MeshConfig())
    split = jax.ShapeDtypeStruct((16, 4), jnp.int32, sharding=layout.batched(2))
    whole = jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=layout.replicated())
    assert argument_bytes((split, {"a": whole}, nnx.State({}))) == 2 * 4 * 4 + 3 * 2
