import errno
import fcntl
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bioscan_jax.barcodes.schemas import REJECTS
from bioscan_jax.errors import InputError
from bioscan_jax.table.columns import vector_schema
from bioscan_jax.table.compact import CompactSummary, compact
from bioscan_jax.table.index import sub_vectors
from bioscan_jax.table.plan import Plan
from bioscan_jax.table.sink import SinkBlock, VectorTable, write_fragments
from bioscan_jax.table.storage import storage_error, table_exists

HIDDEN, BLOCK_ROWS = 16, 32
SOURCE = pa.schema([("genus", pa.dictionary(pa.int32(), pa.string()))])
SCHEMA = vector_schema(SOURCE, HIDDEN, "float32")
PLAN = Plan({"data": {"files": ["a.parquet", "b.parquet"], "block_rows": BLOCK_ROWS}, "model": "nt"})
LARGE = 3 << 30


def open_table(uri: Path | str, rows: int, **changed) -> VectorTable:
    given = {"schema": SCHEMA, "plan": PLAN, "provenance": {"model": "nt", "license": "cc-by"}}
    given |= {"block_rows": BLOCK_ROWS, "max_bytes_per_file": LARGE}
    return VectorTable.open(str(uri), "sequences", rows=rows, **(given | changed))


def vectors_of(rows: np.ndarray, hidden: int = HIDDEN, dtype: type = np.float32) -> pa.FixedSizeListArray:
    values = np.sin(rows[:, None] * 1.7 + np.arange(hidden) ** 1.3).astype(dtype)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), hidden)


def rejects_of(rows: np.ndarray) -> pa.Table:
    ids = [f"s{row}" for row in rows]
    columns = [ids, rows.astype(np.uint64), ["empty"] * len(rows), [None] * len(rows), ["NNN"] * len(rows)]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, REJECTS, strict=True)], schema=REJECTS)


def block(
    index: int,
    rows: int,
    rejected: Callable[[int], bool] = lambda row: row % 7 == 3,
    vectors: Callable[[np.ndarray], pa.Array] = vectors_of,
) -> SinkBlock:
    here = np.arange(index * BLOCK_ROWS, min((index + 1) * BLOCK_ROWS, rows))
    bad = np.array([rejected(int(row)) for row in here], bool)
    good = here[~bad]
    genus = pa.array([f"g{row % 5}" for row in good], pa.string()).dictionary_encode()
    ids = pa.array([f"s{row}" for row in good], pa.string())
    columns = {"sequence_id": ids, "source_row": pa.array(good, pa.uint64()), "vector": vectors(good), "genus": genus}
    return SinkBlock(index, pa.table(columns), rejects_of(here[bad]))


def blocks(rows: int, *more) -> list[SinkBlock]:
    return [block(index, rows, *more) for index in range(-(-rows // BLOCK_ROWS))]


def read(uri: Path | str, name: str = "sequences") -> pa.Table:
    return lance.dataset(f"{uri}/{name}.lance").to_table()


def assert_holds(uri: Path | str, wanted: list[SinkBlock]) -> None:
    """Row for row and bit for bit, in the order of the input."""
    columns = ["sequence_id", "source_row", "vector", "genus"]
    vectors = pa.concat_tables([b.vectors.cast(SCHEMA) for b in wanted]).combine_chunks()
    assert read(uri).replace_schema_metadata().select(columns).combine_chunks().equals(vectors.select(columns))
    rejects = pa.concat_tables([b.rejects for b in wanted]).combine_chunks()
    assert read(uri, "sequences_rejects").replace_schema_metadata().combine_chunks().equals(rejects)


def unnamed_files(uri: Path | str) -> set[str]:
    """Data files that the latest version does not name."""
    unnamed = set()
    for name in ("sequences", "sequences_rejects"):
        dataset = lance.dataset(f"{uri}/{name}.lance")
        named = {file.path for fragment in dataset.get_fragments() for file in fragment.data_files()}
        unnamed |= set(os.listdir(f"{uri}/{name}.lance/data")) - named if dataset.count_rows() else set()
    return unnamed


# columns


def test_own_columns_come_before_those_of_the_input():
    schema = vector_schema(pa.schema([("depth", pa.float32()), ("sequence_id", pa.large_string())]), 8, "float16")
    assert schema.names == ["sequence_id", "source_row", "vector", "depth"]
    assert [str(schema.field(i).type) for i in range(3)] == ["string", "uint64", "fixed_size_list<item: halffloat>[8]"]
    assert [schema.field(i).nullable for i in range(4)] == [False, False, False, True]


TEXT = pa.array(["a", None, "b"])
COLUMNS = {
    "null": pa.nulls(3),
    "bool": pa.array([True, None, False]),
    "uint64": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "double": pa.array([-0.0, None, 1.5]),
    "large_string": TEXT.cast(pa.large_string()),
    "string_view": TEXT.cast(pa.string_view()),
    "binary_view": pa.array([b"a", None, b""], pa.binary_view()),
    "dictionary": TEXT.dictionary_encode(),
    "decimal32": pa.array([Decimal("1.25"), None, Decimal("-3.00")], pa.decimal32(5, 2)),
    "decimal64": pa.array([Decimal("1.25"), None, Decimal("-3.00")], pa.decimal64(12, 2)),
    "decimal256": pa.array([Decimal("1.25"), None, Decimal("-3.00")], pa.decimal256(50, 2)),
    "date32": pa.array([1, None, 2], pa.date32()),
    "timestamp": pa.array([1, None, 2], pa.timestamp("ns", "Europe/Berlin")),
    "duration": pa.array([1, None, 2], pa.duration("ms")),
    "list": pa.array([["a", None], None, []]),
    "list of dictionary": pa.array([["a"], None, []], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "large_list": pa.array([[1], None, []], pa.large_list(pa.int32())),
    "fixed list": pa.array([[1, None], None, [3, 4]], pa.list_(pa.int32(), 2)),
    "fixed list of text": pa.array([["a", None], None, ["c", "d"]], pa.list_(pa.string(), 2)),
    "struct": pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}]),
    "struct of view": pa.array([{"a": "x"}, None, {"a": None}], pa.struct([("a", pa.string_view())])),
    "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"b" : 1, "a":2.0}', None, "[]"])),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16, None, b"b" * 16], pa.binary(16))),
}


def test_values_of_every_accepted_type_are_read_back(tmp_path):
    source = pa.table(COLUMNS)
    schema = vector_schema(source.schema, HIDDEN, "float32")
    rows = np.arange(3)
    ours = {"sequence_id": ["x", "y", "z"], "source_row": pa.array(rows, pa.uint64()), "vector": vectors_of(rows)}
    data = pa.table({**ours, **COLUMNS})
    with open_table(tmp_path, 3, schema=schema) as table:
        table.append([SinkBlock(0, data, rejects_of(rows[:0]))])
    found = read(tmp_path)
    assert found.schema.remove_metadata().equals(schema)
    for name, given_column in COLUMNS.items():
        storage = given_column.storage if isinstance(given_column, pa.ExtensionArray) else given_column
        assert found[name].combine_chunks().equals(storage.cast(schema.field(name).type)), name
        if name != "timestamp":  # nanoseconds do not fit Python's datetime
            assert found[name].to_pylist() == storage.to_pylist(), name


@pytest.mark.parametrize(
    "refused",
    [
        pa.month_day_nano_interval(),
        pa.list_view(pa.int32()),
        pa.run_end_encoded(pa.int32(), pa.string()),
        pa.sparse_union([pa.field("a", pa.int64())]),
        pa.struct([]),
        pa.struct([("a", pa.int64()), ("b", pa.month_day_nano_interval())]),
        pa.list_(pa.struct([])),
        pa.map_(pa.string(), pa.list_view(pa.int32())),
    ],
    ids=str,
)
def test_unstorable_types_are_rejected_by_column_name(refused):
    with pytest.raises(InputError, match=r"input column 'odd' has type .*, which Lance cannot store; cast or drop it"):
        vector_schema(pa.schema([("good", pa.int32()), ("odd", refused)]), HIDDEN, "float32")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["vector"], "'vector' has a name that the vector table needs"),
        (["source_row"], "'source_row' has a name that the vector table needs"),
        (["_distance"], "'_distance' has a name that the vector table needs"),
        (["_rowid"], "'_rowid' has a name that Lance cannot store"),
        (["a.b"], "'a.b' has a name that Lance cannot store"),
        (["`a`"], "'`a`' has a name that Lance cannot store"),
        ([""], "'' has a name that Lance cannot store"),
        (["a", "b", "a"], "the input has 2 columns named 'a'; rename all but one"),
    ],
)
def test_invalid_column_names_are_rejected(names, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        vector_schema(pa.schema([(name, pa.int32()) for name in names]), HIDDEN, "float32")


# the plan


FACTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1, max_size=5), FACTS, max_size=4))
def test_the_plan_depends_on_the_facts_and_not_on_their_order(facts):
    turned = dict(reversed(facts.items()))
    assert Plan(turned).sha256 == Plan(facts).sha256
    assert json.loads(Plan(facts).canonical) == facts
    assert Plan({**facts, "one more": 1}).sha256 != Plan(facts).sha256


def test_metadata_records_plan_and_provenance(tmp_path):
    open_table(tmp_path, 10).close()
    for name in ("sequences", "sequences_rejects"):
        metadata = lance.dataset(f"{tmp_path}/{name}.lance").schema.metadata
        assert metadata[b"plan"].decode() == PLAN.sha256
        assert json.loads(metadata[b"plan_facts"]) == PLAN.facts
        assert (metadata[b"model"], metadata[b"license"]) == (b"nt", b"cc-by")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({**PLAN.facts, "model": "nt-2.5b"}, 'model "nt" -> "nt-2.5b"; pass'),
        ({**PLAN.facts, "pooling": "cls"}, 'another plan: pooling absent -> "cls"; pass'),
        ({"data": PLAN.facts["data"]}, 'another plan: model "nt" -> absent; pass'),
        (
            {**PLAN.facts, "data": {"files": ["a.parquet"], "block_rows": 1}},
            'data.block_rows 32 -> 1, data.files[1] "b.parquet" -> absent; pass',
        ),
        ({**PLAN.facts, "sha": "f" * 200}, f'sha absent -> "{"f" * 39}...{"f" * 14}"; pass'),
        ({**PLAN.facts, **{f"k{i}": i for i in range(8)}}, "k4 absent -> 4 and 3 more; pass"),
    ],
)
def test_another_plan_is_rejected_naming_the_differences(tmp_path, facts, said):
    open_table(tmp_path, 10).close()
    with pytest.raises(InputError) as refused:
        open_table(tmp_path, 10, plan=Plan(facts))
    message = str(refused.value)
    assert message.startswith(f"{tmp_path}/sequences.lance was made by another plan: ")
    assert said in message
    assert message.endswith(
        f"another --sink.table, or remove {tmp_path}/sequences.lance and {tmp_path}/sequences_rejects.lance"
    )


def test_other_rows_or_columns_under_the_same_plan_are_rejected(tmp_path):
    open_table(tmp_path, 10).close()
    with pytest.raises(InputError, match=r"another plan: table\.rows 10 -> 11;"):
        open_table(tmp_path, 11)
    with pytest.raises(InputError, match=r"another plan: table\.block_rows 32 -> 8;"):
        open_table(tmp_path, 10, block_rows=8)
    with pytest.raises(InputError, match=r'other columns: vector "fixed_size_list<.*float>.*" -> ".*halffloat'):
        open_table(tmp_path, 10, schema=vector_schema(SOURCE, HIDDEN, "float16"))
    two = [pa.schema([(a, pa.int32()), (b, pa.int32())]) for a, b in ("ab", "ba")]
    open_table(tmp_path / "two", 10, schema=vector_schema(two[0], HIDDEN, "float32")).close()
    with pytest.raises(InputError, match="other columns: their order;"):
        open_table(tmp_path / "two", 10, schema=vector_schema(two[1], HIDDEN, "float32"))


def test_a_foreign_table_is_rejected_unchanged(tmp_path):
    lance.write_dataset(pa.table({"a": [1]}), f"{tmp_path}/sequences.lance")
    with pytest.raises(InputError, match=r"sequences\.lance was not made by bioscan_jax \(it has no plan\); pass"):
        open_table(tmp_path, 10)
    assert read(tmp_path).to_pydict() == {"a": [1]}
    assert not (tmp_path / "sequences_rejects.lance").exists()


# exactly once


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def embed_all(uri: str, rows: int) -> None:
    """What the killed process of the next test runs."""
    with open_table(uri, rows) as table:
        say(f"open {table.next_block}")
        for index in range(table.next_block, -(-rows // BLOCK_ROWS)):
            table.append([block(index, rows)])
            say(str(index))
        table.finish()


def child(*code_and_arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", *code_and_arguments]
    here = Path(__file__).parent
    return subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_eight_kills_leave_the_table_of_an_uninterrupted_run(tmp_path):
    rows, seed = 180 * BLOCK_ROWS - 5, random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    starts = []
    for _ in range(8):
        with child(
            "import sys, test_sink; test_sink.embed_all(sys.argv[1], int(sys.argv[2]))", str(tmp_path), str(rows)
        ) as run:
            starts.append(int(run.stdout.readline().split()[1]))
            for _ in range(chance.randrange(18)):
                run.stdout.readline()
            time.sleep(chance.random() * 0.008)
            run.kill()
        assert run.returncode == -9, seed
    assert starts == sorted(starts), seed
    assert 0 < starts[-1] < 180, seed
    embed_all(str(tmp_path), rows)
    assert_holds(tmp_path, blocks(rows))
    assert unnamed_files(tmp_path) == set(), seed


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_grouping_and_any_stop_give_the_same_table(data):
    rows = data.draw(st.integers(0, 5 * BLOCK_ROWS), label="rows")
    bad = data.draw(st.sets(st.integers(0, 5)), label="blocks of rejects alone")
    wanted = blocks(rows, lambda row: row // BLOCK_ROWS in bad or row % 7 == 3)
    with tempfile.TemporaryDirectory() as uri:
        finished = False
        while not finished:
            with open_table(uri, rows) as table:
                stop = table.next_block + data.draw(st.integers(1, 6), label="blocks before the stop")
                first_vectors = next((i for i in range(table.next_block, len(wanted)) if i not in bad), len(wanted))
                stop = max(stop, first_vectors + 1)  # blocks of rejects alone are done again: go past them
                while table.next_block < min(stop, len(wanted)):
                    together = data.draw(st.integers(1, 3), label="together")
                    table.append(wanted[table.next_block : table.next_block + together])
                finished = table.finished
                if finished:
                    done = table.finish()
        assert done.vectors + done.rejects == rows
        with open_table(uri, rows) as table:
            assert (table.finished, table.next_block) == (True, len(wanted))
        if wanted:
            assert_holds(uri, wanted)
        assert unnamed_files(uri) == set()


def test_blocks_of_rejects_alone_at_start_middle_and_tail(tmp_path):
    rows = 6 * BLOCK_ROWS
    wanted = blocks(rows, lambda row: row // BLOCK_ROWS in (0, 2, 4, 5))
    seen = []
    for stop in (1, 2, 3, 4, 5, 6):
        with open_table(tmp_path, rows) as table:
            seen.append((table.next_block, table.vectors, table.rejects))
            table.append(wanted[table.next_block : stop])
            assert table.finished == (stop == 6)
    n = BLOCK_ROWS
    assert seen == [(0, 0, 0), (0, 0, 0), (2, n, n), (2, n, n), (4, 2 * n, 2 * n), (4, 2 * n, 2 * n)]
    with open_table(tmp_path, rows) as table:
        assert (table.finished, table.next_block, table.rejects) == (True, 6, 4 * n)
        table.finish("ivf_sq")
    assert_holds(tmp_path, wanted)


def test_a_table_of_rejects_alone_and_one_of_no_rows(tmp_path):
    with open_table(tmp_path / "rejects", 40) as table:
        table.append(blocks(40, lambda row: True))
        done = table.finish("ivf_pq")
    assert (done.vectors, done.rejects, done.indexes) == (0, 40, ())
    assert done.notes == ("no index was built: the table has no vectors",)
    with open_table(tmp_path / "empty", 0) as table:
        assert table.finished
        assert table.finish().vectors == 0


@pytest.mark.parametrize("kind", ["none", "ivf_sq"])
def test_compaction_keeps_rows_order_and_indexes(tmp_path, kind):
    rows = 20 * BLOCK_ROWS - 5
    wanted = blocks(rows)
    with open_table(tmp_path, rows) as table:
        table.append(wanted[:1])
        with pytest.raises(InputError, match="is being written by process"):
            compact(str(tmp_path))
    with pytest.raises(InputError, match="is unfinished"):
        compact(str(tmp_path))
    with open_table(tmp_path, rows) as table:
        for one in wanted[1:]:
            table.append([one])
        indexes = table.finish(kind).indexes
    before = lance.dataset(f"{tmp_path}/sequences.lance")
    assert compact(str(tmp_path)) == CompactSummary(before=40, after=2)
    assert_holds(tmp_path, wanted)
    assert before.to_table().num_rows == before.count_rows()  # its readers still can
    with open_table(tmp_path, rows) as table:
        assert table.finish(kind).indexes == indexes
    after = lance.dataset(f"{tmp_path}/sequences.lance")
    assert after.to_table(columns=["source_row"], filter="sequence_id = 's99'")["source_row"].to_pylist() == [99]
    assert all(index.num_rows_indexed == after.count_rows() for index in after.describe_indices())


def test_rejects_without_committed_vectors_are_removed(tmp_path):
    rows = 3 * BLOCK_ROWS
    wanted = blocks(rows)
    with open_table(tmp_path, rows) as table:
        table.append(wanted[:1])
    lance.write_dataset(wanted[1].rejects, f"{tmp_path}/sequences_rejects.lance", mode="append")
    with open_table(tmp_path, rows) as table:
        assert (table.next_block, table.rejects) == (1, wanted[0].rejects.num_rows)
        table.append(wanted[1:])
        table.finish()
    assert_holds(tmp_path, wanted)


@pytest.mark.parametrize("lost", ["sequences", "sequences_rejects"])
def test_a_kill_during_creation_is_recovered(tmp_path, lost):
    open_table(tmp_path, 40).close()
    for manifest in (tmp_path / f"{lost}.lance" / "_versions").iterdir():
        manifest.unlink()  # what a kill before the first commit leaves: directories, no version
    with open_table(tmp_path, 40) as table:
        table.append(blocks(40))
        table.finish()
    assert_holds(tmp_path, blocks(40))


def test_files_of_a_killed_commit_are_removed(tmp_path):
    with open_table(tmp_path, 2 * BLOCK_ROWS) as table:
        table.append([block(0, 2 * BLOCK_ROWS)])
    late = block(1, 2 * BLOCK_ROWS).vectors
    write_fragments(str(tmp_path), "sequences", late, max_bytes_per_file=LARGE)
    assert len(unnamed_files(tmp_path)) == 1
    open_table(tmp_path, 2 * BLOCK_ROWS).close()
    assert unnamed_files(tmp_path) == set()


def test_old_versions_are_removed_and_files_of_other_hosts_kept(tmp_path):
    rows = 130 * BLOCK_ROWS
    wanted = blocks(rows)
    with open_table(tmp_path, rows) as table:
        last = write_fragments(str(tmp_path), "sequences", wanted[-1].vectors, max_bytes_per_file=LARGE)
        for index in range(129):
            table.append([wanted[index]])
        assert len(lance.dataset(f"{tmp_path}/sequences.lance").versions()) < 70
        table.append_fragments(rows, last, wanted[-1].vectors.num_rows, wanted[-1].rejects)
        table.finish()
    assert_holds(tmp_path, wanted)
    for name in ("sequences", "sequences_rejects"):
        assert len(lance.dataset(f"{tmp_path}/{name}.lance").versions()) == 1


def test_a_large_append_is_split_over_files_in_order(tmp_path):
    rows, hidden = 2 * BLOCK_ROWS, 1 << 14
    wanted = blocks(rows, lambda row: False, lambda good: vectors_of(good, hidden))
    schema = vector_schema(SOURCE, hidden, "float32")
    with open_table(tmp_path, rows, schema=schema, max_bytes_per_file=1 << 20) as table:
        table.append(wanted)
        table.finish()
    assert read(tmp_path)["source_row"].to_pylist() == list(range(rows))
    sizes = [path.stat().st_size for path in (tmp_path / "sequences.lance" / "data").iterdir()]
    assert len(sizes) == 4
    assert max(sizes) < 1.1 * (1 << 20)


# other writers


def test_a_second_writer_gets_the_name_of_the_first(tmp_path):
    hold = "import sys, test_sink; t = test_sink.open_table(sys.argv[1], 40); test_sink.say('open'); input()"
    with child(hold, str(tmp_path)) as run:
        assert run.stdout.readline() == "open\n"
        with pytest.raises(InputError) as refused:
            open_table(tmp_path, 40)
        run.kill()
    message = str(refused.value)
    assert (
        f"{tmp_path}: table sequences is being written by process {run.pid} on {os.uname().nodename} since" in message
    )
    assert "test_sink.open_table" in message
    assert message.endswith("wait for it or stop it, then run the same command again")
    open_table(tmp_path, 40).close()


def test_the_lock_is_released_when_opening_fails(tmp_path):
    open_table(tmp_path, 40).close()
    for _ in range(2):
        with pytest.raises(InputError, match="another plan"):
            open_table(tmp_path, 41)
    with open_table(tmp_path, 40), pytest.raises(InputError, match=f"written by process {os.getpid()} on"):
        open_table(tmp_path, 40)


def test_a_lock_holder_without_a_written_name(tmp_path):
    with (tmp_path / ".sequences.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being written by another process; wait"):
            open_table(tmp_path, 40)


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        InputError, match=r"\.sequences\.lock: this file system has no locks \(.*; write to a local disk"
    ):
        open_table(tmp_path, 40)


def test_rows_of_a_second_writer_are_detected_at_the_next_commit(tmp_path):
    rows = 3 * BLOCK_ROWS
    wanted = blocks(rows)
    with open_table(tmp_path, rows) as table:
        table.append(wanted[:1])
        lance.write_dataset(wanted[0].vectors.cast(SCHEMA), f"{tmp_path}/sequences.lance", mode="append")
        with pytest.raises(
            InputError, match=r"a second writer committed version 3 \(not this library\) after .* had read version 2;"
        ):
            table.append(wanted[1:2])
    with pytest.raises(InputError, match="its rows are not in the order of the input, each once; pass another"):
        open_table(tmp_path, rows)


def test_rejects_of_a_second_writer_are_detected_at_the_next_commit(tmp_path):
    rows = 3 * BLOCK_ROWS
    wanted = blocks(rows, lambda row: row < 9)  # later blocks do not touch the rejects
    with open_table(tmp_path, rows) as table:
        table.append(wanted[:1])
        lance.write_dataset(wanted[0].rejects, f"{tmp_path}/sequences_rejects.lance", mode="append")
        with pytest.raises(InputError, match=r"sequences_rejects\.lance has 18 rows instead of 9: a second writer"):
            table.append(wanted[1:2])


def test_rows_of_a_second_writer_are_detected_at_the_end(tmp_path):
    with open_table(tmp_path, 40) as table:
        table.append(blocks(40))
        lance.write_dataset(block(0, 40).vectors.cast(SCHEMA), f"{tmp_path}/sequences.lance", mode="append")
        with pytest.raises(InputError, match=r"sequences\.lance has 61 rows instead of 34: a second writer"):
            table.finish()


def test_a_table_that_lost_rows_is_rejected(tmp_path):
    rows = 3 * BLOCK_ROWS
    with open_table(tmp_path, rows) as table:
        table.append(blocks(rows)[:2])
    lance.dataset(f"{tmp_path}/sequences.lance").delete("source_row = 5")
    with pytest.raises(InputError, match=r"has 54 vectors and 9 rejects for the first 64 rows: it was altered by"):
        open_table(tmp_path, rows)


# misuse by the caller


def test_blocks_must_be_complete_and_in_order(tmp_path):
    rows = 3 * BLOCK_ROWS
    zero, one, two = blocks(rows)
    with open_table(tmp_path, rows) as table:
        for wrong in ([one], [zero, two], [one, zero], []):
            with pytest.raises(ValueError, match=r"where block 0 comes next"):
                table.append(wrong)
        with pytest.raises(ValueError, match="do not hold rows 0 to 31 once each and in order"):
            table.append([SinkBlock(0, zero.vectors.slice(1), zero.rejects)])
        with pytest.raises(ValueError, match="do not hold rows 0 to 31 once each and in order"):
            table.append([SinkBlock(0, zero.vectors.take(list(range(26, -1, -1))), zero.rejects)])
        with pytest.raises(ValueError, match=r"has columns \['source_row'"):
            table.append([SinkBlock(0, zero.vectors.drop_columns("sequence_id"), zero.rejects)])
        with pytest.raises(ValueError, match="has vectors of type .*halffloat"):
            table.append([block(0, rows, vectors=lambda good: vectors_of(good, dtype=np.float16))])
        short = write_fragments(str(tmp_path), "sequences", zero.vectors[1:], max_bytes_per_file=LARGE)
        with pytest.raises(ValueError, match=r"26 vectors \(27 announced\) and 5 rejects were given for rows 0 to 31"):
            table.append_fragments(BLOCK_ROWS, short, 27, zero.rejects)
        with pytest.raises(ValueError, match=r"has columns \['sequence_id', 'vector'") as wrong_columns:
            write_fragments(
                str(tmp_path), "sequences", zero.vectors.drop_columns("source_row"), max_bytes_per_file=LARGE
            )
        assert not isinstance(wrong_columns.value, InputError)  # a bug keeps its traceback
        whole = write_fragments(str(tmp_path), "sequences", zero.vectors, max_bytes_per_file=LARGE)
        with pytest.raises(ValueError, match=r"has columns \['sequence_id'\]") as wrong_columns:
            table.append_fragments(BLOCK_ROWS, whole, zero.vectors.num_rows, zero.rejects.select(["sequence_id"]))
        assert not isinstance(wrong_columns.value, InputError)
        with pytest.raises(ValueError, match="has 0 vectors and 0 rejects of 96 rows and cannot be finished"):
            table.finish()
        table.append([zero, one, two])
        with pytest.raises(ValueError, match="blocks .* where block 3 comes next"):
            table.append([two])
    with pytest.raises(ValueError, match=r"provenance has \['plan'\], which the table writes itself"):
        open_table(tmp_path, rows, provenance={"plan": "mine"})
    assert_holds(tmp_path, [zero, one, two])


# several hosts


def test_fragments_of_workers_make_the_table_that_append_makes(tmp_path):
    rows = 6 * BLOCK_ROWS - 7
    wanted = blocks(rows)
    write = "import sys, test_sink; test_sink.work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
    with open_table(tmp_path, rows) as table:
        for first in (0, 3):
            with child(write, str(tmp_path), str(rows), str(first)) as run:
                fragments = json.loads(run.stdout.readline())
            taken = wanted[first : first + 3]
            count = sum(b.vectors.num_rows for b in taken)
            rejects = pa.concat_tables([b.rejects for b in taken])
            table.append_fragments(min((first + 3) * BLOCK_ROWS, rows), fragments, count, rejects)
        assert lance.dataset(f"{tmp_path}/sequences.lance").version == 3  # made, and one commit a call
        table.finish()
    assert_holds(tmp_path, wanted)


def work(uri: str, rows: int, first: int) -> None:
    """What a worker process of the test above runs."""
    fragments = []
    for taken in blocks(rows)[first : first + 3]:
        fragments += write_fragments(uri, "sequences", taken.vectors, max_bytes_per_file=LARGE)
    say(json.dumps(fragments))


def test_a_worker_needs_the_table_of_the_writer(tmp_path):
    data = block(0, 40).vectors
    assert not table_exists(str(tmp_path), "sequences")
    with pytest.raises(InputError, match=r"sequences\.lance is absent; pass a --sink\.uri that all hosts share"):
        write_fragments(str(tmp_path), "sequences", data, max_bytes_per_file=LARGE)
    open_table(tmp_path, 40).close()
    assert table_exists(str(tmp_path), "sequences")
    assert write_fragments(str(tmp_path), "sequences", data[:0], max_bytes_per_file=LARGE) == []


def test_wrong_rows_of_workers_are_detected_at_the_end(tmp_path):
    good = block(0, BLOCK_ROWS)
    rows = good.vectors["source_row"].to_pylist()
    shifted = pa.array([3 if row == 4 else row for row in rows], pa.uint64())  # 3 is a reject already
    wrong = good.vectors.set_column(1, "source_row", shifted)
    with open_table(tmp_path, BLOCK_ROWS) as table:
        fragments = write_fragments(str(tmp_path), "sequences", wrong, max_bytes_per_file=LARGE)
        table.append_fragments(BLOCK_ROWS, fragments, wrong.num_rows, good.rejects)
        with pytest.raises(InputError, match=r"sequences\.lance lacks row 4 and has another twice; pass another"):
            table.finish()


# float16, LanceDB, indexes


def test_float16_vectors_are_stored_exactly_and_found_by_lancedb(tmp_path):
    import lancedb

    rows = 40
    wanted = blocks(rows, lambda row: False, lambda good: vectors_of(good, dtype=np.float16))
    with open_table(tmp_path, rows, schema=vector_schema(SOURCE, HIDDEN, "float16")) as table:
        table.append(wanted)
        table.finish("ivf_sq")
    given_bits = np.concatenate([b.vectors["vector"].combine_chunks().flatten().to_numpy() for b in wanted])
    found = read(tmp_path)["vector"].combine_chunks().flatten().to_numpy()
    assert np.array_equal(found.view(np.uint16), given_bits.view(np.uint16))
    table = lancedb.connect(tmp_path).open_table("sequences")
    nearest = table.search(given_bits[:HIDDEN].astype(np.float32)).distance_type("cosine").limit(1).to_arrow()
    assert nearest["sequence_id"].to_pylist() == ["s0"]


@pytest.mark.parametrize(("kind", "lancedb_type"), [("ivf_sq", "IvfSq"), ("ivf_pq", "IvfPq")])
def test_the_indexes_cover_all_rows_and_are_built_once(tmp_path, kind, lancedb_type):
    import lancedb

    rows = 600
    with open_table(tmp_path, rows) as table:
        table.append(blocks(rows))
        assert table.finish("none").indexes == ("sequence_id: BTREE",)
    versions = []
    for _ in range(2):
        with open_table(tmp_path, rows) as table:
            done = table.finish(kind)
        versions.append(lance.dataset(f"{tmp_path}/sequences.lance").version)
        assert done.indexes == ("sequence_id: BTREE", f"vector: {kind.upper()}")
        assert done.notes == ()
    made = {i.name: i for i in lance.dataset(f"{tmp_path}/sequences.lance").describe_indices()}
    assert {name: i.num_rows_indexed for name, i in made.items()} == dict.fromkeys(made, done.vectors)
    assert versions[0] == versions[1]
    assert len(os.listdir(tmp_path / "sequences.lance" / "_indices")) == 2
    table = lancedb.connect(tmp_path).open_table("sequences")
    listed = {i.index_type: i.index_details for i in table.list_indices()}
    assert listed.keys() == {"BTree", lancedb_type}
    assert listed[lancedb_type]["metric_type"] == "COSINE"
    query = vectors_of(np.array([123])).flatten().to_numpy()
    nearest = table.search(query).distance_type("cosine").refine_factor(10).nprobes(20).limit(1).to_arrow()
    assert nearest["sequence_id"].to_pylist() == ["s123"]
    assert table.search().where("sequence_id = 's123'").to_arrow()["source_row"].to_pylist() == [123]


def test_a_table_too_small_to_train_is_noted(tmp_path):
    with open_table(tmp_path, 255) as table:
        table.append(blocks(255, lambda row: False))
        assert table.finish("ivf_pq").indexes == ("sequence_id: BTREE",)
        (note,) = table.finish("ivf_pq").notes
    assert note == "ivf_pq was not built: it needs 256 vectors and the table has 255; search works without it"
    with open_table(tmp_path / "more", 256) as table:
        table.append(blocks(256, lambda row: False))
        assert table.finish("ivf_pq").notes == ()
    with open_table(tmp_path / "one", 1) as table:
        table.append(blocks(1))
        assert table.finish("ivf_sq").indexes == ("sequence_id: BTREE", "vector: IVF_SQ")


@given(st.integers(1, 5000))
def test_sub_vectors_divide_the_vector_into_widths_near_eight(hidden):
    width, rest = divmod(hidden, sub_vectors(hidden))
    assert rest == 0
    assert all(abs(other - 8) >= abs(width - 8) for other in range(1, hidden + 1) if hidden % other == 0)


def test_sub_vectors_of_the_models():
    assert [sub_vectors(hidden) for hidden in (512, 1024, 1280, 2560)] == [64, 128, 160, 320]


# storage


@pytest.mark.parametrize("under", ["file", "file/db"])
def test_a_file_where_the_database_should_be(tmp_path, under):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"a file stands where a directory is needed; pass another --sink\.uri"):
        open_table(tmp_path / under, 40)


def test_a_damaged_table_is_reported(tmp_path):
    open_table(tmp_path, 40).close()
    for manifest in (tmp_path / "sequences.lance" / "_versions").glob("*.manifest"):
        manifest.write_bytes(manifest.read_bytes()[:100])
    with pytest.raises(InputError, match=r"sequences\.lance: the storage failed; fix it and run the same"):
        open_table(tmp_path, 40)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_append_keeps_earlier_rows(tmp_path):
    rows, hidden = 3 * BLOCK_ROWS, 4096
    wanted = blocks(rows, lambda row: row % 7 == 3, lambda good: vectors_of(good, hidden))
    schema = vector_schema(SOURCE, hidden, "float32")
    with open_table(tmp_path, rows, schema=schema) as table:
        table.append(wanted[:1])
        with file_size_limit(100_000), pytest.raises(InputError) as refused:
            table.append(wanted[1:2])
    message = str(refused.value)
    assert message.startswith(f"{tmp_path}/sequences.lance: a file outgrew this process's limit; raise it (ulimit -f)")
    assert "run the same command again: 32 rows are safe" in message
    assert "\n" not in message
    assert read(tmp_path)["source_row"].to_pylist() == wanted[0].vectors["source_row"].to_pylist()
    with open_table(tmp_path, rows, schema=schema) as table:
        assert table.next_block == 1
        table.append(wanted[1:])
        table.finish()
    assert read(tmp_path)["source_row"].to_pylist() == [r for r in range(rows) if r % 7 != 3]
    assert unnamed_files(tmp_path) == set()


LANCE = "LanceError(IO): {}, /home/runner/work/lance/lance/rust/lance-file/src/writer/structural.rs:254:9"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(LANCE.format("No space left on device (os error 28)")),
            "db: the disk or quota is full; free space and run the same command again: 64 rows are safe "
            "(LanceError(IO): No space left on device (os error 28))",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "db: the disk or quota is full; free space and run"),
        (PermissionError(errno.EACCES, "Permission denied"), "db: not allowed; pass a --sink.uri that you may write ("),
        (OSError(errno.EROFS, "Read-only file system"), "db: not allowed; pass a --sink.uri that you may write ("),
        (OSError(LANCE.format("Operation not permitted (os error 1)")), "db: not allowed; pass a --sink.uri that you"),
        (
            RuntimeError("a\nb"),
            "db: the storage failed; fix it and run the same command again: 64 rows are safe (a b)",
        ),
    ],
)
def test_storage_errors_are_one_line_with_the_fix(error, said):
    message = str(storage_error("db", error, 64))
    assert said in message
    assert "\n" not in message
    assert ".rs" not in message


NO_LINKS = """
import sys
from support.no_hard_links import forbid_hard_links
forbid_hard_links()
from bioscan_jax.table.compact import compact
from support.tables import make_table
make_table(sys.argv[1], 300, index="ivf_sq")
compact(sys.argv[1], "sequences")
"""


def test_a_table_is_made_where_there_are_no_hard_links(tmp_path):
    """As on a mount of Google Drive, where Lance's own way to commit fails."""
    from support import tables  # not above: a child process imports this file without tests/ on its path

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    made = [sys.executable, "-c", NO_LINKS, str(tmp_path / "drive")]
    subprocess.run(made, env=environment, check=True, timeout=120)
    tables.make_table(tmp_path / "disk", 300)
    assert tables.same_bits(tables.read(tmp_path / "drive"), tables.read(tmp_path / "disk"))
    assert not [path for path in tmp_path.rglob(".tmp*")]
