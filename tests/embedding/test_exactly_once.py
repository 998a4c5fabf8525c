"""The real script, killed and interrupted: whatever happens, the finished table is that of an uninterrupted run."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import lance
import pytest
from support.embed_runs import BLOCK_ROWS, TABLES, Uninterrupted, campaign, files, lines, rows_there, run, start
from support.paused import paused, reached
from support.places import TESTS

ROWS = 3000


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Uninterrupted:
    return Uninterrupted.make(tmp_path_factory.mktemp("whole"), ROWS)


class Job:
    """The script at work, and what it has written to stderr so far."""

    def __init__(self, arguments: list[str]):
        self.process = start(arguments)
        self.stderr = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while text := self.process.stderr.read(1):
            self.stderr += text

    def wait_for(self, reached: Callable[[], object]) -> None:
        while not reached():
            assert self.process.poll() is None, f"it ended too early: {self.stderr}"
            time.sleep(0.002)

    def end(self) -> tuple[int, str, list[str]]:
        """Exit code, stdout, and the lines on stderr beside the bars."""
        stdout = self.process.stdout.read()
        code = self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        assert "Traceback" not in self.stderr
        return code, stdout, lines(self.stderr)


@pytest.mark.parametrize(
    ("kills", "seed", "number"),
    [
        (2, 0, signal.SIGKILL),
        pytest.param(10, None, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(20, None, signal.SIGTERM, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
    ids=["fixed", "random", "SIGTERM"],
)
def test_kills_leave_the_table_of_an_uninterrupted_run(whole, tmp_path, kills, seed, number):
    seed, said = int(time.time()) if seed is None else seed, []
    wrong = campaign(whole, tmp_path, kills, seed, said.append, number)
    assert not wrong, "\n".join([f"seed {seed}", *said])


def test_the_uninterrupted_table_holds_each_row_once_with_its_reason(whole):
    vectors, rejects = whole.table.vectors, whole.table.rejects
    assert vectors.num_rows > 2000
    assert set(rejects["reason"].to_pylist()) == {"null", "empty", "not_dna", "no_acgt"}
    by_row = dict(zip(rejects["source_row"].to_pylist(), rejects["sequence"].to_pylist(), strict=True))
    assert set(by_row.values()) == {None, "", "MKVLAAGIVGPRE", "NNNNNNNNNNNN", " "}
    assert [row for row in range(5, ROWS, 17) if row not in by_row] == []
    assert all(row in by_row for row in range(5 * BLOCK_ROWS, 7 * BLOCK_ROWS))


def paused_job(whole: Uninterrupted, tmp_path: Path) -> tuple[Job, Path]:
    """A run that waits after its second commit until the file exists, however fast or slow the machine is."""
    python, script, *flags = whole.command(tmp_path / "t")
    resume = tmp_path / f"resume-{len(list(tmp_path.iterdir()))}"
    job = Job([python, *paused(Path(script), resume, 2), *flags])
    job.wait_for(lambda: reached(resume))
    return job, resume


@pytest.mark.slow
def test_a_second_writer_is_refused_and_the_first_is_not_disturbed(whole, tmp_path):
    first, resume = paused_job(whole, tmp_path)
    second = run(whole.command(tmp_path / "t"))
    assert second.returncode == 2
    message = lines(second.stderr)
    assert len(message) == 1
    pid = first.process.pid
    assert re.match(
        rf"error: .*table sequences is being written by process {pid} on .*wait for it or stop it", message[0]
    )
    assert "table " not in second.stdout
    resume.touch()
    assert first.end()[0] == 0
    assert whole.compare(tmp_path / "t") == []


@pytest.mark.slow
def test_interrupted_runs_say_what_is_safe_and_go_on(whole, tmp_path):
    uri, safe = tmp_path / "t", 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        job, resume = paused_job(whole, tmp_path)
        job.process.send_signal(number)
        job.wait_for(lambda job=job: "stopping after the current block" in job.stderr)
        resume.touch()
        ended, stdout, said = job.end()
        assert (ended, len(said)) == (code, 2), said
        found = re.search(
            rf"([\d,]+) of 3,000 rows safe in {re.escape(str(uri))}/sequences\.lance; .*same command", said[1]
        )
        assert found, said
        stated = int(found[1].replace(",", ""))
        assert safe < stated == rows_there(uri) < ROWS
        assert stated % BLOCK_ROWS == 0
        assert "vectors  " not in stdout
        safe = stated
    half_written = [uri / "sequences.lance" / "_versions" / name for name in (".tmpA1b2C3", "9.manifest#1")]
    for file in half_written:
        file.write_bytes(b"what a kill leaves of a manifest")
    job, _ = paused_job(whole, tmp_path)
    job.process.send_signal(signal.SIGINT)
    job.wait_for(lambda: "stopping after the current block" in job.stderr)
    job.process.send_signal(signal.SIGINT)  # the second one ends it in the middle
    ended, _, said = job.end()
    assert ended == 130
    assert "safe" in said[-1]
    assert "same command" in said[-1]
    assert not any(file.exists() for file in half_written)
    finished = run(whole.command(uri))
    assert finished.returncode == 0, finished.stderr
    assert f"3,000 ({safe:,} of them before this run)" not in finished.stdout
    assert "of them before this run)" in finished.stdout
    assert whole.compare(uri) == []

    before = {file: Path(file).read_bytes() for file in files(uri) if not file.endswith(".lock")}
    versions = [lance.dataset(str(uri / f"{name}.lance")).version for name in TABLES]
    again = run(whole.command(uri))
    assert again.returncode == 0
    assert "3,000, complete before this run: nothing was left to do" in again.stdout
    assert {file: Path(file).read_bytes() for file in files(uri) if not file.endswith(".lock")} == before
    assert [lance.dataset(str(uri / f"{name}.lance")).version for name in TABLES] == versions


def catches_sigterm(pid: int) -> bool:
    """Whether the script has set its signal handlers; Python itself sets none for SIGTERM."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    ("number", "sign"),
    [
        (signal.SIGINT, ""),
        (signal.SIGTERM, "load weights"),
        pytest.param(signal.SIGINT, "load weights", marks=pytest.mark.slow),
        (signal.SIGINT, "embed:"),
    ],
    ids=["while python starts", "while weights load, SIGTERM", "while weights load", "while a shape compiles"],
)
def test_an_early_signal_ends_in_one_line(whole, tmp_path, number, sign):
    job = Job(whole.command(tmp_path))
    job.wait_for(lambda: sign in job.stderr if sign else catches_sigterm(job.process.pid))
    job.process.send_signal(number)
    code, stdout, said = job.end()
    assert code == 128 + number
    assert "vectors  " not in stdout
    assert said[-1].startswith("stopped")
    assert said[:-1] in ([], ["stopping after the current block"])
    assert "the same command" in said[-1]
    if sign != "embed:":
        assert not (tmp_path / "sequences.lance").exists()


def test_the_campaign_is_a_script_with_a_verdict():
    script = TESTS / "kill_campaign.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    assert all(flag in shown.stdout for flag in ("--kills", "--rows", "--seed"))
