"""URLs where a path may stand: they work or are refused in one line, and never become a local folder named gs:."""

import dataclasses
import json
import os
import typing
from importlib import import_module
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import call
from support.labelled_tables import clustered, write_labelled
from support.reference_table import World, make_world

import bioscan_jax as bj
import bioscan_jax.cache as bounded
from bioscan_jax import config
from bioscan_jax.cli import COMMANDS
from bioscan_jax.errors import InputError
from bioscan_jax.location import UNFINISHED, Bucket, local_copy, local_directory, locate, output_directory, output_file
from bioscan_jax.matching.answers import ANSWERS
from bioscan_jax.planning.plan import model_size

URL = "gs://no-such-bucket/x"
NO_PATHS = {
    *("sequence_column", "id_column", "split_column", "delimiter", "encoding", "revision", "table", "filter", "sql"),
    *(
        "address",
        "resources",
        "push",
        "branch",
        "commit_message",
        "sequence",
        "targets",
        "project",
        "name",
        "coordinator",
        "title",
        "creator",
        "email",
        "organization",
    ),
}
"""Flags that take text which is no path."""
MODEL, MESH = ("model.checkpoint", "model.adapter", "model.projection"), ("mesh.compilation_cache",)
PATHS = {
    "embed": (*MODEL, "data.path", "data.scratch", "sink.uri", "simulate.path", "profile", *MESH),
    "describe": ("data.path", "data.scratch"),
    "finetune": (*MODEL, "data.path", "data.scratch", "train.output_dir", "simulate.path", "profile", *MESH),
    "export": ("run", "output", "checkpoint", *MODEL, *MESH),
    "push": ("directory",),
    "identify": (
        *MODEL,
        "reference.uri",
        "query.path",
        "output",
        "heads",
        "calibration",
        "groups",
        "taxon_ids",
        "taxon_ids.path",
        *MESH,
    ),
    "calibrate": (*MODEL, "reference.uri", "query.path", "heads", *MESH),
    "default-model": ("data.path", "data.scratch", "output", "work", *MESH),
    "fit-metric": ("reference.uri", "output", *MESH),
    "search": (*MODEL, "reference.uri", *MESH),
    "project": ("reference.uri", "projection", "sink.uri", *MESH),
    "compact": ("uri",),
    "query": ("uri", "output"),
    "annotate": ("uri", "metadata", "metadata.path"),
    "report": ("uri", "output", "identified", "truth", "truth.path", "pictures"),
    "convert": (*MODEL, "output", *MESH),
    "bundle export": ("source", "target", "with"),
    "bundle import": ("source", "target"),
    "bundle verify": ("source",),
}
"""Flags that take a path, of each command."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), species=10)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> str:
    vectors, lineages = clustered()
    uri = str(tmp_path_factory.mktemp("labelled"))
    write_labelled(uri, vectors, lineages)
    return uri


@pytest.fixture(scope="module")
def fitted(labelled) -> str:
    output = "memory://metric/whitened"
    bj.fit_metric(bj.ReferenceConfig(uri=labelled), output, bj.MetricConfig(components=8), progress=False)
    return output


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bioscan_jax"


def string_flags(kind: object, prefix: str = "") -> set[str]:
    """The flags of a command that take a text."""
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        kinds = (hint, *typing.get_args(hint))
        found |= {prefix + name} if str in kinds else set()
        for group in filter(dataclasses.is_dataclass, kinds):
            found |= string_flags(group, "" if name in ("settings", "fit", "archive") else f"{prefix}{name}.")
    return found


def test_every_flag_that_takes_a_path_is_known_here():
    for command in COMMANDS:
        main = getattr(import_module(f"bioscan_jax.cli.{command.replace('-', '_')}"), "main", None)
        if main is not None:
            paths = {flag for flag in string_flags(main) if flag.rpartition(".")[2] not in NO_PATHS}
            assert paths == set(PATHS[command]), command


def settings_of(command: str, world: World, labelled: str, fitted: str, here: Path) -> dict[str, object]:
    """Flags with which a command does something, or comes to read the path in question."""
    model = {"model.checkpoint": "random:tiny-v2", "model.seed": 3, "mesh.data": 1}
    barcodes, reference = str(here / "barcodes.parquet"), {"reference.uri": world.uri}
    rows = pa.table({"sequence_id": ["a"], "dna_sequence": ["ACGTACGT"], "taxonomy": ["Animalia"]})
    pq.write_table(rows, barcodes)
    answer = {field.name: pa.nulls(1, field.type) for field in ANSWERS} | {"sequence_id": ["a"]}
    pq.write_table(pa.table(answer, schema=ANSWERS), here / "answers.parquet")
    (here / "run").mkdir()
    kept = {"loss": vars(config.LossConfig()), "lora": vars(config.LoRAConfig()), "train": {}}
    record = {"decided_by": kept, "model": {"checkpoint": "random:tiny-v2", "revision": None, "seed": 0}}
    (here / "run" / "run.json").write_text(json.dumps(record | {"provenance": {"dtype": "float32"}}))
    if command == "bundle import":
        assert call("bundle", "export", f"--source={labelled}", f"--target={here / 'stick'}").returncode == 0
    found: dict[str, dict[str, object]] = {
        "embed": model | {"data.path": barcodes, "sink.uri": here / "db"},
        "describe": {"data.path": barcodes},
        "finetune": model | {"data.path": barcodes, "train.output_dir": here / "out"},
        "export": {"run": here / "run", "output": here / "out"},
        "push": {"directory": here / "run", "name": "me/model"},
        "identify": model | reference | {"query.path": world.queries, "output": here / "a.dwca.zip"},
        "calibrate": model | reference | {"query.path": world.queries},
        "default-model": {"data.path": barcodes, "output": here / "out", "work": here / "work"},
        "fit-metric": {"reference.uri": labelled, "output": here / "out"},
        "search": model | reference | {"sequence": "ACGTACGTACGT"},
        "project": {"reference.uri": labelled, "projection": fitted, "sink.uri": here / "db"},
        "compact": {"uri": world.uri},
        "query": {"sql": "SELECT 1 FROM sequences", "uri": world.uri},
        "annotate": {"uri": world.uri, "metadata": barcodes},
        "report": {"uri": world.uri, "output": here / "r.html", "projection": "pca"}
        | {"identified": here / "answers.parquet"},
        "convert": model | {"output": here / "out"},
        "bundle export": {"source": world.uri, "target": here / "stick"},
        "bundle import": {"source": here / "stick", "target": here / "db"},
        "bundle verify": {},
    }
    return found[command]


@pytest.mark.parametrize("command", PATHS)
def test_a_url_never_becomes_a_local_folder(command, world, labelled, fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_APPLICATION_CREDENTIALS"):  # refused at once, where drivers are
        monkeypatch.setenv(name, "/nonexistent")
    given = settings_of(command, world, labelled, fitted, tmp_path)
    name, *mode = command.split()
    for flag in PATHS[command]:
        if (command, flag) == ("finetune", "model.projection"):  # is not read: training changes the vectors
            continue
        if flag == "mesh.compilation_cache":
            monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # the last flag that is tried
        changed = {"data.path": URL} if flag == "simulate.path" else {}
        flags = given | changed
        flags.pop(flag.removesuffix(".path"), None)  # --metadata FILE is short for --metadata.path FILE
        if command == "export" and flag in MODEL:
            flags = {"output": tmp_path / "out", "format": "onnx", "model.checkpoint": "random:tiny-v2"}
        flags[flag] = URL
        done = call(name, *mode, *(f"--{key}={value}" for key, value in flags.items()))
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2, (flag, done.stdout, done.stderr)
        assert len(said) == 1, (flag, done.stderr)
        assert "no-such-bucket" in said[0] or f"--{flag} cannot" in said[0], (flag, said)
        assert "--help lists the flags" not in said[0], (flag, said)  # the flag is known
        assert "Traceback" not in done.stderr
        assert not [path for path in tmp_path.rglob("*") if path.name.startswith("gs:")], flag


def test_a_url_that_lost_a_slash_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--output gs:/b/x: a URL has two slashes, gs://b/x"):
        local_directory("gs:/b/x", flag="output")
    assert local_directory("file:///a/b") == Path("/a/b")


def test_a_checkpoint_is_converted_into_a_bucket_and_downloaded_once(cache, monkeypatch):
    url, fetched, fetch = "memory://models/converted", [], Bucket.fetch
    flags = ("--model.checkpoint=random:tiny-v2", f"--output={url}", "--mesh.data=1")
    assert call("convert", *flags).returncode == 0
    monkeypatch.setattr(Bucket, "fetch", lambda self, path, to: fetched.append(path) or fetch(self, path, to))
    vectors = [bj.load(name, mesh=bj.MeshConfig(data=1)).encode("ACGTACGTAA") for name in ("random:tiny-v2", url, url)]
    np.testing.assert_array_equal(vectors[0], vectors[1])
    np.testing.assert_array_equal(vectors[1], vectors[2])
    assert len(fetched) == len(set(fetched)) == len(fsspec.filesystem("memory").find("models/converted"))
    again = call("convert", *flags)
    assert (again.returncode, "not empty" in again.stderr) == (2, True)
    assert model_size(config.ModelConfig(checkpoint=url)).hidden_size == len(vectors[0])


def test_a_projection_in_a_bucket_is_used_from_there(labelled, fitted, cache, tmp_path):
    done = call("project", f"--reference.uri={labelled}", f"--projection={fitted}", f"--sink.uri={tmp_path / 'db'}")
    assert done.returncode == 0, done.stderr
    assert len(list((cache / "downloads").glob("*/projection.json"))) == 1


def test_a_report_and_a_query_go_to_a_bucket(world, labelled):
    memory = fsspec.filesystem("memory")
    flags = (f"--uri={labelled}", "--output=memory://reports/r.html", "--pictures=memory://reports/pictures")
    assert call("report", *flags, "--projection=pca").returncode == 0
    assert memory.cat_file("reports/r.html").startswith(b"<!")
    assert memory.exists("reports/pictures/embedding.png")
    sql = "SELECT count(*) AS rows FROM sequences"
    assert call("query", sql, f"--uri={labelled}", "--output=memory://reports/rows.csv").returncode == 0
    assert memory.cat_file("reports/rows.csv").decode().split()[1] == "480"


def test_files_beside_unfinished_are_refused_and_made_anew(cache):
    url, memory = "memory://half/made", fsspec.filesystem("memory")
    memory.pipe_file("half/made/old.bin", b"from a run that was killed")
    memory.pipe_file(f"half/made/{UNFINISHED}", b"")
    with pytest.raises(InputError, match="--model.checkpoint memory://half/made: incomplete"):
        local_copy(url, "model.checkpoint")
    with pytest.raises(RuntimeError), output_directory(url):
        raise RuntimeError("stopped")
    with pytest.raises(InputError, match="incomplete"):
        local_copy(url, "model.checkpoint")
    with output_directory(url) as directory:
        directory.mkdir()
        (directory / "new.bin").write_bytes(b"new")
    assert [path.name for path in local_copy(url, "x").iterdir()] == ["new.bin"]
    memory.pipe_file("half/made/new.bin", b"newer")
    assert (local_copy(url, "x") / "new.bin").read_bytes() == b"newer"
    assert local_copy(f"{url}/new.bin", "x").read_bytes() == b"newer"
    with pytest.raises(InputError, match="nothing is there"):
        local_copy("memory://half/none", "x")


def end_of_process() -> None:
    """Gives up the locks of downloads as the kernel does when a process ends."""
    for descriptor in bounded._held.values():
        os.close(descriptor)
    bounded._held.clear()


def test_downloads_are_bounded_and_none_in_use_is_removed(cache, monkeypatch):
    memory = fsspec.filesystem("memory")

    def copy(number: int) -> str:
        if not memory.exists(f"bounded/{number}"):
            memory.pipe_file(f"bounded/{number}/weights", bytes(1000))
        return local_copy(f"memory://bounded/{number}", "x").name

    def kept() -> set[str]:
        return {path.parent.name for path in (cache / "downloads").glob("*/weights")}

    monkeypatch.setenv(bounded.BOUND, "0.0000025")
    names = [copy(number) for number in range(4)]
    assert kept() == set(names)  # too much, but this process uses all of it
    end_of_process()
    for number, name in enumerate(names):
        os.utime(cache / "downloads" / f"{name}.used", (number, number))
    assert copy(0) == names[0]
    names.append(copy(4))
    assert kept() == {names[0], names[4]}  # those in use; the longest unused went first, until the rest was gone
    assert copy(1) == names[1]  # downloaded again
    end_of_process()
    monkeypatch.setenv(bounded.BOUND, "much")
    with pytest.raises(InputError, match="BIOSCAN_CACHE_GB=much is not a number of GB; set it to one, such as 20"):
        local_copy("memory://bounded/0", "x")


def test_a_file_that_cannot_be_made_is_refused(tmp_path):
    for output in ("nosuch://a/b.tsv", "memory://a/", "", str(tmp_path), str(tmp_path / "no" / "f.tsv")):
        with pytest.raises(InputError, match="--output"), output_file(output):
            pass
    with pytest.raises(InputError, match="--json nosuch://x: Protocol not known"):
        locate("nosuch://x", "json")
