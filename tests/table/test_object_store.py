"""The table on an S3 server whose requests fail."""

import gzip
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import fsspec
import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.object_store import BUCKET, ObjectStore, served_store
from test_sink import BLOCK_ROWS, SCHEMA, blocks, open_table

from bioscan_jax.config import DataConfig
from bioscan_jax.data.parquet import open_source
from bioscan_jax.errors import InputError
from bioscan_jax.table import commit as committing

ROWS = 4 * BLOCK_ROWS - 3


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with served_store() as served:
        yield served


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing.time, "sleep", lambda seconds: None)


def write_all(uri: str) -> None:
    """Writes the table, repeating the command while the storage fails."""
    for _ in range(4):
        with suppress(InputError), open_table(uri, ROWS) as table:
            for block in blocks(ROWS)[table.next_block :]:
                table.append([block])
            table.finish()
            return
    raise AssertionError("it does not recover")


def assert_holds_each_row_once(uri: str, rows: int = ROWS) -> None:
    for name in ("vectors", "rejects"):
        path = f"{uri}/sequences.lance" if name == "vectors" else f"{uri}/sequences_rejects.lance"
        found = lance.dataset(path).to_table(columns=["source_row"])["source_row"].to_pylist()
        wanted = [getattr(block, name)["source_row"].to_pylist() for block in blocks(rows)]
        assert found == list(chain.from_iterable(wanted)), name


@pytest.mark.parametrize("name", ["a b.parquet", "a b.fasta.gz"])
def test_an_input_in_the_bucket_is_read_as_one_on_disk(store: ObjectStore, tmp_path: Path, name: str) -> None:
    rows = {"sequence_id": ["a", "b"], "dna_sequence": ["ACGT", "TTGA"]}
    pq.write_table(pa.table(rows), tmp_path / "a b.parquet")
    (tmp_path / "a b.fasta.gz").write_bytes(gzip.compress(b">a\nACGT\n>b\nTTGA\n"))
    url = f"{BUCKET}/input/{name}"
    fsspec.filesystem("s3").put(str(tmp_path / name), url)
    found = open_source(DataConfig(path=url), scratch=tmp_path / "scratch")[0].table
    assert found.select(list(rows)).to_pydict() == rows


@pytest.mark.parametrize(("kind", "how", "number"), [("PUT", "lost", 9), ("PUT", "refused", 7), ("LIST", "refused", 9)])
def test_a_failed_request_loses_and_doubles_no_row(store: ObjectStore, kind: str, how: str, number: int) -> None:
    uri = f"{BUCKET}/{kind}-{how}"
    store.fail(kind, number, how)
    write_all(uri)
    assert store.seen[kind] >= number
    assert_holds_each_row_once(uri)


@pytest.mark.parametrize("how", ["lost", "repeated", "refused"])
def test_a_commit_is_found_after_an_error_and_made_once(store: ObjectStore, how: str) -> None:
    """An append puts both data files, then transaction and manifest of the rejects, then those of the vectors."""
    uri, rows = f"{BUCKET}/once-{how}", 5 * BLOCK_ROWS
    with open_table(uri, rows) as table:
        for number, block in zip((3, 4, 5, 6, 99), blocks(rows), strict=True):
            store.fail("PUT", number, how)
            table.append([block])
            assert store.seen["PUT"] >= 6
        table.finish()
    assert_holds_each_row_once(uri, rows)


def test_a_commit_that_even_lance_takes_for_failed_is_found_before_another_try(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lance reads the manifest after a lost answer; this is an outage that outlasts that."""
    original, calls = lance.LanceDataset.commit, []

    def commit(*given, **more):
        calls.append(given)
        if len(calls) % 3 == 0:
            raise OSError("nothing was done")
        found = original(*given, **more)
        if len(calls) % 3 == 1:
            raise OSError("the answer was lost")
        return found

    monkeypatch.setattr(lance.LanceDataset, "commit", commit)
    uri = f"{BUCKET}/outage"
    with open_table(uri, ROWS) as table:
        for block in blocks(ROWS):
            table.append([block])
        table.finish()
    assert len(calls) > 2 * 4
    assert_holds_each_row_once(uri)


def test_commits_say_who_made_them_and_a_second_writer_stops_before_its_own(store: ObjectStore) -> None:
    uri = f"{BUCKET}/second"
    with open_table(uri, ROWS) as table:
        with pytest.raises(InputError, match="is being written by process .* last seen"):
            open_table(uri, ROWS)
        table.append(blocks(ROWS)[:2])
        dataset = lance.dataset(f"{uri}/sequences.lance")
        made = dataset.read_transaction(dataset.version).transaction_properties
        assert {key: made[f"bioscan_jax.{key}"] for key in ("blocks", "rows")} == {"blocks": "0-1", "rows": "0-63"}
        data = blocks(ROWS)[2]
        files = committing.write_files(dataset, data.vectors.cast(SCHEMA), 1 << 30)
        committing.append_files(dataset, files, {"run": "other", "blocks": "2-2"}, lambda: None)
        with pytest.raises(InputError, match=r"a second writer committed version 3 \(blocks 2-2, run other\)"):
            table.append([data])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how"), [("PUT", "lost"), ("PUT", "repeated"), ("PUT", "refused"), ("LIST", "refused")]
)
def test_any_failed_request_loses_and_doubles_no_row(store: ObjectStore, kind: str, how: str) -> None:
    for number in range(1, 200):
        uri = f"{BUCKET}/all-{kind}-{how}-{number}"
        store.fail(kind, number, how)
        write_all(uri)
        assert_holds_each_row_once(uri)
        if store.seen[kind] < number:
            break
    else:
        raise AssertionError("there were more requests than tried")
