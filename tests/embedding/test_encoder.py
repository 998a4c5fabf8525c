"""One object that encodes: its vectors are embed's to the last bit and PyTorch's within rounding."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.golden_models import EVERY, ONE, adapt, golden_model, random_heads
from support.places import GOLDEN, ROOT

import bioscan_jax as bj
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.barcodes.simulate import write_simulated
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.checkpoints.peft import write_adapter
from bioscan_jax.data.batching import BatchShape, fixed_widths
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.embedding import encoder as encoder_module

BOUND = 1e-5
"""Largest difference from PyTorch, over its largest value."""
MESH = bj.MeshConfig(data=1, compilation_cache=None)
DNA = "ACGTTGCATTGACAGG" * 12


@pytest.fixture(scope="module")
def model():
    return bj.load("random:tiny-v2", mesh=MESH)


def dna(count, longest, seed=0):
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("ACGT"), random.integers(6, longest))) for _ in range(count)]


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def table_of(uri):
    found = lance.dataset(str(Path(uri) / "sequences.lance")).to_table(columns=["source_row", "vector"])
    found = found.combine_chunks()
    vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(found.num_rows, -1)
    assert found["source_row"].to_pylist() == sorted(found["source_row"].to_pylist())
    return found["source_row"].to_numpy(), vectors


def embedded(path, uri, checkpoint="random:tiny-v2", block_rows=8192, **embed):
    data, sink = bj.DataConfig(path=str(path), block_rows=block_rows), bj.SinkConfig(uri=str(uri))
    bj.embed(bj.ModelConfig(checkpoint=checkpoint), data, sink, bj.EmbedConfig(**embed), MESH, progress=False)
    return table_of(uri)


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_simulated_barcodes_are_encoded_to_the_bits_of_their_table(tmp_path, model):
    """The settings of configs/demo.yaml, in two blocks."""
    write_simulated(str(tmp_path / "in.parquet"), species=60, per_species=10, length=658, seed=0)
    _, stored = embedded(tmp_path / "in.parquet", tmp_path / "db", block_rows=512, phases=6)
    sequences = pq.read_table(tmp_path / "in.parquet")["dna_sequence"]
    assert_same_bits(model.encode(sequences, phases=6, block_rows=512), stored)
    streamed = model.encode_stream(str(tmp_path / "in.parquet"), phases=6, block_rows=512)
    assert_same_bits(np.concatenate([vectors for _, vectors in streamed]), stored)


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("count", [3, 40, 300])
def test_vectors_are_those_of_a_table(tmp_path, family, count):
    """Few and many rows, repeats within a block and across blocks, rejects, both strands and all phases."""
    sequences = dna(count, 900 if count < 300 else 250, seed=count)
    for row in range(2, count, 3):
        sequences[row] = sequences[row // 2]
    sequences[1] = "protein"
    pq.write_table(pa.table({"dna_sequence": sequences}), tmp_path / "in.parquet")
    model = bj.load(f"random:tiny-{family}", mesh=MESH)
    settings = {"strand": "both", "phases": 6, "batch_tokens": 4096} if count < 300 else {}
    wanted = settings | {"pooling": "mean_no_cls", "block_rows": 64}
    rows, stored = embedded(tmp_path / "in.parquet", tmp_path / "db", f"random:tiny-{family}", **wanted)
    ours = model.encode(sequences, on_error="nan", **wanted)
    assert_same_bits(ours[rows], stored)
    assert (
        np.flatnonzero(np.isnan(ours).any(axis=1)).tolist() == [row for row in range(count) if row not in rows] == [1]
    )


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("data", [1, 2, 8])
def test_golden_vectors_of_pytorch(family, data):
    model = bj.load(GOLDEN / family, mesh=bj.MeshConfig(data=data, compilation_cache=None))
    expected = np.load(GOLDEN / family / "outputs.npz")
    sequences = json.loads((GOLDEN / family / "sequences.json").read_text())
    assert relative(model.encode(sequences), expected["pooled"]) < BOUND
    real = expected["ids"] != 1
    states = model.hidden_states(sequences)
    ours = np.concatenate(states, axis=1)
    assert relative(ours, expected["hidden"][:, real]) < BOUND
    first = model.hidden_states(sequences, layer=1)
    assert relative(np.concatenate(first), expected["hidden"][1][real]) < BOUND


@pytest.mark.parametrize("data", [2, 8])
def test_more_devices_change_vectors_by_rounding_alone(model, data):
    many = bj.load("random:tiny-v2", mesh=bj.MeshConfig(data=data, compilation_cache=None))
    sequences = dna(30, 400)
    one = model.encode(sequences, phases=2)
    assert relative(many.encode(sequences, phases=2), one) < BOUND


def test_all_kinds_of_columns_give_the_same_vectors(model):
    sequences = [DNA, "acgu-ACGT" * 9, DNA[5:]]
    expected = model.encode(sequences)
    assert expected.shape == (3, model.dimension)
    columns = [
        tuple(sequences),
        np.array(sequences),
        np.array(sequences, object),
        pa.array(sequences),
        pa.chunked_array([sequences[:1], sequences[1:]]),
        pa.array(sequences).dictionary_encode(),
        pa.array(sequences, pa.string_view()),
        pd.Series(sequences, index=[7, 8, 9]),
        pd.Series(sequences, dtype="string"),
    ]
    for column in columns:
        np.testing.assert_array_equal(model.encode(column), expected)
    assert model.encode(DNA).shape == (model.dimension,)
    assert relative(model.encode(DNA), expected[0]) < BOUND
    assert model.encode([]).shape == (0, model.dimension)


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        ([DNA, None], r"sequence 1 \(None\) has no vector"),
        (pd.Series([DNA, None]), r"sequence 1 \(None\) has no vector"),
        (pd.Series([DNA, pd.NA], dtype="string"), r"sequence 1 \(None\) has no vector"),
        (pa.array([DNA, DNA, ""]), r"sequence 2 \(''\) has no vector"),
        (["NNN", DNA], r"sequence 0 \('NNN'\)"),
        ("protein", r"sequence 0 \('protein'\)"),
        ([DNA, 7], "sequence 1 is of type int"),
        ([DNA, b"ACGT"], "sequence 1 is of type bytes"),
        ({"A": DNA}, "sequences are a dict"),
        ({DNA}, "sequences are a set"),
        (pd.DataFrame({"A": [DNA]}), "sequences are a DataFrame"),
    ],
)
def test_what_has_no_vector_is_an_error_that_names_its_place(model, sequences, words):
    with pytest.raises(ValueError, match=words):
        model.encode(sequences)


def test_a_position_is_counted_over_all_blocks(model):
    with pytest.raises(bj.InputError, match=r"sequence 5 \("):
        model.encode([DNA] * 5 + [""], block_rows=2)


def test_on_error_nan_keeps_the_places(model):
    sequences = [None, DNA, "protein", DNA[3:]]
    vectors = model.encode(sequences, on_error="nan")
    assert np.isnan(vectors).all(axis=1).tolist() == [True, False, True, False]
    assert relative(vectors[[1, 3]], model.encode(sequences[1::2])) < BOUND
    assert np.isnan(model.encode([None, ""], on_error="nan")).all()


def test_settings_of_a_call(model):
    plain = model.encode(DNA)
    for changed in ({"layer": 1}, {"pooling": "cls"}, {"strand": "both"}, {"phases": 3}, {"max_tokens": 8}):
        assert relative(model.encode(DNA, **changed), plain) > 1e-3
    np.testing.assert_allclose(np.linalg.norm(model.encode([DNA, "ACGT"], normalize=True), axis=1), 1, rtol=1e-6)
    assert model.encode(DNA, dtype="float16").dtype == np.float16
    whole = model.encode(DNA, max_tokens=7, overlong="window")
    assert relative(whole, model.encode(DNA, max_tokens=7)) > 1e-3
    with pytest.raises(bj.InputError, match="more than 9 tokens"):
        model.encode(DNA, max_tokens=9, overlong="error")
    with pytest.raises(bj.InputError, match="max_tokens 5000 exceeds the 2048 positions"):
        model.encode(DNA, max_tokens=5000)
    with pytest.raises(bj.InputError, match="phases 7"):
        model.encode(DNA, phases=7)
    twice = model.encode([DNA, DNA], deduplicate=False)
    assert relative(twice, np.stack([plain, plain])) < BOUND


def test_similarity_is_the_cosine(model):
    a, b = np.array([[3, 4], [0, 2]], np.float32), np.array([4, 3], np.float32)
    np.testing.assert_allclose(model.similarity(a, b), [[0.96], [0.6]], rtol=1e-6)


@pytest.mark.slow
def test_a_thousand_calls_compile_a_bounded_number_of_shapes():
    """Small calls take their shapes from a fixed set: here widths up to 56 tokens and at most 8 rows."""
    model = bj.load("random:tiny-v2", mesh=MESH)
    random = np.random.default_rng(0)
    pool = dna(200, 300)
    for _ in range(1000):
        model.encode([pool[i] for i in random.integers(0, len(pool), random.integers(1, 9))], layer=0)
    (steps,) = model._steps.values()
    widths = [width for width in fixed_widths(2048) if width <= 56]
    assert set(steps.shapes) <= {BatchShape(rows, width) for rows in (1, 2, 4, 8) for width in widths}


def test_large_calls_stop_compiling_shapes_of_their_own(monkeypatch):
    monkeypatch.setattr(encoder_module, "MOST_SHAPES", 6)
    model = bj.load("random:tiny-v2", mesh=MESH)
    fitted = set()
    for seed in range(5):
        model.encode(dna(300, 60 + 40 * seed, seed), layer=0)
        fitted |= {shape for shape in model._steps["mean", 0].shapes if shape.tokens not in fixed_widths(2048)}
    shapes = model._steps["mean", 0].shapes
    fixed = {shape for shape in shapes if shape.rows & (shape.rows - 1) == 0 and shape.tokens in fixed_widths(2048)}
    assert len(set(shapes) - fixed) <= 6


def test_a_stream_keeps_all_columns_and_shows_what_it_left_out(tmp_path, model, caplog):
    sequences = [DNA, None, DNA[4:], "protein", DNA[8:]]
    table = pa.table({"sequence_id": list("abcde"), "dna_sequence": sequences, "depth": [1, 2, 3, 4, 5]})
    pq.write_table(table, tmp_path / "in.parquet")
    with caplog.at_level(logging.WARNING, "bioscan_jax"):
        blocks = list(model.encode_stream(str(tmp_path / "*.parquet"), block_rows=2, normalize=True))
    assert [len(block.rows) for block in blocks] == [1, 1, 1]
    for rows, vectors in blocks:
        assert len(rows) == len(vectors)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert [name for block in blocks for name in block.rows["depth"].to_pylist()] == [1, 3, 5]
    rejects = pa.concat_tables([block.rejects for block in blocks])
    assert rejects["sequence_id"].to_pylist() == ["b", "d"]
    assert rejects["source_row"].to_pylist() == [1, 3]
    assert "2 of 5 rows have no vector (1 not_dna, 1 null)" in caplog.text
    with pytest.raises(bj.InputError, match=r"sequence 1 \(None\)"):
        list(model.encode_stream(str(tmp_path / "in.parquet"), on_error="raise"))


def test_a_stream_of_fasta(tmp_path, model):
    (tmp_path / "in.fasta").write_text(f">one\n{DNA}\n>two\n{DNA[7:]}\n")
    ((rows, vectors),) = model.encode_stream(str(tmp_path / "in.fasta"))
    assert rows["sequence_id"].to_pylist() == ["one", "two"]
    np.testing.assert_array_equal(vectors, model.encode([DNA, DNA[7:]]))


@pytest.mark.parametrize("kind", ["marginal", "independent"])
def test_heads_name_sequences(tmp_path, kind):
    """From an adapter's directory, and from the merged checkpoint; padding a call does not change its names."""
    base = load_weights(bj.ModelConfig(checkpoint=str(GOLDEN / "v2")), make_layout(ONE)).provenance
    write_adapter(tmp_path / "adapter", adapt(golden_model("v2")), EVERY, provenance=base, heads=random_heads(kind))
    adapted = bj.load(tmp_path / "adapter", mesh=MESH)
    assert adapted.provenance.adapter == str(tmp_path / "adapter")
    sequences = [DNA, None, DNA[9:], "ACGTAC"]
    named = adapted.predict(sequences, on_error="nan")
    assert named.column_names == [*RANKS, *(f"{rank}_confidence" for rank in RANKS)]
    assert named["kingdom"].to_pylist() == ["Metazoa", None, "Metazoa", "Metazoa"]
    assert named["species_confidence"].is_null().to_pylist()[1]
    assert 0 < named["kingdom_confidence"].to_pylist()[0] <= 1
    adapted.save_pretrained(tmp_path / "merged")
    adapted.save_pretrained(tmp_path / "again", merge=False)
    for directory in ("merged", "again"):
        again = bj.load(tmp_path / directory, mesh=MESH)
        assert relative(again.encode(sequences[::2]), adapted.encode(sequences[::2])) < BOUND
        assert again.predict(DNA)["species"].to_pylist() == named["species"].to_pylist()[:1]
    assert bj.load(tmp_path / "merged", mesh=MESH).provenance.adapter is None


def test_without_heads_or_adapter_the_error_says_so(tmp_path, model):
    with pytest.raises(bj.InputError, match="no taxonomic heads"):
        model.predict([DNA])
    with pytest.raises(bj.InputError, match="no adapter"):
        model.save_pretrained(tmp_path / "out", merge=False)


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_a_saved_model_gives_the_same_bits(tmp_path, family):
    model = bj.load(GOLDEN / family, mesh=MESH)
    model.save_pretrained(tmp_path / "out")
    again = bj.load(tmp_path / "out", mesh=MESH)
    np.testing.assert_array_equal(again.encode([DNA, "ACGTAC"]), model.encode([DNA, "ACGTAC"]))
    with pytest.raises(bj.InputError, match="not empty"):
        model.save_pretrained(tmp_path / "out")


def test_an_unknown_hub_id_without_a_revision_asks_for_one(monkeypatch, tmp_path):
    """The hub is switched off in tests, and the cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(bj.InputError, match="pass revision=COMMIT"):
        bj.load("owner/name-that-is-not-cached", mesh=MESH)


def test_the_encoder_needs_no_table_or_training_library():
    code = "import sys, bioscan_jax as bj; bj.load('random:tiny-v2').encode('ACGTAC'); "
    code += "print([m for m in ('lance', 'lancedb', 'grain', 'duckdb', 'sklearn', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
