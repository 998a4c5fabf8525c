"""Models with a projection: what they encode, what their tables record, and what is refused."""

import json
from pathlib import Path

import jax.numpy as jnp
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import call
from support.golden_models import EVERY, adapt, golden_model
from support.places import GOLDEN
from support.projections import random_projection, write_projected_model

import bioscan_jax as bj
from bioscan_jax.barcodes.simulate import write_simulated
from bioscan_jax.checkpoints import hub
from bioscan_jax.checkpoints.peft import write_adapter
from bioscan_jax.checkpoints.projection_files import read_projection, write_projection
from bioscan_jax.data.in_memory import SequencesInMemory
from bioscan_jax.embedding import load as load_module
from bioscan_jax.embedding import project as project_module
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.embedding.step import CompiledSteps, CountingSteps
from bioscan_jax.errors import InputError
from bioscan_jax.table.reading import schema_metadata

MESH = bj.MeshConfig(data=1, compilation_cache=None)
NETWORKS = ((16, 8, None), (12, 10, 3.0))
DNA = "ACGTTGCATTGACAGG" * 12


def dna(count, longest=400, seed=0):
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("ACGTN"), random.integers(7, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two layers, a projection with two networks on six phases of layer 0."""
    directory = tmp_path_factory.mktemp("projected") / "model"
    write_projected_model(directory, networks=NETWORKS)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint):
    return bj.load(checkpoint, mesh=MESH)


def projected(model, raw):
    return np.asarray(model.projection(jnp.asarray(raw)))


def general(model):
    """The same model on the path that pools token vectors."""
    return Encoder(loaded=model.loaded, make_steps=lambda *given: CompiledSteps(*given))


def vectors_of(uri, table="sequences"):
    found = lance.dataset(str(Path(uri) / f"{table}.lance")).to_table().combine_chunks()
    return found["vector"].combine_chunks().flatten().to_numpy().reshape(found.num_rows, -1)


def embedded(path, uri, checkpoint, *, projection="auto", block_rows=64, **settings):
    model = bj.ModelConfig(checkpoint=str(checkpoint), projection=projection)
    data, sink = bj.DataConfig(path=str(path), block_rows=block_rows), bj.SinkConfig(uri=str(uri))
    bj.embed(model, data, sink, bj.EmbedConfig(**settings), MESH, progress=False)
    return vectors_of(uri)


@pytest.mark.parametrize(
    ("preset", "inputs"),
    [
        ("tiny-v2", {"layer": 0}),
        ("tiny-v2", {"layer": 0, "strand": "both", "max_tokens": 20, "overlong": "window"}),
        ("tiny-v2", {"layer": 0, "pooling": "max", "phases": 2}),
        ("tiny-v2", {"layer": 1, "strand": "both", "phases": 2}),
        ("tiny-v2", {"layer": 2, "phases": 1, "pooling": "mean_no_cls"}),
        ("tiny-v1", {"layer": 0, "phases": 3}),
    ],
)
def test_encodes_as_raw_vectors_projected(tmp_path, preset, inputs):
    write_projected_model(tmp_path / "model", preset=preset, networks=NETWORKS, **inputs)
    model = bj.load(tmp_path / "model", mesh=MESH)
    assert (model.dimension, model.settings.layer) == (42, inputs["layer"])
    sequences = dna(21)
    raw = model.encode(sequences, project=False)
    assert raw.shape == (21, 64)
    ours = model.encode(sequences)
    assert ours.shape == (21, 42)
    np.testing.assert_allclose(ours, projected(model, raw), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    plain = bj.load(tmp_path / "model", projection="none", mesh=MESH)
    assert (plain.projection, plain.dimension) == (None, 64)
    settings = {"pooling": "mean", "strand": "forward", "phases": 6} | inputs
    np.testing.assert_array_equal(plain.encode(sequences, **settings), raw)


@pytest.mark.parametrize("count", [1, 16, 17, 300])
def test_counting_tokens_equals_pooling_them(model, count):
    sequences = dna(count, seed=count)
    source = SequencesInMemory(pa.array(sequences), 8192)
    blocks = model.block_encoder(source, model.encoding(model.settings, "dna_sequence"), model.settings)
    assert isinstance(blocks.steps, CountingSteps)
    slow = general(model)
    ours = model.encode(sequences)
    for batch_tokens in (512, 16384):
        np.testing.assert_allclose(ours, slow.encode(sequences, batch_tokens=batch_tokens), atol=1e-6)
    np.testing.assert_allclose(ours, model.encode(sequences, block_rows=7, deduplicate=False), atol=1e-6)


@pytest.mark.parametrize("data", [2, 8])
@pytest.mark.parametrize("inputs", [{"layer": 0}, {"layer": 1, "phases": 2}])
def test_more_devices_change_vectors_by_rounding_alone(tmp_path, data, inputs):
    write_projected_model(tmp_path / "model", networks=NETWORKS, **inputs)
    sequences = dna(140)
    one = bj.load(tmp_path / "model", mesh=MESH).encode(sequences)
    mesh = bj.MeshConfig(data=data // 2, model=2, compilation_cache=None)
    np.testing.assert_allclose(bj.load(tmp_path / "model", mesh=mesh).encode(sequences), one, atol=1e-6)


def test_calls_that_differ_from_what_the_projection_was_fitted_on(model):
    for given in ({"phases": 1}, {"strand": "both"}, {"layer": 2}, {"pooling": "cls"}, {"max_tokens": 9}):
        name, value = next(iter(given.items()))
        with pytest.raises(InputError, match=f"{name}={value!r}: the projection of .* {name} .*project=False"):
            model.encode(DNA, **given)
        assert model.encode(DNA, project=False, **given).shape == (64,)
    with pytest.raises(InputError, match="overlong='window'"):
        list(model.encode_stream("absent.parquet", overlong="window"))
    np.testing.assert_array_equal(model.encode(DNA, phases=6, layer=0, max_tokens=2048), model.encode(DNA))


@pytest.fixture(scope="module")
def world(tmp_path_factory, checkpoint):
    """Barcodes with rejects and repeats, their raw and their projected table."""
    directory = tmp_path_factory.mktemp("tables")
    table = pq.read_table(write_simulated(str(directory / "in.parquet"), species=30, per_species=7, length=300, seed=0))
    sequences = table["dna_sequence"].to_pylist()
    sequences[5], sequences[100], sequences[101] = None, "protein", sequences[3]
    place = table.column_names.index("dna_sequence")
    pq.write_table(table.set_column(place, "dna_sequence", pa.array(sequences)), directory / "in.parquet")
    settings = {"phases": 6, "layer": 0}
    embedded(directory / "in.parquet", directory / "raw", checkpoint, projection="none", **settings)
    embedded(directory / "in.parquet", directory / "projected", checkpoint)
    return directory


def test_tables_hold_projected_vectors_and_say_so(world, checkpoint, model):
    stored = vectors_of(world / "projected")
    assert stored.shape == (208, 42)
    ours = model.encode(pq.read_table(world / "in.parquet")["dna_sequence"], block_rows=64, on_error="nan")
    np.testing.assert_array_equal(ours[np.isfinite(ours[:, 0])], stored)
    facts = schema_metadata(lance.dataset(str(world / "projected" / "sequences.lance")))
    plan = json.loads(facts["plan_facts"])
    sha256 = read_projection(checkpoint).sha256
    assert plan["model"]["projection_sha256"] == facts["projection_sha256"] == sha256
    assert (facts["projection"], facts["projection_description"], facts["phases"]) == ("auto", "random", "6")
    assert (plan["embed"]["phases"], plan["embed"]["layer"], plan["data"]["max_tokens"]) == (6, 0, 2048)
    raw = schema_metadata(lance.dataset(str(world / "raw" / "sequences.lance")))
    assert not any("projection" in text for text in [*raw, raw["plan_facts"]])
    record = json.loads((world / "projected" / "sequences.run.json").read_text())
    assert record["provenance"]["projection_sha256"] == sha256


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"phases": 3}, {}, r"--embed.phases 3: .* phases 6; .*--model.projection none"),
        ({"pooling": "max"}, {}, r"--embed.pooling max: .* pooling mean"),
        ({"layer": 2}, {}, r"--embed.layer 2: .* layer 0"),
        ({"strand": "both"}, {}, r"--embed.strand both: .* strand forward"),
        ({}, {"max_tokens": 50}, r"--data.max_tokens 50: .* max_tokens 2048"),
        ({}, {"overlong": "error"}, r"--data.overlong error: .* overlong truncate"),
    ],
)
def test_embedding_in_another_way_is_refused(tmp_path, world, checkpoint, settings, data, message):
    model, sink = bj.ModelConfig(checkpoint=str(checkpoint)), bj.SinkConfig(uri=str(tmp_path / "db"))
    given = bj.DataConfig(path=str(world / "in.parquet"), **data)
    with pytest.raises(InputError, match=message):
        bj.embed(model, given, sink, bj.EmbedConfig(**settings), MESH, progress=False)
    assert not list(tmp_path.rglob("*.lance"))


def test_a_table_is_searched_with_its_own_projection(tmp_path, world, checkpoint):
    row = lance.dataset(str(world / "projected" / "sequences.lance")).take([17]).to_pylist()[0]
    for uri, moved in ((world / "projected", None), (world / "raw", bj.ModelConfig(checkpoint=str(checkpoint)))):
        table = bj.open_table(str(uri), model=moved, mesh=MESH)
        found = table.search(row["dna_sequence"], k=1).to_pylist()[0]
        assert (found["sequence_id"], table.encoder.projection is None) == (row["sequence_id"], uri.name == "raw")
        assert found["similarity"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="projection_sha256 .* is none here"):
        _ = bj.open_table(
            str(world / "projected"), model=bj.ModelConfig(checkpoint=str(checkpoint), projection="none"), mesh=MESH
        ).encoder
    other = random_projection(seed=5, weights_sha256=read_projection(checkpoint).inputs.weights_sha256)
    write_projection(tmp_path / "other", other)
    moved = bj.ModelConfig(checkpoint=str(checkpoint), projection=str(tmp_path / "other"))
    for uri in (world / "projected", world / "raw"):
        with pytest.raises(InputError, match="another model .*projection_sha256"):
            _ = bj.open_table(str(uri), model=moved, mesh=MESH).encoder


def test_identify_embeds_and_projects_the_queries(tmp_path, world):
    reference = bj.ReferenceConfig(uri=str(world / "projected"))
    query = bj.QueryConfig(path=str(world / "in.parquet"))
    settings = bj.IdentifyConfig(k=3, rerank="none")
    bj.identify(reference, query, str(tmp_path / "out.parquet"), settings, mesh=MESH, progress=False)
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 210
    with pytest.raises(InputError, match="--heads .*raw vectors"):
        bj.identify(
            reference,
            query,
            str(tmp_path / "out.parquet"),
            bj.IdentifyConfig(k=3, rerank="none", heads=str(tmp_path)),
            mesh=MESH,
            progress=False,
        )


def test_bundles_keep_the_projection(tmp_path, world):
    bj.bundle(str(world / "projected"), str(tmp_path / "stick"), precision="float16", progress=False)
    bj.import_bundle(str(tmp_path / "stick"), str(tmp_path / "there"))
    found = lance.dataset(str(tmp_path / "there" / "sequences.lance"))
    before = lance.dataset(str(world / "projected" / "sequences.lance"))
    assert schema_metadata(found).items() >= schema_metadata(before).items()
    assert found.schema.field("vector").type.list_size == 42


# ---- bioscan project


def projected_table(reference, directory, uri, **sink):
    return bj.project(
        bj.ReferenceConfig(uri=str(reference)),
        str(directory),
        bj.SinkConfig(uri=str(uri), **sink),
        MESH,
        progress=False,
    )


def test_projecting_a_table_gives_the_table_that_embed_makes(tmp_path, world, checkpoint):
    summary = projected_table(world / "raw", checkpoint, tmp_path / "db")
    assert (summary.rows, summary.vectors, summary.resumed_at, summary.dimension) == (210, 208, 0, 42)
    made, embed = (lance.dataset(f"{uri}/sequences.lance") for uri in (tmp_path / "db", world / "projected"))
    assert made.schema.names == embed.schema.names
    for name in made.schema.names:
        if name != "vector":
            assert made.to_table([name]).equals(embed.to_table([name]))
    np.testing.assert_allclose(vectors_of(tmp_path / "db"), vectors_of(world / "projected"), atol=1e-6)
    rejects = [lance.dataset(f"{uri}/sequences_rejects.lance").to_table() for uri in (tmp_path / "db", world / "raw")]
    assert rejects[0].equals(rejects[1])
    facts, wanted = (schema_metadata(one) for one in (made, embed))
    different = {name for name in facts if facts[name] != wanted.get(name)}
    assert different == {"projection", "plan", "plan_facts"}
    assert projected_table(world / "raw", checkpoint, tmp_path / "db").resumed_at == 210
    row = made.take([17]).to_pylist()[0]
    found = bj.open_table(str(tmp_path / "db"), mesh=MESH).search(row["dna_sequence"], k=1).to_pylist()[0]
    assert found["sequence_id"] == row["sequence_id"]


def test_columns_joined_later_are_kept_and_float16_is_stored(tmp_path, checkpoint, world):
    embedded(world / "in.parquet", tmp_path / "raw", checkpoint, projection="none", phases=6, layer=0)
    ids = lance.dataset(str(tmp_path / "raw" / "sequences.lance")).to_table(["sequence_id"])["sequence_id"]
    pq.write_table(pa.table({"sequence_id": ids, "depth_m": range(len(ids))}), tmp_path / "depth.parquet")
    bj.annotate(str(tmp_path / "raw"), str(tmp_path / "depth.parquet"))
    for _ in range(2):
        projected_table(tmp_path / "raw", checkpoint, tmp_path / "db", vector_dtype="float16")
    made = lance.dataset(str(tmp_path / "db" / "sequences.lance"))
    assert made.to_table(["depth_m"])["depth_m"].to_pylist() == list(range(len(ids)))
    assert vectors_of(tmp_path / "db").dtype == np.float16


def test_projecting_goes_on_where_it_stopped(tmp_path, world, checkpoint, monkeypatch):
    whole = vectors_of(world / "projected")
    projector = project_module.Projector

    class Stopping(projector):
        calls = 0

        def __call__(self, vectors):
            Stopping.calls += 1
            if Stopping.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(vectors)

    monkeypatch.setattr(project_module, "Projector", Stopping)
    with pytest.raises(KeyboardInterrupt):
        projected_table(world / "raw", checkpoint, tmp_path / "db")
    monkeypatch.setattr(project_module, "Projector", projector)
    assert projected_table(world / "raw", checkpoint, tmp_path / "db").resumed_at == 128
    projected_table(world / "raw", checkpoint, tmp_path / "once")
    np.testing.assert_array_equal(vectors_of(tmp_path / "db"), vectors_of(tmp_path / "once"))
    assert len(vectors_of(tmp_path / "db")) == len(whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights_sha256": "a" * 64}, r"weights_sha256 .* fitted on weights_sha256 aaaaaaaaaaaa"),
        ({"pooling": "max"}, r"pooling mean, .* pooling max"),
        ({"layer": 1}, r"layer 0, .* layer 1"),
        ({"phases": 1}, r"phases 6, .* phases 1"),
        ({"features": 32}, r"its vectors have 64 numbers, the projection takes 32"),
    ],
)
def test_projections_that_do_not_fit_the_table(tmp_path, world, checkpoint, changed, message):
    settings = {"weights_sha256": read_projection(checkpoint).inputs.weights_sha256} | changed
    write_projection(tmp_path / "other", random_projection(**settings))
    with pytest.raises(InputError, match=message):
        projected_table(world / "raw", tmp_path / "other", tmp_path / "db")
    assert not (tmp_path / "db").exists()


def test_tables_that_cannot_be_projected(tmp_path, world, checkpoint):
    with pytest.raises(InputError, match="already projected"):
        projected_table(world / "projected", checkpoint, tmp_path / "db")
    with pytest.raises(InputError, match="is the table of raw vectors itself"):
        projected_table(world / "raw", checkpoint, world / "raw")
    with pytest.raises(InputError, match="projection.json: not found"):
        projected_table(world / "raw", tmp_path, tmp_path / "db")
    with pytest.raises(InputError, match="no table"):
        projected_table(tmp_path, checkpoint, tmp_path / "db")


def test_unfinished_tables_and_vectors_that_are_not_finite(tmp_path, world, checkpoint):
    raw = lance.dataset(str(world / "raw" / "sequences.lance")).to_table()
    rejects = lance.dataset(str(world / "raw" / "sequences_rejects.lance")).to_table()
    for name, table in (("few", raw.slice(0, 64)), ("nan", raw)):
        if name == "nan":
            values = vectors_of(world / "raw").copy()
            values[70, 3] = np.nan
            column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 64)
            table = raw.set_column(raw.schema.get_field_index("vector"), raw.schema.field("vector"), column)
        lance.write_dataset(table, str(tmp_path / name / "sequences.lance"))
        lance.write_dataset(rejects, str(tmp_path / name / "sequences_rejects.lance"))
    with pytest.raises(InputError, match="unfinished"):
        projected_table(tmp_path / "few", checkpoint, tmp_path / "db")
    name = raw["sequence_id"][70].as_py()
    with pytest.raises(InputError, match=f"the vector of '{name}' is not finite"):
        projected_table(tmp_path / "nan", checkpoint, tmp_path / "db")


def test_the_command(tmp_path, world, checkpoint):
    flags = ("--projection", checkpoint, "--sink.uri", tmp_path / "db", "--mesh.data", 1)
    done = call("project", "--reference.uri", world / "raw", *flags)
    assert (done.returncode, done.stderr.count("error")) == (0, 0)
    assert "208 vectors of 64 numbers projected to 42" in done.stdout
    again = call("project", "--reference.uri", world / "projected", *flags)
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 1
    assert "already projected" in again.stderr


# ---- saving, converting, the model in the package


def test_saving_and_converting_keep_the_projection(tmp_path, model, checkpoint):
    sequences = dna(5)
    model.save_pretrained(tmp_path / "saved")
    bj.convert(bj.ModelConfig(checkpoint=str(checkpoint)), str(tmp_path / "converted"), MESH)
    for directory in ("saved", "converted"):
        again = bj.load(tmp_path / directory, mesh=MESH)
        np.testing.assert_array_equal(again.encode(sequences), model.encode(sequences))
    assert bj.load(tmp_path / "converted", mesh=MESH).projection.sha256 == model.projection.sha256


def test_a_projection_beside_an_adapter(tmp_path):
    trunk = adapt(golden_model("v2"))
    base = bj.load(GOLDEN / "v2", mesh=MESH).provenance
    write_adapter(tmp_path / "plain", trunk, EVERY, provenance=base)
    adapted = bj.load(GOLDEN / "v2", adapter=tmp_path / "plain", mesh=MESH)
    assert adapted.projection is None
    made_by, limit = adapted.provenance, adapted.config.max_tokens
    shas = {"weights_sha256": made_by.weights_sha256, "adapter_sha256": made_by.adapter_sha256}
    projection = random_projection(16, 8, layer=2, phases=2, max_tokens=limit, **shas)
    write_projection(tmp_path / "plain", projection)
    model = bj.load(GOLDEN / "v2", adapter=tmp_path / "plain", mesh=MESH)
    model.save_pretrained(tmp_path / "alone", merge=False)
    again = bj.load(GOLDEN / "v2", adapter=tmp_path / "alone", mesh=MESH)
    assert again.projection.sha256 == projection.sha256
    np.testing.assert_array_equal(again.encode(DNA), model.encode(DNA))
    model.save_pretrained(tmp_path / "merged")
    merged = bj.load(tmp_path / "merged", mesh=MESH)
    np.testing.assert_allclose(merged.encode(DNA), model.encode(DNA), atol=1e-4)
    with pytest.raises(InputError, match="adapter_sha256 None, .*--model.projection none"):
        bj.load(GOLDEN / "v2", projection=tmp_path / "plain", mesh=MESH)


def test_a_projection_of_another_model_is_refused(tmp_path, checkpoint):
    write_projection(tmp_path / "other", random_projection())
    with pytest.raises(InputError, match="weights_sha256 .*; pass the model it was fitted on"):
        bj.load(checkpoint, projection=tmp_path / "other", mesh=MESH)
    sha256 = read_projection(checkpoint).inputs.weights_sha256
    write_projection(tmp_path / "narrow", random_projection(32, weights_sha256=sha256))
    with pytest.raises(InputError, match="takes vectors of 32 numbers"):
        bj.load(checkpoint, projection=tmp_path / "narrow", mesh=MESH)
    with pytest.raises(InputError, match="not found"):
        bj.load(checkpoint, projection=tmp_path / "absent", mesh=MESH)


def test_a_model_without_layers(tmp_path, world):
    write_projected_model(tmp_path / "model", layers=0)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 4107 * 64 * 4 + 2000
    model = bj.load(tmp_path / "model", mesh=MESH)
    sequences = dna(9)
    states = model.hidden_states(sequences, layer=0)
    raw = model.encode(sequences, project=False, phases=1)
    np.testing.assert_allclose(raw, np.stack([one.mean(axis=0) for one in states]), atol=1e-6)
    np.testing.assert_array_equal(model.encode(sequences, project=False, phases=1, layer=-1), raw)
    assert model.hidden_states(sequences[:1])[0].shape[0] == 1
    np.testing.assert_allclose(
        model.encode(sequences), projected(model, model.encode(sequences, project=False)), atol=1e-6
    )
    model.save_pretrained(tmp_path / "saved")
    bj.convert(bj.ModelConfig(checkpoint=str(tmp_path / "model")), str(tmp_path / "converted"), MESH)
    for directory in ("saved", "converted"):
        again = bj.load(tmp_path / directory, mesh=MESH)
        np.testing.assert_array_equal(again.encode(sequences), model.encode(sequences))
    with pytest.raises(InputError, match="no layers to train"):
        bj.finetune(
            bj.ModelConfig(checkpoint=str(tmp_path / "model")),
            bj.ExamplesConfig(path=str(world / "in.parquet")),
            train=bj.TrainConfig(output_dir=str(tmp_path / "run")),
            mesh=MESH,
            progress=False,
        )
    with pytest.raises(InputError, match="outside the hidden states 0 to 0"):
        model.encode(DNA, layer=1, project=False)


def test_the_model_in_the_package(tmp_path, monkeypatch, world):
    for module in (hub, load_module):
        monkeypatch.setattr(module, "DEFAULT_DIRECTORY", tmp_path / "default_model")
    for make in (bj.load, lambda: embedded(world / "in.parquet", tmp_path / "db", "default")):
        with pytest.raises(InputError, match=f"no default model in {tmp_path / 'default_model'}"):
            make()
    write_projected_model(tmp_path / "default_model", layers=0)
    model = bj.load(mesh=MESH)
    assert (model.provenance.model, model.dimension) == ("default", 24)
    stored = embedded(world / "in.parquet", tmp_path / "db", "default")
    sequences = pq.read_table(world / "in.parquet")["dna_sequence"]
    ours = model.encode(sequences, block_rows=64, on_error="nan")
    np.testing.assert_array_equal(ours[np.isfinite(ours[:, 0])], stored)
    assert bj.open_table(str(tmp_path / "db"), mesh=MESH).encoder.dimension == 24
    model.save_pretrained(tmp_path / "saved")
    assert bj.load(tmp_path / "saved", mesh=MESH).dimension == 24
