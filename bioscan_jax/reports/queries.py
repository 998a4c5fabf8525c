"""Identified barcodes shown beside the table: their vectors, DNA, and how they align with their nearest references."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int64

from bioscan_jax.errors import InputError, one_line
from bioscan_jax.reports.identifications import open_parquet

_DETAILS = ("sequence", "alignment_start", "alignment", "vector")
_EVIDENCE = ("similarity", "identity", "overlap", "coverage", "support")
_BATCH_ROWS = 4096
_STEP = re.compile(r"(\d+)([=XIDS])")


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Queries of a file that `identify` wrote with `details`, in its order."""

    index: Int64[np.ndarray, " queries"]
    """Their places among all queries of the file."""
    total: int
    """Queries with a vector in the file; these may be a sample of them."""
    vectors: Float32[np.ndarray, "queries hidden"]
    sequences: tuple[str, ...]
    """Cleaned DNA on the strand that was compared."""
    nearest: tuple[str | None, ...]
    """The sequence_id of the nearest reference."""
    starts: tuple[int | None, ...]
    """Where in the nearest reference the alignment begins, from 0."""
    cigars: tuple[str | None, ...]
    """The alignment, as in SAM with = and X."""
    strands: tuple[str | None, ...]
    unnamed: tuple[str | None, ...]
    evidence: dict[str, Float64[np.ndarray, " queries"]]
    """Columns of numbers on the nearest reference and the vote, NaN where unknown."""

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.index)


def read_queries(path: str, most: int, seed: int) -> Queries | None:
    """Reads the vectors, DNA and alignments that `identify` writes with `details`; None if the file has none.

    Args:
        path: Parquet file.
        most: Queries to read; of more this many are sampled without replacement.
        seed: Random seed of the sample.

    Raises:
        InputError: The file cannot be read, or a column has another type.
    """
    file = open_parquet(path)
    names = file.schema_arrow.names
    if not set(_DETAILS) <= set(names):
        return None
    kind = file.schema_arrow.field("vector").type
    if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type):
        raise InputError(f"--identified {path}: column 'vector' has the type {kind}; lists of one length are needed")
    others = [*_DETAILS[:-1], "nearest_id", *(name for name in ("strand", "unnamed", *_EVIDENCE) if name in names)]
    try:
        table = file.read(others)
        usable = np.flatnonzero(table["sequence"].is_valid().to_numpy())
        if len(usable) > most:
            usable = np.sort(np.random.default_rng(seed).choice(usable, most, replace=False))
        parts, first = [np.zeros((0, kind.list_size), np.float32)], 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=["vector"]):
            here = usable[(usable >= first) & (usable < first + len(batch))] - first
            values = batch[0].take(pa.array(here)).flatten().to_numpy(zero_copy_only=False)
            parts.append(values.astype(np.float32).reshape(len(here), -1))
            first += len(batch)
        chosen = table.take(pa.array(usable))
        texts = {
            name: tuple(chosen[name].cast(pa.string()).to_pylist()) if name in names else (None,) * len(usable)
            for name in ("sequence", "nearest_id", "alignment", "strand", "unnamed")
        }
        starts = tuple(chosen["alignment_start"].cast(pa.int64()).to_pylist())
        evidence = {name: chosen[name].cast(pa.float64()).to_numpy() for name in _EVIDENCE if name in names}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"--identified {path}: the details cannot be read ({one_line(error)}); run identify again"
        ) from error
    vectors = np.concatenate(parts)
    if not np.isfinite(vectors).all():
        raise InputError(f"--identified {path} has vectors that are not finite; run identify again")
    return Queries(
        index=usable,
        total=int(table["sequence"].is_valid().to_numpy().sum()),
        vectors=vectors,
        sequences=tuple(text or "" for text in texts["sequence"]),
        nearest=texts["nearest_id"],
        starts=starts,
        cigars=texts["alignment"],
        strands=texts["strand"],
        unnamed=texts["unnamed"],
        evidence=evidence,
    )


def fitting_cigars(queries: Queries, references: Mapping[str, str]) -> list[str]:
    """Returns the alignment of each query; an empty text if there is none, or it fits no longer to the two sequences.

    Args:
        queries: The queries.
        references: DNA of the nearest references by sequence_id.
    """
    found = []
    for sequence, nearest, start, cigar in zip(
        queries.sequences, queries.nearest, queries.starts, queries.cigars, strict=True
    ):
        steps = [(int(length), kind) for length, kind in _STEP.findall(cigar or "")]
        here = sum(length for length, kind in steps if kind != "D")
        there = (start or 0) + sum(length for length, kind in steps if kind in "=XD")
        reference = references.get(nearest or "", "")
        fits = "".join(f"{length}{kind}" for length, kind in steps) == cigar and here == len(sequence)
        found.append(cigar if cigar and fits and (start or 0) >= 0 and there <= len(reference) else "")
    return found
