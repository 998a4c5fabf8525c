"""Measurements that anyone can repeat: what is compared is first checked to give the same, then timed in turns."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa

from bioscan_jax import config
from bioscan_jax.data.source import open_source
from bioscan_jax.errors import InputError
from bioscan_jax.schemas import TokenRows
from bioscan_jax.sequences import clean
from bioscan_jax.simulate import simulate
from bioscan_jax.tokenizer import Vocabulary, encode

Figures = dict[str, int | float | str]
"""What a benchmark found and on what, in the order in which it is printed."""

_BARCODE_BASES = 658


def tokenizer(data: config.Data | None = None, rows: int = 2000, seed: int = 0, repeats: int = 7) -> Figures:
    """Compare our tokenizer with transformers.EsmTokenizer on the same rows, on one core.

    Both get the cleaned sequences in the form they take, and EsmTokenizer all of them in one call. Rates are rows per
    second of one core, from the median of its processor time.

    Args:
        data: Barcodes to take; simulated ones of 658 bp if absent.
        rows: Rows to take, from a random one on.
        seed: Of the simulation, or of the first row to take.
        repeats: Times that each is run.

    Raises:
        InputError: A number is too small, or there is no sequence to encode.
    """
    # Its tokenizer needs no PyTorch, and the advice to install it would stand among our figures.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import EsmTokenizer

    for flag, value in (("rows", rows), ("repeats", repeats)):
        if value < 1:
            raise InputError(f"--{flag} {value} is too small; pass at least 1")
    given = _barcodes(data, rows, seed)
    cleaned = clean(given)
    sequences = cleaned.sequences.filter(cleaned.reasons.is_null())
    if not len(sequences):
        raise InputError(f"none of the {len(given)} rows can be encoded; pass another --data.path or --seed")
    texts, vocabulary = sequences.to_pylist(), Vocabulary.published("v2")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "vocab.txt").write_text(vocabulary.text())
        # Its default eos_token appends an id that v1 has no embedding for.
        published = EsmTokenizer(str(Path(directory) / "vocab.txt"), eos_token=None)  # pyright: ignore[reportArgumentType]
    check_same_ids(encode(sequences, vocabulary), published(texts)["input_ids"])

    seconds = median_core_seconds(
        {
            "ours": lambda: encode(sequences, vocabulary),
            "theirs": lambda: published(texts),
            "clean": lambda: encode(clean(given).sequences, vocabulary),
        },
        repeats,
    )
    return {
        "input": f"simulated, seed {seed}" if data is None else f"{data.path}, seed {seed}",
        "rows": len(sequences),
        "mean_bases": _rounded(sum(map(len, texts)) / len(texts)),
        "repeats": repeats,
        "rows_per_second": _rounded(len(sequences) / seconds["ours"]),
        "EsmTokenizer_rows_per_second": _rounded(len(sequences) / seconds["theirs"]),
        "ratio": _rounded(seconds["theirs"] / seconds["ours"]),
        "clean_and_encode_rows_per_second": _rounded(len(given) / seconds["clean"]),
        "transformers_version": metadata.version("transformers"),
    }


BENCHMARKS: Mapping[str, Callable[..., Figures]] = {"tokenizer": tokenizer}
"""By the name that scripts/benchmark.py takes; the parameters are its flags."""


def describe(figures: Figures) -> str:
    """The figures as lines for the terminal; numbers are those of `write_json`."""
    width = max(map(len, figures))
    return "\n".join(f"{k:>{width}}  {v if isinstance(v, str) else f'{v:,}'}" for k, v in figures.items())


def write_json(figures: Figures, path: str) -> None:
    """Writes the figures as one JSON object.

    Raises:
        InputError: It cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--json {path}: cannot be written ({error.strerror}); pass another path") from error


def median_core_seconds(tasks: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Processor time of each task, summed over cores: the median over rounds in which each is run once.

    Other work on the machine does not count, as it would in wall time, and a task gains nothing by using more cores.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def check_same_ids(ours: TokenRows, theirs: Sequence[Sequence[int]]) -> None:
    """Raises RuntimeError, naming the row, where two tokenizers disagree: their speeds say nothing then."""
    if len(ours) != len(theirs):
        raise RuntimeError(f"{len(ours)} rows of ids where EsmTokenizer gives {len(theirs)}")
    for row, expected in enumerate(theirs):
        found = ours.ids[ours.offsets[row] : ours.offsets[row + 1]]
        if not np.array_equal(found, expected):
            raise RuntimeError(f"row {row} has other ids than EsmTokenizer gives it")


def _barcodes(data: config.Data | None, rows: int, seed: int) -> pa.ChunkedArray:
    if data is None:
        table = simulate(species=-(-rows // 10), per_species=10, length=_BARCODE_BASES, seed=seed)
        return table["dna_sequence"].slice(0, rows)
    with tempfile.TemporaryDirectory() as scratch:
        source = open_source(data, scratch=Path(scratch))
        source = source.select([source.sequence_column], source.block_rows)
        first = int(np.random.default_rng(seed).integers(max(source.rows - rows, 0) + 1))
        last = min(first + rows, source.rows)
        blocks = [source[block].table for block in range(first // source.block_rows, -(-last // source.block_rows))]
        offset = first % source.block_rows
        return pa.concat_tables(blocks)[source.sequence_column].slice(offset, last - first)


def _rounded(value: float) -> float | int:
    """Four significant digits: more of them would be noise."""
    rounded = float(f"{value:.4g}")
    return int(rounded) if rounded >= 1000 else rounded
