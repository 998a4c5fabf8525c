import gzip
import os
import threading
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bioscan_jax.data import fasta
from bioscan_jax.data.files import find_files
from bioscan_jax.errors import InputError


def transcode(path: Path | str, target: Path, **kwargs) -> list[dict]:
    return pq.read_table(fasta.transcode(find_files(str(path)), target, **kwargs)).to_pylist()


def row(sequence_id: str, description: str | None, sequence: str) -> dict:
    return {"sequence_id": sequence_id, "description": description, "dna_sequence": sequence}


def error_of(path: Path, target: Path) -> str:
    with pytest.raises(InputError) as caught:
        fasta.transcode(find_files(str(path)), target)
    assert {path.name for path in target.parent.iterdir()} <= {".lock"}, "nothing else may be left behind"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_headers_and_wrapped_sequences(tmp_path):
    (tmp_path / "a.fa").write_bytes(b">A1 COI; Lepidoptera  x \nACGT\r\nacn-\n\n>A2\nTT\n>A3\tq\n>A4\nG")
    assert transcode(tmp_path / "a.fa", tmp_path / "new/dir/out.parquet") == [
        row("A1", "COI; Lepidoptera  x", "ACGTacn-"),
        row("A2", None, "TT"),
        row("A3", "q", ""),
        row("A4", None, "G"),
    ]
    assert pq.read_schema(tmp_path / "new/dir/out.parquet").remove_metadata() == fasta.SCHEMA


@pytest.mark.parametrize("name", ["a.fastq", "a.fq.gz", "a.txt"])
def test_fastq(tmp_path, name):
    data = b"@r1 1:N:0 \nACGT\n+\nIIII\n@r2\n\n+\n\n"
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    assert transcode(tmp_path / name, tmp_path / "o.parquet") == [row("r1", "1:N:0", "ACGT"), row("r2", None, "")]


def test_remote(tmp_path):
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/reads/a.fa.gz", gzip.compress(b">a\nAC\n", mtime=0))
    filesystem.pipe("/reads/b.fa", b">b\nGT\n")
    steps = []
    for _ in range(2):
        assert transcode("memory://reads", tmp_path / "o.parquet", on_rows=steps.append) == [
            row("a", None, "AC"),
            row("b", None, "GT"),
        ]
    assert steps == [2]
    filesystem.pipe("/reads/b.fa", b">b\nGA\n")
    assert transcode("memory://reads", tmp_path / "o.parquet")[1] == row("b", None, "GA")
    filesystem.rm("/reads", recursive=True)


def test_gzip_of_several_members_and_without_its_suffix(tmp_path):
    for name in ("a.fa.gz", "b.fsa"):
        (tmp_path / name).write_bytes(gzip.compress(b">a\nAC\n", mtime=0) + gzip.compress(b"GT\n>b\nA\n", mtime=0))
        assert transcode(tmp_path / name, tmp_path / "o.parquet") == [row("a", None, "ACGT"), row("b", None, "A")]


header = st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"]), min_size=1, max_size=8)
records = st.lists(st.tuples(header, st.none() | header, st.text("ACGTNacgtn-", max_size=30)), min_size=1, max_size=20)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(records=records, width=st.integers(1, 12), cuts=st.integers(1, 3), packed=st.booleans())
def test_written_records_are_read_back(tmp_path, records, width, cuts, packed):
    work = tmp_path / "in"
    work.mkdir(exist_ok=True)
    for old in work.iterdir():
        old.unlink()
    lines = []
    for name, rest, sequence in records:
        wrapped = "".join(sequence[i : i + width] + "\n" for i in range(0, len(sequence), width))
        lines.append(f">{name}{'' if rest is None else ' ' + rest}\n{wrapped}".encode())
    for i in range(cuts):
        data = b"".join(lines[i * len(lines) // cuts : (i + 1) * len(lines) // cuts])
        (work / (f"{i}.fa.gz" if packed else f"{i}.fa")).write_bytes(gzip.compress(data, mtime=0) if packed else data)
    assert transcode(work, tmp_path / "o.parquet") == [row(*record) for record in records]


def test_row_groups_and_progress_over_several_files(tmp_path):
    (tmp_path / "in").mkdir()
    for name, count in (("a.fa", 10_000), ("b.fa", 0), ("c.fa", 8_000)):
        (tmp_path / "in" / name).write_text("".join(f">{name}{i}\nACGT\n" for i in range(count)))
    steps = []
    rows = transcode(tmp_path / "in", tmp_path / "o.parquet", on_rows=steps.append)
    assert [record["sequence_id"] for record in rows[9_999:10_001]] == ["a.fa9999", "c.fa0"]
    metadata = pq.read_metadata(tmp_path / "o.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [8192, 8192, 1616]
    assert steps == [8192, 8192, 1616]
    assert metadata.row_group(0).column(2).compression == "ZSTD"
    assert [(origin["name"], origin["rows"]) for origin in fasta.read_origins(tmp_path / "o.parquet")] == [
        ("a.fa", 10_000),
        ("b.fa", 0),
        ("c.fa", 8_000),
    ]


def test_long_sequences_end_a_row_group_early(tmp_path, monkeypatch):
    monkeypatch.setattr(fasta, "_ROW_GROUP_LETTERS", 100)
    (tmp_path / "a.fa").write_text("".join(f">{i}\n{'A' * 60}\n" for i in range(5)))
    assert len(transcode(tmp_path / "a.fa", tmp_path / "o.parquet")) == 5
    assert pq.read_metadata(tmp_path / "o.parquet").num_row_groups == 3


def test_up_to_date_target_is_kept_and_a_stale_one_rewritten(tmp_path):
    source, target = tmp_path / "a.fa", tmp_path / "s/o.parquet"
    source.write_text(">a\nAC\n")
    transcode(source, target)
    inode, first = target.stat().st_ino, fasta.read_origins(target)
    steps = []
    transcode(source, target, on_rows=steps.append)
    assert (target.stat().st_ino, steps) == (inode, [])

    os.utime(source, ns=(0, 12345))
    transcode(source, target, on_rows=steps.append)
    assert steps == [1]
    assert fasta.read_origins(target) == first, "the content is the same"

    source.write_text(">a\nAG\n")
    os.utime(source, ns=(0, 12345 + 1))
    assert transcode(source, target) == [row("a", None, "AG")]
    assert fasta.read_origins(target)[0]["sha256"] != first[0]["sha256"]

    with target.open("rb") as reader:
        before = target.read_bytes()
        os.utime(source, ns=(0, 12345 + 2))
        transcode(source, target)
        assert reader.read() == before, "who reads the old file keeps it"

    for damage in (b"", b"junk", target.read_bytes()[:-20]):
        target.write_bytes(damage)
        assert transcode(source, target) == [row("a", None, "AG")]
    foreign = pq.read_table(target).replace_schema_metadata(None)
    pq.write_table(foreign.slice(0, 0), target)
    assert transcode(source, target) == [row("a", None, "AG")]
    assert {path.name for path in target.parent.iterdir()} == {".lock", "o.parquet"}


def test_hash_is_of_headers_and_sequences_not_of_their_packing(tmp_path):
    hashes = {}
    for name, data in {
        "plain.fa": b">a b\nACGT\n",
        "wrapped.fa": b">a b\nAC\r\nGT\n",
        "packed.fa.gz": gzip.compress(b">a b\nACGT\n", mtime=0),
        "header.fa": b">a c\nACGT\n",
        "bases.fa": b">a b\nACGA\n",
    }.items():
        (tmp_path / name).write_bytes(data)
        fasta.transcode(find_files(str(tmp_path / name)), tmp_path / "o.parquet")
        hashes[name] = fasta.read_origins(tmp_path / "o.parquet")[0]["sha256"]
    assert hashes["plain.fa"] == hashes["wrapped.fa"] == hashes["packed.fa.gz"]
    assert len(set(hashes.values())) == 3


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("x.fa", b"ACGT\n>b\nAA\n", "line 1: .*Expected '>' at beginning of record"),
        ("x.fa", b"@a\nACGT\n+\nIIII\n", "line 1: .*Expected '>'"),
        ("x.fsa", b"ACGT\n", "does not start with '>'"),
        ("x.fastq", b"@a\nAC\n+\nII\n@b\nACGT\n+\nIII\n", "line 8: .*Length of sequence and qualities differ"),
        ("x.fastq", b"@a\nACGT\n+\n", "line 4: .*Premature end of file"),
        ("x.fa", b">a\nAC\n>b\nAC\xc3\xa9\n", "line 4: a character that is not ASCII"),
        (
            "x.fa.gz",
            gzip.compress(b">a\n" + np.random.default_rng(0).bytes(5000).hex().encode(), mtime=0)[:-500],
            "cannot be read to its end",
        ),
        ("x.fa.gz", gzip.compress(b">a\nAC\n", mtime=0)[:-3], "cannot be read to its end"),
        ("x.fa.gz", gzip.compress(b">a\nAC\n", mtime=0)[:-8] + b"\0" * 8, "cannot be read to its end .*CRC"),
        ("x.fa.gz", gzip.compress(b">a\nAC\n", mtime=0)[:10] + b"\xff" * 20, "cannot be read to its end"),
        ("x.fa", b">a\nAC\n>\nGT\n", r"record 1 \(counted from 0\) has no id"),
        ("x.fa", b">  \nGT\n", r"record 0 \(counted from 0\) has no id"),
    ],
)
def test_malformed(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "out").mkdir()
    message = error_of(tmp_path / name, tmp_path / "out/o.parquet")
    assert message.startswith(f"{tmp_path}/{name}")
    pytest.raises(InputError, fasta.transcode, find_files(str(tmp_path / name)), tmp_path / "out/o.parquet").match(
        expected
    )


def test_error_after_a_written_row_group_leaves_the_old_target(tmp_path):
    source, target = tmp_path / "a.fa", tmp_path / "s/o.parquet"
    source.write_text(">a\nAC\n")
    transcode(source, target)
    source.write_bytes(b">a\nAC\n" * 20_000 + b">\nA\n")
    with pytest.raises(InputError, match="record 20000 "):
        fasta.transcode(find_files(str(source)), target)
    assert {path.name for path in target.parent.iterdir()} == {".lock", "o.parquet"}
    assert pq.read_table(target).num_rows == 1


def test_interrupt_leaves_nothing(tmp_path):
    (tmp_path / "a.fa").write_bytes(b">a\nAC\n" * 9_000)

    def stop(rows):
        assert (tmp_path / "s/.o.parquet.partial").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fasta.transcode(find_files(str(tmp_path / "a.fa")), tmp_path / "s/o.parquet", on_rows=stop)
    assert [path.name for path in (tmp_path / "s").iterdir()] == [".lock"]


def test_no_records_at_all(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.fa").touch()
    (tmp_path / "in/b.fa.gz").write_bytes(gzip.compress(b"", mtime=0))
    (tmp_path / "out").mkdir()
    message = error_of(tmp_path / "in", tmp_path / "out/o.parquet")
    assert message.startswith(f"no sequences in {tmp_path}/in/a.fa")


def test_target_that_cannot_be_written(tmp_path):
    (tmp_path / "a.fa").write_bytes(b">a\nAC\n")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .*file/o.parquet: .*another place"):
        fasta.transcode(find_files(str(tmp_path / "a.fa")), tmp_path / "file/o.parquet")


def test_threads_that_share_a_directory_write_once(tmp_path):
    (tmp_path / "a.fa").write_bytes(b">a\nAC\n" * 20_000)
    steps: list[int] = []
    found = find_files(str(tmp_path / "a.fa"))
    threads = [
        threading.Thread(target=lambda: fasta.transcode(found, tmp_path / "s/o.parquet", on_rows=steps.append))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(steps) == 20_000
    assert pq.read_table(tmp_path / "s/o.parquet").num_rows == 20_000
