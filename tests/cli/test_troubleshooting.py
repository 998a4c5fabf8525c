"""Each message of the troubleshooting page is made to happen here, or stands like that in the code."""

import ast
import dataclasses
import functools
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import call
from support.places import ROOT

from bioscan_jax.cli import _command
from bioscan_jax.embedding import block
from bioscan_jax.embedding.step import CompiledSteps
from bioscan_jax.planning import doctor
from bioscan_jax.planning.probe import Devices, Failure
from bioscan_jax.table.lock import writer_lock

PAGE = ROOT / "bioscan_jax" / "guide" / "troubleshooting.md"
MESSAGES = [row.split(" | ")[0].split("`")[1] for row in PAGE.read_text().splitlines() if row.startswith("| `")]
GOOD = ["ACGTAC" * 20, "TTGACA" * 15 + "N", "GGGCCATTA" * 9]
ONE = ("--mesh.data=1", "--mesh.compilation_cache=null", "--embed.max_shapes=1")


def write(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table({"sequence_id": ["a", "b", "c"], "dna_sequence": GOOD} | columns), path)
    return path


def embed(tmp_path: Path, *more: object, data: object = None) -> str:
    """What a run prints on stderr; the last of a repeated flag counts."""
    path = data or write(tmp_path / "in.parquet")
    flags = ["--model.checkpoint=random:tiny-v2", f"--data.path={path}", f"--sink.uri={tmp_path / 'db'}", *ONE]
    return call("embed", *flags, *more).stderr


def without_column(tmp_path: Path, monkeypatch) -> str:
    pq.write_table(pa.table({"sequence_id": ["a"], "letters": ["ACGT"]}), tmp_path / "other.parquet")
    return embed(tmp_path, data=tmp_path / "other.parquet")


def half_a_file(tmp_path: Path, monkeypatch) -> str:
    path = write(tmp_path / "half.parquet")
    path.write_bytes(path.read_bytes()[:-50])
    return embed(tmp_path, data=path)


def two_writers(tmp_path: Path, monkeypatch) -> str:
    with writer_lock(str(tmp_path / "db"), "sequences"):
        return embed(tmp_path)


def two_plans(tmp_path: Path, monkeypatch) -> str:
    assert "error" not in embed(tmp_path)
    return embed(tmp_path, "--embed.pooling=max")


def stopped(tmp_path: Path, monkeypatch) -> str:
    """SIGTERM comes while a block is read."""
    encode, sent = block.encode_block, threading.Event()

    def encode_block(*arguments):
        if not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*arguments)

    monkeypatch.setattr(block, "encode_block", encode_block)
    return embed(tmp_path, "--data.block_rows=1")


def full_disk(tmp_path: Path, monkeypatch) -> str:
    """A link to /dev/full."""
    assert "error" not in embed(tmp_path)
    (tmp_path / "rows.csv").symlink_to("/dev/full")
    sql = "SELECT sequence_id FROM sequences"
    return call("query", sql, f"--uri={tmp_path / 'db'}", f"--output={tmp_path / 'rows.csv'}").stderr


def too_large(tmp_path: Path, monkeypatch) -> str:
    """XLA is asked for more than there is where a batch would start."""
    monkeypatch.setattr(CompiledSteps, "__call__", lambda steps, ids: jax.block_until_ready(jnp.zeros(1 << 58)))
    return embed(tmp_path)


def no_memory(tmp_path: Path, monkeypatch, capsys) -> str:
    assert _command.exit_code_of(lambda words: bytearray(1 << 60) and None, []) == 2
    return capsys.readouterr().err


def slow_input(tmp_path: Path, monkeypatch) -> str:
    """The summary of a run, as if it had taken a minute, half of which its devices waited."""
    import bioscan_jax as bj

    mesh = bj.MeshConfig(data=1, compilation_cache=None)
    data, sink = bj.DataConfig(path=str(write(tmp_path / "in.parquet"))), bj.SinkConfig(uri=str(tmp_path / "db"))
    summary = bj.embed(bj.ModelConfig(checkpoint="random:tiny-v2"), data, sink, mesh=mesh, progress=False)
    seconds = {"total": 60.0, "load": 0.0, "compile": 0.0}
    fast = dataclasses.replace(summary, seconds=seconds, waiting_for_input=0.1)
    short = dataclasses.replace(summary, seconds=seconds | {"load": 50.0}, waiting_for_input=0.5)
    assert (fast.slow_input, short.slow_input) == (None, None)
    return dataclasses.replace(summary, seconds=seconds, waiting_for_input=0.5).slow_input or ""


def machine(found: Devices | Failure, **chips: int) -> Callable[[Path, pytest.MonkeyPatch], str]:
    def happen(tmp_path: Path, monkeypatch) -> str:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        monkeypatch.setattr(doctor, "accelerators", lambda: chips)
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
        return str(doctor.Diagnosis((doctor._devices(found),)))

    return happen


CPU = Devices(platform="cpu", kind="cpu", count=1, memory=None)
BUSY = Failure("RuntimeError: The TPU is already in use by process with pid 77")
HAPPENS: dict[str, Callable[..., str]] = {
    "TPU chips, and libtpu": machine(CPU, tpu=4),
    "only one can": machine(BUSY, tpu=4),
    "NVIDIA GPUs": machine(CPU, gpu=1),
    "--mesh.data ...": lambda tmp_path, monkeypatch: embed(tmp_path, "--mesh.data=99"),
    "embedding a batch": too_large,
    "running the command": no_memory,
    "nothing found at": lambda tmp_path, monkeypatch: embed(tmp_path, data=tmp_path / "none" / "*.parquet"),
    "has no column": without_column,
    "can be embedded": lambda tmp_path, monkeypatch: embed(
        tmp_path, data=write(tmp_path / "x.parquet", dna_sequence=["MKVL", "", "NNN"])
    ),
    "is not unique": lambda tmp_path, monkeypatch: embed(
        tmp_path, data=write(tmp_path / "x.parquet", sequence_id=["a", "b", "a"])
    ),
    "whole Parquet file": half_a_file,
    "--data.max_tokens": lambda tmp_path, monkeypatch: embed(tmp_path, "--data.max_tokens=99999"),
    "waited for input": slow_input,
    "--data.scratch": lambda tmp_path, monkeypatch: embed(
        tmp_path,
        "--data.scratch=gs://b/x",
        data=(tmp_path / "x.fasta").write_text(">a\nACGT\n") and tmp_path / "x.fasta",
    ),
    "rows safe in": stopped,
    "table ... is being written": two_writers,
    "another plan": two_plans,
    "needs its commit": lambda tmp_path, monkeypatch: embed(tmp_path, "--model.checkpoint=OWNER/NAME"),
    "not in the local cache": lambda tmp_path, monkeypatch: embed(
        tmp_path, "--model.checkpoint=OWNER/NAME", f"--model.revision={'0' * 40}"
    ),
    "--output": full_disk,
}
"""How to make a message happen, by words of it; HF_HUB_OFFLINE is set in all tests."""
IN_THE_CODE = {
    "jax.distributed": "tests/devices/test_hosts.py makes it happen, in several processes",
    "training on": "tests/devices/test_memory.py, by gigabytes",
    "loading the weights": "needs a model that is larger than a device",
    "a table of text": "tests/table/test_as_parquet.py",
    "no labels": "tests/training/test_finetune.py",
    "after step": "tests/training/test_finetune.py",
    "last seen": "tests/table/test_lease.py",
    "another configuration": "tests/training/test_finetune.py",
    "start phases": "tests/matching, on a table of an earlier version",
    "refused the token": "tests/checkpoints/test_hub.py, on a hub on loopback",
    "is gated": "tests/checkpoints/test_hub.py",
    "has no model": "tests/checkpoints/test_hub.py",
    "has no commit": "tests/checkpoints/test_hub.py",
    "is an adapter of": "tests/checkpoints/test_peft.py",
    "another model": "tests/matching/test_identify.py",
    "quota is full": "tests/cli/test_bad_input.py, by a limit on the size of a file",
    "XDG_CACHE_HOME": "needs a full disk",
    "HF_HUB_CACHE": "needs a full disk",
    "the storage failed": "tests/table/test_object_store.py, on a store that fails",
    "rclone is not installed": "tests/bundles/test_rclone.py",
}
"""Messages that need devices, networks, full disks or minutes, by words of them; and what makes them happen."""


def pattern(message: str) -> re.Pattern:
    return re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)


def key_of(message: str, keys: dict) -> list[str]:
    return [key for key in keys if key in message]


@functools.cache
def texts() -> tuple[str, ...]:
    """All texts of the library; those with something to fill in are several."""
    found = []
    for path in (ROOT / "bioscan_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def stands(part: str) -> bool:
    """Whether a text of the library has the part, or several that follow one another make it up."""
    every = texts()
    if any(part in text for text in every):
        return True
    whole, length = frozenset(every), len(part)
    reached = {stop for stop in range(1, length) if any(text.endswith(part[:stop]) for text in every)}
    for start in range(1, length):
        if start in reached:
            reached |= {stop for stop in range(start + 1, length) if part[start:stop] in whole}
    return any(any(text.startswith(part[start:]) for text in every) for start in reached)


def test_every_message_of_the_page_is_checked():
    for message in MESSAGES:
        assert len(key_of(message, HAPPENS | IN_THE_CODE)) == 1, message
    assert len(MESSAGES) == len(HAPPENS) + len(IN_THE_CODE)


@pytest.mark.slow
@pytest.mark.parametrize("message", [one for one in MESSAGES if key_of(one, HAPPENS)])
def test_what_is_printed_is_what_the_page_says(message, tmp_path, monkeypatch, request):
    [key] = key_of(message, HAPPENS)
    more = [request.getfixturevalue("capsys")] if HAPPENS[key] is no_memory else []
    with monkeypatch.context() as patch:
        printed = HAPPENS[key](tmp_path, patch, *more)
    assert pattern(message).search(printed), printed


@pytest.mark.slow
def test_what_does_not_happen_here_stands_in_the_code():
    """Each part of the messages between what is filled in."""
    messages = [message for message in MESSAGES if key_of(message, IN_THE_CODE)]
    parts = [part.strip() for message in messages for part in message.split("...") if len(part.strip()) > 5]
    assert len(parts) > len(messages)
    assert [part for part in parts if not stands(part)] == []
