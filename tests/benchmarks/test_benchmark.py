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
from benchmarks import BENCHMARKS, figures
from benchmarks.device import _row, random_tokens
from benchmarks.embedding import check_same_vectors
from benchmarks.tokenizing import check_same_ids, tokenizer
from support.commands import call
from support.places import ROOT

from bioscan_jax import config
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.errors import InputError
from bioscan_jax.model.config import PRESETS


def test_help_lists_the_benchmarks():
    done = call("benchmark", "--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in BENCHMARKS)


def numbers(output: str) -> dict[str, float]:
    """Returns name and number of each line with a number."""
    found = re.findall(r"^ *(\w+)  ([\d,.]+)$", output, re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in found if value.count(".") < 2}


def test_the_script_prints_what_it_writes(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "tokenizer", "--rows=120", "--repeats", "3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--json=figures.json"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
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


def test_help_lists_the_flags_of_the_command_and_of_the_benchmark() -> None:
    done = call("benchmark", "tokenizer", "--help")
    assert done.returncode == 0
    for flag in ("--json FILE", "--picture FILE", "--data", "--repeats"):
        assert flag in done.stdout


@pytest.mark.parametrize("names", [["tokeniser"], []])
def test_an_unknown_name_exits_2(names: list[str]) -> None:
    done = call("benchmark", *names)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"no benchmark {''.join(names)!r}" in done.stderr
    assert ", ".join(BENCHMARKS) in done.stderr


def test_a_wrong_flag_exits_2_with_one_line() -> None:
    done = call("benchmark", "tokenizer", "--rows", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --rows 0 is too small")
    assert done.stderr.count("\n") == 1


def barcodes(directory: Path, texts: list[str | None]) -> config.DataConfig:
    pq.write_table(pa.table({"dna_sequence": texts, "other": range(len(texts))}), directory / "barcodes.parquet")
    return config.DataConfig(path=str(directory / "barcodes.parquet"), block_rows=4)


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_consecutive_from_a_seeded_first_row(tmp_path: Path, seed: int) -> None:
    data = barcodes(tmp_path, ["ACGTN" * 2 + "A" * row for row in range(30)])
    figures = tokenizer(data, rows=7, seed=seed, repeats=1)
    first = np.random.default_rng(seed).integers(24)
    assert figures["rows"] == 7
    assert figures["mean_bases"] == 10 + first + 3
    assert figures["input"] == f"{data.path}, seed {seed}"


def test_a_short_file_is_used_whole_without_its_rejects(tmp_path: Path) -> None:
    data = barcodes(tmp_path, ["acgu-acg", None, "protein", "NNN", "ACGTACGTAC"])
    figures = tokenizer(data, rows=100, repeats=1)
    assert (figures["rows"], figures["mean_bases"]) == (2, 8.5)


def test_a_file_without_usable_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of the 2 rows .* --data\.path"):
        tokenizer(barcodes(tmp_path, ["NNN", "protein"]), repeats=1)


@pytest.mark.parametrize("flag", ["rows", "repeats"])
def test_too_small_numbers_are_errors(flag: str) -> None:
    with pytest.raises(InputError, match=f"--{flag} 0 is too small"):
        tokenizer(None, **{flag: 0})


def test_different_ids_are_an_error() -> None:
    ours = TokenRows(np.array([3, 7, 3, 8, 9], np.int32), np.array([0, 2, 5]))
    check_same_ids(ours, [[3, 7], [3, 8, 9]])
    with pytest.raises(RuntimeError, match="^row 1 has other ids"):
        check_same_ids(ours, [[3, 7], [3, 8, 8]])
    with pytest.raises(RuntimeError, match="^row 0 has other ids"):
        check_same_ids(ours, [[3], [3, 8, 9]])
    with pytest.raises(RuntimeError, match="^2 rows of ids, 1 from EsmTokenizer"):
        check_same_ids(ours, [[3, 7]])


def test_tasks_are_run_in_turns_and_timed_by_their_processor_time() -> None:
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
    seconds = figures.median_core_seconds(tasks, 3)
    assert order == ["busy", "asleep"] * 3
    assert 0.02 <= seconds["busy"] < 0.1
    assert seconds["asleep"] < 0.02


def test_json_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no directory .*absent; make it first"):
        figures.write_json({"rows": 1}, str(tmp_path / "absent" / "x"))


@pytest.mark.parametrize(
    ("found", "error"),
    [({"rows_per_second": 3.0, "other_rows_per_second": 2.0, "ratio": 1.5}, None), ({"rows": 3}, "nothing to draw")],
)
def test_the_picture_shows_what_was_compared(tmp_path: Path, found: dict, error: str | None) -> None:
    if error:
        with pytest.raises(ValueError, match=error):
            figures.write_picture(found, str(tmp_path / "picture.png"), "title")
        return
    figures.write_picture(found, str(tmp_path / "picture.png"), "title")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="there is no directory .*absent; make it first"):
        figures.write_picture(found, str(tmp_path / "absent" / "x"), "title")


def test_a_process_finds_the_benchmarks_from_any_directory_and_reports_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert figures.in_a_process("benchmarks.figures:rounded", value=12345.6) == 12350
    with pytest.raises(RuntimeError, match="figures:rounded failed: ValueError: Unknown format code 'g'"):
        figures.in_a_process("benchmarks.figures:rounded", value="text")


def test_peers_that_are_not_installed_are_errors() -> None:
    with pytest.raises(InputError, match=r"no_such_peer is not installed: run pip install .*\[parity\]"):
        figures.require("json", "no_such_peer")


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("embed", {"preset": "nt-v3"}, r"--preset 'nt-v3': no such preset; known are nt-v1-500m, "),
        ("embed", {"padded_rows": 0}, "--padded_rows 0 is too small; pass at least 1"),
        ("finetune", {"tokens": 1}, "--tokens 1 is too small; pass at least 2"),
        ("load", {"gib": 0.001}, "--gib 0.001 is too small"),
        ("identify", {"reference": "a.parquet"}, "--reference and --queries go together"),
        ("identify", {"k": 0}, "--k 0 is too small; pass at least 1"),
        ("device", {"presets": ("tiny-v3",)}, "no such preset"),
        ("device", {"tokens": ("128-104",)}, "--tokens '128-104' is no length"),
        ("device", {"tokens": (3000,)}, "--tokens 3000 exceeds the 2048 positions"),
        ("pipeline", {"rows": 100, "resume_at": 100}, "--resume_at 100 is past the 100 rows; pass a smaller one"),
    ],
)
def test_wrong_flags_are_errors(name: str, flags: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BENCHMARKS[name](**flags)


@pytest.mark.slow
def test_the_pipeline_without_a_model(tmp_path: Path) -> None:
    texts: list[str | None] = ["ACGTTGCA" * (3 + row % 17) for row in range(40)]
    found = BENCHMARKS["pipeline"](barcodes(tmp_path, texts), rows=100)
    assert (found["rows"], found["hidden_size"]) == (100, 2560)
    assert found["rows_per_second"] > 0
    assert 0 <= found["device_busy"] <= 1
    assert 0.05 < found["peak_host_gib"] < 4


@pytest.mark.slow
def test_a_pipeline_that_is_resumed(tmp_path: Path) -> None:
    texts: list[str | None] = ["ACGTTGCA" * (3 + row % 17) for row in range(40)]
    found = BENCHMARKS["pipeline"](barcodes(tmp_path, texts), rows=50, more_rows=2000, resume_at=100)
    assert 0 < found["resumed_at_row"] < 2000
    assert found["resume_ratio_to_fresh_start"] > 0
    assert found["rows_per_second_ratio_more_to_less"] > 0


@pytest.mark.parity
def test_embedding_against_pytorch(tmp_path: Path) -> None:
    texts: list[str | None] = ["ACGTNTGCA" * (2 + row % 13) for row in range(30)]
    found = BENCHMARKS["embed"](barcodes(tmp_path, texts), rows=30, preset="tiny-v2", repeats=1, padded_rows=2)
    assert (found["rows"], found["sequences_computed"], found["deduplicated_rows"]) == (30, 13, 13)
    assert found["padded_torch_measured_on_rows"] == 2
    for ratio, ours, theirs in (
        ("ratio_to_sorted", "ours", "sorted_torch"),
        ("ratio_to_tuned", "ours", "tuned_torch"),
        ("ratio_to_padded_with_compiling", "ours_with_compiling", "padded_torch"),
        ("deduplicated_ratio_to_sorted", "deduplicated_ours", "deduplicated_sorted_torch"),
        ("deduplicated_ratio_to_tuned", "deduplicated_ours", "deduplicated_tuned_torch"),
    ):
        expected = found[f"{ours}_rows_per_second"] / found[f"{theirs}_rows_per_second"]
        assert found[ratio] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parity
def test_loading_against_transformers() -> None:
    found = BENCHMARKS["load"](gib=0.08, form="safetensors", repeats=1)
    assert (found["file"], found["layers"]) == ("model.safetensors", 1)
    assert found["ours_seconds"] > 0
    assert found["transformers_seconds"] > 0
    assert found["ours_peak_gib"] > found["gib"]


@pytest.mark.parity
def test_a_step_against_peft() -> None:
    found = BENCHMARKS["finetune"](preset="tiny-v2", batch_size=2, tokens=8, rank=2, repeats=1)
    ratio = found["rows_per_second"] / found["peft_rows_per_second"]
    assert found["ratio"] == pytest.approx(ratio, rel=2e-3)


@pytest.mark.parity
def test_a_device_against_pytorch() -> None:
    found = BENCHMARKS["device"](("tiny-v2",), ("12-16", 24), batch_tokens=64, step_tokens=64, repeats=1, minutes=20)
    assert found["left_out"] == "nothing"
    for name in ("tiny-v2 12-16", "tiny-v2 24"):
        embed, lora = found[f"{name} embed"], found[f"{name} lora"]
        for row in (embed, lora):
            assert row["ratio"] == pytest.approx(row["rows/s"] / row["torch rows/s"], rel=2e-3)
            assert row["planned GiB"] > 0
            assert row["MFU"] == "-"  # the peak of this CPU is not known
        assert embed["batch"] == lora["batch"] == ("4 x 16" if "16" in name else "2 x 24")


def test_a_device_s_rows_fill_the_budget_and_count_their_flops() -> None:
    tokens = random_tokens(PRESETS["tiny-v2"], 10, 16, 160, seed=0)
    assert len(tokens) == 10
    assert set(tokens.lengths) <= set(range(10, 17))
    assert (tokens.ids[tokens.offsets[:-1]] == 3).all()
    sides = {"ours": {"embed": {"rows": 10, "tokens": 140, "flops": 5e9, "seconds": 0.5, "batch": "10 x 16"}}}
    row = _row(sides, "embed", 1e11)
    assert (row["rows/s"], row["tokens/s"], row["MFU"]) == (20, 280, 0.1)
    assert "ratio" not in row
    assert _row({"ours": {"error": "no memory"}}, "lora", None) == {"rows/s": "no memory"}


@pytest.mark.vsearch
def test_identification_against_vsearch() -> None:
    found = BENCHMARKS["identify"](k=20, repeats=1, check_recall=10)
    assert (found["seen_rows"], found["unseen_species_rows"]) == (192, 192)
    for method in ("ours", "vsearch_quick", "vsearch_deep"):
        assert found[f"{method}_seen_species_right"] > 0.95
        assert found[f"{method}_unseen_species_species_right"] == 0.0
        assert found[f"{method}_unseen_species_genus_right"] > 0.5
    ratio = found["vsearch_quick_seconds"] / found["ours_seconds"]
    assert found["seconds_ratio_vsearch_quick_to_ours"] == pytest.approx(ratio, rel=2e-3)
    assert 0 < float(str(found["recall"]).split()[0]) <= 1


def test_different_vectors_are_an_error(tmp_path: Path) -> None:
    import lance

    def write(name: str, names: list[str], values: list[float]) -> str:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values, pa.float32()), 1)
        lance.write_dataset(pa.table({"sequence_id": names, "vector": vectors}), str(tmp_path / name))
        return str(tmp_path / name)

    ours = write("ours", ["a", "b"], [1.0, 2.0])
    check_same_vectors(ours, write("same", ["b", "a"], [2.0, 1.0001]))
    with pytest.raises(RuntimeError, match="by 0.5 of the largest value"):
        check_same_vectors(ours, write("other", ["b", "a"], [2.0, 2.0]))
    with pytest.raises(RuntimeError, match="absent was not written"):
        check_same_vectors(ours, str(tmp_path / "absent"))
