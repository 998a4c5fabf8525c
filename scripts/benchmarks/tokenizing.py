"""Tokenizing: ours and EsmTokenizer."""

import os
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from benchmarks.barcodes import barcodes, describe_input
from benchmarks.figures import Figures, at_least, median_core_seconds, rounded
from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.barcodes.tokenizer import Vocabulary, encode
from bioscan_jax.errors import InputError


def tokenizer(data: config.DataConfig | None = None, rows: int = 2000, seed: int = 0, repeats: int = 7) -> Figures:
    """Compare our tokenizer with transformers.EsmTokenizer on the same rows, on one core.

    Both get the cleaned sequences in their own input format, EsmTokenizer all of them in one call. Rates are rows per
    second of one core, from the median processor time.

    Args:
        data: Barcodes to encode; 658 bp are simulated if absent.
        rows: Number of rows, from a random one on.
        seed: Random seed of the simulation, or of the first row.
        repeats: Runs of each.

    Raises:
        InputError: A number is too small, or there is no sequence to encode.
    """
    # The tokenizer needs no PyTorch, and the advice to install it would be printed among the figures
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import EsmTokenizer

    at_least(rows=(rows, 1), repeats=(repeats, 1))
    given = barcodes(data, rows, seed)
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
        "input": describe_input(data, seed),
        "rows": len(sequences),
        "mean_bases": rounded(sum(map(len, texts)) / len(texts)),
        "repeats": repeats,
        "rows_per_second": rounded(len(sequences) / seconds["ours"]),
        "EsmTokenizer_rows_per_second": rounded(len(sequences) / seconds["theirs"]),
        "ratio": rounded(seconds["theirs"] / seconds["ours"]),
        "clean_and_encode_rows_per_second": rounded(len(given) / seconds["clean"]),
        "transformers_version": metadata.version("transformers"),
    }


def check_same_ids(ours: TokenRows, theirs: Sequence[Sequence[int]]) -> None:
    """Raises RuntimeError with the row where two tokenizers disagree, since their speeds mean nothing then."""
    if len(ours) != len(theirs):
        raise RuntimeError(f"{len(ours)} rows of ids, {len(theirs)} from EsmTokenizer")
    for row, expected in enumerate(theirs):
        found = ours.ids[ours.offsets[row] : ours.offsets[row + 1]]
        if not np.array_equal(found, expected):
            raise RuntimeError(f"row {row} has other ids than from EsmTokenizer")
