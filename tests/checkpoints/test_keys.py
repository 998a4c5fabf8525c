"""Strict loading, sharded placement, bounded host memory, and the converted form."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.golden import golden_config
from support.golden_models import relative, token_rows
from support.places import GOLDEN

from bioscan_jax import config
from bioscan_jax.checkpoints.convert import convert
from bioscan_jax.checkpoints.keys import abstract_model, load_model, published_names
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.checkpoints.orbax import is_converted, read_provenance, save_converted
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.errors import InputError
from bioscan_jax.model.config import PRESETS

ONE = config.MeshConfig(data=1)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the v2 golden checkpoint, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "v2", tmp_path / "checkpoint"))


def edit(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def read(checkpoint):
    return load_weights(config.ModelConfig(checkpoint=str(checkpoint)), make_layout(ONE))


def test_a_missing_tensor_is_named(checkpoint):
    edit(checkpoint, lambda tensors: tensors.pop("esm.encoder.layer.1.attention.self.key.bias"))
    with pytest.raises(InputError, match=r"1 tensor\(s\) missing, first 'esm.encoder.layer.1.attention.self.key.bias'"):
        read(checkpoint)


def test_an_unexpected_tensor_is_named(checkpoint):
    name = "esm.encoder.layer.3.output.dense.weight"
    edit(checkpoint, lambda tensors: tensors.update({name: np.ones((2, 2), np.float32)}))
    with pytest.raises(InputError, match=rf"1 unexpected tensor\(s\), first '{name}'"):
        read(checkpoint)


def without_head(tensors):
    for name in [name for name in tensors if name.startswith("lm_head.")]:
        del tensors[name]


def rename(tensors, new_name):
    for name in list(tensors):
        tensors[new_name(name)] = tensors.pop(name)


def as_classifier(tensors):
    without_head(tensors)
    more = {
        "classifier.dense.weight": (16, 16),
        "classifier.out_proj.bias": (3,),
        "esm.contact_head.regression.bias": (1,),
    }
    tensors.update({name: np.ones(shape, np.float32) for name, shape in more.items()})


def as_bare_trunk(tensors):
    without_head(tensors)
    rename(tensors, lambda name: name.removeprefix("esm."))
    tensors["pooler.dense.weight"] = np.ones((16, 16), np.float32)


def as_of_tensorflow(tensors):
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old |= {"emb_layer_norm_after.weight": "emb_layer_norm_after.gamma"}
    rename(tensors, lambda name: next((name.replace(k, v) for k, v in old.items() if name.endswith(k)), name))


def as_old_bare_trunk(tensors):
    as_bare_trunk(tensors)
    as_of_tensorflow(tensors)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without_head, ""),
        (as_classifier, "classifier left out"),
        (as_bare_trunk, "esm.pooler left out"),
        (as_of_tensorflow, ""),
        (as_old_bare_trunk, "esm.pooler left out"),
    ],
)
def test_the_trunk_is_enough_for_vectors(checkpoint, change, named, tmp_path, caplog):
    before = read(checkpoint)
    edit(checkpoint, change)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(before.model), nnx.state(read(checkpoint).model))
    assert named in caplog.text
    wanted = config.ModelConfig(checkpoint=str(checkpoint))
    has_head = change is as_of_tensorflow
    if has_head:
        assert load_weights(wanted, make_layout(ONE), lm_head=True).model.lm_head is not None
    else:
        with pytest.raises(InputError, match=r"no masked-language-model head \(lm_head\), which this needs"):
            load_weights(wanted, make_layout(ONE), lm_head=True)
    convert(wanted, str(tmp_path / "out"), ONE)
    again = config.ModelConfig(checkpoint=str(tmp_path / "out"))
    trunk = load_weights(again, make_layout(ONE)).model
    jax.tree.map(np.testing.assert_array_equal, nnx.state(before.model), nnx.state(trunk))
    assert (load_weights(again, make_layout(ONE), lm_head=None).model.lm_head is not None) == has_head
    if not has_head:
        with pytest.raises(InputError, match=r"no masked-language-model head \(lm_head\)"):
            load_weights(again, make_layout(ONE), lm_head=True)


def test_half_a_head_is_damage(checkpoint):
    edit(checkpoint, lambda tensors: tensors.pop("lm_head.dense.weight"))
    with pytest.raises(InputError, match=r"1 tensor\(s\) missing, first 'lm_head.dense.weight'"):
        read(checkpoint)


def test_one_parameter_under_two_names_is_refused(checkpoint):
    name = "esm.encoder.layer.0.LayerNorm"
    edit(checkpoint, lambda tensors: tensors.update({f"{name}.gamma": tensors[f"{name}.weight"]}))
    with pytest.raises(InputError, match="'esm.encoder.layer.0.LayerNorm.(weight|gamma)' .* are the same parameter"):
        read(checkpoint)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["EsmForSequenceClassification", "EsmForTokenClassification", "EsmModel"])
@pytest.mark.parametrize("pooler", [True, False])
def test_what_transformers_saved_from_another_class_is_read(kind, pooler, tmp_path):
    import torch
    import transformers
    from support.torch_models import torch_model

    source = torch_model(golden_config("v1"), seed=3)
    theirs = source.esm
    if kind == "EsmModel":
        theirs = transformers.EsmModel(source.config, add_pooling_layer=pooler)
        theirs.load_state_dict(source.esm.state_dict(), strict=False)
    else:
        theirs = getattr(transformers, kind)(source.config)
        theirs.esm = source.esm
    theirs.eval().save_pretrained(tmp_path / "out")
    shutil.copy(GOLDEN / "v1" / "vocab.txt", tmp_path / "out")
    ours = load_weights(config.ModelConfig(checkpoint=str(tmp_path / "out")), make_layout(ONE)).model
    ids = np.asarray(token_rows(ours.config))
    with torch.no_grad():
        given = torch.tensor(ids)
        out = theirs(input_ids=given, attention_mask=given != 1, output_hidden_states=True)
    assert relative(ours.hidden_state(jnp.asarray(ids)), out.hidden_states[-1].numpy(), ids) < 1e-4


def test_a_misshapen_tensor_is_named(checkpoint):
    name = "esm.encoder.layer.2.intermediate.dense.weight"
    edit(checkpoint, lambda tensors: tensors.update({name: tensors[name][:-1].copy()}))
    with pytest.raises(
        InputError, match=r"layer.2.intermediate.dense.weight has shape \[63, 16\], .* needs \[64, 16\]"
    ):
        read(checkpoint)


def test_an_integer_tensor_is_refused(checkpoint):
    name = "esm.encoder.emb_layer_norm_after.weight"
    edit(checkpoint, lambda tensors: tensors.update({name: tensors[name].astype(np.int32)}))
    with pytest.raises(InputError, match="emb_layer_norm_after.weight is int32, not floating point"):
        read(checkpoint)


def test_unused_tensors_of_published_checkpoints_are_passed_over(checkpoint):
    extra = {
        "esm.embeddings.position_embeddings.weight": np.ones((66, 16), np.float32),
        "esm.embeddings.position_ids": np.ones((1, 66), np.int64),
        "esm.contact_head.regression.weight": np.ones((1, 6), np.float32),
    }
    before = read(checkpoint)
    edit(checkpoint, lambda tensors: tensors.update(extra))
    after = read(checkpoint)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(before.model), nnx.state(after.model))


@pytest.mark.parametrize(("family", "other", "last"), [("v1", "v2", 4106), ("v2", "v1", 4104)])
def test_a_vocabulary_of_the_other_family_is_refused(tmp_path, family, other, last):
    """Otherwise every 6-mer would be taken for another one, and nothing would say so."""
    checkpoint = Path(shutil.copytree(GOLDEN / family, tmp_path / "checkpoint"))
    shutil.copy(GOLDEN / other / "vocab.txt", checkpoint / "vocab.txt")
    with pytest.raises(InputError, match=f"vocab.txt: its last letter has id {last}, config.json has"):
        read(checkpoint)


def test_a_vocabulary_whose_pad_differs_is_refused(checkpoint):
    lines = (checkpoint / "vocab.txt").read_text().splitlines()
    lines[1], lines[4] = lines[4], lines[1]
    (checkpoint / "vocab.txt").write_text("\n".join(lines))
    with pytest.raises(InputError, match="<pad> is id 4, in config.json 1"):
        read(checkpoint)


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_the_key_table_names_each_parameter_once(family):
    names = [name for row in published_names(golden_config(family), lm_head=True) for name in row.names(3)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize(
    "mesh",
    [config.MeshConfig(data=8), config.MeshConfig(data=8, params="fsdp"), config.MeshConfig(data=4, model=2)],
    ids=str,
)
def test_loading_onto_a_mesh_gives_the_same_numbers(family, mesh):
    transformer = golden_config(family)
    one = load_model(GOLDEN / family, transformer, jnp.float32, make_layout(ONE), lm_head=True)
    many = load_model(GOLDEN / family, transformer, jnp.float32, make_layout(mesh), lm_head=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(nnx.state(one)), jax.device_get(nnx.state(many)))
    kernel = many.layers.feed_forward.up.kernel.get_value()
    shards = {"replicated": 1, "fsdp": 8}[mesh.params] * mesh.model
    assert kernel.addressable_shards[0].data.size * shards == kernel.size


def test_bfloat16_is_float32_rounded():
    transformer = golden_config("v1")
    full = load_model(GOLDEN / "v1", transformer, jnp.float32, make_layout(ONE))
    half = load_model(GOLDEN / "v1", transformer, jnp.bfloat16, make_layout(ONE))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a.astype(jnp.bfloat16)), np.asarray(b)),
        nnx.state(full),
        nnx.state(half),
    )


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_converted_weights_are_the_same_model(family, tmp_path):
    loaded = load_weights(config.ModelConfig(checkpoint=str(GOLDEN / family)), make_layout(ONE), lm_head=True)
    save_converted(tmp_path / "out", loaded.model, loaded.config, loaded.vocabulary, loaded.provenance)
    assert is_converted(tmp_path / "out")
    for mesh in (ONE, config.MeshConfig(data=8, params="fsdp")):
        again = load_weights(config.ModelConfig(checkpoint=str(tmp_path / "out")), make_layout(mesh), lm_head=True)
        assert again.config == loaded.config
        assert again.provenance == loaded.provenance
        assert again.vocabulary == loaded.vocabulary
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.device_get(nnx.state(loaded.model)),
            jax.device_get(nnx.state(again.model)),
        )
    trunk = load_weights(config.ModelConfig(checkpoint=str(tmp_path / "out"), dtype="bfloat16"), make_layout(ONE))
    assert trunk.model.lm_head is None
    assert trunk.provenance == dataclasses.replace(loaded.provenance, dtype="bfloat16")
    assert trunk.model.word_embeddings.dtype == jnp.bfloat16


def test_convert_writes_a_checkpoint_and_tells_what_it_is(tmp_path):
    out = str(tmp_path / "out")
    summary = convert(config.ModelConfig(checkpoint=str(GOLDEN / "v2")), out, ONE)
    assert summary.provenance == read_provenance(tmp_path / "out")
    assert str(summary) == f"{out}: {GOLDEN / 'v2'} in float32, sha256 {summary.provenance.weights_sha256}"
    with pytest.raises(InputError, match="not empty"):
        convert(config.ModelConfig(checkpoint=str(GOLDEN / "v2")), out, ONE)


def test_damaged_converted_weights_are_refused(tmp_path):
    loaded = load_weights(config.ModelConfig(checkpoint=str(GOLDEN / "v2")), make_layout(ONE), lm_head=True)
    out = tmp_path / "out"
    save_converted(out, loaded.model, loaded.config, loaded.vocabulary, loaded.provenance)
    with pytest.raises(InputError, match="not empty"):
        save_converted(out, loaded.model, loaded.config, loaded.vocabulary, loaded.provenance)
    shutil.rmtree(out / "weights" / "trunk")
    with pytest.raises(InputError, match="converted weights cannot be read"):
        read(out)
    (out / "bioscan_jax.json").write_text("{")
    with pytest.raises(InputError, match="bioscan_jax.json: damaged"):
        read_provenance(out)


MEASURE = """
import sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from flax import nnx
from bioscan_jax import config
from bioscan_jax.model.config import read_config
from bioscan_jax.checkpoints.keys import load_model
from bioscan_jax.devices.sharding import make_layout

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

directory = Path(sys.argv[1])
transformer, layout = read_config(directory), make_layout(config.MeshConfig(data=1))
load_model(Path(sys.argv[2]), read_config(Path(sys.argv[2])), jnp.float32, layout, lm_head=True)  # warms up the compiler
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = load_model(directory, transformer, jnp.dtype(sys.argv[3]), layout, lm_head=True)
jax.block_until_ready(nnx.state(model))
done = True
thread.join()
print(peak - before, sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))))
"""


@pytest.fixture(scope="module")
def two_layers_of_the_headline_model(tmp_path_factory):
    """NT 2.5B at full width, two layers deep: 760 MiB of float32, its largest tensor 100 MiB."""
    directory = tmp_path_factory.mktemp("wide")
    transformer = dataclasses.replace(PRESETS["nt-v1-2.5b"], num_hidden_layers=2)
    state = nnx.state(abstract_model(transformer, jnp.float32, lm_head=True))
    shapes = {path: variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    tensors = {}
    for row in published_names(transformer, lm_head=True):
        shape = shapes[row.path][1:] if row.path[0] == "layers" else shapes[row.path]
        for name in row.names(2):
            tensors[name] = np.full(shape[::-1] if row.transposed else shape, 0.5, np.float32)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(transformer.to_json())
    return directory, max(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_host_memory_stays_under_one_and_a_half_tensors(two_layers_of_the_headline_model, dtype):
    """Beyond the device copies, which on CPU are host memory too; what the compiler takes is counted."""
    directory, largest = two_layers_of_the_headline_model
    assert largest == 100 << 20
    command = [sys.executable, "-c", MEASURE, directory, GOLDEN / "v2", dtype]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    grown, devices = map(int, run.stdout.split())
    assert grown - devices < 1.5 * largest
