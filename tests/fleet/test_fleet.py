"""A fleet on a Ray cluster: killed at random it leaves the table of one process, and what is wrong is one line."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import call
from support.dashboards import hide_credentials, history
from support.embed_runs import BLOCK_ROWS, Table, lines, rows_there, run, unnamed_files, write_input
from support.fleets import script_command, start_driver
from support.places import TESTS

import bioscan_jax as bj
from bioscan_jax import DataConfig, EmbedConfig, FleetConfig, InputError, MeshConfig, ModelConfig, SinkConfig
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.fleet.cluster import connected, mismatch
from bioscan_jax.fleet.driver import absolute
from bioscan_jax.fleet.orders import Facts, Refusal, Settings
from bioscan_jax.fleet.worker import Worker

ROWS = 3000


@pytest.fixture
def settings(tmp_path) -> Settings:
    (tmp_path / "barcodes.fasta").write_text(">a\nACGTTGCAACGT\n>b\nTTGACATTGACA\n")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / ".sequences.fleet").write_bytes(b"token")
    return Settings(
        model=ModelConfig(checkpoint="random:tiny-v2"),
        data=DataConfig(path=str(tmp_path / "barcodes.fasta")),
        sink=SinkConfig(uri=str(tmp_path / "table")),
        embed=EmbedConfig(),
        mesh=MeshConfig(compilation_cache=None, data=1),
        marker=".sequences.fleet",
        token=b"token",
    )


def facts_of(settings: Settings) -> Facts:
    found = Worker(settings).load()
    assert isinstance(found, Facts), found
    return found


@pytest.mark.fleet
def test_ray_that_does_not_start_is_one_line(monkeypatch):
    def init(**given):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(InputError, match="Ray cannot start on this machine .*timed out.*run the same command again"):
        connected(FleetConfig(address="local")).__enter__()


@pytest.mark.fleet
def test_workers_that_would_compute_other_vectors_are_told_from_those_that_would_not(settings):
    first = facts_of(settings)
    assert first.probe.any()
    model, mesh = replace(settings.model, seed=1), replace(settings.mesh, data=2)
    other = facts_of(replace(settings, model=model, mesh=mesh))
    assert "model.weights_sha256" in str(mismatch(first, other, mixed=True))
    two = replace(first, devices=other.devices, shapes=other.shapes)
    assert "2 x cpu, the first worker 1 x cpu" in str(mismatch(first, two, mixed=False))
    assert mismatch(first, two, mixed=True) is None
    for change, refused in ((1 + 1e-5, [True, False]), (1.1, [True, True])):
        changed = replace(first, probe=first.probe * np.float32(change))
        assert [mismatch(first, changed, mixed=mixed) is not None for mixed in (False, True)] == refused


def test_a_worker_without_the_input_or_the_directory_of_the_table_says_so(settings):
    absent = Worker(replace(settings, data=DataConfig(path="/absent/barcodes.parquet"))).load()
    assert isinstance(absent, Refusal)
    assert "/absent/barcodes.parquet" in absent.reason
    elsewhere = Worker(replace(settings, token=b"of the driver")).load()
    assert isinstance(elsewhere, Refusal)
    assert "share" in elsewhere.reason
    assert settings.sink.uri in elsewhere.reason


def embed_by(address: str, tmp_path: Path, *more: str) -> tuple[int, str, float]:
    """Runs embed with a fleet; returns the exit code, stderr and the seconds."""
    (tmp_path / "barcodes.fasta").write_text(">a\nACGTTGCAACGT\n")
    flags = {
        "model.checkpoint": "random:tiny-v2",
        "data.path": tmp_path / "barcodes.fasta",
        "sink.uri": tmp_path / "table",
        "fleet.address": address,
    }
    begun = time.monotonic()
    ended = call("embed", *(f"--{name}={value}" for name, value in flags.items()), *more)
    return ended.returncode, ended.stderr, time.monotonic() - begun


def test_local_paths_are_made_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, sink = ModelConfig(checkpoint="default"), SinkConfig(uri="vectors")
    paths = {"a.fasta": f"{tmp_path}/a.fasta", "demo:coi": "demo:coi", "gs://b/a.fasta": "gs://b/a.fasta"}
    for path, wanted in paths.items():
        there = absolute(model, DataConfig(path=path), sink)
        assert (there[0], there[1].path, there[2].uri) == (model, wanted, f"{tmp_path}/vectors")


def test_without_ray_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, stderr, _ = embed_by("auto", tmp_path)
    assert (code, len(stderr.splitlines())) == (2, 1)
    assert "pip install 'bioscan_jax[fleet]'" in stderr
    assert not list((tmp_path / "table").glob("*.lance"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"workers": 0}, "--fleet.workers 0"),
        ({"resources": {"TPU": 0.0}}, "--fleet.resources"),
        ({"resources": {}}, "--fleet.resources"),
        ({"start_seconds": 0.0}, "--fleet.start_seconds"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, words):
    with pytest.raises(InputError, match=words):
        FleetConfig(address="auto", **flags)


@pytest.mark.fleet
@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1:1", "no Ray answers"), ("ray://127.0.0.1:1", "no Ray answers"), ("auto", "in no")],
)
def test_a_wrong_address_is_one_line_within_a_minute(tmp_path, address, words):
    code, stderr, seconds = embed_by(address, tmp_path)
    assert code == 2, stderr
    assert words in stderr
    assert len(stderr.splitlines()) == 1
    assert seconds < 60


@pytest.mark.fleet
def test_killed_workers_nodes_and_drivers_leave_the_table_of_one_process(tmp_path):
    """Ray starts processes by fork, which this one, with JAX in it, had better not do: the campaign is a script."""
    data = write_input(tmp_path / "input", ROWS)
    flags = ["--rows", ROWS, "--nodes", 2, "--kills", 3, "--driver-kills", 1, "--block-rows", BLOCK_ROWS]
    done = run([sys.executable, str(TESTS / "fleet_campaign.py"), "--data", str(data), *map(str, flags)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every row and every bit is that of the single process" in done.stdout
    assert done.stdout.count("SIGKILL of") == 4


@pytest.mark.fleet
def test_a_fleet_goes_on_from_a_table_and_stops_when_asked(tmp_path, monkeypatch):
    """A stop keeps what is finished; another run goes on, to the table of one process, and says so to Weights & Biases."""
    hide_credentials(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    data, uri, log = write_input(tmp_path / "input", ROWS), tmp_path / "fleet", tmp_path / "stderr"
    settings = {"data__block_rows": BLOCK_ROWS, "embed__cache_rows": 3 * BLOCK_ROWS}
    single = run(script_command(data, tmp_path / "single", **settings))
    assert single.returncode == 0, single.stderr
    command = [*script_command(data, uri, **settings), "--fleet.address=local", "--fleet.workers=1"]

    def begin(*more: str) -> subprocess.Popen:
        return start_driver([*command, *more], tmp_path / "cache", log)

    driver = begin()
    while driver.poll() is None and rows_there(uri) < ROWS // 4:
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    driver.communicate(timeout=60)
    assert driver.returncode == 128 + signal.SIGTERM, log.read_text()
    assert "rows safe in" in lines(log.read_text())[-1]
    safe = rows_there(uri)
    assert ROWS // 4 <= safe < ROWS
    nothing = begin('--fleet.resources={"TPU": 4}', "--fleet.start_seconds=3")
    nothing.communicate(timeout=120)
    assert nothing.returncode == 2
    assert "no machine of the cluster has 4 TPU" in lines(log.read_text())[-1]
    driver = begin("--tracking.mode=offline")
    summary = driver.communicate(timeout=120)[0].decode()
    assert driver.returncode == 0, log.read_text()
    assert f"3,000 ({safe:,} of them before this run)" in summary
    assert "1 workers, " in summary
    (directory,) = tmp_path.glob("wandb/offline-run-*")
    last = history(directory)[-1]
    assert (last["embed/rows_done"], last["embed/rows_pending"], last["embed/workers"]) == (ROWS, 0, 1)
    assert Table.read(uri).differences(Table.read(tmp_path / "single")) == []
    assert unnamed_files(uri) == []


@pytest.mark.fleet
def test_vectors_that_are_not_finite_are_rejected_in_a_fleet_too_and_their_copies(tmp_path):
    """The weights of one 6-mer are NaN; its sequence comes again in the same block, in later ones and at random."""
    checkpoint, poison = tmp_path / "model", "ACACAC"
    bj.load("random:tiny-v2").save_pretrained(str(checkpoint))
    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name][Vocabulary.published("v2").tokens.index(poison)] = np.nan
    save_file(weights, checkpoint / "model.safetensors")
    random = np.random.default_rng(1)
    texts = ["".join(random.choice(list("CGT"), 60)) for _ in range(600)]
    for row in range(40, 600, 7):
        texts[row] = texts[row - 40]
    for row in (150, 151, 205, 335, 590):
        texts[row] = poison + texts[150][6:]
    pq.write_table(pa.table({"dna_sequence": texts}), tmp_path / "barcodes.parquet")
    flags = {"model__checkpoint": checkpoint, "data__block_rows": 16, "embed__cache_rows": 64, "mesh__data": 1}
    tables = []
    for how in ({}, {"fleet__address": "local", "fleet__workers": 2}):
        uri = tmp_path / f"table-{len(tables)}"
        done = run(script_command(tmp_path / "barcodes.parquet", uri, **flags, **how))
        assert done.returncode == 0, done.stderr
        tables.append(Table.read(uri))
    assert tables[0].rejects["reason"].to_pylist().count("not_finite") == 5
    assert tables[1].differences(tables[0]) == []
