"""Adapters and heads as files: bit for bit as written, PEFT's own, nothing but plain LoRA of the right base."""

import dataclasses
import json
import subprocess
import sys
from functools import partial

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.golden import golden_config
from support.golden_models import (
    BASE,
    EVERY,
    GOLDEN,
    ONE,
    adapt,
    arrays,
    golden_model,
    label_space,
    random_heads,
    relative,
    token_rows,
)
from support.places import SCRIPTS

from bioscan_jax import DataConfig, EmbedConfig, InputError, ModelConfig, SinkConfig, config
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.head_files import HEADS_FILE, LABELS_FILE, read_heads, write_heads
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.keys import load_model
from bioscan_jax.checkpoints.load import LoadedModel, load_weights
from bioscan_jax.checkpoints.model_card import FACTS_FILE
from bioscan_jax.checkpoints.orbax import read_provenance, save_converted
from bioscan_jax.checkpoints.peft import CONFIG_FILE, read_adapter, write_adapter
from bioscan_jax.checkpoints.readers import sha256_of, weight_files
from bioscan_jax.data.parquet import open_source
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.embedding.job import prepare
from bioscan_jax.model.lora import TARGETS, add_adapters

WEIGHTS = "adapter_model.safetensors"


def adapters(model):
    return arrays(model, nnx.LoRAParam)


@pytest.fixture(params=["v1", "v2"])
def family(request):
    return request.param


@pytest.fixture
def exported(tmp_path):
    """An adapter of the v2 model, to be damaged."""
    directory = tmp_path / "adapter"
    write_adapter(directory, adapt(golden_model("v2")), EVERY, provenance=BASE)
    return directory


def read_again(directory, base=BASE, family="v2"):
    return read_adapter(directory, golden_model(family), make_layout(ONE), base=base)


def refusal(directory, **settings):
    with pytest.raises(InputError) as error:
        read_again(directory, **settings)
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)
    return str(error.value)


def reconfigure(directory, **changes):
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("targets", [("query", "value"), ("feed_forward_in", "feed_forward_out")])
def test_what_is_read_is_what_was_written(family, targets, tmp_path):
    lora = dataclasses.replace(EVERY, targets=targets)
    model = adapt(golden_model(family), lora)
    write_adapter(tmp_path / "out", model, lora, provenance=BASE, facts={"epochs": 3})
    again = golden_model(family)
    adapter = read_adapter(tmp_path / "out", again, make_layout(ONE), base=BASE)
    assert adapters(model).keys() == adapters(again).keys()
    for path, values in adapters(model).items():
        np.testing.assert_array_equal(values, adapters(again)[path])
    assert nnx.graphdef(model) == nnx.graphdef(again)
    assert adapter.facts["epochs"] == 3
    assert adapter.facts["base"]["weights_sha256"] == BASE.weights_sha256
    assert adapter.lora == lora


@pytest.mark.parametrize(
    ("mesh", "of_a", "of_b"),
    [
        (config.MeshConfig(data=8), 1, 1),
        (config.MeshConfig(data=8, params="fsdp"), 8, 1),
        (config.MeshConfig(data=4, model=2, params="fsdp"), 4, 2),
    ],
    ids=["replicated", "fsdp", "fsdp and tensor parallel"],
)
def test_adapters_lie_where_their_layers_do(mesh, of_a, of_b, exported):
    one, model, layout = adapt(golden_model("v2")), golden_model("v2", mesh), make_layout(mesh)
    read_adapter(exported, model, layout, base=BASE)
    for path, values in adapters(one).items():
        np.testing.assert_array_equal(values, adapters(model)[path])
    up = model.layers.feed_forward.up
    for array, parts in ((up.a[...], of_a), (up.b[...], of_b)):
        assert array.addressable_shards[0].data.size * parts == array.size
        assert len(array.sharding.device_set) == 8
    if mesh.model == 2:
        ids = jnp.tile(token_rows(model.config), (2, 1))
        expected = np.asarray(one.hidden_state(ids))
        hidden = np.asarray(nnx.jit(lambda m: m.hidden_state(ids, layout=layout))(model))
        assert np.abs(hidden - expected).max() / np.abs(expected).max() < 1e-5


def test_the_files_are_peft_s(family, tmp_path):
    lora = config.LoRAConfig(rank=2, targets=("query", "feed_forward_in", "feed_forward_out"))
    write_adapter(tmp_path / "out", adapt(golden_model(family), lora), lora, provenance=BASE)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG_FILE, WEIGHTS, FACTS_FILE, "README.md"}
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert len(tensors) == 2 * 3 * 3
    stem = "base_model.model.esm.encoder.layer.2"
    width = 64 if family == "v2" else 32
    shapes = {
        f"{stem}.attention.self.query.lora_A.weight": (2, 16),
        f"{stem}.attention.self.query.lora_B.weight": (16, 2),
        f"{stem}.intermediate.dense.lora_A.weight": (2, 16),
        f"{stem}.intermediate.dense.lora_B.weight": (width, 2),
        f"{stem}.output.dense.lora_A.weight": (2, 32),
        f"{stem}.output.dense.lora_B.weight": (16, 2),
    }
    assert {name: tensors[name].shape for name in shapes} == shapes
    parsed = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert (parsed["peft_type"], parsed["task_type"]) == ("LORA", "FEATURE_EXTRACTION")
    assert (parsed["r"], parsed["lora_alpha"]) == (2, 32)
    assert (parsed["base_model_name_or_path"], parsed["revision"]) == ("mine/v", "a" * 40)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-sa-4.0\n" in card
    assert "base_model: mine/v\n" in card


def test_a_card_without_a_licence_says_so(tmp_path):
    write_adapter(
        tmp_path / "out", adapt(golden_model("v2")), EVERY, provenance=dataclasses.replace(BASE, license=None)
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license:" not in card.split("---")[1]
    assert "names no licence" in card


def test_the_hash_is_of_what_changes_the_numbers(exported):
    before = read_again(exported).sha256
    reconfigure(exported, revision="c" * 40, lora_dropout=0.5, peft_version="9.9", some_new_option=None)
    assert read_again(exported).sha256 == before
    reconfigure(exported, lora_alpha=13)
    assert read_again(exported).sha256 != before


def test_rank_stabilised_scaling(exported):
    reconfigure(exported, use_rslora=True)
    model = golden_model("v2")
    adapter = read_adapter(exported, model, make_layout(ONE), base=BASE)
    assert model.layers.attention.query.scaling == 12.0 / np.sqrt(8)
    assert adapter.lora.alpha / 8 == pytest.approx(12.0 / np.sqrt(8), rel=1e-15)


def test_half_precision_tensors_are_read_as_float32(exported):
    edit(exported, lambda t: t.update({name: value.astype(np.float16) for name, value in t.items()}))
    model = golden_model("v2")
    read_adapter(exported, model, make_layout(ONE), base=BASE)
    assert {values.dtype for values in adapters(model).values()} == {np.dtype(np.float32)}


def test_names_without_the_esm_prefix_are_an_esm_model_s(exported):
    (exported / FACTS_FILE).unlink()
    whole = golden_model("v2")
    read_adapter(exported, whole, make_layout(ONE), base=BASE)
    renamed = {k.replace(".esm.", "."): v for k, v in load_file(exported / WEIGHTS).items()}
    save_file(renamed, exported / WEIGHTS)
    bare = golden_model("v2")
    read_adapter(exported, bare, make_layout(ONE), base=BASE)
    for path, values in adapters(whole).items():
        np.testing.assert_array_equal(values, adapters(bare)[path])
    save_file(
        renamed | {k.replace("base_model.model.", "base_model.model.esm."): v for k, v in renamed.items()},
        exported / WEIGHTS,
    )
    assert "are the same" in refusal(exported)


UNSUPPORTED = {
    "peft_type": "LOHA",
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "modules_to_save": ["classifier", "emb_layer_norm_after"],
    "rank_pattern": {"query": 2},
    "alpha_pattern": {"query": 2},
    "layers_to_transform": [0],
    "layer_replication": [[0, 2]],
    "init_lora_weights": "pissa",
    "loftq_config": {"loftq_bits": 4},
    "some_later_option": 0.5,
}


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED.items())
def test_more_than_plain_lora_is_refused(exported, key, value):
    reconfigure(exported, **{key: value})
    message = refusal(exported)
    assert CONFIG_FILE in message
    assert f"{key} = {value!r}" in message


@pytest.mark.parametrize(
    ("key", "value"), [("r", 0), ("r", 2.5), ("lora_alpha", None), ("lora_alpha", float("nan")), ("lora_dropout", "no")]
)
def test_numbers_that_are_none_are_refused(exported, key, value):
    reconfigure(exported, **{key: value})
    assert f"{key} = {value!r} is not a number of the right kind" in refusal(exported)


def test_files_that_are_not_there_or_damaged(exported, tmp_path):
    assert "there is no such directory" in refusal(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.bin").touch()
    assert "has no adapter_config.json, only model.bin" in refusal(tmp_path / "other")
    kept = (exported / FACTS_FILE).read_text()
    (exported / FACTS_FILE).write_text(kept.replace('"format": 1', '"format": 7'))
    assert "has format 7" in refusal(exported)
    (exported / FACTS_FILE).write_text("[]")
    assert f"{FACTS_FILE}: damaged" in refusal(exported)
    (exported / FACTS_FILE).write_text(kept)
    whole = (exported / WEIGHTS).read_bytes()
    (exported / WEIGHTS).write_bytes(whole[:-5])
    assert "is not a whole safetensors file" in refusal(exported)
    (exported / WEIGHTS).unlink()
    assert "has no adapter_model.safetensors or adapter_model.bin" in refusal(exported)
    (exported / CONFIG_FILE).write_text("[]")
    assert "not a JSON object" in refusal(exported)
    (exported / CONFIG_FILE).write_text("{")
    assert "not readable as JSON" in refusal(exported)


def test_an_adapter_of_another_base_is_refused(exported):
    message = refusal(exported, base=dataclasses.replace(BASE, model="theirs", weights_sha256="c" * 64))
    assert "adapter of mine/v (sha256 bbbbbbbbbbbb), not of theirs (sha256 cccccccccccc)" in message
    (exported / FACTS_FILE).unlink()
    assert "adapter of mine/v, not of other/v" in refusal(exported, base=dataclasses.replace(BASE, model="other/v"))
    message = refusal(exported, base=dataclasses.replace(BASE, model="other/v", revision=None), family="v1")
    assert "an adapter of mine/v: " in message
    assert "intermediate.dense.lora_B.weight has shape [64, 8], other/v and r need [32, 8]" in message


def test_tensors_that_do_not_fit_are_refused(exported):
    stem = "base_model.model.esm.encoder.layer"
    name = f"{stem}.1.attention.self.key.lora_B.weight"
    whole = load_file(exported / WEIGHTS)

    def with_tensors(**changes):
        changed = {k: v for k, v in (whole | changes).items() if v is not None}
        save_file(changed, exported / WEIGHTS)
        return refusal(exported)

    assert f"1 tensor(s) missing, first '{name}'" in with_tensors(**{name: None})
    assert "unexpected tensor 'base_model.model.esm.embeddings.word_embeddings.lora_A.weight'" in with_tensors(
        **{"base_model.model.esm.embeddings.word_embeddings.lora_A.weight": np.ones((8, 16), np.float32)}
    )
    deeper = {f"{stem}.3.attention.self.key.lora_{m}.weight": whole[name] for m in "AB"}
    assert f"unexpected tensor '{stem}.3.attention.self.key.lora_A" in with_tensors(**deeper)
    assert "key.lora_B.weight has shape [16, 7]" in with_tensors(**{name: whole[name][:, :7].copy()})
    assert "key.lora_B.weight is int32, not floating point" in with_tensors(**{name: whole[name].astype(np.int32)})
    save_file({}, exported / WEIGHTS)
    assert "holds no tensors" in refusal(exported)


def test_what_a_vector_does_not_need_is_named_and_left(exported, caplog):
    whole = golden_model("v2")
    digest = read_adapter(exported, whole, make_layout(ONE), base=BASE).sha256
    names = ("classifier.dense.weight", "classifier.out_proj.bias", "lm_head.dense.lora_A.weight")
    names += ("esm.contact_head.regression.lora_B.weight", "esm.pooler.dense.lora_A.weight", "score.weight")
    edit(exported, lambda t: t.update({f"base_model.model.{name}": np.ones((8, 16), np.float32) for name in names}))
    reconfigure(exported, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    again = golden_model("v2")
    assert read_adapter(exported, again, make_layout(ONE), base=BASE).sha256 != digest
    for path, values in adapters(whole).items():
        np.testing.assert_array_equal(values, adapters(again)[path])
    assert "classifier, esm.contact_head, esm.pooler, lm_head, score left out" in caplog.text
    edit(exported, lambda t: [t.pop(name) for name in list(t) if ".layer." in name])
    assert "holds no tensors but those of classifier, esm.contact_head" in refusal(exported)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"target_modules": r"esm\.encoder\.layer\.[02]\..*"}, {0, 2}),
        ({"target_modules": [f"layer.2.{n}" for n in ("attention.self.query", "output.dense")]}, {2}),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, {1}),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, {1}),
        ({"target_modules": ["query", "key", "value", "dense"], "exclude_modules": r".*layer\.1\..*"}, {0, 2}),
    ],
)
def test_layers_without_an_adapter_get_none(exported, settings, kept):
    """As PEFT does: the config says which layers, and those that it names must be in the file."""
    whole = golden_model("v2")
    read_adapter(exported, whole, make_layout(ONE), base=BASE)
    only = isinstance(settings["target_modules"], list) and len(settings["target_modules"]) == 2
    parts = (".self.query.", ".output.dense.") if only else (".",)
    stem = "base_model.model.esm.encoder.layer"
    kept_names = [f"{stem}.{i}." for i in kept]

    def drop(tensors):
        for name in list(tensors):
            wanted = any(part in name for part in parts) and not (only and "attention.output" in name)
            if not wanted or not name.startswith(tuple(kept_names)):
                del tensors[name]

    edit(exported, drop)
    reconfigure(exported, **settings)
    partial_model = golden_model("v2")
    adapter = read_adapter(exported, partial_model, make_layout(ONE), base=BASE)
    assert len(adapter.lora.targets) == (2 if only else 6)
    for path, values in adapters(partial_model).items():
        for layer, found in enumerate(values):
            expected = adapters(whole)[path][layer] if layer in kept else np.zeros_like(found)
            np.testing.assert_array_equal(found, expected)
    first = min(load_file(exported / WEIGHTS))
    edit(exported, lambda t: t.pop(first))
    assert "1 tensor(s) missing, first" in refusal(exported)


@pytest.mark.parametrize(
    ("key", "value"),
    [("target_modules", "("), ("target_modules", 7), ("target_modules", [7]), ("layers_to_transform", ["0"])],
)
def test_settings_that_choose_no_layers_are_refused(exported, key, value):
    reconfigure(exported, **{key: value})
    assert f"{key} = {value!r}" in refusal(exported)


def test_nothing_is_overwritten_or_half_written(exported, tmp_path):
    model = adapt(golden_model("v2"))
    with pytest.raises(InputError, match="adapter: not empty"):
        write_adapter(exported, model, EVERY, provenance=BASE)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: not empty"):
        write_adapter(tmp_path / "file", model, EVERY, provenance=BASE)
    with pytest.raises(InputError, match="cannot be written"):
        write_adapter(tmp_path / "file" / "below", model, EVERY, provenance=BASE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_adapter(tmp_path / "empty", model, EVERY, provenance=BASE, facts={"x": object()})
    with pytest.raises(ValueError, match=r"facts has \['base'\], which the export writes itself"):
        write_adapter(tmp_path / "empty", model, EVERY, provenance=BASE, facts={"base": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "file", "empty"}
    assert not list((tmp_path / "empty").iterdir())
    write_adapter(tmp_path / "empty", model, EVERY, provenance=BASE)
    assert read_again(tmp_path / "empty").sha256 == read_again(exported).sha256


def test_adapters_that_are_not_those_of_the_settings(tmp_path):
    model = adapt(golden_model("v2"))
    for wrong in ({"targets": ("query",)}, {"rank": 4}, {"alpha": 3.0}):
        with pytest.raises(ValueError, match="the adapter"):
            write_adapter(tmp_path / "out", model, dataclasses.replace(EVERY, **wrong), provenance=BASE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "encoder"), [("cosine", True), ("marginal", True), ("marginal", False)])
def test_heads_come_back_bit_for_bit(kind, encoder, tmp_path):
    given = random_heads(kind, encoder=encoder)
    write_adapter(tmp_path / "out", adapt(golden_model("v2")), EVERY, provenance=BASE, heads=given)
    for mesh in (ONE, config.MeshConfig(data=8, params="fsdp")):
        layout = make_layout(mesh)
        again = read_heads(tmp_path / "out", layout)
        assert (again.kind, again.pooling, again.space.sha256) == (kind, "mean", given.space.sha256)
        assert (again.encoder is not None) == encoder
        assert again.scale == given.scale == (7.5 if kind == "cosine" else None)
        for one, two in ((given.head, again.head), (given.encoder, again.encoder)):
            if one is not None:
                pairs = zip(nnx.to_flat_state(nnx.state(one)), nnx.to_flat_state(nnx.state(two)), strict=True)
                for (path, a), (other, b) in pairs:
                    assert path == other
                    np.testing.assert_array_equal(a.get_value(), np.asarray(b.get_value()))
    facts = json.loads((tmp_path / "out" / FACTS_FILE).read_text())
    assert (facts["head"], facts["labels_sha256"]) == (kind, given.space.sha256)
    assert "label_space.json" in (tmp_path / "out" / "README.md").read_text()


def test_heads_that_do_not_fit_are_refused(tmp_path):
    layout = make_layout(ONE)
    with pytest.raises(InputError, match=r"has no heads.safetensors; pass the directory of an export"):
        read_heads(tmp_path, layout)
    write_heads(tmp_path, random_heads("marginal"))
    label_space(4).save(tmp_path / LABELS_FILE)
    with pytest.raises(InputError, match="is for the label space .* but .*label_space.json is"):
        read_heads(tmp_path, layout)
    write_heads(tmp_path, random_heads("marginal"))
    tensors = load_file(tmp_path / HEADS_FILE)
    save_file(tensors, tmp_path / HEADS_FILE)
    with pytest.raises(InputError, match="made by another version of bioscan_jax, or by another program"):
        read_heads(tmp_path, layout)
    facts = {"content": "bioscan_jax heads 1", "kind": "marginal", "pooling": "mean"}
    facts["label_space_sha256"] = label_space().sha256
    for change, words in (
        (
            {"head.leaves.linear.bias": np.ones(129, np.float32)},
            r"has shape \(129,\), the label space needs \(128,\)",
        ),
        ({"head.more": np.ones(1, np.float32)}, r"head.more has shape \(1,\), the label space needs None"),
        ({"head.leaves.linear.bias": np.ones(128, np.float64)}, "head.leaves.linear.bias .*float32"),
    ):
        save_file(tensors | change, tmp_path / HEADS_FILE, facts)
        with pytest.raises(InputError, match=words):
            read_heads(tmp_path, layout)
    for scale in ("nan", "0", "large"):
        save_file(tensors, tmp_path / HEADS_FILE, facts | {"kind": "cosine", "scale": scale})
        with pytest.raises(InputError, match="the scale"):
            read_heads(tmp_path, layout)
    save_file({"x": np.ones(1, np.float32)}, tmp_path / HEADS_FILE, facts)
    with pytest.raises(InputError, match="no kernel of a head"):
        read_heads(tmp_path, layout)
    mixed = dataclasses.replace(random_heads("marginal"), space=label_space(400))
    with pytest.raises(ValueError, match="do not match their kind or label space"):
        write_heads(tmp_path, mixed)


def golden_provenance():
    """As `load` gives it for the v2 checkpoint."""
    digest = sha256_of(weight_files(GOLDEN / "v2"))
    return Provenance(model=str(GOLDEN / "v2"), revision=None, weights_sha256=digest, license=None, dtype="float32")


def test_load_applies_the_adapter_and_says_so(tmp_path):
    base, model = golden_provenance(), adapt(golden_model("v2"))
    write_adapter(tmp_path / "a", model, EVERY, provenance=base)
    given = ModelConfig(checkpoint=str(GOLDEN / "v2"), adapter=str(tmp_path / "a"))
    loaded = load_weights(given, make_layout(ONE), lm_head=True)
    for path, values in arrays(model).items():
        np.testing.assert_array_equal(values, arrays(loaded.model)[path])
    digest = loaded.adapter.sha256
    assert loaded.provenance == dataclasses.replace(base, adapter=str(tmp_path / "a"), adapter_sha256=digest)
    with pytest.raises(InputError, match=r"--model.adapter .* cannot be converted"):
        save_converted(tmp_path / "c", loaded.model, loaded.config, loaded.vocabulary, loaded.provenance)
    save_converted(tmp_path / "c", golden_model("v2"), loaded.config, loaded.vocabulary, base)
    record = json.loads((tmp_path / "c" / "bioscan_jax.json").read_text())
    assert record.keys() == {"format", "model", "revision", "weights_sha256", "license", "dtype"}
    assert read_provenance(tmp_path / "c") == base
    converted = load_weights(dataclasses.replace(given, checkpoint=str(tmp_path / "c")), make_layout(ONE))
    assert converted.provenance == loaded.provenance


def write_input(path):
    pq.write_table(pa.table({"sequence_id": ["x", "y"], "dna_sequence": ["ACGTAC" * 9, "TTGACA" * 5]}), path)
    return str(path)


def test_the_plan_of_a_table_has_the_adapter(tmp_path):
    data = DataConfig(path=write_input(tmp_path / "in.parquet"))
    adapter = {"adapter": "a", "adapter_sha256": "c" * 64}
    jobs = [
        prepare(
            open_source(data, scratch=tmp_path / "scratch"),
            Encoder(
                loaded=LoadedModel(
                    model=golden_model("v2"),
                    config=golden_config("v2"),
                    vocabulary=Vocabulary.published("v2"),
                    layout=make_layout(ONE),
                    get_provenance=partial(dataclasses.replace, BASE, **changes),
                )
            ),
            data,
            EmbedConfig(),
            SinkConfig(uri=str(tmp_path / "db")),
        )
        for changes in ({}, adapter)
    ]
    without, with_adapter = (job.plan.facts["model"] for job in jobs)
    assert with_adapter == without | {"adapter_sha256": "c" * 64}
    # What plans had before there were adapters: such tables still open.
    assert without.keys() == {"weights_sha256", "dtype", "vocabulary_sha256", "config"}
    assert jobs[1].provenance == jobs[0].provenance | adapter


@pytest.mark.slow
def test_the_script_takes_an_adapter_of_its_model_alone(tmp_path):
    """The real script: other vectors than without, a table of its own, and one line for another model's adapter."""
    import lance

    base = golden_provenance()
    other = dataclasses.replace(base, model="theirs", weights_sha256="0" * 64)
    for name, provenance in (("good", base), ("bad", other)):
        write_adapter(tmp_path / name, adapt(golden_model("v2")), EVERY, provenance=provenance)

    def run(table, *more):
        flags = {
            "model.checkpoint": GOLDEN / "v2",
            "data.path": write_input(tmp_path / "in.parquet"),
            "sink.uri": tmp_path / "db",
            "sink.table": table,
            "mesh.compilation_cache": tmp_path / "cache",
        }
        script = SCRIPTS / "embed.py"
        command = [sys.executable, str(script), *(f"--{name}={value}" for name, value in flags.items()), *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    plain, good = run("plain"), run("good", f"--model.adapter={tmp_path / 'good'}")
    assert (plain.returncode, good.returncode) == (0, 0), plain.stderr + good.stderr
    assert f"with the adapter {tmp_path / 'good'}" in good.stdout
    assert "with the adapter" not in plain.stdout
    tables = [lance.dataset(str(tmp_path / "db" / f"{name}.lance")) for name in ("plain", "good")]
    one, two = (np.stack(table.to_table()["vector"].to_numpy()) for table in tables)
    assert np.abs(one - two).max() > 0.01
    facts = tables[1].schema.metadata
    assert facts[b"adapter"] == str(tmp_path / "good").encode()
    assert json.loads(facts[b"plan_facts"])["model"]["adapter_sha256"] == facts[b"adapter_sha256"].decode()
    for table, adapter, words in (
        ("plain", "good", "adapter_sha256"),
        ("third", "bad", f"is an adapter of theirs (sha256 000000000000), not of {GOLDEN}/v2"),
    ):
        refused = run(table, f"--model.adapter={tmp_path / adapter}")
        assert (refused.returncode, refused.stdout) == (2, "")
        last = refused.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert words in last
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "db" / "third.lance").exists()


@pytest.fixture
def reference(family, tmp_path):
    """PyTorch's model, its checkpoint's directory and our model of it."""
    from support.torch_models import save_checkpoint, torch_model

    transformer = golden_config(family)
    theirs = torch_model(transformer, seed=2)
    save_checkpoint(theirs, transformer, tmp_path / "base", "safetensors")
    return theirs, load_model(tmp_path / "base", transformer, jnp.float32, make_layout(ONE))


def torch_states(model, ids):
    import torch

    ids = torch.tensor(np.asarray(ids))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=ids != 1, output_hidden_states=True).hidden_states[-1].numpy()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("targets", [("all_linear",), ("query", "value"), ("feed_forward_out",), ("attention_output",)])
def test_peft_reads_ours(family, reference, targets, tmp_path):
    from peft import PeftModel, PeftModelForFeatureExtraction

    theirs, ours = reference
    ids = token_rows(ours.config)
    plain = np.asarray(ours.hidden_state(ids))
    lora = dataclasses.replace(EVERY, targets=targets)
    source = adapt(golden_model(family), lora)
    add_adapters(ours, lora, nnx.Rngs(0))
    nnx.update(ours, nnx.state(source, nnx.LoRAParam))
    write_adapter(tmp_path / "out", ours, lora, provenance=BASE)
    model = PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    assert isinstance(model, PeftModelForFeatureExtraction)
    assert sum(1 for name, _ in model.named_parameters() if "lora_" in name) == 2 * 3 * len(lora.targets) * (
        len(TARGETS) if targets == ("all_linear",) else 1
    )
    expected = torch_states(model, ids)
    assert relative(plain, expected, ids) > 1e-2
    assert relative(ours.hidden_state(ids), expected, ids) < 1e-4


@pytest.mark.parity
def test_peft_refuses_ours_around_a_bare_trunk(reference, family, tmp_path):
    """A name that fits and a tensor that does not would be no more than a warning."""
    from peft import PeftModel

    write_adapter(tmp_path / "out", adapt(golden_model(family)), EVERY, provenance=BASE)
    with pytest.raises(ValueError, match="not found in the base model"):
        PeftModel.from_pretrained(reference[0].esm, tmp_path / "out")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("whole", [True, False], ids=["EsmForMaskedLM", "EsmModel"])
def test_we_read_peft_s(family, reference, whole, safe, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    theirs, ours = reference
    ids = token_rows(ours.config)
    plain = np.asarray(ours.hidden_state(ids))
    wanted = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=whole,
        lora_dropout=0.1,
        target_modules=["query", "value", "intermediate.dense", "attention.output.dense", "output.dense"],
        init_lora_weights=False,
    )
    model = get_peft_model(theirs if whole else theirs.esm, wanted).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "out")
    if not safe:
        (tmp_path / "out" / WEIGHTS).unlink()
        torch.save(get_peft_model_state_dict(model), tmp_path / "out" / "adapter_model.bin")
    adapter = read_adapter(tmp_path / "out", ours, make_layout(ONE), base=BASE)
    assert adapter.facts is None
    assert adapter.lora.targets == ("query", "value", "attention_output", "feed_forward_in", "feed_forward_out")
    if whole:
        expected = torch_states(model, ids)
    else:
        with torch.no_grad():
            theirs_ids = torch.tensor(np.asarray(ids))
            expected = model(input_ids=theirs_ids, attention_mask=theirs_ids != 1).last_hidden_state.numpy()
    assert relative(plain, expected, ids) > 1e-2
    assert relative(ours.hidden_state(ids), expected, ids) < 1e-4


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("SEQ_CLS", {"target_modules": ["query", "value"]}),
        ("SEQ_CLS", {"target_modules": "all-linear"}),
        ("SEQ_CLS", {"target_modules": r".*\.layer\.[02]\..*\.(query|dense)"}),
        ("TOKEN_CLS", {"target_modules": ["key", "dense"], "layers_to_transform": [1]}),
        (None, {"target_modules": "all-linear"}),
        (None, {"target_modules": r".*\.layer\.1\..*dense|lm_head\.dense"}),
    ],
)
def test_we_read_peft_s_adapters_of_other_tasks(family, reference, task, settings, tmp_path, caplog):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import EsmForSequenceClassification, EsmForTokenClassification

    theirs, ours = reference
    if task is not None:
        kind = {"SEQ_CLS": EsmForSequenceClassification, "TOKEN_CLS": EsmForTokenClassification}[task]
        trunk, theirs = theirs.esm, kind(theirs.config)
        theirs.esm = trunk
    ids = token_rows(ours.config)
    plain = np.asarray(ours.hidden_state(ids))
    model = get_peft_model(theirs, LoraConfig(task_type=task, r=4, init_lora_weights=False, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "out")
    read_adapter(tmp_path / "out", ours, make_layout(ONE), base=BASE)
    expected = torch_states(model, ids)
    assert relative(plain, expected, ids) > 1e-2
    assert relative(ours.hidden_state(ids), expected, ids) < 1e-4
    names = load_file(tmp_path / "out" / WEIGHTS)
    for module in ("classifier", "lm_head", "contact_head"):
        assert (module in caplog.text) == any(f"{module}." in name for name in names)
    if task is not None:
        assert "classifier" in caplog.text
