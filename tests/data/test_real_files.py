"""Files as people have them: encodings, compressions, folders, ids, columns under the names of public databases."""

import bz2
import gzip
import lzma
import re
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bioscan_jax.config import DataConfig
from bioscan_jax.data import fasta
from bioscan_jax.data.files import find_files
from bioscan_jax.data.parquet import ParquetBlocks, check_unique_ids, open_source
from bioscan_jax.errors import InputError

FASTA = b">a x\nACGT\n>b\nTTGA\n"


def opened(path: Path, **settings) -> ParquetBlocks:
    return open_source(DataConfig(path=str(path), **settings), scratch=path.parent / f"{path.name}.scratch")


def rows(path: Path, **settings) -> list[dict]:
    source = opened(path, **settings)
    return [row for index in range(len(source)) for row in source[index].table.to_pylist()]


def records(path: Path) -> list[tuple[str, str | None, str]]:
    return [(row["sequence_id"], row["description"], row["dna_sequence"]) for row in rows(path)]


def error_of(path: Path, **settings) -> str:
    with pytest.raises(InputError) as caught:
        check_unique_ids(opened(path, **settings))
    message = str(caught.value)
    assert message.replace("\t", "").isprintable(), message
    assert len(message) < 1000
    return message


def packed(data: bytes) -> dict[str, bytes]:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return {
        "": data,
        ".gz": gzip.compress(data, mtime=0),
        ".bz2": bz2.compress(data),
        ".xz": lzma.compress(data),
        ".zst": sink.getvalue().to_pybytes(),
    }


# headers and encodings


@pytest.mark.parametrize("kind", ["fasta", "fastq"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_headers_keep_their_text(tmp_path, kind, encoding, caplog):
    headers = [("Epichloë_x|SH1", "café end"), ("G_×hybrid", None), ("no\u00a0break", "a\u00a0b")]
    lines = [
        f">{name} {rest or ''}\nACGT\n" if kind == "fasta" else f"@{name} {rest or ''}\nACGT\n+\nIIII\n"
        for name, rest in headers
    ]
    (tmp_path / f"x.{kind}").write_bytes("".join(lines).encode(encoding))
    assert records(tmp_path / f"x.{kind}") == [(name, rest, "ACGT") for name, rest in headers]
    assert ("Latin-1" in caplog.text) == (encoding == "latin-1")


def test_byte_order_marks_between_joined_files_are_skipped(tmp_path):
    (tmp_path / "x.fasta").write_bytes(b"\xef\xbb\xbf>a\r\nAC\r\n\xef\xbb\xbf>b\nGT\n")
    assert records(tmp_path / "x.fasta") == [("a", None, "AC"), ("b", None, "GT")]


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n\r\n", "\n  \n\t\n"])
def test_blank_lines_at_the_end_and_between_records_pass(tmp_path, end):
    (tmp_path / "x.fastq").write_bytes(b"@a\nAC\n+\nII\n\n@b y\nGT\n+b y\nII" + end.encode())
    (tmp_path / "x.fasta").write_bytes(b"\n>a\nAC\n\n>b y\nGT" + end.encode())
    assert records(tmp_path / "x.fastq") == records(tmp_path / "x.fasta") == [("a", None, "AC"), ("b", "y", "GT")]


def test_a_sequence_that_is_not_ascii_names_its_line(tmp_path):
    (tmp_path / "x.fasta").write_bytes(">é1\nAC\n>b\nA\u00a0C\n".encode())
    assert "line 4: a character that is not ASCII" in error_of(tmp_path / "x.fasta")


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("x.fasta", FASTA.decode().encode("utf-16"), "UTF-16 text"),
        ("x.fasta", FASTA.decode().encode("utf-16-le"), "UTF-16 text"),
        ("x.fasta.gz", gzip.compress(FASTA.decode().encode("utf-16"), mtime=0), "UTF-16 text"),
        ("x.fasta.gz", gzip.compress(gzip.compress(FASTA, mtime=0), mtime=0), "compressed twice (gzip within gzip)"),
        ("x.fasta.gz", gzip.compress(bz2.compress(FASTA), mtime=0), "compressed twice (bzip2 within gzip)"),
        ("x.fasta", b"<!DOCTYPE html>\n<html></html>", "a web page"),
        ("x.fasta", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        ("x.fasta", b"LOCUS       AB1 658 bp", "a GenBank flat file"),
        ("x.fasta", b"\x00\x01\x02" * 50, "a binary file"),
        ("x", FASTA.decode().encode("utf-16"), "UTF-16 text"),
    ],
)
def test_what_is_no_fasta_is_named(tmp_path, name, data, what):
    (tmp_path / name).write_bytes(data)
    assert what in error_of(tmp_path / name)


@pytest.mark.parametrize("name", ["x.fasta.gz", "x.fasta", "x.tgz"])
def test_archives_are_named(tmp_path, name):
    (tmp_path / "a.fa").write_bytes(FASTA)
    with tarfile.open(tmp_path / name, "w" if name == "x.fasta" else "w:gz") as archive:
        archive.add(tmp_path / "a.fa", "a.fa")
    assert "a tar archive" in error_of(tmp_path / name)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("a.fa", FASTA)
    assert "a zip archive" in error_of(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_file_cut_inside_is_one_line(tmp_path, suffix, keep):
    data = packed(
        "".join(f">{i}\n{i * 7919 % 10007:b}\n".replace("1", "AC").replace("0", "GT") for i in range(5000)).encode()
    )
    (tmp_path / f"x.fasta{suffix}").write_bytes(data[suffix][: int(len(data[suffix]) * keep)])
    assert "cannot be read to its end" in error_of(tmp_path / f"x.fasta{suffix}")


def test_control_characters_never_reach_a_message(tmp_path):
    (tmp_path / "x.fasta").write_bytes(b"\x1b[31mACGT\x07\n>a\nAC\n")
    assert "\\x1b[31mACGT" in error_of(tmp_path / "x.fasta")
    (tmp_path / "y.fastq").write_bytes(b"@a\nACGT\nno\x9b\xc2\x9bplus\nIIII\n")
    error_of(tmp_path / "y.fastq")


def test_a_parquet_column_name_that_is_not_utf8_is_one_line(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"dna_sequence": ["ACGT"], "remarks": ["x"]}), path)
    path.write_bytes(path.read_bytes().replace(b"remarks", b"rem\xff\xfeks"))
    assert error_of(path).startswith(f"{path}")


# compression, directories and folders


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("stem", ["x.fasta", "x.seq", "x"])
def test_every_compression_is_read_by_its_first_bytes(tmp_path, suffix, stem):
    path = tmp_path / (stem + suffix if stem != "x" else stem)
    path.write_bytes(packed(FASTA)[suffix])
    assert records(path) == [("a", "x", "ACGT"), ("b", None, "TTGA")]


def test_a_directory_is_read_whole_and_what_is_left_out_is_named(tmp_path, caplog):
    work = tmp_path / "in"
    work.mkdir()
    for number, (suffix, data) in enumerate(packed(b">s\nACGTACGT\n").items()):
        (work / f"{number}.fasta{suffix}").write_bytes(data)
    (work / "f.seq").write_bytes(b">f\nACGT\n")
    (work / "e.txt").write_bytes(b">e\nACGT\n")
    (work / "genbank.seq").write_bytes(b"LOCUS       AB1\n")
    (work / "notes.txt").write_bytes(b"> a quotation\nnot DNA at all\n")
    (work / "table.csv").write_bytes(b"a,b\n")
    found = find_files(str(work))
    assert found.names == ("0.fasta", "1.fasta.gz", "2.fasta.bz2", "3.fasta.xz", "4.fasta.zst", "e.txt", "f.seq")
    assert "left out 3 files: genbank.seq, notes.txt, table.csv" in caplog.text
    assert len(rows(work, id="file_row")) == 7


def test_a_glob_names_what_it_leaves_out(tmp_path, caplog):
    (tmp_path / "a.fa").write_bytes(FASTA)
    (tmp_path / "a.md5").write_bytes(b"d41d8")
    assert find_files(str(tmp_path / "a.*")).names == ("a.fa",)
    assert "left out 1 file: a.md5" in caplog.text
    with pytest.raises(InputError, match="a.md5 is neither"):
        find_files(str(tmp_path / "*.md5"))


@pytest.mark.parametrize("suffix", ["pq", "parq", "PARQUET"])
def test_other_suffixes_of_parquet(tmp_path, suffix):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"dna_sequence": ["ACGT"], "sequence_id": ["a"]}), tmp_path / "in" / f"x.{suffix}")
    assert rows(tmp_path / "in") == [{"sequence_id": "a", "dna_sequence": "ACGT"}]


def hive(root: Path, folders: str, ids: list[str], **columns) -> None:
    (root / folders).mkdir(parents=True)
    table = pa.table({"sequence_id": ids, "dna_sequence": ["ACGT"] * len(ids), **columns})
    pq.write_table(table, root / folders / "part-0.parquet")


def test_hive_folders_are_columns(tmp_path):
    hive(tmp_path / "in", "marker_gene=COI/year=2021", ["a", "b"])
    hive(tmp_path / "in", "marker_gene=16S%20rRNA/year=2022", ["c"])
    hive(tmp_path / "in", "marker_gene=__HIVE_DEFAULT_PARTITION__/year=2022", ["d"])
    source = opened(tmp_path / "in", block_rows=3)
    assert source.schema.field("marker_gene").type == pa.string()
    assert source.schema.field("year").type == pa.int64()
    found = {row["sequence_id"]: (row["marker_gene"], row["year"]) for row in rows(tmp_path / "in", block_rows=3)}
    assert found == {"a": ("COI", 2021), "b": ("COI", 2021), "c": ("16S rRNA", 2022), "d": (None, 2022)}
    assert rows(tmp_path / "in/marker_gene=COI")[0]["marker_gene"] == "COI"
    hive(tmp_path / "deep", "marker_gene=COI/raw", ["a"])
    hive(tmp_path / "deep", "marker_gene=16S/raw", ["b"])
    assert {row["marker_gene"] for row in rows(tmp_path / "deep")} == {"COI", "16S"}
    hive(tmp_path / "one", "marker_gene=COI/raw", ["a"])
    for named in ("one", "one/*/*/*.parquet", "one/marker_gene=COI"):
        assert rows(tmp_path / named)[0]["marker_gene"] == "COI", named
    assert "marker_gene" not in rows(tmp_path / "one/marker_gene=COI/raw")[0]  # it is above what is named
    assert [row["year"] for row in source.select(["year"], 2)[1].table.to_pylist()] == [2021, 2022]


def test_hive_folders_with_leading_zeros_stay_text(tmp_path):
    hive(tmp_path / "in", "plate=0002", ["a"])
    hive(tmp_path / "in", "plate=10", ["b"])
    assert [row["plate"] for row in rows(tmp_path / "in")] == ["0002", "10"]


def test_hive_folders_of_fasta(tmp_path):
    for sample in ("S1", "S2"):
        (tmp_path / f"in/sample={sample}").mkdir(parents=True)
        (tmp_path / f"in/sample={sample}/{sample}.fasta").write_text(f">{sample}a\nACGT\n>{sample}b\nACGA\n")
    assert [(row["sequence_id"], row["sample"]) for row in rows(tmp_path / "in", block_rows=3)] == [
        ("S1a", "S1"),
        ("S1b", "S1"),
        ("S2a", "S2"),
        ("S2b", "S2"),
    ]


def test_hive_folders_that_not_all_files_have_are_refused(tmp_path):
    hive(tmp_path / "in", "marker_gene=COI", ["a"])
    hive(tmp_path / "in", "rest", ["b"])
    assert "is in a folder marker_gene=..." in error_of(tmp_path / "in")


def test_a_column_of_the_files_goes_before_a_folder(tmp_path, caplog):
    hive(tmp_path / "in", "site=X", ["a"], site=["own"])
    assert rows(tmp_path / "in")[0]["site"] == "own"
    assert "site=... are ignored" in caplog.text


# ids


def test_repeated_ids_of_fasta_have_a_way_out(tmp_path):
    path = tmp_path / "mito.fasta"
    path.write_text(">NC_1 COX1\nACGT\n>NC_1 rrnS\nACGA\n>NC_2 COX1\nACGG\n")
    message = error_of(path)
    assert "'NC_1' is not unique" in message
    assert "--data.id header" in message
    assert "--data.id file_row" in message
    check_unique_ids(opened(path, id="header"))
    assert [row["sequence_id"] for row in rows(path, id="header")] == ["NC_1 COX1", "NC_1 rrnS", "NC_2 COX1"]
    numbered = rows(path, id="file_row")
    check_unique_ids(opened(path, id="file_row"))
    assert [row["sequence_id"] for row in numbered] == ["mito:0", "mito:1", "mito:2"]
    assert [(row["input_id"], row["description"]) for row in numbered[:2]] == [("NC_1", "COX1"), ("NC_1", "rrnS")]


@pytest.mark.parametrize(("how", "expected"), [("header", ["r1 1:N:0", "r1 2:N:0"]), ("file_row", ["R1:0", "R2:0"])])
def test_pairs_of_reads(tmp_path, how, expected):
    (tmp_path / "in").mkdir()
    for read in (1, 2):
        (tmp_path / f"in/R{read}.fastq").write_text(f"@r1 {read}:N:0\nACGT\n+\nIIII\n")
    assert "'r1' is not unique" in error_of(tmp_path / "in")
    check_unique_ids(opened(tmp_path / "in", id=how))
    assert [row["sequence_id"] for row in rows(tmp_path / "in", id=how)] == expected


def test_repeated_ids_of_parquet_can_be_numbered_and_are_kept(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"dna_sequence": ["A", "C"], "sequence_id": ["s", "s"]}), path)
    assert "--data.id file_row" in error_of(path)
    assert rows(path, id="file_row") == [
        {"sequence_id": "x:0", "dna_sequence": "A", "input_id": "s"},
        {"sequence_id": "x:1", "dna_sequence": "C", "input_id": "s"},
    ]
    assert "--data.id header is for FASTA" in error_of(path, id="header")


def test_abundances_are_a_column(tmp_path):
    (tmp_path / "x.fasta").write_text(">a;size=12;\nAC\n>b;size=3;sample=S\nGT\n>c\nAA\n>d;resize=4\nAA\n")
    assert [(row["sequence_id"], row["size"]) for row in rows(tmp_path / "x.fasta")] == [
        ("a;size=12;", 12),
        ("b;size=3;sample=S", 3),
        ("c", None),
        ("d;resize=4", None),
    ]
    (tmp_path / "y.fasta").write_text(">a;seize=12;\nAC\n")
    assert "size" not in rows(tmp_path / "y.fasta")[0]


# names of columns


def test_a_file_as_bold_publishes_it_needs_no_flag(tmp_path, caplog):
    path = tmp_path / "x.parquet"
    caplog.set_level("INFO", "bioscan_jax")
    pq.write_table(pa.table({"processid": ["P1", "P2"], "nuc": ["ACGT", "TTGA"], "coord-lat": [1.0, 2.0]}), path)
    source = opened(path)
    assert (source.sequence_column, source.id_column) == ("nuc", "processid")
    assert rows(path)[1] == {"sequence_id": "P2", "processid": "P2", "nuc": "TTGA", "coord-lat": 2.0}
    assert "sequence = nuc, id = processid, latitude = coord-lat" in caplog.text


@pytest.mark.parametrize("name", ["DNA_sequence", "Sequence", "nucraw", "dna_barcode", "NUC"])
def test_names_of_the_sequence(tmp_path, name):
    pq.write_table(pa.table({"occurrenceID": ["o"], name: ["ACGT"], "barcode label": ["X"]}), tmp_path / "x.parquet")
    assert rows(tmp_path / "x.parquet")[0] == {
        "sequence_id": "o",
        "occurrenceID": "o",
        name: "ACGT",
        "barcode label": "X",
    }


def test_a_flag_and_our_own_names_go_first(tmp_path):
    table = pa.table({"dna_sequence": ["ACGT"], "nuc": ["TTTT"], "processid": ["P"], "sampleid": ["S"]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert opened(tmp_path / "x.parquet").sequence_column == "dna_sequence"
    flagged = rows(tmp_path / "x.parquet", sequence_column="nuc", id_column="sampleid")
    assert flagged == [{"sequence_id": "S", "dna_sequence": "ACGT", "nuc": "TTTT", "processid": "P"}]


# any FASTA

header = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)
record = st.tuples(header, st.none() | header, st.text("ACGTNacgtn-", min_size=1, max_size=30))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    written=st.lists(record, min_size=1, max_size=12),
    fastq=st.booleans(),
    suffix=st.sampled_from(["", ".gz", ".bz2", ".xz", ".zst"]),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    blank=st.sampled_from(["", "\n", "\n\n"]),
    width=st.integers(1, 20),
)
def test_any_fasta_and_fastq_is_read_back(tmp_path, written, fastq, suffix, end, bom, blank, width):
    text = ""
    for name, rest, sequence in written:
        title = name if rest is None else f"{name} {rest}"
        lines = [sequence[i : i + width] for i in range(0, len(sequence), width)]
        body = [f"@{title}", sequence, "+", "I" * len(sequence)] if fastq else [f">{title}", *lines]
        text += "".join(line + end for line in body) + blank
    path = tmp_path / f"x.{'fastq' if fastq else 'fasta'}{suffix}"
    path.write_bytes(packed((("\ufeff" if bom else "") + text).encode())[suffix])
    found = pq.read_table(fasta.transcode(find_files(str(path)), tmp_path / "o.parquet")).to_pylist()
    assert [(row["sequence_id"], row["description"], row["dna_sequence"]) for row in found] == written
    assert re.fullmatch("[0-9a-f]{64}", fasta.read_origins(tmp_path / "o.parquet")[0]["sha256"])
