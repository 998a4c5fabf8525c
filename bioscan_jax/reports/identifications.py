"""Results of `identify`, and how accurate they are where the true names are known."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64

from bioscan_jax.barcodes.lineage import LINEAGE_COLUMN, RANKS, lineage_columns, read_lineages
from bioscan_jax.config import SideTableConfig
from bioscan_jax.errors import InputError, one_line
from bioscan_jax.location import local_copy
from bioscan_jax.reports.contents import Taxa
from bioscan_jax.table.side_tables import read_side_table

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BINS = 10
_NEAREST = 100
"""Nearest references kept, to check whether a table is the one that was searched."""


@dataclass(frozen=True, kw_only=True)
class Identifications:
    """Results of `identify`, one entry per query."""

    ids: tuple[str, ...]
    names: tuple[tuple[str | None, ...], ...]
    """For each of RANKS, one name per query."""
    confidence: Float64[np.ndarray, "rows ranks"]
    """NaN where there is none."""
    answered: Bool[np.ndarray, "rows ranks"]
    """True above the rank at which the query abstains; False everywhere without a calibration."""
    calibrated: bool
    nearest: tuple[str, ...]
    """Nearest references of the first queries that have one."""
    novelty: Float64[np.ndarray, " rows"]
    """NaN where there is none."""
    novel: Bool[np.ndarray, " rows"]

    @property
    def scored(self) -> Bool[np.ndarray, " rows"]:
        """Queries that have a novelty score."""
        return np.isfinite(self.novelty)


def read_identifications(path: str) -> Identifications:
    """Reads the Parquet file that `identify` writes.

    Raises:
        InputError: It cannot be read, lacks a column, or has no rows.
    """
    file = open_parquet(path)
    scores = [f"{rank}_confidence" for rank in RANKS]
    needed = ["sequence_id", *RANKS, *scores, "nearest_id", "novelty", "novel", "abstained_at"]
    if missing := [name for name in needed if name not in file.schema_arrow.names]:
        raise InputError(f"--identified {path} has no column {missing[0]!r}; pass a Parquet file that identify wrote")
    with _one_line(path):
        table = file.read(needed)
    if not table.num_rows:
        raise InputError(f"--identified {path} has no rows; identify some barcodes first")
    stops, novel = table["abstained_at"].to_pylist(), table["novel"].to_pylist()
    if unknown := [stop for stop in stops if stop is not None and stop not in RANKS]:
        raise InputError(f"--identified {path}: abstained_at {unknown[0]!r} is none of {', '.join(RANKS)}")
    decided = [stop is not None or flag is not None for stop, flag in zip(stops, novel, strict=True)]
    depth = [len(RANKS) if stop is None else RANKS.index(stop) for stop in stops]
    names = tuple(tuple(table[rank].cast(pa.string()).to_pylist()) for rank in RANKS)
    named = np.array([[name is not None for name in column] for column in names]).T
    return Identifications(
        ids=tuple(table["sequence_id"].cast(pa.string()).to_pylist()),
        names=names,
        confidence=np.stack([_floats(table, name, path) for name in scores], axis=1),
        answered=named & (np.arange(len(RANKS)) < np.where(decided, depth, 0)[:, None]),
        calibrated=any(decided),
        nearest=tuple(table["nearest_id"].cast(pa.string()).drop_null().to_pylist()[:_NEAREST]),
        novelty=_floats(table, "novelty", path),
        novel=np.array([bool(flag) for flag in novel]),
    )


def read_truth(given: str | SideTableConfig, ids: Sequence[str]) -> tuple[tuple[str | None, ...], ...]:
    """Reads the true names: for each of RANKS one per id, None where unknown or where the file lacks the id.

    Args:
        given: Parquet, CSV or TSV file, or a directory of them; see `table.side_tables`.
        ids: The sequence_ids of the identified queries.

    Raises:
        InputError: The file cannot be read, has no lineages, two different lineages for an id, or none of the ids.
    """
    given = SideTableConfig(path=given) if isinstance(given, str) else given
    names: dict[str, pa.DataType] = dict.fromkeys((*RANKS, LINEAGE_COLUMN), pa.string())
    side, path = read_side_table(given, "--truth", names), given.path
    table = side.table
    if "sequence_id" not in table.column_names:
        raise InputError(f"--truth {path} has no column 'sequence_id'; the columns are {', '.join(table.column_names)}")
    columns = lineage_columns(table.column_names)
    if not columns:
        raise InputError(f"--truth {path} has neither a column {LINEAGE_COLUMN!r} nor one of genus or species; add one")
    lineages = list(zip(*(names.to_pylist() for names in read_lineages(table.select(columns))), strict=True))
    true: dict[str, tuple[str | None, ...]] = {}
    for row, (key, lineage) in enumerate(
        zip(table["sequence_id"].cast(pa.string()).to_pylist(), lineages, strict=True)
    ):
        if true.setdefault(key, lineage) != lineage:
            raise InputError(
                f"--truth {path} has {key!r} twice with different names, again in {side.locate(row)}; keep one"
            )
    if not any(key in true for key in ids):
        raise InputError(
            f"--truth {path} has none of the sequence_ids of --identified; pass the file that was identified"
        )
    unknown = (None,) * len(RANKS)
    return tuple(zip(*(true.get(key, unknown) for key in ids), strict=True))


def open_parquet(path: str) -> "pq.ParquetFile":
    """Opens the Parquet file that `identify` wrote.

    Raises:
        InputError: There is none, or it is no Parquet.
    """
    import pyarrow.parquet as pq

    file = local_copy(path, "identified")
    if not file.is_file():
        raise InputError(f"--identified {path}: there is no such file; pass a Parquet file")
    with _one_line(path):
        return pq.ParquetFile(file)


@contextmanager
def _one_line(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"--identified {path} cannot be read as Parquet ({one_line(error)}); pass what identify --output FILE.parquet wrote"
        ) from error


def _floats(table: pa.Table, name: str, path: str) -> Float64[np.ndarray, " rows"]:
    try:
        return table[name].cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:
        kind = table[name].type
        raise InputError(f"--identified {path}: column {name!r} has the type {kind}; numbers are needed") from error


@dataclass(frozen=True, kw_only=True)
class ConfidenceBin:
    """Answers of similar confidence."""

    confidence: float
    """Mean confidence."""
    correct: float
    """Fraction of correct answers."""
    low: float
    """Lower end of Wilson's 95% interval of `correct`."""
    high: float
    """Upper end of that interval."""
    count: int


@dataclass(frozen=True, kw_only=True)
class RankMetrics:
    """Metrics of the identifications at one rank; None where they cannot be computed."""

    rank: str
    named: float
    """Fraction of queries with a name at this rank."""
    answered: float | None
    """Fraction of queries that the calibration answers at this rank."""
    labelled: int
    """Queries whose true name is known."""
    accuracy: float | None
    """Fraction of labelled queries whose best guess is correct; no guess counts as wrong."""
    precision: float | None
    """Fraction of answered, labelled queries that are correct."""
    in_table: float | None
    """Fraction of labelled queries whose true name is in the table."""
    error: float | None
    """Expected calibration error, Guo et al. 2017 (arXiv:1706.04599): mean over answers of |confidence - correct| of
    their bin."""
    bins: tuple[ConfidenceBin, ...]
    separation: float | None
    """AUROC of the novelty score for true names missing from the table; None unless some are missing and some are
    not."""


def rank_metrics(
    identifications: Identifications, truth: Sequence[Sequence[str | None]] | None, reference: Sequence[Taxa] | None
) -> tuple[RankMetrics, ...]:
    """Computes the metrics of each rank.

    Args:
        identifications: The results to judge.
        truth: True names by rank, or None.
        reference: Names in the searched table, or None if that table is not at hand.
    """
    metrics = []
    for index, rank in enumerate(RANKS):
        names = np.array(identifications.names[index], dtype=object)
        true = np.array(truth[index] if truth is not None else [None] * len(names), dtype=object)
        labelled = np.array([name is not None for name in true])
        right = labelled & (names == true)
        answered = identifications.answered[:, index] & labelled
        known = set(reference[index].names) if reference is not None else set()
        in_table = np.array([name in known for name in true])
        with_confidence = labelled & np.isfinite(identifications.confidence[:, index])
        bins = confidence_bins(identifications.confidence[with_confidence, index], right[with_confidence])
        with_score = labelled & identifications.scored
        total = with_confidence.sum()
        metrics.append(
            RankMetrics(
                rank=rank,
                named=float(np.mean([name is not None for name in names])),
                answered=float(identifications.answered[:, index].mean()) if identifications.calibrated else None,
                labelled=int(labelled.sum()),
                accuracy=_mean(right[labelled]),
                precision=_mean(right[answered]),
                in_table=_mean(in_table[labelled]) if reference is not None else None,
                error=sum(b.count * abs(b.confidence - b.correct) for b in bins) / total if bins else None,
                bins=bins,
                separation=auroc(identifications.novelty[with_score], ~in_table[with_score])
                if reference is not None
                else None,
            )
        )
    return tuple(metrics)


def confidence_bins(
    confidence: Float64[np.ndarray, " rows"], right: Bool[np.ndarray, " rows"]
) -> tuple[ConfidenceBin, ...]:
    """Groups answers by confidence into ten bins of equal width, without the empty ones; the last bin includes 1."""
    from scipy.stats import binomtest

    place = np.clip((confidence * _BINS).astype(int), 0, _BINS - 1)
    bins = []
    for index in np.unique(place):
        chosen = right[place == index]
        interval = binomtest(int(chosen.sum()), len(chosen)).proportion_ci(0.95, method="wilson")
        bins.append(
            ConfidenceBin(
                confidence=float(confidence[place == index].mean()),
                correct=float(chosen.mean()),
                low=float(interval.low),
                high=float(interval.high),
                count=len(chosen),
            )
        )
    return tuple(bins)


def auroc(score: Float64[np.ndarray, " rows"], positive: Bool[np.ndarray, " rows"]) -> float | None:
    """Returns the area under the ROC curve, or None unless there are both positive and negative rows."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, score)) if positive.any() and not positive.all() else None


def _mean(values: Bool[np.ndarray, " rows"]) -> float | None:
    return float(values.mean()) if len(values) else None
