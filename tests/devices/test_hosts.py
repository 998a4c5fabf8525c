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
from pathlib import Path

import jax
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from support.places import ROOT

from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.devices.hosts import failing_together, gather_bytes
from bioscan_jax.errors import InputError

CHECKPOINT = ROOT / "tests" / "golden" / "v2"
POISON = "ACACAC"
"""A 6-mer that the barcodes do not have."""
BLOCK_ROWS = 4
BLOCKS = 201
ROWS = (BLOCKS - 1) * BLOCK_ROWS + 3
SECONDS = 90
"""No process may take longer, whatever happens to the others."""

Start = Callable[..., list[subprocess.Popen]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the same Python command line once a process, and lets none outlive the test."""
    started = []

    def start(command: Sequence[str], processes: int, distributed: Callable[[str, int], Sequence[str]]) -> list:
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT)}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        for process in range(processes):
            started.append(
                subprocess.Popen(
                    [sys.executable, *command, *distributed(coordinator, process)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return started[-processes:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


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


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def embed(start: Start, barcodes: Path, cache: Path) -> Start:
    def embed(
        sink: Path, processes: int, checkpoint: Path = CHECKPOINT, data: Path = barcodes
    ) -> list[subprocess.Popen]:
        def distributed(coordinator: str, process: int) -> Sequence[str]:
            if processes == 1:
                return []
            flags = {"distributed": "true", "coordinator": coordinator, "processes": processes, "process_id": process}
            return [f"--mesh.{name}={value}" for name, value in flags.items()]

        command = [
            str(ROOT / "scripts" / "embed.py"),
            f"--model.checkpoint={checkpoint}",
            f"--data.path={data}",
            f"--data.block_rows={BLOCK_ROWS}",
            "--data.max_tokens=24",
            f"--sink.uri={sink}",
            "--embed.max_shapes=2",
            f"--mesh.compilation_cache={cache}",
        ]
        return start(command, processes, distributed)

    return embed


@pytest.fixture(scope="module")
def expected() -> dict[str, pa.Table]:
    """The tables of an uninterrupted run of one process, filled by the first test that makes them."""
    return {}


def wait(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    end = time.monotonic() + SECONDS
    outputs = [process.communicate(timeout=end - time.monotonic())[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def wait_for_commits(sink: Path, processes: Sequence[subprocess.Popen], commits: int = 12) -> None:
    end = time.monotonic() + SECONDS
    while len(list((sink / "sequences.lance" / "_versions").glob("*"))) <= commits:
        assert time.monotonic() < end
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def read(sink: Path) -> dict[str, pa.Table]:
    """Both tables in the order in which their rows were written."""
    tables = {
        name: lance.dataset(str(sink / f"{name}.lance")).to_table() for name in ("sequences", "sequences_rejects")
    }
    return {name: table.select(sorted(table.column_names)).combine_chunks() for name, table in tables.items()}


def check_whole(sink: Path, expected: dict[str, pa.Table]) -> None:
    """Same rows in the same order, same rejects; vectors bit by bit."""
    found = read(sink)
    rows = [found[name]["source_row"].to_numpy() for name in found]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(ROWS))
    for name, table in expected.items():
        assert found[name].equals(table), name


def check_beginning(sink: Path, expected: dict[str, pa.Table]) -> int:
    """A table of which a part is done holds whole blocks from the first on; gives their number."""
    found = read(sink)["sequences"]
    blocks = int(found["source_row"][-1].as_py()) // BLOCK_ROWS + 1
    assert 0 < blocks < BLOCKS
    first = expected["sequences"].slice(0, found.num_rows)
    assert found.equals(first)
    assert expected["sequences"]["source_row"][found.num_rows].as_py() >= blocks * BLOCK_ROWS
    return blocks


@pytest.fixture
def whole(embed: Start, expected: dict[str, pa.Table], tmp_path: Path) -> dict[str, pa.Table]:
    if not expected:
        [(code, output)] = wait(embed(tmp_path / "whole", 1))
        assert code == 0, output
        expected.update(read(tmp_path / "whole"))
        assert expected["sequences_rejects"].num_rows == len(range(6, ROWS, 50))
    return expected


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
    killed = embed(tmp_path / "t", 2)
    wait_for_commits(tmp_path / "t", killed)
    for process in killed:
        process.kill()
    assert [code for code, _ in wait(killed)] == [-signal.SIGKILL] * 2
    check_beginning(tmp_path / "t", whole)
    ended = wait(embed(tmp_path / "t", 2))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "of them before this run" in ended[0][1]
    check_whole(tmp_path / "t", whole)


def test_sigterm_to_one_stops_both_and_one_process_goes_on(
    embed: Start, whole: dict[str, pa.Table], tmp_path: Path
) -> None:
    stopped = embed(tmp_path / "t", 2)
    wait_for_commits(tmp_path / "t", stopped)
    stopped[1].send_signal(signal.SIGTERM)
    results = wait(stopped)
    blocks = check_beginning(tmp_path / "t", whole)
    where = tmp_path / "t" / "sequences.lance"
    for code, output in results:
        assert code == 128 + signal.SIGTERM, output
        assert output.splitlines()[-1] == (
            f"stopped with {blocks * BLOCK_ROWS:,} of {ROWS:,} rows safe in {where}; "
            "the same command goes on from there"
        )
    [(code, output)] = wait(embed(tmp_path / "t", 1))
    assert code == 0, output
    check_whole(tmp_path / "t", whole)


@pytest.mark.slow
def test_two_processes_go_on_from_one(embed: Start, whole: dict[str, pa.Table], tmp_path: Path) -> None:
    stopped = embed(tmp_path / "t", 1)
    wait_for_commits(tmp_path / "t", stopped)
    stopped[0].send_signal(signal.SIGTERM)
    [(code, output)] = wait(stopped)
    assert code == 128 + signal.SIGTERM, output
    check_beginning(tmp_path / "t", whole)
    for code, output in wait(embed(tmp_path / "t", 2)):
        assert code == 0, output
    check_whole(tmp_path / "t", whole)


def test_a_mistake_that_process_0_finds_ends_both(embed: Start, tmp_path: Path) -> None:
    # Made by another plan: only the process that opens the table notices.
    lance.write_dataset(pa.table({"a": [1]}), str(tmp_path / "t" / "sequences.lance"))
    (code, output), (other_code, other_output) = wait(embed(tmp_path / "t", 2))
    line = output.splitlines()[-1]
    assert (code, other_code) == (2, 2), output + other_output
    assert line.startswith(f"error: {tmp_path / 't' / 'sequences.lance'}")
    failed = f"error: process 0 on {socket.gethostname()} failed, and the others with it: "
    assert other_output.splitlines()[-1] == failed + line.removeprefix("error: ")


def test_a_block_that_process_1_cannot_embed_ends_both(
    embed: Start, barcodes: Path, whole: dict[str, pa.Table], tmp_path: Path
) -> None:
    # The failed block's successors are on their way by then: none of them may be taken for it.
    failing = 41
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    weights["esm.embeddings.word_embeddings.weight"][Vocabulary.published("v2").tokens.index(POISON)] = np.nan
    save_file(weights, checkpoint / "model.safetensors")
    texts = pq.read_table(barcodes).to_pydict()
    texts["dna_sequence"][failing * BLOCK_ROWS + 1] = POISON
    pq.write_table(pa.table(texts), tmp_path / "barcodes.parquet")

    both = embed(tmp_path / "t", 2, checkpoint, tmp_path / "barcodes.parquet")
    (code, output), (other_code, other_output) = wait(both)
    assert (code, other_code) == (2, 2), output + other_output
    line = other_output.splitlines()[-1]
    assert line.startswith(f"error: the vector of 'barcodes:{failing * BLOCK_ROWS + 1}' is not finite in float32; ")
    failed = f"error: process 1 on {socket.gethostname()} failed, and the others with it: "
    assert output.splitlines()[-1] == failed + line.removeprefix("error: ")
    assert check_beginning(tmp_path / "t", whole) == failing - 1  # rounds are committed whole


TALK = """
import sys
import jax
from bioscan_jax.config import Mesh
from bioscan_jax.devices.hosts import failing_together, gather_bytes, join

process = int(sys.argv[2])
for _ in range(2):  # the second changes nothing
    join(Mesh(coordinator=sys.argv[1], processes=2, process_id=process))
sizes = [0, 1, 5 << 20, 3, 0]  # gRPC's usual limit is 4 MiB
for size in sizes:
    assert gather_bytes(bytes([65 + process]) * (size + process)) == [b"A" * size, b"B" * (size + 1)]
store = jax._src.distributed.global_state.client
left = [key for key, _ in store.key_value_dir_get("bioscan_jax")]
assert f"bioscan_jax/gathered/{len(sizes) - 2}/{process}" not in left, left
with failing_together():
    if process == 1:
        raise ValueError("no such luck")
    gather_bytes(b"for nobody")
"""


def test_payloads_and_failures_reach_the_other_process(start: Start) -> None:
    (code, output), (other_code, other_output) = wait(
        start(["-c", TALK], 2, lambda coordinator, process: [coordinator, str(process)])
    )
    assert (code, other_code) == (1, 1), output + other_output
    failed = f"process 1 on {socket.gethostname()} failed, and the others with it: ValueError: no such luck"
    assert output.splitlines()[-1] == f"bioscan_jax.errors.InputError: {failed}"
    assert other_output.splitlines()[-1] == "ValueError: no such luck"


MISTAKES = """
import socket

from bioscan_jax.config import Mesh
from bioscan_jax.errors import InputError
from bioscan_jax.devices.hosts import join

taken = socket.create_server(("", 0))
here = f"127.0.0.1:{taken.getsockname()[1]}"
mend = "pass --mesh.coordinator HOST:PORT (a free port of process 0), --mesh.processes and --mesh.process_id, or none "
for coordinator, processes, process_id, *parts in [
    (None, 2, 0, "with coordinator None, ", "(coordinator_address should be defined.); ", mend),
    ("10.0.0.1", 2, 1, "--mesh.coordinator '10.0.0.1' has no port; pass HOST:PORT of process 0"),
    ("10.0.0.1:65536", 2, 1, "--mesh.coordinator '10.0.0.1:65536' has no port; pass HOST:PORT of process 0"),
    (here, 2, None, "processes 2, process_id None (The process id of the current process must be defined.); ", mend),
    (here, 2, 5, "processes 2, process_id 5 (", "Got process_id=5, num_processes=2.); ", mend),
    (here, 2, 0, f"--mesh.coordinator '{here}': Address already in use; pass another port, or stop what listens "),
]:
    try:
        join(Mesh(coordinator=coordinator, processes=processes, process_id=process_id))
    except InputError as error:
        assert all(part in str(error) for part in parts), str(error)
    else:
        raise AssertionError(parts)
"""


def test_mistaken_flags_are_told(start: Start) -> None:
    [(code, output)] = wait(start(["-c", MISTAKES], 1, lambda coordinator, process: []))
    assert code == 0, output


def test_one_process_has_its_own_payload() -> None:
    assert gather_bytes(b"mine") == [b"mine"]


def test_one_process_fails_as_ever() -> None:
    with pytest.raises(ZeroDivisionError), failing_together():
        raise ZeroDivisionError


def test_processes_without_jax_distributed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)  # as on a TPU pod
    with pytest.raises(InputError, match=r"4 processes that do not know each other; pass --mesh\.distributed true"):
        gather_bytes(b"mine")
