"""How right the identifications are: accuracy, calibration and novelty, where the true names are known."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.reports.contents import Taxa
from bioscan_jax.reports.identifications import Identified

BINS = 10
_Z = 1.959964
"""Of a two-sided interval of 95% of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Answers of nearly one confidence."""

    confidence: float
    """Their mean."""
    correct: float
    """Share of them that are right."""
    low: float
    """Of Wilson's interval of 95% for that share, and `high`."""
    high: float
    count: int


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """One rank's figures; None where they cannot be told."""

    rank: str
    named: float
    """Share of the queries with a name of this rank."""
    answered: float | None
    """Share of them that is answered by the calibration."""
    labelled: int
    """Queries whose true name is known."""
    accuracy: float | None
    """Of those, the share whose best guess is right; no guess is wrong."""
    precision: float | None
    """Of those answered, the share that is right."""
    in_table: float | None
    """Share whose true name the table has."""
    error: float | None
    """Expected calibration error, Guo et al. 2017 (arXiv:1706.04599): mean over the answers of |confidence - correct|
    of their bin."""
    bins: tuple[Bin, ...]
    separation: float | None
    """AUROC of the novelty score for true names that the table lacks; None unless there are such and others."""


def figures(
    identified: Identified, truth: Sequence[Sequence[str | None]] | None, reference: Sequence[Taxa] | None
) -> tuple[RankFigures, ...]:
    """The figures of each rank.

    Args:
        identified: The answers.
        truth: True names by rank, or None.
        reference: The names in the table that was searched, or None where that is not at hand.
    """
    found = []
    for index, rank in enumerate(RANKS):
        names = np.array(identified.names[index], dtype=object)
        true = np.array(truth[index] if truth is not None else [None] * len(names), dtype=object)
        labelled = np.array([name is not None for name in true])
        right = labelled & (names == true)
        answered = identified.answered[:, index] & labelled
        has = set(reference[index].names) if reference is not None else set()
        there = np.array([name in has for name in true])
        scored = labelled & np.isfinite(identified.confidence[:, index])
        bins = reliability(identified.confidence[scored, index], right[scored])
        judged = labelled & np.isfinite(identified.novelty)
        found.append(
            RankFigures(
                rank=rank,
                named=_share(np.array([name is not None for name in names])),
                answered=_share(identified.answered[:, index]) if identified.calibrated else None,
                labelled=int(labelled.sum()),
                accuracy=_share(right[labelled]) if labelled.any() else None,
                precision=_share(right[answered]) if answered.any() else None,
                in_table=_share(there[labelled]) if labelled.any() and reference is not None else None,
                error=sum(b.count * abs(b.confidence - b.correct) for b in bins) / scored.sum() if bins else None,
                bins=bins,
                separation=auroc(identified.novelty[judged], ~there[judged]) if reference is not None else None,
            )
        )
    return tuple(found)


def reliability(confidence: Float64[np.ndarray, " rows"], right: Bool[np.ndarray, " rows"]) -> tuple[Bin, ...]:
    """Answers by confidence in ten bins of equal width, empty ones left out; the last one holds 1."""
    place = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    bins = []
    for index in range(BINS):
        here = place == index
        if count := int(here.sum()):
            correct = float(right[here].mean())
            low, high = wilson(correct, count)
            mean = float(confidence[here].mean())
            bins.append(Bin(confidence=mean, correct=correct, low=low, high=high, count=count))
    return tuple(bins)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of 95% for a share of `count` (J. Am. Stat. Assoc. 22, 1927, doi:10.2307/2276774)."""
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * np.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def auroc(score: Float64[np.ndarray, " rows"], positive: Bool[np.ndarray, " rows"]) -> float | None:
    """Returns the area under the ROC curve, or None unless there are both positive and negative rows."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, score)) if positive.any() and not positive.all() else None


def _share(values: Bool[np.ndarray, " rows"]) -> float:
    return float(values.mean())
