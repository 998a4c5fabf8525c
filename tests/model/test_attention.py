"""Attention by splash, interpreted, against dense; and what `auto` picks where."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from bioscan_jax import config
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.embedding.step import make_embed_step
from bioscan_jax.errors import InputError
from bioscan_jax.model.attention import (
    FLASH_MIN_TOKENS,
    AttentionSetting,
    attention_function,
    attention_setting,
    choose_attention,
    splash_blocks,
)
from bioscan_jax.model.classifier import make_classifier

LENGTHS = [40, 1, 5, 39, 20, 7, 40, 3]
V5E = AttentionSetting(
    platform="tpu",
    device_kind="TPU v5 lite",
    capability=None,
    dtype="bfloat16",
    heads=20,
    head_dim=128,
    head_devices=1,
)
V3 = dataclasses.replace(V5E, device_kind="TPU v3")
CPU = dataclasses.replace(V5E, platform="cpu", device_kind="cpu", dtype="float32")
A100 = dataclasses.replace(V5E, platform="gpu", device_kind="NVIDIA A100-SXM4-40GB", capability="8.0")
MESHES = [None, config.MeshConfig(data=1), config.MeshConfig(data=8), config.MeshConfig(data=2, model=4)]


def rows(tokens, lengths, *, heads=4, head_dim=8, dtype=jnp.float32):
    q, k, v = (jax.random.normal(jax.random.key(i), (len(lengths), tokens, heads, head_dim)) for i in range(3))
    mask = jnp.arange(tokens)[None] < jnp.array(lengths)[:, None]
    return (q, k.astype(dtype), v.astype(dtype)), mask


def layout_of(mesh):
    return None if mesh is None else make_layout(mesh)


@partial(jax.jit, static_argnums=(2, 3))
def with_gradients(qkv, mask, kind, layout):
    """What real tokens attend to, all that is attended, and gradients of a loss on the real ones."""

    def loss(qkv):
        attended = attention_function(kind, layout)(*qkv, mask)
        real = jnp.where(mask[:, :, None, None], attended.astype(jnp.float32), 0.0)
        return jnp.sum(jnp.sin(real)), (real, attended)

    (_, (real, attended)), gradients = jax.value_and_grad(loss, has_aux=True)(qkv)
    return real, attended, gradients


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_splash_is_dense_on_one_and_eight_devices(mesh):
    qkv, mask = rows(40, LENGTHS)
    real, attended, gradients = with_gradients(qkv, mask, "interpreted", layout_of(mesh))
    expected, _, expected_gradients = with_gradients(qkv, mask, "dense", None)
    assert relative(real, expected) < 1e-6
    assert np.isfinite(attended).all()
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert relative(ours, theirs) < 2e-6
        assert not ours[~mask].any()


def test_several_blocks_a_row_and_padding_only_in_the_first_of_them():
    qkv, mask = rows(520, [520, 100, 390], heads=1)
    assert splash_blocks(520) == (384, 768)
    ours, _, gradients = with_gradients(qkv, mask, "interpreted", None)
    theirs, _, expected = with_gradients(qkv, mask, "dense", None)
    assert relative(ours, theirs) < 1e-6
    assert max(map(relative, gradients, expected)) < 2e-6


def test_bfloat16_differs_by_its_own_rounding():
    exact, mask = rows(40, LENGTHS)
    exact = tuple(x.astype(jnp.bfloat16).astype(jnp.float32) for x in exact)
    truth, _, _ = with_gradients(exact, mask, "dense", None)
    rounded = exact[0], *(x.astype(jnp.bfloat16) for x in exact[1:])
    ours, theirs = (with_gradients(rounded, mask, kind, None)[0] for kind in ("interpreted", "dense"))
    assert relative(ours, truth) < 1.5 * relative(theirs, truth) < 0.02


@given(st.integers(1, 2048))
def test_blocks_hold_the_row_and_are_whole_lanes(tokens):
    block, whole = splash_blocks(tokens)
    assert block % 128 == 0
    assert block <= 512
    assert whole % block == 0
    assert tokens <= whole < tokens + 128 * (whole // block)


@pytest.mark.parametrize("preset", ["tiny-v1", "tiny-v2"])
@pytest.mark.parametrize(
    "mesh", [config.MeshConfig(data=1), config.MeshConfig(data=4, model=2, params="fsdp")], ids=str
)
def test_a_whole_model_and_its_gradients_do_not_depend_on_the_kind(preset, mesh):
    layout = make_layout(mesh)
    model = load_weights(config.ModelConfig(checkpoint=f"random:{preset}"), layout).model
    ids = np.random.default_rng(0).integers(6, model.config.vocab_size, (4, 24)).astype(np.int32)
    ids[:, 0] = 3
    for row, length in zip(ids, [24, 2, 11, 17], strict=True):
        row[length:] = 1
    ids = jax.device_put(ids, layout.batched(2))

    def run(kind, remat):
        model.attention = kind
        graph, state = nnx.split(model)
        vectors = make_embed_step(model, layout, config.EmbedConfig())[0](state, ids)

        def loss(state):
            hidden = nnx.merge(graph, state).hidden_state(ids, layout=layout, remat=remat)
            return jnp.sum(jnp.where((ids != 1)[:, :, None], jnp.sin(hidden), 0.0))

        return vectors, jax.jit(jax.grad(loss))(state)

    vectors, gradients = run("interpreted", remat=True)
    expected, expected_gradients = run("dense", remat=False)
    assert relative(vectors, expected) < 1e-5
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradients))
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("setting", "short", "long"),
    [
        (CPU, "dense", "dense"),
        (V3, "dense", "dense"),
        (V5E, "dense", "splash"),
        (dataclasses.replace(V5E, device_kind="TPU v4"), "dense", "splash"),
        (dataclasses.replace(V5E, device_kind="TPU v6 lite", dtype="float32", head_dim=32), "dense", "splash"),
        (dataclasses.replace(V5E, device_kind="TPU of another day"), "dense", "dense"),
        (dataclasses.replace(V5E, head_devices=8), "dense", "dense"),
        (dataclasses.replace(V5E, head_devices=4), "dense", "splash"),
        (A100, "dense", "cudnn"),
        (dataclasses.replace(A100, dtype="float32"), "dense", "dense"),
        (dataclasses.replace(A100, capability="7.5"), "dense", "dense"),
        (dataclasses.replace(A100, device_kind="AMD Instinct", capability="gfx90a"), "dense", "dense"),
    ],
)
def test_auto(setting, short, long):
    assert [choose_attention("auto", setting, tokens) for tokens in (114, FLASH_MIN_TOKENS - 1)] == [short, short]
    assert [choose_attention("auto", setting, tokens) for tokens in (FLASH_MIN_TOKENS, 2048)] == [long, long]


@pytest.mark.parametrize(
    ("choice", "setting", "message"),
    [
        ("splash", CPU, "--model.attention splash needs a TPU v4 or newer, not cpu; pass auto or dense"),
        ("splash", V3, "--model.attention splash needs a TPU v4 or newer, not TPU v3; pass auto or dense"),
        (
            "splash",
            dataclasses.replace(V5E, head_devices=8),
            "--model.attention splash cannot split 20 heads over --mesh.model 8 devices; pass auto or dense",
        ),
        (
            "cudnn",
            V5E,
            "--model.attention cudnn needs an NVIDIA GPU of compute capability 8.0 or newer, not TPU v5 lite; "
            "pass auto or dense",
        ),
        (
            "cudnn",
            dataclasses.replace(A100, dtype="float32"),
            "--model.attention cudnn computes in bfloat16, not float32; pass auto or dense",
        ),
        (
            "cudnn",
            dataclasses.replace(A100, head_dim=20),
            "--model.attention cudnn needs heads of a multiple of 8 features up to 128, not 20; pass auto or dense",
        ),
    ],
)
def test_what_cannot_work_is_refused(choice, setting, message):
    with pytest.raises(InputError) as caught:
        choose_attention(choice, setting, tokens=0)
    assert str(caught.value) == message


@pytest.mark.parametrize("choice", ["splash", "cudnn"])
def test_a_model_is_not_loaded_for_what_cannot_work_here(choice):
    with pytest.raises(InputError, match=rf"--model\.attention {choice} needs .*, not cpu; pass auto or dense"):
        load_weights(
            config.ModelConfig(checkpoint="random:tiny-v2", attention=choice), make_layout(config.MeshConfig(data=1))
        )


def test_what_is_asked_for_by_name_is_taken_at_any_length():
    assert choose_attention("splash", V5E, 16) == "splash"
    assert choose_attention("dense", V5E, 2048) == "dense"
    assert choose_attention("cudnn", A100, 16) == "cudnn"
    assert (
        load_weights(
            config.ModelConfig(checkpoint="random:tiny-v2", attention="dense"), make_layout(config.MeshConfig())
        ).model.attention
        == "dense"
    )


def test_adapters_and_heads_leave_a_model_its_attention():
    layout = make_layout(config.MeshConfig(data=1))
    trunk = load_weights(config.ModelConfig(checkpoint="random:tiny-v2", attention="dense"), layout, lm_head=True).model
    classifier = make_classifier(trunk, config.LossConfig(), config.LoRAConfig(), None, layout, seed=0)
    assert (trunk.attention, classifier.trunk.attention) == ("dense", "dense")


def test_the_setting_is_that_of_the_mesh():
    layout = make_layout(config.MeshConfig(data=2, model=4))
    assert attention_setting(layout, heads=20, head_dim=128, dtype=jnp.float32) == dataclasses.replace(
        CPU, head_devices=4
    )
    assert attention_setting(None, heads=20, head_dim=128, dtype=jnp.float32) == CPU
