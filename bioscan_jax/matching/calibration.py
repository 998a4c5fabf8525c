"""What an answer is worth: confidences, thresholds and a novelty flag, fitted on labelled barcodes."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int32

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.errors import InputError
from bioscan_jax.matching.vote import Votes

FORMAT = "bioscan_jax calibration 1"
_STEP = 0.02
"""Of the share of the answers between two thresholds that are tried."""
_SHARE_CLIP = 1e-4


@dataclass(frozen=True)
class Logistic:
    """P(yes) = 1 / (1 + exp(-(bias + coefficients . features)))."""

    coefficients: tuple[float, ...]
    bias: float

    def __call__(self, features: Float64[np.ndarray, "rows features"]) -> Float64[np.ndarray, " rows"]:
        """The probability of each row."""
        logit = features @ np.array(self.coefficients) + self.bias
        return 1 / (1 + np.exp(-np.clip(logit, -500, 500)))


@dataclass(frozen=True)
class RankFit:
    """One rank's confidence, and from where on it is answered."""

    logistic: Logistic
    threshold: float | None
    """None: no threshold keeps the precision, and the rank is never answered."""


@dataclass(frozen=True)
class Calibration:
    """All that was fitted for one table, model and settings."""

    table: dict[str, Any]
    """What it holds for: `table_binding`."""
    settings: dict[str, Any]
    """And `settings_binding`."""
    power: float
    """Of the vote."""
    head_weight: float
    ranks: tuple[RankFit, ...]
    novelty: Logistic | None
    """None: the labelled barcodes were all of known species, or all of unknown ones."""
    novelty_threshold: float | None
    precision: float
    risk: float
    fitted_on: dict[str, Any]
    """The labelled barcodes, and the figures of those held out."""


def table_binding(facts: dict[str, str], rows: int) -> dict[str, Any]:
    """The table that a calibration is bound to: its plan (which holds the model's and the adapter's sha256), its rows."""
    model = {"weights_sha256": facts["weights_sha256"], "adapter_sha256": facts.get("adapter_sha256")}
    return {"plan": facts["plan"], "rows": rows, **model}


def settings_binding(settings: config.IdentifyConfig, search: str, heads: str | None) -> dict[str, Any]:
    """The settings that a calibration is bound to.

    Args:
        settings: Of the identification.
        search: `exact` or `index`.
        heads: sha256 of the heads, if there are any.
    """
    return {
        "k": settings.k,
        "rerank": settings.rerank,
        "aligned": settings.aligned if settings.rerank == "alignment" else None,
        "filter": settings.filter,
        "search": search,
        "nprobes": settings.nprobes if search == "index" else None,
        "refine_factor": settings.refine_factor if search == "index" else None,
        "heads": heads,
    }


def rank_features(votes: Votes, rank: int) -> Float64[np.ndarray, "rows 3"]:
    """Log distance to the taxon's nearest reference, log ratio to the nearest of another taxon, logit of the share."""
    share = np.clip(votes.share[:, rank], _SHARE_CLIP, 1 - _SHARE_CLIP)
    near, other = np.log(votes.near[:, rank]), np.log(votes.other[:, rank])
    return np.nan_to_num(np.stack([near, other - near, np.log(share / (1 - share))], axis=1), posinf=0.0, neginf=0.0)


def novelty_features(votes: Votes, entropy: Float[np.ndarray, " rows"] | None) -> Float64[np.ndarray, "rows features"]:
    """Log distance to the nearest reference, and the entropy of a head's species."""
    columns = [np.nan_to_num(np.log(votes.nearest), posinf=0.0)] + ([] if entropy is None else [entropy])
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def confidences(ranks: Sequence[RankFit], votes: Votes) -> Float64[np.ndarray, "rows 7"]:
    """Probability that each name is right; no rank's exceeds that above it, and 0 where there is no name."""
    found = [fit.logistic(rank_features(votes, rank)) for rank, fit in enumerate(ranks)]
    return np.minimum.accumulate(np.stack(found, axis=1), axis=1) * (votes.taxa >= 0)


def answered(ranks: Sequence[RankFit], confidence: Float64[np.ndarray, "rows 7"]) -> Bool[np.ndarray, "rows 7"]:
    """Whether each rank is answered: its confidence and those of all ranks above reach their thresholds."""
    thresholds = [np.inf if fit.threshold is None else fit.threshold for fit in ranks]
    return np.logical_and.accumulate(confidence >= np.array(thresholds)[None, :], axis=1)


def fit_ranks(
    fitting: tuple[Votes, Int32[np.ndarray, "rows 7"]],
    testing: tuple[Votes, Int32[np.ndarray, "rows_2 7"]],
    wanted: config.CalibrateConfig,
) -> tuple[RankFit, ...]:
    """Fits the confidences on some labelled barcodes and the thresholds on others.

    A confidence is a logistic regression on `rank_features` (Platt 1999). The thresholds of a rank are tried from the
    strictest on, each answering 2 % more, until one fails: its precision is not shown to be `precision` or more by the
    exact binomial test at level `risk`. The last that passes is taken. Trying in an order fixed beforehand keeps the
    level for all of them (Angelopoulos et al. 2021, Learn then Test, arXiv:2110.01052).

    Args:
        fitting: Votes and truths (taxa, -1 unknown, -2 not in the reference) that the confidences are fitted on.
        testing: Those that the thresholds are fitted on.
        wanted: Precision and risk.
    """
    ranks: list[RankFit] = []
    for rank in range(len(RANKS)):
        votes, truth = fitting
        known = (truth[:, rank] != -1) & (votes.taxa[:, rank] >= 0)
        right = (votes.taxa[:, rank] == truth[:, rank])[known]
        ranks.append(RankFit(fit_logistic(rank_features(votes, rank)[known], right), None))
    votes, truth = testing
    confidence = confidences(ranks, votes)
    open_rows = np.ones(len(truth), bool)
    for rank, fit in enumerate(ranks):
        known = open_rows & (truth[:, rank] != -1) & (votes.taxa[:, rank] >= 0)
        right = (votes.taxa[:, rank] == truth[:, rank])[known]
        threshold = fit_threshold(confidence[known, rank], right, wanted.precision, wanted.risk)
        ranks[rank] = RankFit(fit.logistic, threshold)
        open_rows &= confidence[:, rank] >= (np.inf if threshold is None else threshold)
    return tuple(ranks)


def fit_logistic(features: Float64[np.ndarray, "rows features"], yes: Bool[np.ndarray, " rows"]) -> Logistic:
    """Logistic regression; where all answers are the same, the share of yes with half a row added to either side."""
    if not len(yes) or yes.all() or not yes.any():
        share = (yes.sum() + 0.5) / (len(yes) + 1)
        return Logistic((0.0,) * features.shape[1], float(np.log(share / (1 - share))))
    from sklearn.linear_model import LogisticRegression

    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    fitted = LogisticRegression(max_iter=1000).fit((features - mean) / scale, yes)
    coefficients = fitted.coef_[0] / scale
    return Logistic(tuple(coefficients.tolist()), float(fitted.intercept_[0] - coefficients @ mean))


def fit_threshold(
    confidence: Float64[np.ndarray, " rows"], right: Bool[np.ndarray, " rows"], precision: float, risk: float
) -> float | None:
    """The lowest threshold whose answers are shown to have the precision; see `fit_ranks`.

    The first one answers a tenth of the rows, or as many as the test needs when all are right.
    """
    from scipy.stats import binom

    order = np.argsort(-confidence, kind="stable")
    sorted_ones = confidence[order]
    fewest = max(math.ceil(math.log(risk) / math.log(precision)), math.ceil(len(order) / 10))
    found = None
    count = fewest
    while fewest <= len(order):
        answers = int(np.searchsorted(-sorted_ones, -sorted_ones[count - 1], side="right"))
        wrong = int((~right[order[:answers]]).sum())
        if binom.cdf(wrong, answers, 1 - precision) > risk:
            break
        found = float(sorted_ones[count - 1])
        if count == len(order):
            break
        count = min(max(answers + 1, count + math.ceil(_STEP * len(order))), len(order))
    return found


def novelty_threshold(known_scores: Float64[np.ndarray, " known"], false_share: float) -> float | None:
    """The score that at most `false_share` of the barcodes of known species exceed.

    The (n + 1) (1 - false_share)-th smallest of n (split conformal; Vovk et al. 2005), None where n is too small.
    """
    n = len(known_scores)
    place = math.ceil((n + 1) * (1 - false_share))
    return float(np.sort(known_scores)[place - 1]) if place <= n else None


def to_json(entries: Sequence[Calibration]) -> str:
    """The file beside a table."""
    body = {"format": FORMAT, "calibrations": [asdict(entry) for entry in entries]}
    return json.dumps({"sha256": _digest(body), **body}, indent=1) + "\n"


def from_json(text: str | bytes, where: str) -> tuple[Calibration, ...]:
    """Reads what `to_json` wrote.

    Raises:
        InputError: It is damaged or of another format.
    """
    try:
        body = json.loads(text)
        if body.pop("sha256") != _digest(body) or body["format"] != FORMAT:
            raise ValueError("its checksum or format is wrong")
        return tuple(_read(entry) for entry in body["calibrations"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} is damaged or was edited ({error}); run scripts/calibrate.py again") from error


def _read(entry: dict[str, Any]) -> Calibration:
    def logistic(raw: dict[str, Any]) -> Logistic:
        return Logistic(tuple(raw["coefficients"]), raw["bias"])

    ranks = tuple(RankFit(logistic(fit["logistic"]), fit["threshold"]) for fit in entry["ranks"])
    novelty = None if entry["novelty"] is None else logistic(entry["novelty"])
    return Calibration(**entry | {"ranks": ranks, "novelty": novelty})


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
