"""Repeats across blocks: copied, the same to the last bit whatever the run went through, and never from too far."""

from dataclasses import dataclass

import jax.numpy as jnp
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioscan_jax import DataConfig, EmbedConfig, InputError, MeshConfig, ModelConfig, SinkConfig
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.barcodes.views import Views
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.data.encode import BlockCounts, EncodedBlock
from bioscan_jax.data.parquet import Block
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.embedding.repeats import PreparedBlock, Repeats, VectorCache, Window, digests, fresh_views
from bioscan_jax.embedding.run import embed, embed_with
from bioscan_jax.embedding.step import CompiledSteps
from bioscan_jax.table.sink import VectorTable

MODEL, MESH = ModelConfig(checkpoint="random:tiny-v2"), MeshConfig(compilation_cache=None, data=1)
BLOCK_ROWS, ROWS = 16, 320


@given(st.lists(st.lists(st.integers(0, 9), max_size=6, unique=True), max_size=12), st.integers(0, 4))
def test_a_window_finds_what_the_last_blocks_have(blocks, size):
    window = Window(size)
    for index, block in enumerate(blocks):
        repeats = window.look_up(index, [bytes([s]) for s in block])
        near = range(max(0, index - size), index)
        assert repeats.copied.tolist() == [any(s in blocks[i] for i in near) for s in block]
        copied = [s for s, known in zip(block, repeats.copied, strict=True) if known]
        for s, at, place in zip(copied, repeats.blocks, repeats.places, strict=True):
            assert blocks[at][place] == s
            assert at == max(i for i in near if s in blocks[i])


def views_of(rows, owner):
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    ids = np.array([token for row in rows for token in row], np.int32)
    return Views(TokenRows(ids, offsets), np.array(owner), np.zeros(max(owner) + 1, bool))


def test_digests_tell_sequences_apart_by_all_of_their_views():
    one = digests(views_of([[3, 7], [3, 8], [3, 7], [3, 7, 8], [3, 7]], [0, 0, 1, 2, 3]), 4)
    assert one[1] == one[3]
    assert len(set(one)) == 3
    assert digests(views_of([[3, 7], [3, 8]], [0, 0]), 1) == [one[0]]


def test_views_of_copied_sequences_are_left_out():
    views = views_of([[3, 7], [3, 8], [3, 9, 9], [3]], [0, 0, 1, 2])
    fresh = fresh_views(views, np.array([False, True, False]))
    assert fresh.tokens.ids.tolist() == [3, 7, 3, 8, 3]
    assert fresh.tokens.offsets.tolist() == [0, 2, 4, 5]
    assert fresh.owner.tolist() == [0, 0, 1]
    assert len(fresh.overlong) == 2
    assert fresh_views(views, np.zeros(3, bool)) is views


@pytest.fixture(scope="module")
def barcodes(tmp_path_factory):
    """Repeats from one to nine blocks away, some within a block, some of repeats, rejects between them."""
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("ACGT"), random.integers(20, 400))) for _ in range(ROWS)]
    for row in range(BLOCK_ROWS, ROWS):
        if random.random() < 0.5:
            texts[row] = texts[max(0, row - int(random.integers(1, 9 * BLOCK_ROWS)))]
    texts[5::23] = ["protein"] * len(texts[5::23])
    path = tmp_path_factory.mktemp("repeats") / "barcodes.parquet"
    pq.write_table(pa.table({"dna_sequence": texts}), path)
    return path


@dataclass
class Companions(CompiledSteps):
    """Vectors that also tell which batch they come from: any difference in what is computed together shows."""

    def __call__(self, ids):
        return super().__call__(ids) + jnp.float32(np.int64(ids).sum() % 8191)


def settings(barcodes, uri, **embed):
    data = DataConfig(path=str(barcodes), block_rows=BLOCK_ROWS)
    return data, SinkConfig(uri=str(uri)), EmbedConfig(**{"batch_tokens": 512, "max_shapes": 1} | embed), MESH


def vectors(uri):
    table = lance.dataset(str(uri / "sequences.lance")).to_table(columns=["source_row", "vector"]).combine_chunks()
    return table["source_row"].to_numpy(), table["vector"].combine_chunks().flatten().to_numpy().reshape(
        table.num_rows, -1
    )


def killed_after(commits, monkeypatch):
    """The next run dies when it would make one more commit."""
    append, done = VectorTable.append_fragments, []

    def dying(*arguments):
        if len(done) == commits:
            raise KeyboardInterrupt
        done.append(append(*arguments))

    monkeypatch.setattr(VectorTable, "append_fragments", dying)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_killed_anywhere_it_goes_on_to_the_same_bits(barcodes, tmp_path, monkeypatch, dtype):
    cache = {"cache_rows": 4 * BLOCK_ROWS}

    def once(uri):
        data, sink, wanted, mesh = settings(barcodes, uri, **cache)
        sink = SinkConfig(uri=sink.uri, vector_dtype=dtype)

        def make_encoder(layout):
            return Encoder(loaded=load_weights(MODEL, layout), make_steps=Companions)

        return embed_with(make_encoder, data, sink, wanted, mesh, progress=False)

    whole = once(tmp_path / "whole")
    assert whole.counts.copied > 30
    rows, expected = vectors(tmp_path / "whole")
    for commits in (7, 2) if dtype == "float32" else (9,):
        with monkeypatch.context() as patched:
            killed_after(commits, patched)
            with pytest.raises(KeyboardInterrupt):
                once(tmp_path / "killed")
    last = once(tmp_path / "killed")
    assert last.resumed_at == 9 * BLOCK_ROWS
    found, values = vectors(tmp_path / "killed")
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(values.view(np.uint8), expected.view(np.uint8))


def test_each_sequence_is_embedded_once_where_all_are_remembered(barcodes, tmp_path):
    """And its vector is, to the last bit, that of a run without copying, where no batch holds more than one row."""
    data, sink, wanted, mesh = settings(barcodes, tmp_path / "copied", batch_tokens=2)
    summary = embed(MODEL, data, sink, wanted, mesh, progress=False)
    texts = pq.read_table(barcodes)["dna_sequence"].to_pylist()
    distinct = set(texts) - {"protein"}
    assert summary.counts.distinct == len(distinct)
    assert summary.counts.vectors == sum(text != "protein" for text in texts)
    assert summary.counts.copied > 0
    rows, values = vectors(tmp_path / "copied")
    first = {}
    for row, value in zip(rows.tolist(), values, strict=True):
        np.testing.assert_array_equal(value, first.setdefault(texts[row], value))
    repeats = len(rows) - len(distinct)
    assert f"embedded {len(distinct)} sequences and copied the vectors of {repeats} repeats" in str(summary)
    assert 0 < summary.device_busy <= 1
    assert 0 <= summary.waiting_for_input < 1
    assert 0 < summary.seconds_to_first_commit < summary.seconds["total"]

    computed = [summary.counts.distinct]
    for name, less in (("block", {"cache_rows": 0}), ("off", {"deduplicate": False})):
        data, sink, wanted, mesh = settings(barcodes, tmp_path / name, batch_tokens=2, **less)
        alone = embed(MODEL, data, sink, wanted, mesh, progress=False)
        computed.append(alone.counts.distinct)
        assert (alone.counts.copied, alone.shapes) == (0, summary.shapes)
        np.testing.assert_array_equal(vectors(tmp_path / name)[1].view(np.uint32), values.view(np.uint32))
    assert computed == sorted(set(computed))
    assert computed[-1] == len(rows)


def test_a_table_altered_during_the_run_is_an_error(tmp_path):
    stored = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6, dtype=np.float32)), 2)
    rows = pa.array([0, 1, 3], pa.uint64())
    lance.write_dataset(pa.table({"source_row": rows, "vector": stored}), str(tmp_path / "sequences.lance"))
    repeats = Repeats(np.array([False, True]), np.array([4]), np.array([1]))
    views = views_of([[3, 7]], [0])
    block = EncodedBlock(
        block=Block(5, 0, pa.table({})),
        kept=np.arange(2),
        sequence_of=np.arange(2),
        views=views,
        rejects=pa.table({}),
        counts=BlockCounts(),
    )
    prepared, fresh = PreparedBlock(block, repeats, views), np.zeros((1, 2), np.float32)
    cache = VectorCache(1, SinkConfig(uri=str(tmp_path)))
    cache.add_committed(4, np.array([0, 3], np.uint64))
    assert cache.complete(prepared, fresh).tolist() == [[0, 0], [4, 5]]
    cache.add_committed(4, np.array([0, 2], np.uint64))
    with pytest.raises(InputError, match=r"sequences\.lance was altered .*run the same command"):
        cache.complete(prepared, fresh)
    absent = VectorCache(1, SinkConfig(uri=str(tmp_path / "absent")))
    absent.add_committed(4, np.array([0, 3], np.uint64))
    with pytest.raises(InputError, match=r"absent/sequences\.lance is absent; pass a --sink\.uri"):
        absent.complete(prepared, fresh)
