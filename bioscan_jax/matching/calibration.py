"""Fits confidences, thresholds and a novelty flag on labelled barcodes, for one table and one set of settings."""

import dataclasses
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int32

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.errors import InputError, logger
from bioscan_jax.location import read_if_exists, write_whole
from bioscan_jax.matching.alignment import worker_pool
from bioscan_jax.matching.candidates import (
    Candidates,
    Matcher,
    count_votes,
    find_candidates,
    in_reference,
    open_matcher,
    rank_candidates,
)
from bioscan_jax.matching.queries import open_queries
from bioscan_jax.matching.vote import BY_SCORE, HeadVotes, Votes, Voting, default_voting
from bioscan_jax.notebook import Shown, progress_bar
from bioscan_jax.table.storage import sidecar_path, storage_errors

FORMAT = "bioscan_jax calibration 4"
_POWERS = (4.0, 8.0, 16.0, 32.0, 64.0)
_IDENTITY_WEIGHTS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0)
_SATURATIONS = (BY_SCORE.saturation, 1.0)
"""None below that of the default: see `Candidates.transversions`."""
_TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_HEAD_WEIGHTS = (0.0, 0.25, 0.5, 0.75)
_OF_ALIGNMENT = ("aligned", "identity_weight", "saturation", "temperature", "min_overlap", "min_identity")
"""Settings without effect where nothing is aligned."""
_CLEARLY = 2.0
"""How many standard errors better than the default weights others must be."""
_THRESHOLD_STEP = 0.02
"""Share of the rows by which the answers grow from one tried threshold to the next."""
_SHARE_CLIP = 1e-4
_SIGNS = (-1, 1, 1)
"""How the probability that a name is correct changes with `rank_features`."""
_CONSTANT = 1e-9
"""Relative spread below which a feature is constant: its differences are rounding errors."""


@dataclass(frozen=True)
class Logistic:
    """A logistic regression: P(yes) = 1 / (1 + exp(-(bias + coefficients . features)))."""

    coefficients: tuple[float, ...]
    bias: float

    def __call__(self, features: Float64[np.ndarray, "rows features"]) -> Float64[np.ndarray, " rows"]:
        """Returns the probability of each row."""
        logit = features @ np.array(self.coefficients) + self.bias
        return 1 / (1 + np.exp(-np.clip(logit, -500, 500)))


@dataclass(frozen=True)
class RankFit:
    """One rank's confidence, and the threshold above which the rank is answered."""

    logistic: Logistic
    threshold: float | None
    """None: no threshold reaches the precision, and the rank is never answered."""


@dataclass(frozen=True)
class Calibration:
    """Everything fitted for one table, model and settings."""

    table: dict[str, Any]
    """The table it is valid for; see `table_binding`."""
    settings: dict[str, Any]
    """The settings it is valid for; see `settings_binding`."""
    voting: Voting
    """How candidates are scored and weighted."""
    ranks: tuple[RankFit, ...]
    novelty: Logistic | None
    """None if the labelled barcodes were all of species in the reference, or all of others."""
    novelty_threshold: float | None
    precision: float
    risk: float
    fitted_on: dict[str, Any]
    """Number and fingerprint of the labelled barcodes, the seed of their split, and how many the reference has too."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSummary(Shown):
    """A fitted calibration, and its figures on barcodes that it was not fitted on; prints as a few lines of text.

    Example:
        >>> from dataclasses import fields
        >>> [field.name for field in fields(bj.CalibrationSummary)]
        ['path', 'calibration', 'lines', 'seconds']
    """

    path: str
    calibration: Calibration
    lines: list[str]
    seconds: float

    def __str__(self) -> str:
        """Lines for the terminal."""
        return "\n".join([f" calibration  {self.path}", *self.lines, f"     seconds  {self.seconds:.1f}"])


def calibrate(
    reference: config.ReferenceConfig,
    query: config.QueryConfig,
    settings: config.IdentifyConfig | None = None,
    fit: config.CalibrateConfig | None = None,
    *,
    model: config.ModelConfig | None = None,
    mesh: config.MeshConfig | None = None,
    progress: bool = True,
) -> CalibrationSummary:
    """Fits a calibration on labelled barcodes and writes it beside the table, to TABLE.calibration.json.

    The barcodes are split by a seeded hash of their sequence: a share is held out for the figures; of the rest, one
    half determines the weights of the vote and the confidences, the other the thresholds (see `calibration.fit_ranks`).
    Calibrations of the same table for other settings stay in the file. Barcodes whose id or sequence is in the reference
    are left out, and counted: they are easier to name than others. Barcodes of either strand are compared as `settings`
    say; the calibration is valid with the other choice of `strand`, too, since it knows the compared strand only.

    Args:
        reference: The table of vectors.
        query: Labelled barcodes like those to be identified: the precision holds for their mixture of species in the
            reference and others.
        settings: The settings that `identify` will be called with.
        fit: The precision required of answers, and how the barcodes are split.
        model: Where the table's model is now, if not where the table records it.
        mesh: Which devices.
        progress: Show a progress bar on the terminal.

    Raises:
        InputError: The table, the model, the settings or the barcodes are invalid; nothing is written then.

    Example:
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> _ = write_simulated("barcodes.parquet", species=100, per_species=4, length=120, seed=0)
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path="barcodes.parquet")
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri="vectors"), progress=False)
        >>> reference, labelled = bj.ReferenceConfig(uri="vectors"), bj.QueryConfig(path="barcodes.parquet")
        >>> settings = bj.IdentifyConfig(k=5, filter="source_row % 4 > 0")  # the other barcodes are not in the reference
        >>> fit = bj.CalibrateConfig(precision=0.9)
        >>> summary = bj.calibrate(reference, labelled, settings, fit, progress=False)
        >>> summary.calibration.precision, summary.calibration.settings["k"]
        (0.9, 5)
    """
    start = time.perf_counter()
    settings, fit = settings or config.IdentifyConfig(), fit or config.CalibrateConfig()
    with ExitStack() as held:
        source = open_queries(query, Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bioscan_jax-"))))
        pool = held.enter_context(worker_pool(settings.processes if settings.rerank == "alignment" else 1))
        matcher = open_matcher(reference, settings, model, mesh)
        bar = held.enter_context(progress_bar(total=source.rows, unit="row", desc="calibrate", disable=not progress))
        blocks, shared, labelled = [], 0, 0
        for block in find_candidates(matcher, source, pool, bar.update):
            if block.truth is None:
                raise InputError(
                    f"{query.path} has no labels; pass barcodes with a column of lineages, or rank columns such as genus "
                    "and species"
                )
            known = in_reference(matcher, block)
            shared, labelled = shared + int(known.sum()), labelled + len(known)
            block = dataclasses.replace(block, vectors=block.vectors[:, :0], reverse=None, size=None)
            blocks.append(_rows(block, np.flatnonzero(~known)) if fit.overlap == "exclude" else block)
    everything = _concatenated(blocks)
    used = "used all the same" if fit.overlap == "keep" else "left out (--overlap keep uses them)"
    overlap = (
        f"{shared:,} of {labelled:,} labelled barcodes ({shared / max(labelled, 1):.1%}) are in the reference, by id or"
    )
    overlap += f" sequence: {used}"
    try:
        parts = [_rows(everything, rows) for rows in split_labelled(everything.texts, fit)]
    except InputError as error:
        raise InputError(f"{error}; {overlap}" if shared else str(error)) from error
    voting = _best_voting(matcher, parts[1])
    held_out, fitting, testing = (_Labelled(_votes(matcher, part, voting), part) for part in parts)
    named = np.concatenate([part.votes.taxa for part in (fitting, testing)]) >= 0
    labelled_at = np.concatenate([part.truth for part in (fitting, testing)]) != -1
    if without := [rank for at, rank in enumerate(RANKS) if named[:, at].any() and not labelled_at[:, at].any()]:
        raise InputError(
            f"{query.path} labels no barcode with a name of {', '.join(without)}, which the references have: no confidence "
            "can be fitted there; add these ranks to the labels"
        )
    ranks = fit_ranks((fitting.votes, fitting.truth), (testing.votes, testing.truth), fit)
    novelty, novelty_at = _fit_novelty(fitting, testing, fit)
    fitted = Calibration(
        table=table_binding(matcher.reference.facts, matcher.reference.dataset.count_rows()),
        settings=settings_binding(settings, matcher.search, matcher.heads_sha256),
        voting=voting,
        ranks=ranks,
        novelty=novelty,
        novelty_threshold=novelty_at,
        precision=fit.precision,
        risk=fit.risk,
        fitted_on={
            "rows": len(fitting.candidates.texts) + len(testing.candidates.texts),
            "held_out": len(held_out.candidates.texts),
            "seed": fit.seed,
            "input": source.fingerprint,
            "in_reference": {"rows": shared, "of": labelled, "used": fit.overlap == "keep"},
        },
    )
    path = save_calibration(reference, fitted)
    return CalibrationSummary(
        path=path,
        calibration=fitted,
        lines=[f"     overlap  {overlap}", *_lines(held_out, fitted)],
        seconds=time.perf_counter() - start,
    )


def split_labelled(texts: Sequence[str], fit: config.CalibrateConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits rows three ways: held out, for the confidences, for the thresholds; equal sequences stay together.

    Raises:
        InputError: One of the three is empty.
    """
    digests = [hashlib.sha256(f"{fit.seed}:{text}".encode()).digest() for text in texts]
    draws = np.array([int.from_bytes(digest[:8]) / 2**64 for digest in digests])
    second = np.array([digest[8] < 128 for digest in digests], bool)
    out = draws < fit.held_out
    found = np.flatnonzero(out), np.flatnonzero(~out & second), np.flatnonzero(~out & ~second)
    if not all(map(len, found)):
        raise InputError(f"{len(texts)} labelled barcodes are too few to split three ways; pass a few hundred at least")
    return found


def rank_accuracy(
    taxa: Int32[np.ndarray, "rows 7"], sure: Bool[np.ndarray, "rows 7"] | None, truth: Int32[np.ndarray, "rows 7"]
) -> list[str]:
    """Describes the accuracy of the best guesses at each rank, and of those that are answered, one line per rank.

    Args:
        taxa: Codes of the guesses.
        sure: Which ranks are answered; None without a calibration.
        truth: From `Taxa.truth`; rows with an unknown name do not count.
    """
    lines = []
    for rank, name in enumerate(RANKS):
        known = truth[:, rank] != -1
        if not known.any():
            continue
        if (taxa[:, rank] < 0).all():
            lines.append(f"{name:8} is not named: no reference near these {known.sum():,} barcodes has a name there")
            continue
        right = (taxa[:, rank] == truth[:, rank]) & known
        line = f"{name:8} {right.sum() / known.sum():.4f} of {known.sum():,} best guesses are correct"
        if sure is not None:
            kept = sure[:, rank] & known
            correct = f", {(right & kept).sum() / kept.sum():.4f} of these correctly" if kept.any() else ""
            line += f"; {kept.sum() / known.sum():.4f} are answered{correct}"
        lines.append(line)
    return lines


@dataclass(frozen=True, eq=False)
class _Labelled:
    """One part of the labelled barcodes, with the vote on each."""

    votes: Votes
    candidates: Candidates

    @property
    def truth(self) -> Int32[np.ndarray, "rows 7"]:
        return _truth(self.candidates)

    @property
    def novelty(self) -> tuple[Float64[np.ndarray, "rows features"], Bool[np.ndarray, " rows"]]:
        """Features of the rows with a known species, and whether that species is missing from the reference."""
        species = self.truth[:, -1]
        features = novelty_features(self.votes, self.candidates)
        return features[species != -1], (species == -2)[species != -1]


def _truth(candidates: Candidates) -> Int32[np.ndarray, "rows 7"]:
    assert candidates.truth is not None
    return candidates.truth


_BY_QUERY = ("vectors", "rows", "similarity", "edit_distances", "transversions", "truth")


def _by_query(candidates: Candidates) -> list[str]:
    return [name for name in _BY_QUERY if getattr(candidates, name) is not None]


def _concatenated(blocks: list[Candidates]) -> Candidates:
    heads = [_fields(block.heads) for block in blocks if block.heads is not None]
    return dataclasses.replace(
        blocks[0],
        texts=[text for block in blocks for text in block.texts],
        **{name: np.concatenate([getattr(block, name) for block in blocks]) for name in _by_query(blocks[0])},
        heads=HeadVotes(*map(np.concatenate, zip(*heads, strict=True))) if heads else None,
    )


def _rows(candidates: Candidates, rows: np.ndarray) -> Candidates:
    heads = candidates.heads
    return dataclasses.replace(
        candidates,
        texts=[candidates.texts[row] for row in rows.tolist()],
        **{name: getattr(candidates, name)[rows] for name in _by_query(candidates)},
        heads=None if heads is None else HeadVotes(*(field[rows] for field in _fields(heads))),
    )


def _fields(heads: HeadVotes) -> tuple[Any, ...]:
    return heads.lineages, heads.probabilities, heads.entropy


def _votes(matcher: Matcher, candidates: Candidates, voting: Voting) -> Votes:
    return count_votes(matcher, rank_candidates(candidates, voting, matcher.settings.aligned), voting, candidates.heads)


def _best_voting(matcher: Matcher, fitting: Candidates) -> Voting:
    """Returns the weights with the most correct names over all ranks, the first of equals, if they are clearly better.

    The default stays unless others gain more than two standard errors, where all barcodes of one taxon count as one draw.
    Most of what the best of so many weights gains on the barcodes of a few hundred species is chance: it names fewer of
    other species than the default does.
    """
    truth = _truth(fitting)
    _, taxon = np.unique(truth, axis=0, return_inverse=True)

    def correct(voting: Voting) -> Float64[np.ndarray, " taxa"]:
        taxa = _votes(matcher, fitting, voting).taxa
        return np.bincount(taxon.reshape(-1), ((taxa == truth) & (taxa >= 0)).sum(axis=1))

    settings = matcher.settings
    tried = []
    for head in (0.0,) if fitting.heads is None else _HEAD_WEIGHTS:
        if settings.rerank == "none":
            tried += [Voting(power=power, head_weight=head) for power in _POWERS]
            continue
        weights = _IDENTITY_WEIGHTS if settings.identity_weight is None else (settings.identity_weight,)
        temperatures = _TEMPERATURES if settings.temperature is None else (settings.temperature,)
        saturations = _SATURATIONS if settings.saturation is None else (settings.saturation,)
        tried += [
            Voting(identity_weight=weight, saturation=saturation, temperature=temperature, head_weight=head)
            for saturation in saturations
            for weight in weights
            for temperature in temperatures
        ]
    default = default_voting(settings, heads=fitting.heads is not None)
    before, best, most = correct(default), default, 0.0
    for voting in tried:
        gained = correct(voting) - before
        if gained.sum() > max(most, _CLEARLY * np.sqrt((gained**2).sum())):
            best, most = voting, gained.sum()
    return best


def _fit_novelty(
    fitting: _Labelled, testing: _Labelled, fit: config.CalibrateConfig
) -> tuple[Logistic | None, float | None]:
    """Fits the novelty score and its threshold; (None, None) if all species are in the reference, or none is."""
    features, labels = fitting.novelty
    if labels.all() or not labels.any():
        return None, None
    fitted = fit_logistic(features, labels)
    features, labels = testing.novelty
    return fitted, novelty_threshold(fitted(features[~labels]), 1 - fit.precision)


def _lines(held_out: _Labelled, fitted: Calibration) -> list[str]:
    """Describes how the calibration does on the held-out barcodes."""
    sure = answered(fitted.ranks, confidences(fitted.ranks, held_out.votes))
    lines = [f"        vote  {fitted.voting}"]
    lines.append(
        f"    held out  {len(held_out.candidates.texts):,} barcodes, with the thresholds for precision {fitted.precision}:"
    )
    lines += [f"              {line}" for line in rank_accuracy(held_out.votes.taxa, sure, held_out.truth)]
    for rank, name in enumerate(RANKS):
        if fitted.ranks[rank].threshold is None:
            lines.append(f"              {name}: never answered, since no threshold reaches the precision")
    if fitted.novelty is None:
        return [*lines, "     novelty  not fitted: it needs barcodes of species in the reference and of others"]
    from sklearn.metrics import roc_auc_score

    features, labels = held_out.novelty
    if labels.all() or not labels.any():
        return [
            *lines,
            "     novelty  not measured: the held-out barcodes are all in the reference by species, or none is",
        ]
    scores = fitted.novelty(features)
    area = roc_auc_score(labels, scores)
    flagged = scores > (np.inf if fitted.novelty_threshold is None else fitted.novelty_threshold)
    return [
        *lines,
        f"     novelty  AUROC {area:.4f}; flagged as novel: {flagged[labels].mean():.4f} of {labels.sum():,} barcodes of "
        f"species not in the reference, {flagged[~labels].mean():.4f} of {(~labels).sum():,} of species in it",
    ]


def rank_features(votes: Votes, rank: int) -> Float64[np.ndarray, "rows 3"]:
    """Returns log distance to the taxon's nearest reference, log ratio to that of another taxon, logit of the share."""
    share = np.clip(votes.share[:, rank], _SHARE_CLIP, 1 - _SHARE_CLIP)
    with np.errstate(invalid="ignore"):  # without a candidate, both are -inf
        near, other = np.log(votes.near[:, rank]), np.log(votes.other[:, rank])
    return np.nan_to_num(np.stack([near, other - near, np.log(share / (1 - share))], axis=1), posinf=0.0, neginf=0.0)


def novelty_features(votes: Votes, candidates: Candidates) -> Float64[np.ndarray, "rows features"]:
    """Returns log distance to the nearest reference, log edit distance, and entropy of a head's species probabilities.

    The second is that of the candidate that has least, after alignment; the third is there with a head.
    """
    columns, edits = [np.log(votes.nearest)], candidates.edit_distances
    if edits is not None:
        columns.append(np.log(edits.min(axis=1, initial=np.inf)))
    if candidates.heads is not None:
        columns.append(candidates.heads.entropy.astype(np.float64))
    return np.nan_to_num(np.stack(columns, axis=1), posinf=0.0)


def confidences(ranks: Sequence[RankFit], votes: Votes) -> Float64[np.ndarray, "rows 7"]:
    """Returns the probability that each name is correct: at most that of the named ranks above; 0 where there is no name."""
    found = np.stack([fit.logistic(rank_features(votes, rank)) for rank, fit in enumerate(ranks)], axis=1)
    named = votes.taxa >= 0
    return np.minimum.accumulate(np.where(named, found, 1.0), axis=1) * named


def passed(ranks: Sequence[RankFit], confidence: Float64[np.ndarray, "rows 7"]) -> Bool[np.ndarray, "rows 7"]:
    """Returns which ranks reach their thresholds, as all ranks above do; a blank rank above a name is passed over."""
    thresholds = [np.inf if fit.threshold is None else fit.threshold for fit in ranks]
    named = confidence > 0
    named_below = np.logical_or.accumulate(named[:, ::-1], axis=1)[:, ::-1]
    return np.logical_and.accumulate((confidence >= np.array(thresholds)) & named | ~named & named_below, axis=1)


def answered(ranks: Sequence[RankFit], confidence: Float64[np.ndarray, "rows 7"]) -> Bool[np.ndarray, "rows 7"]:
    """Returns which ranks are answered: those with a name that `passed`."""
    return passed(ranks, confidence) & (confidence > 0)


def fit_ranks(
    fitting: tuple[Votes, Int32[np.ndarray, "rows 7"]],
    testing: tuple[Votes, Int32[np.ndarray, "rows_2 7"]],
    fit: config.CalibrateConfig,
) -> tuple[RankFit, ...]:
    """Fits the confidences on some labelled barcodes and the thresholds on others.

    A confidence is a logistic regression on `rank_features` (Platt 1999). The thresholds of a rank are tried from the
    strictest on, each answering 2 % more, until the exact binomial test at level `risk` no longer shows a precision
    of at least `precision`; the last one that passes is taken. Testing in an order fixed beforehand keeps the level for
    all of them (Angelopoulos et al. 2021, Learn then Test, arXiv:2110.01052).

    Args:
        fitting: Votes and true taxa (-1 unknown, -2 not in the reference) to fit the confidences on.
        testing: Votes and true taxa to fit the thresholds on.
        fit: Precision and risk.
    """
    ranks: list[RankFit] = []
    for rank in range(len(RANKS)):
        votes, truth = fitting
        known = (truth[:, rank] != -1) & (votes.taxa[:, rank] >= 0)
        right = (votes.taxa[:, rank] == truth[:, rank])[known]
        ranks.append(RankFit(fit_logistic(rank_features(votes, rank)[known], right, _SIGNS), None))
    votes, truth = testing
    confidence = confidences(ranks, votes)
    open_rows = np.ones(len(truth), bool)
    for rank, fitted in enumerate(ranks):
        known = open_rows & (truth[:, rank] != -1) & (votes.taxa[:, rank] >= 0)
        right = (votes.taxa[:, rank] == truth[:, rank])[known]
        threshold = fit_threshold(confidence[known, rank], right, fit.precision, fit.risk)
        ranks[rank] = RankFit(fitted.logistic, threshold)
        open_rows &= (confidence[:, rank] >= (np.inf if threshold is None else threshold)) | (votes.taxa[:, rank] < 0)
    return tuple(ranks)


def fit_logistic(
    features: Float64[np.ndarray, "rows features"], yes: Bool[np.ndarray, " rows"], signs: Sequence[int] = ()
) -> Logistic:
    """Fits a logistic regression; a constant if all labels are equal: their share, with half a row added per class.

    Args:
        features: Features of the rows.
        yes: Labels.
        signs: 1 or -1 for each feature whose effect is known to rise or fall: one that comes out the other way, by
            chance, has no effect.
    """
    if not len(yes) or yes.all() or not yes.any():
        share = (yes.sum() + 0.5) / (len(yes) + 1)
        return Logistic((0.0,) * features.shape[1], float(np.log(share / (1 - share))))
    from sklearn.linear_model import LogisticRegression

    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > _CONSTANT * np.maximum(np.abs(mean), 1), scale, np.inf)
    fitted = LogisticRegression(max_iter=1000).fit((features - mean) / scale, yes)
    coefficients = fitted.coef_[0] / scale
    wrong = coefficients * np.array([*signs, *[0] * (len(mean) - len(signs))]) < 0
    if wrong.any():
        return fit_logistic(np.where(wrong, 0.0, features), yes, signs)
    return Logistic(tuple(coefficients.tolist()), float(fitted.intercept_[0] - coefficients @ mean))


def fit_threshold(
    confidence: Float64[np.ndarray, " rows"], right: Bool[np.ndarray, " rows"], precision: float, risk: float
) -> float | None:
    """Finds the lowest threshold whose answers are shown to reach the precision; see `fit_ranks`.

    The first one tried answers a tenth of the rows, or as many as the test needs if all are correct.
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
        count = min(max(answers + 1, count + math.ceil(_THRESHOLD_STEP * len(order))), len(order))
    return found


def novelty_threshold(known_scores: Float64[np.ndarray, " known"], false_share: float) -> float | None:
    """Finds the score that at most `false_share` of the barcodes of known species exceed.

    The (n + 1) (1 - false_share)-th smallest of n (split conformal; Vovk et al. 2005); None if n is too small.
    """
    n = len(known_scores)
    place = math.ceil((n + 1) * (1 - false_share))
    return float(np.sort(known_scores)[place - 1]) if place <= n else None


def table_binding(facts: dict[str, str], rows: int) -> dict[str, Any]:
    """Identifies the table that a calibration is valid for: the vectors' plan, rows, and sha256 of model and adapter."""
    model = {"weights_sha256": facts["weights_sha256"], "adapter_sha256": facts.get("adapter_sha256")}
    return {"plan": facts["plan"], "rows": rows, **model}


def settings_binding(settings: config.IdentifyConfig, search: str, heads: str | None) -> dict[str, Any]:
    """Selects the settings that a calibration depends on.

    Args:
        settings: Settings of the identification.
        search: `exact` or `index`.
        heads: sha256 of the heads, if any.
    """
    return {
        "k": settings.k,
        "rerank": settings.rerank,
        **{name: getattr(settings, name) if settings.rerank == "alignment" else None for name in _OF_ALIGNMENT},
        "filter": settings.filter,
        "search": search,
        "nprobes": settings.nprobes if search == "index" else None,
        "refine_factor": settings.refine_factor if search == "index" else None,
        "heads": heads,
    }


def find_calibration(
    reference: config.ReferenceConfig, matcher: Matcher, path: str | None = None
) -> tuple[Calibration | None, str]:
    """Finds the calibration for a table and settings; returns it with a line that names it, or tells why there is none.

    Args:
        reference: Where the table is.
        matcher: The table, its model and the settings.
        path: A file other than the one beside the table.

    Raises:
        InputError: The file belongs to another table, is damaged, or `path` does not exist.
    """
    where = path or sidecar_path(reference.uri, reference.table, "calibration")
    entries = _load(where, must_exist=path is not None)
    if not entries:
        return None, "none for this table: confidences are shares of the vote; bioscan calibrate fits one"
    table = table_binding(matcher.reference.facts, matcher.reference.dataset.count_rows())
    wanted = settings_binding(matcher.settings, matcher.search, matcher.heads_sha256)
    for entry in entries:
        different = [name for name, value in table.items() if entry.table.get(name) != value]
        if different:
            raise InputError(
                f"{where} is the calibration of another table (its {', '.join(different)} differ); run "
                "bioscan calibrate for this one, or remove the file"
            )
    for entry in entries:
        if entry.settings == wanted:
            return entry, f"{where}, precision {entry.precision} on {entry.fitted_on['rows']:,} labelled barcodes"
    others = "; ".join(
        ", ".join(f"{name} {value}" for name, value in entry.settings.items() if wanted.get(name) != value)
        for entry in entries
    )
    return None, f"none for these settings, only for {others}: confidences are shares of the vote"


def save_calibration(reference: config.ReferenceConfig, fitted: Calibration) -> str:
    """Writes a calibration to the file beside its table.

    Replaces those of other rows or of the same settings, and a file that cannot be used.
    """
    where = sidecar_path(reference.uri, reference.table, "calibration")
    try:
        before = _load(where)
    except InputError as error:
        logger.warning("%s; it is replaced", error)
        before = ()
    others = [e for e in before if e.table == fitted.table and e.settings != fitted.settings]
    with storage_errors(where):
        write_whole(where, to_json([*others, fitted]).encode())
    return where


def _load(where: str, *, must_exist: bool = False) -> tuple[Calibration, ...]:
    try:
        text = read_if_exists(where)
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error}); make it readable, or remove it") from error
    if text is None and must_exist:
        raise InputError(f"--calibration {where}: there is no such file; bioscan calibrate makes one")
    return () if text is None else from_json(text, where)


def to_json(entries: Sequence[Calibration]) -> str:
    """Formats calibrations as the file beside a table."""
    body = {"format": FORMAT, "calibrations": [asdict(entry) for entry in entries]}
    return json.dumps({"sha256": _digest(body), **body}, indent=1) + "\n"


def from_json(text: str | bytes, where: str) -> tuple[Calibration, ...]:
    """Reads the file that `to_json` formats.

    Raises:
        InputError: The file is damaged, or another version made it.
    """
    try:
        body = json.loads(text)
        if body.pop("sha256") != _digest(body):
            raise ValueError("its checksum is wrong")
        if body["format"] == FORMAT:
            return tuple(_read(entry) for entry in body["calibrations"])
        made_by = str(body["format"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where} is damaged or was edited ({error}); run bioscan calibrate again") from error
    raise InputError(
        f"{where} was fitted for the vote of another version ({made_by}, here {FORMAT}); run bioscan calibrate again"
    )


def _read(entry: dict[str, Any]) -> Calibration:
    def logistic(raw: dict[str, Any]) -> Logistic:
        return Logistic(tuple(raw["coefficients"]), raw["bias"])

    ranks = tuple(RankFit(logistic(fit["logistic"]), fit["threshold"]) for fit in entry["ranks"])
    novelty = None if entry["novelty"] is None else logistic(entry["novelty"])
    return Calibration(**entry | {"ranks": ranks, "novelty": novelty, "voting": Voting(**entry["voting"])})


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
