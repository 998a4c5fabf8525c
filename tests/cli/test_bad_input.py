"""Every way to be wrong that we could think of: one line that says what, where and how to mend, nothing left behind."""

import gzip
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import call
from support.embed_runs import Table, environment, files, lines, run, start, unnamed_files
from support.places import GOLDEN, SCRIPTS

from bioscan_jax import DataConfig, EmbedConfig, InputError, MeshConfig, ModelConfig, SinkConfig, embed
from bioscan_jax.cli import finetune, fit_metric
from bioscan_jax.cli._command import parse, shipped_configs
from bioscan_jax.embedding import block_encoder, encoder
from bioscan_jax.table.lock import writer_lock

EMBED = import_module("bioscan_jax.embedding.run")  # the package's name `embed` is the function
CHECKPOINTS = {family: GOLDEN / family for family in ("v1", "v2")}
ALL = {"cache_rows": 0, "max_shapes": 1}
"""Every block is computed, though it repeats the one before."""
GOOD = ["ACGTAC" * 20, "TTGACA" * 15 + "N", "GGGCCATTA" * 9]


def write(path: Path, sequences: list | pa.Array, **columns) -> Path:
    ids = [f"s{number}" for number in range(len(sequences))]
    pq.write_table(pa.table({"sequence_id": ids, "dna_sequence": sequences, **columns}), path)
    return path


def embed_here(tmp_path: Path, data: dict, model: dict | None = None, sink: dict | None = None, **rest):
    """The job in this process on one device."""
    return embed(
        ModelConfig(**({"checkpoint": str(CHECKPOINTS["v2"])} | (model or {}))),
        DataConfig(**({"path": str(tmp_path / "in.parquet")} | data)),
        SinkConfig(**({"uri": str(tmp_path / "db")} | (sink or {}))),
        EmbedConfig(**rest.get("embed", {"max_shapes": 1})),
        MeshConfig(**({"data": 1, "compilation_cache": None} | rest.get("mesh", {}))),
        progress=False,
    )


def assert_nothing_left(uri: Path, table: str = "sequences") -> None:
    """No table and no temporary file; the lock is free."""
    assert files(uri) <= {str(uri / f".{table}.lock")}
    if uri.is_dir():
        assert {path.name for path in uri.iterdir()} <= {f".{table}.lock"}
        with writer_lock(str(uri), table):
            pass


def refused(tmp_path: Path, data: dict | None = None, **settings) -> str:
    """The message of a job that must fail and leave nothing."""
    with pytest.raises(InputError) as error:
        embed_here(tmp_path, data or {}, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert_nothing_left(tmp_path / "db")
    return message


@contextmanager
def spoilt_after(monkeypatch, blocks: int) -> Iterator[list]:
    """Has the model give NaN once so many blocks have been averaged; yields the calls that averaged."""
    average, calls = block_encoder.sequence_vectors, []

    def spoilt(*arguments):
        calls.append(arguments)
        return average(*arguments) * (1.0 if len(calls) <= blocks else np.nan)

    with monkeypatch.context() as changed:
        changed.setattr(block_encoder, "sequence_vectors", spoilt)
        yield calls


def assert_says(message: str, *words: object) -> None:
    missing = [word for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


def script(arguments: list, name: str = "embed.py", **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
        **options,
    )


def assert_script_fails(process: subprocess.CompletedProcess, *words: object) -> None:
    said = lines(process.stderr)
    assert process.returncode == 2, process.stderr
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    assert "vectors  " not in process.stdout
    assert_says(said[0], *words)


# the input


def test_missing_file(tmp_path):
    message = refused(tmp_path, {"path": str(tmp_path / "nowhere.parquet")})
    assert_says(message, f"nothing found at {tmp_path}/nowhere.parquet", "expected Parquet", "FASTA")


def test_no_rows(tmp_path):
    write(tmp_path / "in.parquet", pa.array([], pa.string()))
    assert_says(refused(tmp_path), f"{tmp_path}/in.parquet has no rows", "pass files with sequences")


def test_no_sequence_column(tmp_path):
    pq.write_table(
        pa.table({"sequence_id": ["a"], "letters": ["ACGT"], "sequences": ["ACGT"]}), tmp_path / "in.parquet"
    )
    message = refused(tmp_path)
    assert_says(message, f"{tmp_path}/in.parquet has no column 'dna_sequence'", "--data.sequence_column sequences")


def test_a_sequence_column_that_is_not_text(tmp_path):
    write(tmp_path / "in.parquet", pa.array([1, 2]))
    assert_says(refused(tmp_path), "in.parquet: column 'dna_sequence' is int64, not text", "--data.sequence_column")


@pytest.mark.parametrize(
    ("sequences", "reasons"),
    [
        (pa.array([None] * 3, pa.string()), "3 null"),
        (pa.nulls(3), "3 null"),
        (["", "  "], "2 empty"),
        (["MKVLAAGIVGPRE"] * 4, "4 not_dna"),
        (["NNNN", None, "", "MKVL"], "1 empty, 1 no_acgt, 1 not_dna, 1 null"),
    ],
    ids=["nulls", "a column of type null", "empty", "protein", "all of them"],
)
def test_nothing_that_can_be_embedded(tmp_path, sequences, reasons):
    write(tmp_path / "in.parquet", sequences)
    message = refused(tmp_path)
    assert_says(message, "no sequence in column 'dna_sequence'", f"({reasons})", "is it DNA?", "--data.sequence_column")


def test_bad_rows_among_good_ones_are_rejected_with_reasons(tmp_path):
    write(tmp_path / "in.parquet", [GOOD[0], None, "", "MKVLAAGIVGPRE", "NNNN", GOOD[1].lower(), "acgu-ryk ACG"])
    summary = embed_here(tmp_path, {})
    table = Table.read(tmp_path / "db")
    assert (summary.rows, summary.vectors, summary.rejects) == (7, 3, 4)
    assert table.vectors["sequence_id"].to_pylist() == ["s0", "s5", "s6"]
    assert table.rejects.select(["sequence_id", "source_row", "reason", "sequence"]).to_pylist() == [
        {"sequence_id": "s1", "source_row": 1, "reason": "null", "sequence": None},
        {"sequence_id": "s2", "source_row": 2, "reason": "empty", "sequence": ""},
        {"sequence_id": "s3", "source_row": 3, "reason": "not_dna", "sequence": "MKVLAAGIVGPRE"},
        {"sequence_id": "s4", "source_row": 4, "reason": "no_acgt", "sequence": "NNNN"},
    ]


def test_a_sequence_of_20_kb(tmp_path):
    long = "".join(np.random.default_rng(0).choice(list("ACGT"), 20_000))
    write(tmp_path / "in.parquet", [GOOD[0], long, long[: 63 * 6]])
    vectors = {}
    for overlong in ("truncate", "window", "error"):
        summary = embed_here(tmp_path, {"overlong": overlong}, sink={"table": overlong})
        vectors[overlong] = np.stack(lance.dataset(summary.table).to_table()["vector"].to_numpy())
        assert summary.vectors + summary.rejects == 3
        assert summary.counts.truncated == (overlong == "truncate")
    assert np.abs(vectors["truncate"][1] - vectors["truncate"][2]).max() < 1e-5  # what fits of it
    assert np.abs(vectors["window"][1] - vectors["truncate"][1]).max() > 1e-3
    assert len(vectors["error"]) == 2
    rejects = lance.dataset(str(tmp_path / "db" / "error_rejects.lance")).to_table().to_pylist()
    assert [(r["sequence_id"], r["reason"], r["detail"]) for r in rejects] == [
        ("s1", "too_long", "more than 64 tokens")
    ]
    assert rejects[0]["sequence"] == long


def test_ids_that_repeat(tmp_path):
    table = pa.table({"sequence_id": ["a", "b", "a"], "dna_sequence": GOOD})
    pq.write_table(table, tmp_path / "in.parquet")
    message = refused(tmp_path)
    assert_says(message, "sequence_id 'a' is not unique", "in.parquet row 0", "row 2", "--data.id_column")


def test_a_parquet_file_cut_short(tmp_path):
    path = write(tmp_path / "in.parquet", GOOD * 100)
    path.write_bytes(path.read_bytes()[:-50])
    assert_says(refused(tmp_path), path, "is not a whole Parquet file", "get it again")


def test_a_parquet_file_damaged_inside(tmp_path, monkeypatch):
    """The damage is met by a reader thread while earlier blocks are done; the rest follows once it is mended."""
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACGT"), 200)) for _ in range(400)]
    path = write(tmp_path / "in.parquet", sequences)
    pq.write_table(pq.read_table(path), path, row_group_size=50, compression="zstd")
    whole, group = path.read_bytes(), pq.ParquetFile(path).metadata.row_group(6)
    page = group.column(1).data_page_offset
    path.write_bytes(whole[: page + 30] + bytes(200) + whole[page + 230 :])
    monkeypatch.setattr(encoder, "SAMPLED_ROWS", 1)
    monkeypatch.setattr(EMBED, "check_unique_ids", lambda source: None)
    with pytest.raises(InputError) as error:
        embed_here(tmp_path, {"block_rows": 50})
    assert_says(str(error.value), path, "row group 6 cannot be decoded", "damaged", "get it again")
    path.write_bytes(whole)
    summary = embed_here(tmp_path, {"block_rows": 50})
    assert summary.vectors == 400
    assert summary.resumed_at >= 50
    assert unnamed_files(tmp_path / "db") == []


def test_fasta_that_is_malformed_leaves_nothing(tmp_path):
    path = tmp_path / "bad.fasta"
    path.write_text(">a\nACGT\n>\nACGT\n")
    assert_says(refused(tmp_path, {"path": str(path)}), path, "record 1 (counted from 0) has no id")
    path.write_text(">a\nMKVL\n>b\nMKVLE\n")
    assert_says(refused(tmp_path, {"path": str(path)}), "no sequence in column 'dna_sequence'", "2 not_dna")


def test_fasta_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Gzipped, with Windows line ends, to a relative path with all that a path can hold."""
    text = "".join(f">s{n} some text\r\n{GOOD[n % 3][:30]}\r\n{GOOD[n % 3][30:]}\r\n" for n in range(12))
    (tmp_path / "in.fa.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    monkeypatch.chdir(tmp_path)
    uri = tmp_path / "a:b" / "c d ü%20#?"
    settings = {"data": {"path": "in.fa.gz", "block_rows": 4}, "sink": {"uri": "a:b/c d ü%20#?"}, "embed": ALL}
    with spoilt_after(monkeypatch, 1), pytest.raises(InputError, match="the vector of 's4' is not finite"):
        embed_here(tmp_path, **settings)
    assert (uri / ".sequences.input" / "input.parquet").is_file()
    assert embed_here(tmp_path, **settings).resumed_at == 4
    assert unnamed_files(uri) == []
    assert not (uri / ".sequences.input").exists()
    found = Table.read(uri).vectors
    assert found["dna_sequence"].to_pylist() == GOOD * 4
    write(tmp_path / "in.parquet", GOOD * 4)
    embed_here(tmp_path, {"block_rows": 4}, embed=ALL)
    assert found["vector"].equals(Table.read(tmp_path / "db").vectors["vector"])


@pytest.mark.parametrize("column", ["sequence_id", "dna_sequence", "note"])
def test_text_that_is_not_utf8(tmp_path, column):
    """Lance would take it and not give it back."""
    offsets = pa.array([0, 6, 9, 15], pa.int32()).buffers()[1]
    latin = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"ACGTACM\xfcAGGGTTA"))
    columns = {"sequence_id": pa.array(["a", "b", "c"]), "dna_sequence": pa.array(GOOD), "note": pa.array(GOOD)}
    pq.write_table(pa.table(columns | {column: latin}), tmp_path / "in.parquet")
    message = refused(tmp_path)
    assert_says(
        message, f"in.parquet row 1 (counted from 0), column '{column}': Invalid UTF8", "write the file with UTF-8"
    )


def test_an_input_column_that_the_table_needs(tmp_path):
    write(tmp_path / "in.parquet", GOOD, vector=[1.0, 2.0, 3.0])
    assert_says(refused(tmp_path), "in.parquet", "column 'vector'", "vector table", "rename it")


# the checkpoint


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the tiny v2 checkpoint to spoil, and good input."""
    write(tmp_path / "in.parquet", GOOD)
    return Path(shutil.copytree(CHECKPOINTS["v2"], tmp_path / "model"))


def spoil(checkpoint: Path, change) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def refused_model(checkpoint: Path, **settings) -> str:
    return refused(checkpoint.parent, model={"checkpoint": str(checkpoint)}, **settings)


KEY = "esm.encoder.layer.1.attention.self.key.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw[: len(raw) // 2], ["model.safetensors", "again"]),
        (lambda raw: raw[:5], ["model.safetensors", "again"]),
        (lambda raw: b"", ["model.safetensors", "again"]),
        (lambda raw: raw[:20] + bytes(8) + raw[28:], ["model.safetensors", "again"]),
        (lambda raw: bytes(7) + b"\xff" + raw[8:], ["model.safetensors", "again"]),
    ],
    ids=["half", "five bytes", "nothing", "a hole in the header", "a header longer than the file"],
)
def test_a_damaged_safetensors_file(checkpoint, change, words):
    path = checkpoint / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    assert_says(refused_model(checkpoint), *words)


def test_a_damaged_pytorch_file(tmp_path):
    write(tmp_path / "in.parquet", GOOD)
    checkpoint = Path(shutil.copytree(CHECKPOINTS["v1"], tmp_path / "model"))
    path = checkpoint / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_says(refused_model(checkpoint), "pytorch_model.bin", "again")


def test_a_missing_key(checkpoint):
    spoil(checkpoint, lambda tensors: tensors.pop(KEY))
    assert_says(refused_model(checkpoint), checkpoint, KEY)


def test_an_extra_key(checkpoint):
    spoil(checkpoint, lambda tensors: tensors.update({"esm.encoder.layer.9.bias": np.zeros(3, np.float32)}))
    assert_says(refused_model(checkpoint), checkpoint, "esm.encoder.layer.9.bias")


def test_a_wrong_shape(checkpoint):
    spoil(checkpoint, lambda tensors: tensors.update({KEY: np.zeros((16, 8), np.float32)}))
    assert_says(refused_model(checkpoint), KEY, "16", "8")


def test_weights_that_are_not_finite(checkpoint):
    spoil(checkpoint, lambda tensors: tensors.update({KEY: np.full((16, 16), np.nan, np.float32)}))
    assert_says(refused_model(checkpoint), "the vector of 's0' is not finite in float32", "check the weights")


def test_no_vocabulary(checkpoint):
    (checkpoint / "vocab.txt").unlink()
    assert_says(refused_model(checkpoint), checkpoint / "vocab.txt", "No such file")


@pytest.mark.parametrize(("family", "other"), [("v1", "v2"), ("v2", "v1")])
def test_the_vocabulary_of_the_other_family(tmp_path, family, other):
    write(tmp_path / "in.parquet", GOOD)
    checkpoint = Path(shutil.copytree(CHECKPOINTS[family], tmp_path / "model"))
    shutil.copy(CHECKPOINTS[other] / "vocab.txt", checkpoint / "vocab.txt")
    assert_says(refused_model(checkpoint), checkpoint / "vocab.txt", "config.json")


def test_an_unknown_key_in_config_json(checkpoint):
    raw = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(raw | {"rope_scaling": {"factor": 2}}))
    assert_says(refused_model(checkpoint), checkpoint / "config.json", "unknown key 'rope_scaling'")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"checkpoint": "random:tiny-v3"}, ["'random:tiny-v3'", "no such preset", "tiny-v2"]),
        ({"checkpoint": "InstaDeepAI/nucleotide-transformer-v2-50m-multi-species"}, ["--model.revision COMMIT"]),
        ({"checkpoint": "InstaDeepAI/nt", "revision": "main"}, ["--model.revision 'main' can move", "40 hex digits"]),
        ({"checkpoint": "./nowhere"}, ["'./nowhere'", "no such directory", "check the path"]),
    ],
)
def test_a_checkpoint_that_there_is_not(tmp_path, model, words):
    write(tmp_path / "in.parquet", GOOD)
    assert_says(refused(tmp_path, model=model), "--model.", *words)


# settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": {"max_tokens": 65}}, ["--data.max_tokens 65", "64 positions", "golden/v2", "pass at most 64"]),
        ({"embed": {"layer": 4}}, ["--embed.layer 4", "0 to 3"]),
        ({"embed": {"layer": -5}}, ["--embed.layer -5", "0 to 3"]),
        ({"mesh": {"data": 99}}, ["--mesh.data 99", "8 cpu device(s)", "lower"]),
        ({"mesh": {"model": 3}}, ["attention", "heads", "not divisible by --mesh.model 3"]),
    ],
)
def test_settings_that_do_not_fit_the_model(tmp_path, settings, words):
    write(tmp_path / "in.parquet", GOOD)
    assert_says(refused(tmp_path, **settings), *words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DataConfig(path="x", max_tokens=1), ["--data.max_tokens 1", "at least 2"]),
        (lambda: DataConfig(path="x", block_rows=0), ["--data.block_rows 0", "at least 1"]),
        (lambda: EmbedConfig(phases=7), ["--embed.phases 7", "1 to 6"]),
        (lambda: MeshConfig(data=0), ["--mesh.data 0", "at least 1"]),
        (lambda: SinkConfig(uri="x", table="a/b"), ["--sink.table 'a/b'", "letters, digits"]),
        (lambda: SinkConfig(uri="x", max_bytes_per_file=9), ["--sink.max_bytes_per_file 9", "at least"]),
    ],
)
def test_settings_that_are_wrong_by_themselves(make, words):
    with pytest.raises(InputError) as error:
        make()
    assert_says(str(error.value), *words)


# the sink


def test_a_sink_below_a_file(tmp_path):
    write(tmp_path / "in.parquet", GOOD)
    (tmp_path / "file").write_text("")
    message = refused(tmp_path, sink={"uri": str(tmp_path / "file" / "db")})
    assert_says(message, tmp_path / "file" / "db", "a file stands where a directory is needed", "--sink.uri")


def test_a_sink_without_a_name(tmp_path, monkeypatch):
    write(tmp_path / "in.parquet", GOOD)
    monkeypatch.chdir(tmp_path)
    assert_says(refused(tmp_path, sink={"uri": ""}), "--sink.uri is empty", "pass a directory")
    assert files(tmp_path) == {str(tmp_path / "in.parquet")}


def test_the_table_of_another_plan(tmp_path):
    write(tmp_path / "in.parquet", GOOD)
    embed_here(tmp_path, {})
    before = {file: Path(file).read_bytes() for file in files(tmp_path / "db") if not file.endswith(".lock")}
    for settings, words in (
        ({"embed": {"max_shapes": 1, "pooling": "max"}}, ['embed.pooling "mean" -> "max"']),
        ({"model": {"checkpoint": "random:tiny-v2"}}, ["model.config.hidden_size 16 -> 64", "more;"]),
        ({"sink": {"vector_dtype": "float16"}}, ['vector_dtype "float32" -> "float16"']),
        ({"data": {"block_rows": 2}}, ["block_rows 8192 -> 2"]),
    ):
        with pytest.raises(InputError) as error:
            embed_here(tmp_path, **({"data": {}} | settings))
        where = [str(tmp_path / "db" / f"{name}.lance") for name in ("sequences", "sequences_rejects")]
        assert_says(str(error.value), f"{where[0]} was made by another plan", *words, "pass another --sink.table")
        assert_says(str(error.value), f"or remove {where[0]} and {where[1]}")
    write(tmp_path / "in.parquet", GOOD[:2])
    with pytest.raises(InputError, match=r"input\[0\]\.rows 3 -> 2"):
        embed_here(tmp_path, {})
    after = {file: Path(file).read_bytes() for file in files(tmp_path / "db") if not file.endswith(".lock")}
    assert after == before


def test_vectors_that_do_not_fit_float16(checkpoint):
    spoil(checkpoint, lambda t: t.update({"esm.encoder.emb_layer_norm_after.weight": np.full(16, 1e6, np.float32)}))
    message = refused_model(checkpoint, sink={"vector_dtype": "float16"})
    assert_says(message, "the vector of 's0' is not finite in float16", "--sink.vector_dtype float32")
    assert embed_here(checkpoint.parent, {}, model={"checkpoint": str(checkpoint)}).vectors == 3


def test_a_failure_after_commits_keeps_them(tmp_path, monkeypatch):
    """A vector that is not finite in a later block: what was committed stays, nothing follows it."""
    write(tmp_path / "in.parquet", GOOD * 4)
    with spoilt_after(monkeypatch, 2) as calls, pytest.raises(InputError, match="the vector of 's4' is not finite"):
        embed_here(tmp_path, {"block_rows": 2}, embed=ALL)
    assert len(calls) == 3
    assert Table.read(tmp_path / "db").vectors.num_rows == 4
    assert embed_here(tmp_path, {"block_rows": 2}).resumed_at == 4
    assert Table.read(tmp_path / "db").vectors["sequence_id"].to_pylist() == [f"s{n}" for n in range(12)]
    assert unnamed_files(tmp_path / "db") == []


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """A limit on the size of a file stands for a full disk: the same error from the same call, on any machine."""
    rng = np.random.default_rng(0)
    notes = ["" if row < 60 else rng.bytes(3000).hex() for row in range(120)]
    data = write(tmp_path / "in.parquet", GOOD * 40, notes=notes)

    def flags(uri: str) -> list[str]:
        settings = {
            "model.checkpoint": CHECKPOINTS["v2"],
            "data.path": data,
            "data.block_rows": 30,
            "embed.max_shapes": 1,
        }
        settings |= {"sink.uri": tmp_path / uri, "mesh.compilation_cache": "null"}
        return [f"--{name}={value}" for name, value in settings.items()]

    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", sys.executable, str(SCRIPTS / "embed.py")]
    assert_script_fails(
        run([*limited, *flags("db")]), tmp_path / "db", "60 rows are safe", "run the same command again"
    )
    whole = script(flags("db"))
    assert whole.returncode == 0, whole.stderr
    assert "(60 of them before this run)" in whole.stdout
    assert script(flags("whole")).returncode == 0
    assert Table.read(tmp_path / "db").differences(Table.read(tmp_path / "whole")) == []
    assert unnamed_files(tmp_path / "db") == []


# the command line


NEEDED = ["--model.checkpoint=random:tiny-v2", "--data.path=in.parquet", "--sink.uri=db"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*NEEDED, "--embed.poolin=max"], ["--embed.poolin=max", "--help"]),
        ([*NEEDED, "--embed.phase=2"], ["--embed.phase=2", "--help"]),
        ([*NEEDED, "--embed.phases=two"], ["--embed.phases", "int", "two"]),
        ([*NEEDED, "--embed.phases=7"], ["--embed.phases 7", "1 to 6"]),
        ([*NEEDED, "--sink.index=hnsw"], ["--sink.index", "'ivf_sq'", "hnsw"]),
        ([*NEEDED, "--simulate.species=0"], ["--simulate.species 0", "at least 1"]),
        ([*NEEDED, "--simulate.species=x"], ["species", "int", "x"]),
        ([*NEEDED, "more"], ["more"]),
        (NEEDED[:2], ["--sink.uri required"]),
        ([*NEEDED, "--fleet.workers=2"], ["--fleet.address required"]),
        ([*NEEDED, "--fleet.address=local", "--fleet.workers=two"], ["--fleet.workers: expected int, got two;"]),
        (["--config", "nowhere.yaml"], ["--config", "nowhere.yaml"]),
        (["--config", "wrong.yaml"], ["'model'", "'checkpoin'"]),
        (["--config", "torn.yaml"], ["config", "line 1"]),
        (["--config", "bytes.yaml"], ["utf-8"]),
    ],
)
def test_a_wrong_command_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("model: {checkpoin: x}")
    Path("torn.yaml").write_text("model: [1")
    Path("bytes.yaml").write_bytes(bytes(range(128, 255)))
    done = call("embed", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch("error: .+\n", done.stderr)
    assert_says(done.stderr, *words)
    assert not Path("db").exists()


@pytest.mark.parametrize("path", shipped_configs().values(), ids=lambda path: path.name)
def test_each_config_is_one_of_the_command_that_its_first_line_names(path):
    named = re.match(r"# python scripts/(\w+)\.py --config configs/(\S+)", path.read_text())
    assert named, f"{path} must start with its command"
    assert named[2] == path.name
    header = re.match(r"(?:#.*\n)+", path.read_text())[0].replace("\\\n#", "").split("\n")[0]
    words = shlex.split(header.removeprefix("# python"))
    flags = [str(path) if word == f"configs/{path.name}" else word for word in words[1:]]
    unprefixed = ["settings"] if named[1] == "default_model" else []
    assert parse(import_module(f"bioscan_jax.cli.{named[1]}").main, flags, named[1], unprefixed)


@pytest.mark.parametrize("given", ["query,value", "[query,value]", "[query, value]"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_list_needs_no_brackets(given, joined):
    flags = ["--model.checkpoint=random:tiny-v2", "--data.path=in.parquet", "--loss.rank_weights=0,0,0,0,1,1,2.5"]
    flags += [f"--lora.targets={given}"] if joined else ["--lora.targets", given]
    found = parse(finetune.main, [*flags, "--train.epochs", "3"], "finetune")
    assert found["lora"].targets == ("query", "value")
    assert found["loss"].rank_weights == (0, 0, 0, 0, 1, 1, 2.5)
    assert found["train"].epochs == 3


def test_a_list_without_a_prefix_needs_no_brackets_either():
    flags = ["--reference.uri=vectors", "--output=made", "--rank_weights", "0,0,1,.5"]
    found = parse(fit_metric.main, flags, "fit-metric", ["settings"])
    assert found["settings"].rank_weights == (0, 0, 1, 0.5)


@pytest.mark.slow
def test_from_another_directory(tmp_path, monkeypatch):
    """One line on stderr, exit code 2, no traceback, no summary on stdout; the script itself once for each outcome."""
    write(tmp_path / "in.parquet", GOOD)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    given = ["--mesh.compilation_cache=null", f"--model.checkpoint={CHECKPOINTS['v2']}", "--sink.uri=db"]
    cases = [
        ([*given, "--data.path=nowhere.parquet"], ["nothing found at", "nowhere.parquet"]),
        ([*given, "--data.path=../in.parquet", "--embed.layer=9"], ["--embed.layer 9", "0 to 3"]),
        ([*given, "--data.path=../in.parquet", "--embed.poolin=max"], ["--embed.poolin=max"]),
        ([*given, "--data.path=../in.parquet", "--model.checkpoint=../model"], ["config.json"]),
    ]
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(elsewhere)
    for arguments, words in cases:
        assert_script_fails(call("embed", *arguments), *words)
        assert_nothing_left(elsewhere / "db")
    assert_script_fails(script(cases[0][0], cwd=elsewhere), *cases[0][1])
    done = script([*given, "--data.path=../in.parquet"], cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert lines(done.stderr) == []
    assert f"{elsewhere}/db/sequences.lance" in done.stdout


@pytest.mark.slow
def test_output_that_nobody_reads_and_streams_that_are_closed(tmp_path):
    write(tmp_path / "in.parquet", GOOD)
    flags = [
        "--mesh.compilation_cache=null",
        f"--model.checkpoint={CHECKPOINTS['v2']}",
        f"--data.path={tmp_path}/in.parquet",
    ]
    job = start([sys.executable, str(SCRIPTS / "embed.py"), *flags, f"--sink.uri={tmp_path}/piped"])
    job.stdout.close()
    said = lines(job.stderr.read())
    job.stderr.close()
    assert job.wait(120) == 128 + signal.SIGPIPE
    assert said == ["the reader of the output has gone; what was committed is safe"]
    closed = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, str(SCRIPTS / "embed.py")]
    assert run([*closed, *flags, f"--sink.uri={tmp_path}/closed"]).returncode == 0
    for uri in (tmp_path / "piped", tmp_path / "closed"):
        assert Table.read(uri).vectors.num_rows == 3
        assert unnamed_files(uri) == []


def test_help_names_the_flags():
    shown = call("embed", "--help")
    flags = """--config --model.checkpoint --model.revision --model.dtype --data.path --data.sequence_column
    --data.max_tokens --data.overlong --data.block_rows --embed.pooling --embed.layer --embed.strand --embed.phases
    --mesh.data --mesh.model --sink.uri --sink.table --sink.vector_dtype --sink.index"""
    assert shown.returncode == 0
    assert shown.stderr == ""
    assert_says(shown.stdout, *(f"\n  {flag} " for flag in flags.split()))


def test_settings_in_python_are_checked_as_flags_are():
    """In a process of its own, as the types of the tests' process are checked by beartype."""
    code = """
from pathlib import Path
from bioscan_jax.config import DataConfig, EmbedConfig, IdentifyConfig
assert DataConfig(path=Path("x")).path == "x"
for kind, given in ((EmbedConfig, {"pooling": "men"}), (IdentifyConfig, {"rerank": "align"}), (IdentifyConfig, {"k": "5"})):
    try:
        kind(**given)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "EmbedConfig(pooling=...) got 'men'; pass 'mean', 'mean_no_cls', 'cls' or 'max'",
        "IdentifyConfig(rerank=...) got 'align'; pass 'none' or 'alignment'",
        "IdentifyConfig(k=...) got '5'; pass a whole number",
    ]
