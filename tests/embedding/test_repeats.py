"""Repeats across blocks: copied, the same to the last bit whatever the run went through, and never from too far."""

import os
import signal
from dataclasses import dataclass

import jax.numpy as jnp
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioscan_jax import DataConfig, EmbedConfig, InputError, Interrupted, MeshConfig, ModelConfig, SinkConfig
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.barcodes.views import Views
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.data.encode import BlockCounts, EncodedBlock
from bioscan_jax.data.parquet import Block
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.embedding import pipeline
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.embedding.repeats import PreparedBlock, Repeats, VectorCache, Window, digests, fresh_views
from bioscan_jax.embedding.run import embed, embed_with
from bioscan_jax.embedding.step import CompiledSteps
from bioscan_jax.table.sink import VectorTable

MODEL, MESH = ModelConfig(checkpoint="random:tiny-v2"), MeshConfig(compilation_cache=None, data=1)
BLOCK_ROWS, ROWS = 16, 320
POISON = "ACACAC"


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


def rejects(uri):
    table = lance.dataset(str(uri / "sequences_rejects.lance")).to_table()
    columns = (table[name].to_pylist() for name in ("source_row", "reason", "detail", "sequence"))
    return {row: tuple(others) for row, *others in zip(*columns, strict=True)}


def killed_after(commits, monkeypatch):
    """The next run dies when it would make one more commit."""
    append, done = VectorTable.append_fragments, []

    def dying(*arguments):
        if len(done) == commits:
            raise KeyboardInterrupt
        done.append(append(*arguments))

    monkeypatch.setattr(VectorTable, "append_fragments", dying)


def embed_companions(barcodes, uri, dtype="float32", make_steps=Companions, block_rows=BLOCK_ROWS, **more):
    data, sink, wanted, mesh = settings(barcodes, uri, cache_rows=4 * BLOCK_ROWS, **more)
    data = DataConfig(path=data.path, block_rows=block_rows)
    sink = SinkConfig(uri=sink.uri, vector_dtype=dtype)

    def make_encoder(layout):
        return Encoder(loaded=load_weights(MODEL, layout), make_steps=make_steps)

    return embed_with(make_encoder, data, sink, wanted, mesh, progress=False)


def assert_same_table(uri, whole):
    (found, values), (rows, expected) = vectors(uri), vectors(whole)
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(values.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_killed_anywhere_it_goes_on_to_the_same_bits(barcodes, tmp_path, monkeypatch, dtype):
    def once(uri):
        return embed_companions(barcodes, uri, dtype)

    whole = once(tmp_path / "whole")
    assert whole.counts.copied > 30
    for commits in (7, 2) if dtype == "float32" else (9,):
        with monkeypatch.context() as patched:
            killed_after(commits, patched)
            with pytest.raises(KeyboardInterrupt):
                once(tmp_path / "killed")
    last = once(tmp_path / "killed")
    assert last.resumed_at == 9 * BLOCK_ROWS
    assert_same_table(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("phases", [1, 2])
def test_parts_of_blocks_give_the_same_bits(barcodes, tmp_path, monkeypatch, phases):
    """Committed after every batch, killed inside blocks: what the table has is not computed again, nor changed."""
    whole = embed_companions(barcodes, tmp_path / "whole", phases=phases)
    monkeypatch.setattr(pipeline, "SECONDS_BETWEEN_COMMITS", 0)
    safe = []
    for commits in (8, 3, 6):
        with monkeypatch.context() as patched:
            killed_after(commits, patched)
            with pytest.raises(KeyboardInterrupt):
                embed_companions(barcodes, tmp_path / "killed", phases=phases)
        safe.append(int(vectors(tmp_path / "killed")[0][-1]) + 1)
    assert safe == sorted(set(safe))
    assert any(row % BLOCK_ROWS for row in safe)
    last = embed_companions(barcodes, tmp_path / "killed", phases=phases)
    assert last.resumed_at >= safe[-1]
    assert last.tokens_computed < whole.tokens_computed * (1 - safe[-1] / ROWS / 2)
    assert_same_table(tmp_path / "killed", tmp_path / "whole")
    assert rejects(tmp_path / "killed") == rejects(tmp_path / "whole")


def test_a_stop_leaves_a_long_block_unfinished_and_safe(barcodes, tmp_path, monkeypatch):
    """SIGTERM while a batch is computed: what is finished is committed, no further batch is started."""
    started = []

    @dataclass
    class Terminated(Companions):
        def __call__(self, ids):
            started.append(len(started))
            if len(started) == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(ids)

    embed_companions(barcodes, tmp_path / "whole", block_rows=ROWS)
    monkeypatch.setattr(pipeline, "SECONDS_TO_STOP", 0)
    with pytest.raises(Interrupted, match=r"of 320 rows safe in .*; the same command continues") as stopped:
        embed_companions(barcodes, tmp_path / "t", make_steps=Terminated, block_rows=ROWS)
    assert len(started) == 9
    safe = int(str(stopped.value).split("stopped with ")[1].split()[0])
    assert 0 < safe < ROWS
    found, _ = vectors(tmp_path / "t")
    assert found[-1] == safe - 1 or safe - 1 in rejects(tmp_path / "t")
    assert embed_companions(barcodes, tmp_path / "t", block_rows=ROWS).resumed_at > safe - 23
    assert_same_table(tmp_path / "t", tmp_path / "whole")


@dataclass
class Overflowing(Companions):
    """Vectors of sequences with a certain 6-mer are not finite."""

    def __call__(self, ids):
        poisoned = (ids == Vocabulary.published("v2").tokens.index(POISON)).any(axis=1)
        return jnp.where(poisoned[:, None], jnp.nan, super().__call__(ids))


def test_vectors_that_are_not_finite_are_rejected(tmp_path, monkeypatch):
    """Also copies of them, within a block, from an earlier block, and from one that an earlier run committed."""
    random = np.random.default_rng(1)
    texts = ["".join(random.choice(list("CGT"), 60)) for _ in range(400)]
    bad = [150, 151, 205]  # blocks 9 and 12
    for row in bad:
        texts[row] = POISON + texts[150][6:]
    texts[20] = "protein"
    path = tmp_path / "barcodes.parquet"
    pq.write_table(pa.table({"dna_sequence": texts}), path)
    whole = embed_companions(path, tmp_path / "whole", make_steps=Overflowing)
    assert (whole.vectors, whole.rejects) == (396, 4)
    assert whole.counts.rejects == {"not_dna": 1, "not_finite": 3}
    assert whole.counts.vectors == 396
    found = rejects(tmp_path / "whole")
    assert [row for row, (reason, _, _) in found.items() if reason == "not_finite"] == bad
    assert found[205] == ("not_finite", "not finite in float32", texts[205])
    assert "3 not_finite" in str(whole)
    with monkeypatch.context() as patched:
        killed_after(11, patched)
        with pytest.raises(KeyboardInterrupt):
            embed_companions(path, tmp_path / "killed", make_steps=Overflowing)
    assert embed_companions(path, tmp_path / "killed", make_steps=Overflowing).resumed_at == 11 * BLOCK_ROWS
    assert_same_table(tmp_path / "killed", tmp_path / "whole")
    assert rejects(tmp_path / "killed") == found

    for row in range(300, 310):
        texts[row] = POISON + texts[row][6:]
    pq.write_table(pa.table({"dna_sequence": texts}), path)
    with pytest.raises(
        InputError, match=r"'barcodes:300' is not finite in float32, and \d+ of 3\d\d so far are not; pass"
    ):
        embed_companions(path, tmp_path / "many", make_steps=Overflowing)
    again = vectors(tmp_path / "many")[0]
    assert again[-1] < 300
    with pytest.raises(InputError, match="'barcodes:300' is not finite"):  # the table remembers how many there were
        embed_companions(path, tmp_path / "many", make_steps=Overflowing)

    model = Encoder(loaded=load_weights(MODEL, make_layout(MESH)), make_steps=Overflowing)
    alone = model.encode(texts[:300], on_error="nan")
    assert np.flatnonzero(np.isnan(alone).any(axis=1)).tolist() == [20, *bad]
    with pytest.raises(InputError, match="sequence 150 .*not finite in float32"):
        model.encode(texts[21:22] * 21 + texts[21:300])


def test_a_run_without_a_finite_vector_ends(tmp_path):
    path = tmp_path / "barcodes.parquet"
    pq.write_table(pa.table({"dna_sequence": [POISON * 3]}), path)
    with pytest.raises(InputError, match="'barcodes:0' is not finite in float32, and 1 of 1 so far are not"):
        embed_companions(path, tmp_path / "t", make_steps=Overflowing)
    assert not (tmp_path / "t" / "sequences.lance").exists()


@pytest.mark.slow
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
