import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_jax import benchmark, config
from bioscan_jax.errors import InputError
from bioscan_jax.schemas import TokenRows

ROOT = Path(__file__).parent.parent


def script(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def numbers(output: str) -> dict[str, float]:
    """Name and number of each line that has one."""
    found = re.findall(r"^ *(\w+)  ([\d,.]+)$", output, re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in found if value.count(".") < 2}


def test_the_script_prints_what_it_writes(tmp_path: Path) -> None:
    done = script("tokenizer", "--rows=120", "--repeats", "3", f"--json={tmp_path / 'figures.json'}")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert numbers(done.stdout) == {k: v for k, v in figures.items() if not isinstance(v, str)}
    assert len(done.stdout.splitlines()) == len(figures)
    assert (figures["rows"], figures["repeats"]) == (120, 3)
    assert figures["input"] == "simulated, seed 0"
    assert 600 < figures["mean_bases"] <= 658
    ours, theirs = figures["rows_per_second"], figures["EsmTokenizer_rows_per_second"]
    assert figures["ratio"] == pytest.approx(ours / theirs, rel=2e-3)
    assert figures["ratio"] > 2
    assert theirs > 0
    assert figures["clean_and_encode_rows_per_second"] > 0


@pytest.mark.parametrize("names", [["tokeniser"], []])
def test_an_unknown_name_exits_2(names: list[str]) -> None:
    done = script(*names)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"error: no benchmark {''.join(names)!r}; pass one of {', '.join(benchmark.BENCHMARKS)} first\n"
    )


def test_a_mistaken_flag_exits_2_with_a_line() -> None:
    done = script("tokenizer", "--rows", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --rows 0 is too small; pass at least 1\n"


def barcodes(directory: Path, texts: list[str | None]) -> config.Data:
    pq.write_table(pa.table({"dna_sequence": texts, "other": range(len(texts))}), directory / "barcodes.parquet")
    return config.Data(path=str(directory / "barcodes.parquet"), block_rows=4)


@pytest.mark.parametrize("seed", range(4))
def test_rows_follow_each_other_from_one_that_the_seed_draws(tmp_path: Path, seed: int) -> None:
    data = barcodes(tmp_path, ["ACGTN" * 2 + "A" * row for row in range(30)])
    figures = benchmark.tokenizer(data, rows=7, seed=seed, repeats=1)
    first = np.random.default_rng(seed).integers(24)
    assert figures["rows"] == 7
    assert figures["mean_bases"] == 10 + first + 3
    assert figures["input"] == f"{data.path}, seed {seed}"


def test_a_file_with_fewer_rows_is_taken_whole_without_its_rejects(tmp_path: Path) -> None:
    data = barcodes(tmp_path, ["acgu-acg", None, "protein", "NNN", "ACGTACGTAC"])
    figures = benchmark.tokenizer(data, rows=100, repeats=1)
    assert (figures["rows"], figures["mean_bases"]) == (2, 8.5)


def test_nothing_to_encode_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^none of the 2 rows can be encoded; pass another --data\.path or --seed$"):
        benchmark.tokenizer(barcodes(tmp_path, ["NNN", "protein"]), repeats=1)


@pytest.mark.parametrize("flag", ["rows", "repeats"])
def test_too_few_are_told(flag: str) -> None:
    with pytest.raises(InputError, match=f"^--{flag} 0 is too small; pass at least 1$"):
        benchmark.tokenizer(None, **{flag: 0})


def test_ids_must_be_the_same() -> None:
    ours = TokenRows(np.array([3, 7, 3, 8, 9], np.int32), np.array([0, 2, 5]))
    benchmark.check_same_ids(ours, [[3, 7], [3, 8, 9]])
    with pytest.raises(RuntimeError, match="^row 1 has other ids"):
        benchmark.check_same_ids(ours, [[3, 7], [3, 8, 8]])
    with pytest.raises(RuntimeError, match="^row 0 has other ids"):
        benchmark.check_same_ids(ours, [[3], [3, 8, 9]])
    with pytest.raises(RuntimeError, match="^2 rows of ids where EsmTokenizer gives 1"):
        benchmark.check_same_ids(ours, [[3, 7]])


def test_tasks_are_timed_in_turns_by_the_processor_time_they_take() -> None:
    order = []

    def spend(name: str, seconds: float) -> None:
        order.append(name)
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    long_once = iter([0.02, 0.5, 0.02])
    tasks = {
        "busy": lambda: spend("busy", next(long_once)),
        "asleep": lambda: (order.append("asleep"), time.sleep(0.1)),
    }
    seconds = benchmark.median_core_seconds(tasks, 3)
    assert order == ["busy", "asleep"] * 3
    assert 0.02 <= seconds["busy"] < 0.1
    assert seconds["asleep"] < 0.02


def test_json_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent/x: cannot be written \(No such file or directory\); pass another"):
        benchmark.write_json({"rows": 1}, str(tmp_path / "absent" / "x"))
