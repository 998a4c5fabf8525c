"""Answers of `identify`, and the true names beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64

from bioscan_jax.barcodes.lineage import LINEAGE_COLUMN, RANKS, read_lineages
from bioscan_jax.errors import InputError
from bioscan_jax.reports.contents import lineage_columns

_NEAREST = 100
"""References kept to see whether a table is the one that was searched."""


@dataclass(frozen=True, kw_only=True)
class Identified:
    """What `identify` answered, one entry a query."""

    ids: tuple[str, ...]
    names: tuple[tuple[str | None, ...], ...]
    """Of each of RANKS, one a query."""
    confidence: Float64[np.ndarray, "rows ranks"]
    """NaN where there is none, as below."""
    answered: Bool[np.ndarray, "rows ranks"]
    """Above the rank at which the query abstains; False throughout without a calibration."""
    calibrated: bool
    nearest: tuple[str, ...]
    """The nearest references of some queries."""
    novelty: Float64[np.ndarray, " rows"]
    novel: Bool[np.ndarray, " rows"]


def read_identified(path: str) -> Identified:
    """Reads the Parquet file that `identify` writes.

    Raises:
        InputError: It cannot be read, has other columns, or no rows.
    """
    table = _read(path, "--identified")
    scores = [f"{rank}_confidence" for rank in RANKS]
    needed = ["sequence_id", *RANKS, *scores, "nearest_id", "novelty", "novel", "abstained_at"]
    if missing := [name for name in needed if name not in table.column_names]:
        raise InputError(
            f"--identified {path} has no column {missing[0]!r}; pass a Parquet file of scripts/identify.py"
        )
    if not table.num_rows:
        raise InputError(f"--identified {path} has no rows; identify some barcodes first")
    stops = table["abstained_at"].to_pylist()
    if strange := [stop for stop in stops if stop is not None and stop not in RANKS]:
        raise InputError(f"--identified {path}: abstained_at {strange[0]!r} is none of {', '.join(RANKS)}")
    judged = [
        stop is not None or novel is not None for stop, novel in zip(stops, table["novel"].to_pylist(), strict=True)
    ]
    depth = [len(RANKS) if stop is None else RANKS.index(stop) for stop in stops]
    reach = np.where(judged, depth, 0)
    names = tuple(tuple(table[rank].cast(pa.string()).to_pylist()) for rank in RANKS)
    named = np.array([[name is not None for name in column] for column in names]).T
    return Identified(
        ids=tuple(table["sequence_id"].cast(pa.string()).to_pylist()),
        names=names,
        confidence=np.stack([_floats(table, name, path) for name in scores], axis=1),
        answered=named & (np.arange(len(RANKS))[None, :] < reach[:, None]),
        calibrated=any(judged),
        nearest=tuple(table["nearest_id"].cast(pa.string()).drop_null().to_pylist()[:_NEAREST]),
        novelty=_floats(table, "novelty", path),
        novel=np.array([bool(value) for value in table["novel"].to_pylist()]),
    )


def read_truth(path: str, ids: Sequence[str]) -> tuple[tuple[str | None, ...], ...]:
    """The true names of each of RANKS, one for each id, None where unknown or where the file lacks the id.

    Raises:
        InputError: The file cannot be read, has no lineages, has an id twice with other names, or none of the ids.
    """
    table = _read(path, "--truth")
    if "sequence_id" not in table.column_names:
        raise InputError(f"--truth {path} has no column 'sequence_id'; the columns are {', '.join(table.column_names)}")
    columns = lineage_columns(table.column_names)
    if not columns:
        raise InputError(f"--truth {path} has neither a column {LINEAGE_COLUMN!r} nor all seven ranks; add one of them")
    lineages = list(zip(*(names.to_pylist() for names in read_lineages(table.select(columns))), strict=True))
    true: dict[str, tuple[str | None, ...]] = {}
    for key, lineage in zip(table["sequence_id"].cast(pa.string()).to_pylist(), lineages, strict=True):
        if true.setdefault(key, lineage) != lineage:
            raise InputError(f"--truth {path} has {key!r} twice with different names; keep one")
    unknown = (None,) * len(RANKS)
    found = [true.get(key, unknown) for key in ids]
    if not any(key in true for key in ids):
        raise InputError(
            f"--truth {path} has none of the sequence_ids of --identified; pass the file that was identified"
        )
    return tuple(zip(*found, strict=True))


def _read(path: str, flag: str) -> pa.Table:
    import pyarrow.parquet as pq

    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{flag} {path}: there is no such file; pass a Parquet file")
    try:
        return pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{flag} {path} cannot be read as Parquet ({text}); pass a Parquet file") from error


def _floats(table: pa.Table, name: str, path: str) -> Float64[np.ndarray, " rows"]:
    try:
        return table[name].cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:
        kind = table[name].type
        raise InputError(f"--identified {path}: column {name!r} has the type {kind}; numbers are needed") from error
