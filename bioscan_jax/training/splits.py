"""Splits into training, validation and test rows, by sequence or by taxon, independent of the order of rows.

About half of public barcodes are exact copies of another one, so splitting by row would put the same sequence into
several splits. Here all copies of a cleaned sequence are in one split. A trimmed or reversed copy counts as another
sequence.
"""

import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int8, Int64, UInt64

from bioscan_jax.barcodes.cleaning import string_bytes
from bioscan_jax.errors import InputError

SPLITS = ("train", "validation", "test")
"""A split is stored as its index here."""
LEFT_OUT = -1
"""Marks rows in no split: rejected sequences, and those that would leak between held-out taxa."""

HELD_OUT_RANK: dict[Literal["random", "held_out_species", "held_out_genera"], str | None] = {
    "random": None,
    "held_out_species": "species",
    "held_out_genera": "genus",
}
"""The kinds of split, with the rank whose taxa are each kept in one split."""

_GIVEN = {
    "train": 0,
    "training": 0,
    "validation": 1,
    "valid": 1,
    "val": 1,
    "dev": 1,
    "test": 2,
    "testing": 2,
    "unused": LEFT_OUT,
    "pretrain": 0,
    "key_unseen": LEFT_OUT,
    "other_heldout": LEFT_OUT,
}


def fingerprints(values: pa.Array | pa.ChunkedArray, *, seed: int) -> UInt64[np.ndarray, " rows"]:
    """Hashes texts to 64 bits with BLAKE2b keyed by the seed (RFC 7693), each distinct text once.

    Fingerprints are the same on every machine and in every version. They depend on the row's text alone, so blocks can
    be hashed one by one and concatenated.

    Returns:
        One fingerprint per row; 0 for a null or empty text (a rejected sequence, an unknown taxon).

    Raises:
        InputError: The seed does not fit in 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"the split's seed {seed} is out of range; pass one from 0 to {2**64 - 1}")
    key = seed.to_bytes(8, "little")
    hashes = [np.empty(0, np.uint64)]
    for chunk in values.chunks if isinstance(values, pa.ChunkedArray) else [values]:
        coded = pc.fill_null(chunk.cast(pa.large_string()), "").dictionary_encode()
        text, offsets = string_bytes(coded.dictionary)
        view, ends = text.data, offsets.tolist()
        digests = (
            hashlib.blake2b(view[start:end], digest_size=8, key=key).digest() if end > start else bytes(8)
            for start, end in zip(ends[:-1], ends[1:], strict=True)
        )
        distinct = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
        hashes.append(distinct[coded.indices.to_numpy()])
    return np.concatenate(hashes)


def assign_splits(
    sequences: UInt64[np.ndarray, " rows"],
    taxa: UInt64[np.ndarray, " rows"] | None = None,
    *,
    validation: float,
    test: float,
) -> Int8[np.ndarray, " rows"]:
    """Assigns each row of the whole input to a split.

    Without `taxa` (random), the sequence's fingerprint determines the split, so copies stay together. With `taxa`
    (held-out species or genera), the taxon's fingerprint determines the split of all its rows, and rows of unknown
    taxon are training rows. Copies of one sequence then follow two rules: copies of unknown taxon join the labelled
    copies, and a sequence whose labelled copies would be in different splits is left out, since it would leak. With a
    larger `test`, earlier test rows stay test rows.

    Args:
        sequences: `fingerprints` of the cleaned sequences.
        taxa: `fingerprints` of the names at the rank of `HELD_OUT_RANK`.
        validation: Expected share of the distinct sequences or taxa in the validation split.
        test: Expected share in the test split.

    Returns:
        Indices into `SPLITS`, or `LEFT_OUT`.

    Raises:
        InputError: A share is negative, or no share is left for training.
    """
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise InputError(
            f"--data.validation {validation} and --data.test {test} must be at least 0 and together less than 1"
        )
    if taxa is None:
        return np.where(sequences == 0, LEFT_OUT, _split_of(sequences, validation, test)).astype(np.int8)
    splits = np.where(taxa == 0, SPLITS.index("train"), _split_of(taxa, validation, test))
    groups, group_of = np.unique(sequences, return_inverse=True)
    lowest, highest = _range(group_of[taxa != 0], splits[taxa != 0], len(groups))
    unlabelled = highest < 0
    group_splits = np.where(lowest == highest, lowest, LEFT_OUT)
    group_splits[unlabelled] = SPLITS.index("train")
    group_splits[groups == 0] = LEFT_OUT
    return group_splits[group_of].astype(np.int8)


def read_given_splits(
    column: pa.Array | pa.ChunkedArray, *, locate: Callable[[int], str] = "row {}".format
) -> Int8[np.ndarray, " rows"]:
    """Reads a column of given splits, that of --data.split_column.

    Values are train, validation or test, their usual forms (training, val, valid, dev, testing), or unused. Case is
    ignored, and so is the rest of a value after '_': test_unseen_species is read as test. BIOSCAN-5M's pretrain is
    read as train; its key_unseen and other_heldout hold taxa that training must not see, and are unused.

    Args:
        column: Column of the whole input or of a block.
        locate: Returns the location of a row, for messages.

    Raises:
        InputError: A value is null or not a split.
    """
    splits = [np.empty(0, np.int8)]
    rows = 0
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        coded = chunk.cast(pa.string()).dictionary_encode("encode")
        values = coded.dictionary.to_pylist()
        numbers = [None if value is None else _split_named(value.strip().lower()) for value in values]
        for value, number in zip(values, numbers, strict=True):
            if number is None:
                row = rows + pc.index(coded.indices, values.index(value)).as_py()
                raise InputError(
                    f"{locate(row)} has the split {value!r} in --data.split_column; "
                    "write train, validation, test or unused"
                )
        splits.append(np.array(numbers, np.int8)[coded.indices.to_numpy()])
        rows += len(chunk)
    return np.concatenate(splits)


def _split_named(value: str) -> int | None:
    return _GIVEN.get(value, _GIVEN.get(value.split("_")[0]))


def check_leakage(
    sequences: UInt64[np.ndarray, " rows"],
    splits: Int8[np.ndarray, " rows"],
    *,
    locate: Callable[[int], str] = "row {}".format,
) -> None:
    """Checks that no sequence is in two splits; rows that are left out or rejected are ignored.

    Args:
        sequences: `fingerprints` of the cleaned sequences.
        splits: From `assign_splits` or `read_given_splits`.
        locate: Returns the location of a row, as `ParquetBlocks.locate` does.

    Raises:
        InputError: A sequence is in two splits; names two of its rows and counts such sequences.
    """
    rows = np.flatnonzero((splits != LEFT_OUT) & (sequences != 0))
    groups, group_of = np.unique(sequences[rows], return_inverse=True)
    lowest, highest = _range(group_of, splits[rows].astype(np.int64), len(groups))
    leaking = np.flatnonzero(lowest < highest)
    if not len(leaking):
        return
    first = rows[np.isin(group_of, leaking)][0]
    copies = rows[sequences[rows] == sequences[first]]
    second = copies[splits[copies] != splits[first]][0]
    raise InputError(
        f"{locate(int(first))} ({SPLITS[splits[first]]}) and {locate(int(second))} ({SPLITS[splits[second]]}) are the "
        f"same sequence, and {len(leaking)} sequences in all are in more than one split; mark the copies 'unused', "
        "or leave out --data.split_column"
    )


def _split_of(hashes: UInt64[np.ndarray, " rows"], validation: float, test: float) -> Int64[np.ndarray, " rows"]:
    """Returns the split of each hash: test from 0 up, then validation, and training above."""
    limits = np.array([int(test * 2.0**64), int((test + validation) * 2.0**64)], np.uint64)
    return 2 - np.searchsorted(limits, hashes, side="right")


def _range(
    group_of: Int64[np.ndarray, " rows"], splits: Int64[np.ndarray, " rows"], groups: int
) -> tuple[Int64[np.ndarray, " groups"], Int64[np.ndarray, " groups"]]:
    """Returns the lowest and highest split in each group; len(SPLITS) and -1 for a group without rows."""
    lowest, highest = np.full(groups, len(SPLITS), np.int64), np.full(groups, -1, np.int64)
    np.minimum.at(lowest, group_of, splits)
    np.maximum.at(highest, group_of, splits)
    return lowest, highest
