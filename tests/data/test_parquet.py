import gzip
import hashlib
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bioscan_jax.config import DataConfig
from bioscan_jax.data import fasta
from bioscan_jax.data import parquet as source_module
from bioscan_jax.data.parquet import ParquetBlocks, check_unique_ids, hash_text, open_source
from bioscan_jax.errors import InputError


def barcodes(rows: int, start: int = 0) -> pa.Table:
    numbers = range(start, start + rows)
    return pa.table(
        {
            "dna_sequence": [None if i % 7 == 3 else "ACGT" * (i % 5) for i in numbers],
            "sequence_id": [f"S{i}" for i in numbers],
            "depth": [float(i) for i in numbers],
        }
    )


def write(path: Path, table: pa.Table, **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **kwargs)
    return path


def opened(path: Path | str, columns=None, scratch: Path | None = None, **kwargs) -> ParquetBlocks:
    return open_source(DataConfig(path=str(path), **kwargs), scratch=scratch, columns=columns)


def whole(source: ParquetBlocks) -> pa.Table:
    return pa.concat_tables([source[i].table for i in range(len(source))])


def error_of(path: Path | str, columns=None, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        whole(opened(path, columns, **kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_words(message: str, *words: object) -> None:
    missing = [word for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.fixture
def decoded(monkeypatch):
    """Row groups in the order in which their decoding began."""
    groups = []
    read = ParquetBlocks._read

    def count(self, g):
        groups.append(g)
        yield from read(self, g)

    monkeypatch.setattr(ParquetBlocks, "_read", count)
    return groups


def test_blocks_of_one_file(tmp_path):
    table = barcodes(10)
    source = opened(write(tmp_path / "a.parquet", table, row_group_size=3), block_rows=4)
    assert (len(source), source.rows, source.block_rows, source.sequence_column) == (3, 10, 4, "dna_sequence")
    assert source.schema == pa.schema(
        [("sequence_id", pa.string()), ("dna_sequence", pa.string()), ("depth", pa.float64())]
    )
    for i, first in enumerate((0, 4, 8)):
        block = source[i]
        assert (block.index, block.first_row) == (i, first)
        assert block.table.schema.equals(source.schema, check_metadata=True)
        assert block.table.equals(table.select(source.schema.names).slice(first, 4))
        assert block.table.column(0).num_chunks == 1
    assert source[np.int64(2)].table.num_rows == 2
    assert repr(source) == "ParquetBlocks(files=1, rows=10, block_rows=4)"
    for outside in (-1, 3):
        with pytest.raises(IndexError, match=f"block {outside} is outside 0 to 2"):
            source[outside]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=4),
    block_rows=st.integers(1, 50),
    piece_rows=st.integers(1, 30),
    cache_bytes=st.sampled_from([0, 500, 1 << 20]),
    order=st.randoms(use_true_random=False),
)
def test_any_block_in_any_order(tmp_path, parts, block_rows, piece_rows, cache_bytes, order):
    directory = tmp_path / "in"
    directory.mkdir(exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    tables, start = [], 0
    for i, (rows, group) in enumerate(parts):
        tables.append(barcodes(rows, start).cast(barcodes(1).schema))
        pq.write_table(tables[-1], directory / f"{i}.parquet", row_group_size=group)
        start += rows
    if not start:
        assert "has no rows" in error_of(directory)
        return
    expected = pa.concat_tables(tables).select(["sequence_id", "dna_sequence", "depth"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_module, "_PIECE_ROWS", piece_rows)
        patch.setattr(source_module, "_CACHE_BYTES", cache_bytes)
        source = opened(directory, block_rows=block_rows)
        indices = [*range(len(source))] * 2
        order.shuffle(indices)
        for i in indices:
            block = source[i]
            assert block.first_row == i * block_rows
            assert block.table.equals(expected.slice(i * block_rows, block_rows))


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("piece_rows", [100, 16_384])
def test_threads_that_read_forward_decode_each_group_once(tmp_path, monkeypatch, decoded, threads, piece_rows):
    monkeypatch.setattr(source_module, "_PIECE_ROWS", piece_rows)
    table = barcodes(6000)
    source = opened(write(tmp_path / "a.parquet", table, row_group_size=1000), block_rows=700)
    with ThreadPoolExecutor(threads) as pool:
        blocks = list(pool.map(source.__getitem__, range(len(source))))
    assert pa.concat_tables([block.table for block in blocks]).equals(table.select(source.schema.names))
    if piece_rows > 1000 or threads == 1:
        assert sorted(decoded) == list(range(6))


def test_four_blocks_are_kept_however_large(tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(source_module, "_PIECE_ROWS", 100)
    monkeypatch.setattr(source_module, "_CACHE_BYTES", 0)
    source = opened(write(tmp_path / "a.parquet", barcodes(6000), row_group_size=6000), block_rows=500)
    for i in (3, 2, 1, 0, 7, 5, 6, 4, 8, 11, 10, 9):
        assert source[i].table.column("depth")[0].as_py() == i * 500
    assert decoded == [0]
    assert source._cached_rows <= 2100


def test_going_back_starts_the_group_again(tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(source_module, "_PIECE_ROWS", 100)
    monkeypatch.setattr(source_module, "_CACHE_BYTES", 0)
    source = opened(write(tmp_path / "a.parquet", barcodes(6000), row_group_size=6000), block_rows=100)
    assert [source[i].table.column("depth")[0].as_py() for i in (50, 2, 40)] == [5000, 200, 4000]
    assert decoded == [0, 0]


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "_PIECE_ROWS", 10)
    source = opened(write(tmp_path / "a.parquet", barcodes(1000), row_group_size=100), block_rows=10)
    for g in range(10):
        source[10 * g]
        assert len(source._readers) <= 2
    assert list(source._readers) == [8, 9]


def test_batches_that_end_early(tmp_path, monkeypatch):
    table = barcodes(1000)
    monkeypatch.setattr(source_module, "_PIECE_ROWS", 70)
    source = opened(write(tmp_path / "a.parquet", table, row_group_size=450), block_rows=100)
    iter_batches = pq.ParquetFile.iter_batches

    def split(self, batch_size, **kwargs):
        for batch in iter_batches(self, batch_size, **kwargs):
            yield batch.slice(0, 33)
            yield batch.slice(33)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", split)
    assert whole(source).equals(table.select(source.schema.names))


def test_row_group_shorter_than_its_footer_says(tmp_path, monkeypatch):
    source = opened(write(tmp_path / "a.parquet", barcodes(100)))
    read = ParquetBlocks._read
    monkeypatch.setattr(ParquetBlocks, "_read", lambda self, g: (piece.slice(0, 60) for piece in read(self, g)))
    with pytest.raises(InputError, match="row group 0 .*60 rows.* footer .*100"):
        source[0]
    monkeypatch.setattr(ParquetBlocks, "_read", lambda self, g: iter(()))
    with pytest.raises(InputError, match="row group 0 .*StopIteration"):
        source[0]


def test_cache_is_bounded_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "_PIECE_ROWS", 100)
    monkeypatch.setattr(source_module, "_CACHE_BYTES", 20_000)
    source = opened(write(tmp_path / "a.parquet", barcodes(20_000)), block_rows=10)
    sizes = []
    for i in range(len(source)):
        source[i]
        sizes.append((source._cached_bytes, sum(table.nbytes for table in source._cache.values())))
    assert all(counted == real <= 20_000 for counted, real in sizes)
    assert max(sizes)[0] > 10_000
    assert len(source._readers) <= 2


def test_pieces_shrink_with_the_size_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "_PIECE_BYTES", 100_000)
    table = pa.table(
        {"dna_sequence": [os.urandom(500).hex() for _ in range(1000)], "sequence_id": map(str, range(1000))}
    )
    source = opened(write(tmp_path / "a.parquet", table, use_dictionary=False), block_rows=10)
    source[0]
    assert 50_000 < source._cached_bytes < 150_000
    assert whole(source).num_rows == 1000


def test_seek_reads_only_the_group_it_lands_in(tmp_path, decoded):
    source = opened(write(tmp_path / "a.parquet", barcodes(1000), row_group_size=50), block_rows=20)
    assert source[30].table.column(0)[0].as_py() == "S600"
    assert decoded == [12]


def test_opening_reads_footers_only(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", barcodes(5))
    write(tmp_path / "b.parquet", barcodes(5, 5))
    monkeypatch.setattr(pq, "ParquetFile", None)
    assert opened(tmp_path).rows == 10


@pytest.mark.parametrize("threads", [1, 2])
def test_grain_reads_seeks_and_closes(tmp_path, threads):
    table = barcodes(5000)
    source = opened(write(tmp_path / "a.parquet", table, row_group_size=900), block_rows=256)
    dataset = (
        grain.MapDataset.source(source)
        .map(lambda block: (block.index, block.table.column("sequence_id").to_pylist()))
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4))
    )
    ids = table.column("sequence_id").to_pylist()
    iterator = iter(dataset)
    assert list(iterator) == [(i, ids[i * 256 : (i + 1) * 256]) for i in range(20)]
    iterator.close()
    for k in (0, 7, 19):
        iterator = iter(dataset)
        grain.experimental.set_next_index(iterator, k)
        assert next(iterator) == (k, ids[k * 256 : (k + 1) * 256])
        assert iterator.get_state() == {"next_index": k + 1}
        iterator.close()
    shuffled = [index for index, _ in grain.MapDataset.source(source).seed(1).shuffle().map(lambda b: (b.index, b))]
    assert sorted(shuffled) == list(range(20))
    assert shuffled != sorted(shuffled)


def test_error_in_a_grain_thread_reaches_the_reader(tmp_path):
    ids = [None if i == 777 else f"S{i}" for i in range(1000)]
    path = write(
        tmp_path / "a.parquet", pa.table({"dna_sequence": ["A"] * 1000, "sequence_id": ids}), row_group_size=100
    )
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(grain.MapDataset.source(opened(path, block_rows=100)).to_iter_dataset(options))
    with pytest.raises(InputError, match="row 777"):
        list(iterator)
    iterator.close()


def test_pickled_source_reads_on(tmp_path):
    source = opened(write(tmp_path / "a.parquet", barcodes(100), row_group_size=30), block_rows=20)
    source[2]
    copy = pickle.loads(pickle.dumps(source))
    assert whole(copy).equals(whole(source))
    assert copy.fingerprint == source.fingerprint


def test_remote_parquet_is_read_by_several_threads(tmp_path):
    table = barcodes(5000)
    write(tmp_path / "a.parquet", table, row_group_size=500)
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/bucket/d/a.parquet", (tmp_path / "a.parquet").read_bytes())
    filesystem.pipe("/bucket/d/_SUCCESS", b"")
    source = pickle.loads(pickle.dumps(opened("memory://bucket/d", block_rows=300)))
    with ThreadPoolExecutor(4) as pool:
        blocks = list(pool.map(source.__getitem__, range(len(source))))
    assert pa.concat_tables([block.table for block in blocks]).equals(table.select(source.schema.names))
    assert source.fingerprint == opened(tmp_path).fingerprint
    assert source.locate(3) == "memory:///bucket/d/a.parquet row 3"
    filesystem.rm("/bucket", recursive=True)


def test_fingerprint_is_of_the_footer_alone(tmp_path):
    for root in ("x", "y/deep"):
        write(tmp_path / root / "a.parquet", barcodes(10))
        write(tmp_path / root / "s/b.parquet", barcodes(3, 10))
    os.utime(tmp_path / "x/a.parquet", ns=(1, 1))
    fingerprint = opened(tmp_path / "x").fingerprint
    assert fingerprint == opened(tmp_path / "y").fingerprint == opened(tmp_path / "y/deep/**/*.parquet").fingerprint
    data = (tmp_path / "x/a.parquet").read_bytes()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    assert fingerprint[0] == {
        "name": "a.parquet",
        "bytes": len(data),
        "rows": 10,
        "footer_sha256": hashlib.sha256(footer).hexdigest(),
    }
    assert fingerprint[1]["name"] == "s/b.parquet"
    write(tmp_path / "x/a.parquet", barcodes(10, 1))
    assert opened(tmp_path / "x").fingerprint[0]["footer_sha256"] != fingerprint[0]["footer_sha256"]


def test_footer_longer_than_the_first_guess(tmp_path):
    table = pa.table({"dna_sequence": ["A"], "sequence_id": ["a"]}).replace_schema_metadata({"note": "x" * 200_000})
    source = opened(write(tmp_path / "a.parquet", table))
    data = (tmp_path / "a.parquet").read_bytes()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    assert source.fingerprint[0]["footer_sha256"] == hashlib.sha256(footer).hexdigest()
    assert source.schema.metadata is None
    assert source[0].table.num_rows == 1


def test_column_projection(tmp_path):
    path = write(tmp_path / "a.parquet", barcodes(10).append_column("depth.max", pa.array(range(10))))
    source = opened(path, ["depth"])
    assert source.schema.names == source[0].table.schema.names == ["sequence_id", "depth"]
    assert opened(path, []).schema.names == ["sequence_id"]
    assert whole(source.select(("depth",), 3)).equals(whole(source))
    assert_words(error_of(path, ["deptj"]), path, "'deptj'", "sequence_id, dna_sequence, depth, depth.max")
    made = opened(write(tmp_path / "m.parquet", barcodes(4).drop_columns("sequence_id")), [])
    assert whole(made).to_pydict() == {"sequence_id": [f"m:{i}" for i in range(4)]}


def test_types_are_kept_or_made_plain(tmp_path):
    table = pa.table(
        {
            "seq": pa.array(["AC", None], pa.string_view()).cast(pa.large_string()),
            "key": pa.array([7, -3], pa.int16()),
            "genus": pa.array(["Apis", None]).dictionary_encode(),
            "view": pa.array(["a", "b"], pa.string_view()),
            "binary_view": pa.array([b"a", b"b"], pa.binary_view()),
            "nothing": pa.nulls(2),
            "tags": pa.array([["a"], None], pa.list_(pa.string())),
            "when": pa.array([0, 1], pa.timestamp("us", "UTC")),
        }
    )
    source = opened(write(tmp_path / "a.parquet", table), sequence_column="seq", id_column="key")
    assert source.schema == pa.schema(
        [
            ("sequence_id", pa.string()),
            ("seq", pa.large_string()),
            ("genus", pa.string()),
            ("view", pa.large_string()),
            ("binary_view", pa.large_binary()),
            ("nothing", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("when", pa.timestamp("us", "UTC")),
        ]
    )
    block = whole(source)
    assert block.schema == source.schema
    assert block.column("sequence_id").to_pylist() == ["7", "-3"]
    assert block.drop_columns("sequence_id").to_pylist() == table.drop_columns("key").to_pylist()
    assert source.sequence_column == "seq"


def test_dictionary_columns_across_a_fall_back_to_plain_pages(tmp_path):
    values = [f"name {i % 5 if i < 3000 else i}" for i in range(6000)]
    table = barcodes(6000).append_column("name", pa.array(values).dictionary_encode())
    path = write(tmp_path / "a.parquet", table, dictionary_pagesize_limit=2000, data_page_size=500)
    assert whole(opened(path, block_rows=1000)).column("name").to_pylist() == values


def test_dictionary_of_integers_as_ids(tmp_path):
    table = pa.table({"dna_sequence": ["A", "C"], "sequence_id": pa.array([5, 6]).dictionary_encode()})
    assert whole(opened(write(tmp_path / "a.parquet", table))).column(0).to_pylist() == ["5", "6"]


def test_large_string_ids_stay(tmp_path):
    table = barcodes(3).set_column(1, "sequence_id", pa.array(["a", "b", "c"], pa.large_string()))
    source = opened(write(tmp_path / "a.parquet", table))
    assert source.schema.field(0) == pa.field("sequence_id", pa.large_string())
    check_unique_ids(source)


def test_files_of_one_schema_in_another_order_with_empty_columns(tmp_path):
    write(tmp_path / "a.parquet", pa.table({"dna_sequence": ["A"], "sequence_id": ["1"], "depth": pa.nulls(1)}))
    write(tmp_path / "b.parquet", pa.table({"depth": [2.5], "sequence_id": ["2"], "dna_sequence": ["C"]}))
    write(tmp_path / "c.parquet", pa.table({"depth": pa.nulls(1), "sequence_id": ["3"], "dna_sequence": pa.nulls(1)}))
    assert whole(opened(tmp_path, block_rows=2)).to_pydict() == {
        "sequence_id": ["1", "2", "3"],
        "dna_sequence": ["A", "C", None],
        "depth": [None, 2.5, None],
    }


def test_files_that_differ(tmp_path):
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write(a, barcodes(2))
    write(b, barcodes(2).set_column(2, "depth", pa.array([1, 2])))
    assert_words(error_of(tmp_path), f"{b}: column 'depth' is int64", f"double in {a}", "one type")
    write(b, barcodes(2).drop_columns("depth"))
    assert_words(error_of(tmp_path), f"{b} has no column 'depth'", a, "the same columns")
    write(b, barcodes(2).append_column("extra", pa.array([1, 2])))
    assert_words(error_of(tmp_path), f"{a} has no column 'extra'", b, "the same columns")


def test_repeated_column_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(["A"])] * 3, names=["dna_sequence", "x", "x"])
    path = write(tmp_path / "a.parquet", table)
    assert_words(error_of(path), path, "2 columns named 'x'", "rename")


@pytest.mark.parametrize("cut", [0, 3, 11, -1, -8, "junk", "footer", "magic"])
def test_file_that_is_not_whole_parquet(tmp_path, cut):
    path = write(tmp_path / "a.parquet", barcodes(100))
    data = path.read_bytes()
    damaged = {
        "junk": b"id,seq\n1,ACGT\n",
        "footer": data[:-200] + b"\xff" * 192 + data[-8:],
        "magic": b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1",
    }
    path.write_bytes(damaged[cut] if isinstance(cut, str) else data[:cut])
    write(tmp_path / "b.parquet", barcodes(1))
    assert_words(
        error_of(tmp_path), f"{path} ({path.stat().st_size} bytes)", "not a whole Parquet file", "get it again"
    )


def test_damaged_pages_are_named_when_they_are_read(tmp_path):
    path = write(tmp_path / "a.parquet", barcodes(1000), row_group_size=500, compression="zstd")
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(bytes(data))
    source = opened(path, block_rows=500)
    assert source[0].table.num_rows == 500
    for _ in range(2):
        with pytest.raises(InputError, match=r"a.parquet: row group 1 .*damaged"):
            source[1]
    path.unlink()
    without_cache = pickle.loads(pickle.dumps(source))
    with pytest.raises(InputError, match="row group 0 .*FileNotFoundError"):
        without_cache[0]


def test_no_rows(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        write(tmp_path / name, barcodes(0).cast(barcodes(1).schema))
    assert_words(error_of(tmp_path), tmp_path, "no rows", "2")
    write(tmp_path / "c.parquet", barcodes(3))
    assert whole(opened(tmp_path)).column(0).to_pylist() == ["S0", "S1", "S2"]


@pytest.mark.parametrize("names", [["sequence"], ["Seq"], ["sequences", "nucraw"]])
def test_a_sequence_column_under_another_name_is_found(tmp_path, names):
    path = write(tmp_path / "a.parquet", pa.table({name: ["A"] for name in ["sequence_id", *names]}))
    assert opened(path).sequence_column == names[-1]


@pytest.mark.parametrize(
    ("names", "suggested"),
    [
        (["sequence_id", "sequences"], "sequences"),
        (["sequence_id", "dna_seqeunce"], "dna_seqeunce"),
        (["sequence_id", "Sequenz", "count"], "Sequenz"),
        (["sequence_id", "count"], "COLUMN"),
    ],
)
def test_missing_sequence_column_suggests_another(tmp_path, names, suggested):
    path = write(tmp_path / "a.parquet", pa.table({name: ["A"] for name in names}))
    flag = f"--data.sequence_column {suggested}"
    assert_words(error_of(path), f"{path} has no column 'dna_sequence'", flag, ", ".join(names))


@pytest.mark.parametrize(
    ("column", "kind"),
    [(pa.array([1]), "int64"), (pa.array([b"A"]), "binary"), (pa.array([["A"]]), "list<element: string>")],
)
def test_sequence_column_that_is_not_text(tmp_path, column, kind):
    path = write(tmp_path / "a.parquet", pa.table({"dna_sequence": column, "sequence_id": ["1"]}))
    assert_words(error_of(path), f"{path}: column 'dna_sequence' is {kind}", "string column")


@pytest.mark.parametrize("column", [pa.array([1.5]), pa.array([True]), pa.array([b"a"])])
def test_id_column_of_another_type(tmp_path, column):
    path = write(tmp_path / "a.parquet", pa.table({"dna_sequence": ["A"], "sequence_id": column}))
    assert_words(error_of(path), f"{path}: id column 'sequence_id' is {column.type}", "string", "--data.id_column")


def test_id_column_of_another_name(tmp_path):
    path = write(tmp_path / "a.parquet", barcodes(2).rename_columns(["dna_sequence", "processid", "depth"]))
    source = opened(path, id_column="processid")
    assert source.schema.names == ["sequence_id", "dna_sequence", "depth"]
    assert whole(source).column(0).to_pylist() == ["S0", "S1"]
    clash = write(tmp_path / "b.parquet", barcodes(2).append_column("processid", pa.array(["a", "b"])))
    fix = "--data.id_column sequence_id"
    assert_words(error_of(clash, id_column="processid"), f"{clash}: column 'processid'", "another column", fix)
    assert_words(error_of(clash, id_column="absent"), f"{clash} has no column 'absent'", fix)
    both = error_of(clash, id_column="dna_sequence")
    assert_words(both, "--data.sequence_column and --data.id_column are both 'dna_sequence'")


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["reef.2024.parquet"], ["reef.2024"]),
        (["a.parquet", "b.parquet"], ["a", "b"]),
        (["a/x.parquet", "b/x.parquet", "b/y.parquet"], ["a/x", "b/x", "y"]),
        (["p/a/x.parquet", "q/a/x.parquet", "q/b/x.parquet"], ["p/a/x", "q/a/x", "b/x"]),
        (["s/x.parquet", "x.parquet"], ["s/x", "x"]),
        (["x.PARQUET", "x.parquet"], ["x.PARQUET", "x.parquet"]),
    ],
)
def test_generated_ids(tmp_path, monkeypatch, names, labels):
    monkeypatch.setattr(source_module, "_PIECE_ROWS", 2)
    for name in names:
        write(tmp_path / name, barcodes(5).drop_columns("sequence_id"), row_group_size=3)
    source = opened(tmp_path, block_rows=3)
    assert whole(source).column(0).to_pylist() == [f"{label}:{i}" for label in labels for i in range(5)]
    check_unique_ids(source)


@pytest.mark.parametrize("empty", [None, ""])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_row_without_an_id(tmp_path, empty, kind):
    write(tmp_path / "a.parquet", pa.table({"dna_sequence": ["A"] * 4, "sequence_id": pa.array(list("abcd"), kind)}))
    ids = pa.array([*"efghij", empty, "k"], kind)
    path = write(tmp_path / "b.parquet", pa.table({"dna_sequence": ["A"] * 8, "sequence_id": ids}), row_group_size=5)
    message = error_of(tmp_path, block_rows=3)
    assert_words(message, f"{path} row 6 (counted from 0)", "no id in column 'sequence_id'", "--data.id_column")
    with pytest.raises(InputError) as caught:
        check_unique_ids(opened(tmp_path))
    assert str(caught.value) == message


def test_ids_that_are_all_null_or_null_integers(tmp_path):
    for ids in (pa.nulls(2), pa.array([1, None])):
        path = write(tmp_path / "a.parquet", pa.table({"dna_sequence": ["A", "C"], "sequence_id": ids}))
        assert f"{path} row {ids.is_null().index(True).as_py()} (counted from 0) has no id" in error_of(path)


@pytest.mark.parametrize("name", ["vector", "source_row"])
def test_reserved_columns(tmp_path, name):
    path = write(tmp_path / "a.parquet", barcodes(2).append_column(name, pa.array([1, 2])))
    assert_words(error_of(path), f"{path} has a column {name!r}", "rename it")
    assert opened(path, ["depth"]).rows == 2
    queries = open_source(DataConfig(path=str(path)), scratch=None, for_table=False)
    assert sorted(queries.schema.names) == sorted(barcodes(2).column_names)


def test_fasta_becomes_blocks(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.fa").write_text("".join(f">a{i} x\nACGT\n" for i in range(10)))
    (tmp_path / "in/b.fa.gz").write_bytes(gzip.compress(b">b0\nAC\n>b1\n\n", mtime=0))
    steps: list[int] = []
    data = DataConfig(path=str(tmp_path / "in"), sequence_column="other", id_column="another", block_rows=5)
    source = open_source(data, scratch=tmp_path / "scratch", on_rows=steps.append)
    assert steps == [12]
    assert source.schema.names == ["sequence_id", "description", "dna_sequence"]
    assert source.sequence_column == "dna_sequence"
    assert whole(source).slice(9).to_pylist() == [
        {"sequence_id": "a9", "description": "x", "dna_sequence": "ACGT"},
        {"sequence_id": "b0", "description": None, "dna_sequence": "AC"},
        {"sequence_id": "b1", "description": None, "dna_sequence": ""},
    ]
    assert source.locate(11) == f"{tmp_path}/in/b.fa.gz row 1"
    assert [(entry["name"], entry["rows"]) for entry in source.fingerprint] == [("a.fa", 10), ("b.fa.gz", 2)]
    assert [path.name for path in (tmp_path / "scratch").glob("[!.]*")] == ["input.parquet"]
    os.utime(tmp_path / "in/a.fa", ns=(1, 1))
    again = open_source(data, scratch=tmp_path / "scratch", on_rows=steps.append)
    assert steps == [12, 12]
    assert again.fingerprint == source.fingerprint, "an older file with the same content is the same input"
    check_unique_ids(again)
    (tmp_path / "in/b.fa.gz").write_bytes(gzip.compress(b">b0\nAC\n>a3\nG\n", mtime=0))
    with pytest.raises(InputError, match=r"'a3' is not unique: .*/a\.fa row 3 and .*/b\.fa\.gz row 1 "):
        check_unique_ids(open_source(data, scratch=tmp_path / "scratch"))
    with pytest.raises(InputError, match="is FASTA.*pass --data.scratch"):
        open_source(data, scratch=None)


def test_repeated_ids_are_named(tmp_path):
    ids = [f"S{i}" for i in range(2000)]
    write(tmp_path / "a.parquet", pa.table({"dna_sequence": ["A"] * 2000, "sequence_id": ids}))
    write(tmp_path / "b.parquet", pa.table({"dna_sequence": ["A"] * 4, "sequence_id": ["x", "S1234", "S1234", "S7"]}))
    with pytest.raises(InputError) as caught:
        check_unique_ids(opened(tmp_path))
    places = f"{tmp_path}/a.parquet row 1234 and {tmp_path}/b.parquet row 1 "
    assert_words(str(caught.value), "'S1234' is not unique", places, "3 rows", "--data.id_column")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ids=st.lists(st.text(st.characters(codec="utf-8", exclude_characters=""), min_size=1, max_size=4), min_size=1))
def test_check_unique_ids_agrees_with_a_set(tmp_path, ids):
    path = write(tmp_path / "a.parquet", pa.table({"dna_sequence": ["A"] * len(ids), "sequence_id": ids}))
    if len(set(ids)) == len(ids):
        check_unique_ids(opened(path))
    else:
        with pytest.raises(InputError, match=f"and {len(ids) - len(set(ids))} rows in all repeat"):
            check_unique_ids(opened(path))


def test_ids_that_only_share_a_hash_are_unique(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "_HASHED_ROWS", 10)
    monkeypatch.setattr(source_module, "hash_text", lambda ids: hash_text(ids) % np.uint64(16))
    path = write(tmp_path / "a.parquet", barcodes(300))
    check_unique_ids(opened(path))
    write(path, pa.concat_tables([barcodes(300), barcodes(1, 250)]))
    with pytest.raises(InputError, match="'S250' is not unique: .* row 250 and .* row 300 "):
        check_unique_ids(opened(path))


@given(
    texts=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=20),
    large=st.booleans(),
    skip=st.integers(0, 5),
)
def test_hash_depends_on_the_text_alone(texts, large, skip):
    column = pa.array(["#"] * skip + texts, pa.large_string() if large else pa.string()).slice(skip)
    alone = [hash_text(pa.chunked_array([pa.array([text])]))[0] for text in texts]
    assert hash_text(pa.chunked_array([column, column])).tolist() == [*alone, *alone]
    assert len(set(alone)) == len(set(texts))


def test_hash_depends_on_zero_bytes_and_order():
    texts = ["a", "a\0", "\0a", "\0", "\0\0", "ab", "ba"]
    assert len(set(hash_text(pa.chunked_array([texts])).tolist())) == len(texts)


def test_threads_may_share_a_source_in_any_order(tmp_path):
    table = barcodes(3000)
    source = opened(write(tmp_path / "a.parquet", table, row_group_size=250), block_rows=100)
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).permutation(len(source)):
            if not source[i].table.equals(table.select(source.schema.names).slice(int(i) * 100, 100)):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_mistyped_id_column_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"dna_sequence": ["ACGT"], "processid": ["A"]}))
    message = error_of(path, id_column="procesid")
    assert_words(message, f"{path} has no column 'procesid'", "dna_sequence, processid", "--data.id_column")


def test_a_scratch_directory_keeps_the_parquet_form_of_fasta_for_every_run_on_the_same_files(tmp_path, monkeypatch):
    written, write = [], fasta._write
    monkeypatch.setattr(fasta, "_write", lambda found, *rest: written.append(found.paths) or write(found, *rest))
    files = [tmp_path / name for name in ("a.fasta", "b.fasta")]
    files[0].write_text(">x\nACGT\n")
    files[1].write_text(">y\nTTGACA\n")
    kept = tmp_path / "scratch"
    for file in (files[0], files[1], files[0]):
        data = DataConfig(path=str(file), scratch=str(kept))
        source = open_source(data, scratch=tmp_path / "unused")
        assert source[0].table["sequence_id"].to_pylist() == ["x" if file is files[0] else "y"]
    assert [paths for (paths,) in written] == [str(file) for file in files]
    files[0].write_text(">z\nACGTACGT\n")
    again = open_source(DataConfig(path=str(files[0]), scratch=str(kept)), scratch=None)
    assert again[0].table["sequence_id"].to_pylist() == ["z"]
    assert len(list(kept.glob("*.parquet"))) == len(written) == 3
    assert not (tmp_path / "unused").exists()
    with pytest.raises(InputError, match="--data.scratch gs://b/x: working files need a disk; pass a directory"):
        open_source(DataConfig(path=str(files[0]), scratch="gs://b/x"), scratch=None)
