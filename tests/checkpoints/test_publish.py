"""Merged checkpoints: the same states, published names and shapes, read by our loader and by transformers."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.golden import golden_config
from support.golden_models import BASE, GOLDEN, ONE, adapt, arrays, golden_model, random_heads, relative, token_rows

from bioscan_jax import InputError, ModelConfig, config
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.head_files import read_heads
from bioscan_jax.checkpoints.keys import load_model, published_names
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.checkpoints.model_card import FACTS_FILE
from bioscan_jax.checkpoints.orbax import save_converted
from bioscan_jax.checkpoints.publish import write_merged
from bioscan_jax.checkpoints.readers import list_tensors, read_rows
from bioscan_jax.checkpoints.writers import PendingTensor, write_safetensors
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.model.lora import merge_adapters

CONTACT = {"esm.contact_head.regression.weight", "esm.contact_head.regression.bias"}


def publish(directory, model, family, base=None, **settings):
    write_merged(directory, model, Vocabulary.published(family), provenance=BASE, base=base, **settings)


def names_of(transformer):
    table = published_names(transformer, lm_head=True)
    return {name for row in table for name in row.names(transformer.num_hidden_layers)}


def assert_merged(found, model):
    """Equal to the last bit where there is no adapter; the compiler may round a merged number otherwise."""
    merge_adapters(model)
    expected = arrays(model)
    assert arrays(found).keys() == expected.keys()
    for path, value in arrays(found).items():
        if path[0] == "layers" and path[-1] == "kernel":
            np.testing.assert_allclose(value, expected[path], rtol=0, atol=2e-7)
        else:
            np.testing.assert_array_equal(value, expected[path])


@pytest.fixture(params=["v1", "v2"])
def family(request):
    return request.param


def test_a_merged_checkpoint_is_the_adapted_model(family, tmp_path):
    model = adapt(golden_model(family))
    ids = token_rows(model.config)
    before, graph = arrays(model), nnx.graphdef(model)
    hidden = model.hidden_state(ids)
    publish(tmp_path / "out", model, family, GOLDEN / family, facts={"epochs": 3})
    assert nnx.graphdef(model) == graph
    for path, value in arrays(model).items():
        np.testing.assert_array_equal(value, before[path])
    again = load_weights(ModelConfig(checkpoint=str(tmp_path / "out")), make_layout(ONE), lm_head=True)
    assert again.config == model.config
    assert again.vocabulary == Vocabulary.published(family)
    assert again.provenance.license == "cc-by-nc-sa-4.0"
    assert again.adapter is None
    merged = again.model.hidden_state(ids)
    assert np.abs(merged - hidden).max() / np.abs(hidden).max() < 1e-5
    logits, expected = again.model.logits(merged), model.logits(hidden)
    assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-5
    assert_merged(again.model, model)
    there = {"config.json", "vocab.txt", "tokenizer_config.json", "model.safetensors", "README.md", FACTS_FILE}
    assert {path.name for path in (tmp_path / "out").iterdir()} == there
    facts = json.loads((tmp_path / "out" / FACTS_FILE).read_text())
    assert (facts["kind"], facts["epochs"], facts["base"]["weights_sha256"]) == ("merged", 3, "b" * 64)


@pytest.mark.parametrize(
    "mesh",
    [config.MeshConfig(data=8, params="fsdp"), config.MeshConfig(data=4, model=2)],
    ids=["fsdp", "tensor parallel"],
)
def test_the_files_do_not_depend_on_the_mesh(mesh, tmp_path):
    one, many = (golden_model("v2", where) for where in (ONE, mesh))
    publish(tmp_path / "one", one, "v2")
    publish(tmp_path / "many", many, "v2")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "many")]
    assert files[0] == files[1]


def test_keys_and_what_the_model_does_not_read_are_the_base_s(family, tmp_path):
    """Published checkpoints hold more than the forward pass reads, and not always in the model's dtype."""
    base = Path(shutil.copytree(GOLDEN / family, tmp_path / "base"))
    tensors = {name: read_rows(tensor) for name, tensor in list_tensors(base).items()}
    (base / "pytorch_model.bin").unlink(missing_ok=True)
    extra = {
        "esm.embeddings.position_ids": np.arange(66)[None],
        "esm.contact_head.regression.weight": np.arange(6, dtype=np.float32)[None],
        "esm.contact_head.regression.bias": np.ones(1, np.float32),
        "lm_head.decoder.bias": tensors["lm_head.bias"] + 1,
    }
    if family == "v2":
        extra["esm.embeddings.position_embeddings.weight"] = np.full((66, 16), 0.5, np.float16)
        extra["esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq"] = np.ones(4, np.float32)
    tensors |= extra
    save_file(tensors, base / "model.safetensors")
    publish(tmp_path / "out", adapt(golden_model(family)), family, base)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in tensors.items()}
    extra["lm_head.decoder.bias"] = tensors["lm_head.bias"]
    for name, value in extra.items():
        np.testing.assert_array_equal(written[name], value)
        assert written[name].dtype == value.dtype
    assert "is zero here" not in (tmp_path / "out" / "README.md").read_text()


def test_without_the_base_s_files_the_contact_head_is_zero(tmp_path):
    model = adapt(golden_model("v2"))
    publish(tmp_path / "out", model, "v2")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == names_of(model.config) | CONTACT
    assert not any(written[name].any() for name in CONTACT)
    assert "is zero here" in (tmp_path / "out" / "README.md").read_text()
    save_converted(tmp_path / "converted", golden_model("v2"), model.config, Vocabulary.published("v2"), BASE)
    publish(tmp_path / "again", model, "v2", tmp_path / "converted")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == written.keys()


def test_large_checkpoints_are_split(tmp_path):
    model = adapt(golden_model("v2"))
    publish(tmp_path / "one", model, "v2")
    publish(tmp_path / "many", model, "v2", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for shard in shards:
        tensors = load_file(tmp_path / "many" / shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 100_000
        assert {name for name, file in index["weight_map"].items() if file == shard} == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, whole[name])
    again = load_weights(ModelConfig(checkpoint=str(tmp_path / "many")), make_layout(ONE), lm_head=True)
    assert_merged(again.model, model)


def test_bfloat16_stays_bfloat16(tmp_path):
    graph, state = nnx.split(golden_model("v1"))
    model = adapt(nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)))
    publish(tmp_path / "out", model, "v1", GOLDEN / "v1")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = list_tensors(tmp_path / "out")
    assert {tensor.dtype for name, tensor in tensors.items() if name not in CONTACT} == {np.dtype(jnp.bfloat16)}
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in tensors.values())
    merge_adapters(model)
    kernel = np.asarray(model.layers.feed_forward.down.kernel[2])
    written = read_rows(tensors["esm.encoder.layer.2.output.dense.weight"])
    np.testing.assert_allclose(written.astype(np.float32), kernel.T.astype(np.float32), rtol=2**-8)


def test_heads_go_along(tmp_path):
    given = random_heads("marginal")
    publish(tmp_path / "out", adapt(golden_model("v2")), "v2", heads=given)
    assert read_heads(tmp_path / "out", make_layout(ONE)).space.sha256 == given.space.sha256


def test_what_cannot_be_published(tmp_path):
    model = adapt(golden_model("v2"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="full: not empty"):
        publish(tmp_path / "full", model, "v2")
    model.lm_head = None
    with pytest.raises(ValueError, match="load the model with lm_head=True"):
        publish(tmp_path / "out", model, "v2")
    with pytest.raises(InputError, match="no weights in"):
        publish(tmp_path / "out", adapt(golden_model("v2")), "v2", tmp_path / "full")
    wrong = PendingTensor("x", np.dtype(np.float32), (3,), lambda: np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"x is float32 \(4,\), announced as float32 \(3,\)"):
        write_safetensors(tmp_path / "x", [wrong])
    assert not (tmp_path / "out").exists()


def torch_logits(model, ids):
    import torch

    with torch.no_grad():
        ids = torch.tensor(np.asarray(ids))
        return model(ids, attention_mask=ids != 1).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 100_000])
def test_transformers_reads_v1(with_base, max_shard_bytes, tmp_path):
    from support.torch_models import save_checkpoint, torch_model
    from transformers import AutoTokenizer, EsmForMaskedLM

    transformer = golden_config("v1")
    save_checkpoint(torch_model(transformer, seed=4), transformer, tmp_path / "base", "bin")
    ours = load_model(tmp_path / "base", transformer, jnp.float32, make_layout(ONE), lm_head=True)
    adapt(ours)
    base = tmp_path / "base" if with_base else None
    publish(tmp_path / "out", ours, "v1", base, max_shard_bytes=max_shard_bytes)
    model, info = EsmForMaskedLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    ids = token_rows(transformer)
    expected = torch_logits(model.eval(), ids)
    assert relative(ours.logits(ours.hidden_state(ids)), expected, ids) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(["ACGTACGTN"])["input_ids"] == [[3, 726, 4103, 4101, 4104]]
    assert tokenizer.model_max_length == transformer.max_tokens


@pytest.mark.parity
def test_v2_has_the_keys_and_numbers_of_pytorch_s(tmp_path):
    import torch
    from support.torch_models import save_checkpoint, torch_model

    transformer = dataclasses.replace(golden_config("v2"), num_hidden_layers=2)
    theirs = torch_model(transformer, seed=4)
    save_checkpoint(theirs, transformer, tmp_path / "base", "safetensors")
    ours = load_model(tmp_path / "base", transformer, jnp.float32, make_layout(ONE), lm_head=True)
    adapt(ours)
    publish(tmp_path / "out", ours, "v2", tmp_path / "base")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.shape for k, v in written.items()} == {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    theirs.load_state_dict({name: torch.tensor(value) for name, value in written.items()}, strict=True)
    ids = token_rows(transformer)
    assert relative(ours.logits(ours.hidden_state(ids)), torch_logits(theirs, ids), ids) < 1e-5
