"""Two processes of four fake devices each run the real script; what they leave must be what one process leaves."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from support.paused import paused, reached
from support.places import GOLDEN, ROOT, SCRIPTS, TESTS

from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.devices.hosts import gather_bytes, propagate_failure
from bioscan_jax.errors import InputError

pytestmark = pytest.mark.timeout(900)  # the only limit: how long processes take depends on the machine's load

POISON = "ACACAC"
"""A 6-mer that the barcodes do not have."""
BLOCK_ROWS = 4
BLOCKS = 61
ROWS = (BLOCKS - 1) * BLOCK_ROWS + 3
PAUSE = 5
"""Commits after which an interrupted run pauses."""


@dataclass(frozen=True)
class Process:
    """A process and the file that takes its stdout and stderr."""

    popen: subprocess.Popen
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            assert self.popen.poll() is None, self.output
            time.sleep(0.01)


Start = Callable[..., list[Process]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the same Python command line in each process; none outlives the test."""
    started: list[Process] = []

    def start(command: Sequence[str], processes: int, distributed: Callable[[str, int], Sequence[str]]) -> list:
        paths = os.pathsep.join([str(ROOT), str(TESTS)])
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": paths}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        for process in range(processes):
            log = tmp_path / f"process-{len(started)}.log"
            arguments = [sys.executable, *command, *distributed(coordinator, process)]
            with log.open("w") as output:
                popen = subprocess.Popen(arguments, env=environment, stdout=output, stderr=subprocess.STDOUT)
            started.append(Process(popen, log))
        return started[-processes:]

    yield start
    for process in started:
        process.popen.kill()
        process.popen.wait()


@pytest.fixture(scope="module")
def barcodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd number of blocks, the last one short, with repeats and rejects in the blocks of both processes."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGT"), rng.integers(20, 120))) for _ in range(ROWS)]
    texts = [text.replace(POISON, "ACACAG") for text in texts]
    texts[9::40], texts[6::50] = texts[8::40], ["protein"] * len(texts[6::50])
    path = tmp_path_factory.mktemp("input") / "barcodes.parquet"
    pq.write_table(pa.table({"dna_sequence": texts, "depth": rng.random(ROWS)}), path)
    return path


@pytest.fixture
def embed(start: Start, barcodes: Path) -> Start:
    def embed(
        sink: Path,
        processes: int,
        *,
        resume: Path | None = None,
        checkpoint: Path = GOLDEN / "v2",
        data: Path = barcodes,
    ) -> list[Process]:
        def distributed(coordinator: str, process: int) -> Sequence[str]:
            if processes == 1:
                return []
            flags = {"distributed": "true", "coordinator": coordinator, "processes": processes, "process_id": process}
            return [f"--mesh.{name}={value}" for name, value in flags.items()]

        script = SCRIPTS / "embed.py"
        command = [
            *([str(script)] if resume is None else paused(script, resume, PAUSE)),
            f"--model.checkpoint={checkpoint}",
            f"--data.path={data}",
            f"--data.block_rows={BLOCK_ROWS}",
            "--data.max_tokens=24",
            f"--sink.uri={sink}",
            "--embed.max_shapes=2",
        ]
        return start(command, processes, distributed)

    return embed


def wait(processes: Sequence[Process]) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    return [(process.popen.wait(), process.output) for process in processes]


def read(sink: Path) -> dict[str, pa.Table]:
    """Both tables in the order in which their rows were written."""
    tables = {
        name: lance.dataset(str(sink / f"{name}.lance")).to_table() for name in ("sequences", "sequences_rejects")
    }
    return {name: table.select(sorted(table.column_names)).combine_chunks() for name, table in tables.items()}


def check_whole(sink: Path, expected: dict[str, pa.Table]) -> None:
    """Checks for the same rows in the same order, the same rejects, and vectors equal to the bit."""
    found = read(sink)
    rows = [found[name]["source_row"].to_numpy() for name in found]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(ROWS))
    for name, table in expected.items():
        assert found[name].equals(table), name


def check_beginning(sink: Path, expected: dict[str, pa.Table]) -> int:
    """Checks that an unfinished table holds whole blocks from the first on; returns their number."""
    found = read(sink)["sequences"]
    blocks = int(found["source_row"][-1].as_py()) // BLOCK_ROWS + 1
    assert 0 < blocks < BLOCKS
    first = expected["sequences"].slice(0, found.num_rows)
    assert found.equals(first)
    assert expected["sequences"]["source_row"][found.num_rows].as_py() >= blocks * BLOCK_ROWS
    return blocks


_whole: dict[str, pa.Table] = {}


@pytest.fixture
def whole(embed: Start, tmp_path: Path) -> dict[str, pa.Table]:
    """The tables of an uninterrupted run of one process, made for the first test that needs them."""
    if not _whole:
        [(code, output)] = wait(embed(tmp_path / "whole", 1))
        assert code == 0, output
        _whole.update(read(tmp_path / "whole"))
        assert _whole["sequences_rejects"].num_rows == len(range(6, ROWS, 50))
    return _whole


def test_two_processes_make_the_table_of_one(embed: Start, whole: dict[str, pa.Table], tmp_path: Path) -> None:
    ended = wait(embed(tmp_path / "t", 2))
    assert [code for code, _ in ended] == [0, 0], ended
    assert ["4 x cpu, 2 process(es)" in output for _, output in ended] == [True, False]  # process 0 speaks for both
    check_whole(tmp_path / "t", whole)
    record = json.loads((tmp_path / "t" / "sequences.run.json").read_text())
    assert record["rows"] == record["counts"]["rows"] == ROWS
    assert record["vectors"] == record["counts"]["vectors"] == whole["sequences"].num_rows
    assert record["rejects"] == sum(record["counts"]["rejects"].values()) == whole["sequences_rejects"].num_rows


@pytest.mark.slow
def test_two_killed_processes_are_resumed_by_two(embed: Start, whole: dict[str, pa.Table], tmp_path: Path) -> None:
    resume = tmp_path / "resume"
    killed = embed(tmp_path / "t", 2, resume=resume)
    killed[0].wait_until(lambda: reached(resume))
    for process in killed:
        process.popen.kill()
    assert [code for code, _ in wait(killed)] == [-signal.SIGKILL] * 2
    check_beginning(tmp_path / "t", whole)
    ended = wait(embed(tmp_path / "t", 2))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "of them before this run" in ended[0][1]
    check_whole(tmp_path / "t", whole)


@pytest.mark.slow
def test_sigterm_to_one_stops_both_and_one_process_continues(
    embed: Start, whole: dict[str, pa.Table], tmp_path: Path
) -> None:
    resume = tmp_path / "resume"
    both = embed(tmp_path / "t", 2, resume=resume)
    both[0].wait_until(lambda: reached(resume))
    both[1].popen.send_signal(signal.SIGTERM)
    both[1].wait_until(lambda: "stopping after the current block" in both[1].output)
    resume.touch()
    results = wait(both)
    blocks = check_beginning(tmp_path / "t", whole)
    for code, output in results:
        assert code == 128 + signal.SIGTERM, output
        last = output.splitlines()[-1]
        assert f"{blocks * BLOCK_ROWS:,} of {ROWS:,} rows safe in {tmp_path / 't' / 'sequences.lance'}" in last
        assert "the same command" in last
    [(code, output)] = wait(embed(tmp_path / "t", 1))
    assert code == 0, output
    check_whole(tmp_path / "t", whole)


@pytest.mark.slow
def test_two_processes_continue_the_table_of_one(embed: Start, whole: dict[str, pa.Table], tmp_path: Path) -> None:
    resume = tmp_path / "resume"
    [one] = embed(tmp_path / "t", 1, resume=resume)
    one.wait_until(lambda: reached(resume))
    one.popen.send_signal(signal.SIGTERM)
    one.wait_until(lambda: "stopping after the current block" in one.output)
    resume.touch()
    [(code, output)] = wait([one])
    assert code == 128 + signal.SIGTERM, output
    check_beginning(tmp_path / "t", whole)
    for code, output in wait(embed(tmp_path / "t", 2)):
        assert code == 0, output
    check_whole(tmp_path / "t", whole)


def check_failure_reached(process: int, failed: tuple[int, str], other: tuple[int, str]) -> str:
    """Checks that both ended with the error of the failed process; returns it."""
    assert (failed[0], other[0]) == (2, 2), failed[1] + other[1]
    line, relayed = failed[1].splitlines()[-1], other[1].splitlines()[-1]
    assert relayed.startswith(f"error: process {process} on {socket.gethostname()} failed")
    assert relayed.endswith(line.removeprefix("error: "))
    return line


@pytest.mark.slow
def test_an_error_in_process_0_ends_both(embed: Start, tmp_path: Path) -> None:
    # Made by another plan: only the process that opens the table notices.
    lance.write_dataset(pa.table({"a": [1]}), str(tmp_path / "t" / "sequences.lance"))
    first, second = wait(embed(tmp_path / "t", 2))
    line = check_failure_reached(0, first, second)
    assert line.startswith(f"error: {tmp_path / 't' / 'sequences.lance'}")


@pytest.mark.slow
def test_vectors_of_process_1_that_are_not_finite_end_both(
    embed: Start, barcodes: Path, whole: dict[str, pa.Table], tmp_path: Path
) -> None:
    # The failed block's successors are in progress by then: none of them may be taken for it.
    failing = 41
    checkpoint = shutil.copytree(GOLDEN / "v2", tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    weights["esm.embeddings.word_embeddings.weight"][Vocabulary.published("v2").tokens.index(POISON)] = np.nan
    save_file(weights, checkpoint / "model.safetensors")
    texts = pq.read_table(barcodes).to_pydict()
    for row in range(1, 4):  # more than are rejected
        texts["dna_sequence"][failing * BLOCK_ROWS + row] = POISON
    pq.write_table(pa.table(texts), tmp_path / "barcodes.parquet")

    for code, output in wait(embed(tmp_path / "t", 2, checkpoint=checkpoint, data=tmp_path / "barcodes.parquet")):
        assert code == 2, output  # both count what is not finite in a round
        assert f"'barcodes:{failing * BLOCK_ROWS + 1}' is not finite in float32" in output.splitlines()[-1]
    assert check_beginning(tmp_path / "t", whole) == failing - 1  # rounds are committed whole


TALK = """
import sys
import jax
from bioscan_jax.config import MeshConfig
from bioscan_jax.devices.hosts import any_process, gather_bytes, initialize_distributed, propagate_failure

process = int(sys.argv[2])
for _ in range(2):  # the second changes nothing
    initialize_distributed(MeshConfig(coordinator=sys.argv[1], processes=2, process_id=process))
sizes = [0, 1, 5 << 20, 3, 0]  # gRPC's usual limit is 4 MiB
for size in sizes:
    assert gather_bytes(bytes([65 + process]) * (size + process)) == [b"A" * size, b"B" * (size + 1)]
assert any_process(process == 0, process == 1, False) == (True, True, False)
store = jax._src.distributed.global_state.client
left = [key for key, _ in store.key_value_dir_get("bioscan_jax")]
assert f"bioscan_jax/gathered/{len(sizes) - 1}/{process}" not in left, left
with propagate_failure():
    if process == 1:
        raise ValueError("no such luck")
    gather_bytes(b"for nobody")
"""


@pytest.mark.slow
def test_payloads_and_failures_reach_the_other_process(start: Start) -> None:
    (code, output), (other_code, other_output) = wait(
        start(["-c", TALK], 2, lambda coordinator, process: [coordinator, str(process)])
    )
    assert (code, other_code) == (1, 1), output + other_output
    failed = output.splitlines()[-1]
    assert failed.startswith(f"bioscan_jax.errors.InputError: process 1 on {socket.gethostname()} failed")
    assert failed.endswith(": ValueError: no such luck")
    assert other_output.splitlines()[-1] == "ValueError: no such luck"


MISTAKES = """
import socket

from bioscan_jax.config import MeshConfig
from bioscan_jax.devices.hosts import initialize_distributed
from bioscan_jax.errors import InputError

taken = socket.create_server(("", 0))
here = f"127.0.0.1:{taken.getsockname()[1]}"
flags = "--mesh.coordinator HOST:PORT", "--mesh.processes", "--mesh.process_id"
for coordinator, processes, process_id, *parts in [
    (None, 2, 0, "coordinator None, ", "coordinator_address should be defined", *flags),
    ("10.0.0.1", 2, 1, "--mesh.coordinator '10.0.0.1' has no port", "HOST:PORT"),
    ("10.0.0.1:65536", 2, 1, "--mesh.coordinator '10.0.0.1:65536' has no port", "HOST:PORT"),
    (here, 2, None, "process_id None", "process id of the current process must be defined", *flags),
    (here, 2, 5, "process_id 5", "process_id=5, num_processes=2", *flags),
    (here, 2, 0, f"--mesh.coordinator '{here}': Address already in use", "another port"),
]:
    try:
        initialize_distributed(MeshConfig(coordinator=coordinator, processes=processes, process_id=process_id))
    except InputError as error:
        assert all(part in str(error) for part in parts), str(error)
    else:
        raise AssertionError(parts)
"""


def test_mistaken_flags_are_refused(start: Start) -> None:
    [(code, output)] = wait(start(["-c", MISTAKES], 1, lambda coordinator, process: []))
    assert code == 0, output


def test_one_process_has_its_own_payload() -> None:
    assert gather_bytes(b"mine") == [b"mine"]


def test_one_process_raises_its_own_error() -> None:
    with pytest.raises(ZeroDivisionError), propagate_failure():
        raise ZeroDivisionError


def test_processes_without_jax_distributed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)  # as on a TPU pod
    with pytest.raises(InputError, match=r"4 processes .*--mesh\.distributed true"):
        gather_bytes(b"mine")
