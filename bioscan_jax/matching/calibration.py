"""Confidences, thresholds and a novelty flag for one table and one way of using it, from labelled barcodes."""

import dataclasses
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int32
from tqdm import tqdm

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.errors import InputError
from bioscan_jax.matching.alignment import workers
from bioscan_jax.matching.candidates import Matched, Matcher, match, prepare, votes
from bioscan_jax.matching.queries import open_queries
from bioscan_jax.matching.vote import HeadVotes, Votes
from bioscan_jax.table.storage import read_if_exists, sidecar_path, storage_errors, write_whole

FORMAT = "bioscan_jax calibration 1"
POWERS = (4.0, 8.0, 16.0, 32.0, 64.0)
HEAD_WEIGHTS = (0.0, 0.25, 0.5, 0.75)
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


@dataclass(frozen=True, kw_only=True)
class CalibrationSummary:
    """What was fitted, and the figures of the barcodes that it was not fitted on."""

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
    wanted: config.CalibrateConfig | None = None,
    *,
    model: config.ModelConfig | None = None,
    mesh: config.MeshConfig | None = None,
    progress: bool = True,
) -> CalibrationSummary:
    """Fits a calibration on labelled barcodes and keeps it beside the table, as TABLE.calibration.json.

    The barcodes are parted by a seeded hash of their sequence: a share is held out for the figures; of the rest one
    half gives the vote's power and the confidences, the other the thresholds (see `calibration.fit_ranks`). A
    calibration of the same table for other settings stays in the file beside the new one.

    Args:
        reference: The table of vectors.
        query: Labelled barcodes like those to be identified: the precision holds for their mixture of known and
            unknown species.
        settings: As they will be identified.
        wanted: Precision, and how the barcodes are parted.
        model: Where the table's model is now, if not where the table says.
        mesh: Devices.
        progress: Show a bar on the terminal.

    Raises:
        InputError: Something the user can mend; then nothing is written.
    """
    settings, wanted, begun = (
        settings or config.IdentifyConfig(),
        wanted or config.CalibrateConfig(),
        time.perf_counter(),
    )
    with ExitStack() as held:
        source = open_queries(query, Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bioscan_jax-"))))
        matcher = prepare(reference, settings, model, mesh)
        worker = held.enter_context(workers(settings.processes if settings.rerank == "alignment" else 1))
        bar = held.enter_context(tqdm(total=source.rows, unit="row", desc="calibrate", disable=not progress))
        blocks = []
        for block in match(matcher, source, worker, bar.update):
            if block.truth is None:
                raise InputError(f"{query.path} has no labels; pass barcodes with taxonomy or the seven rank columns")
            blocks.append(dataclasses.replace(block, vectors=block.vectors[:, :0]))
    every = _joined(blocks)
    held_out, fitting, testing = parted(every.texts, wanted)
    power, head_weight = _best_weights(matcher, _picked(every, fitting))
    parts = {
        name: (votes(matcher, some, power, head_weight), some)
        for name, rows in (("fit", fitting), ("test", testing), ("held out", held_out))
        for some in [_picked(every, rows)]
    }
    fit, test = ((result, _truth(some)) for result, some in (parts["fit"], parts["test"]))
    ranks = fit_ranks(fit, test, wanted)
    novelty = _novelty(parts, wanted)
    fitted = Calibration(
        table=table_binding(matcher.reference.facts, matcher.reference.dataset.count_rows()),
        settings=settings_binding(settings, matcher.search, matcher.heads_sha256),
        power=power,
        head_weight=head_weight,
        ranks=ranks,
        novelty=novelty[0],
        novelty_threshold=novelty[1],
        precision=wanted.precision,
        risk=wanted.risk,
        fitted_on={
            "rows": len(fitting) + len(testing),
            "held_out": len(held_out),
            "seed": wanted.seed,
            "input": source.fingerprint,
        },
    )
    path = save(reference, fitted)
    return CalibrationSummary(
        path=path, calibration=fitted, lines=_lines(parts["held out"], fitted), seconds=time.perf_counter() - begun
    )


def parted(texts: Sequence[str], wanted: config.CalibrateConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows held out, rows to fit the confidences on, rows to fit the thresholds on; equal sequences stay together.

    Raises:
        InputError: One of the three is empty.
    """
    digests = [hashlib.sha256(f"{wanted.seed}:{text}".encode()).digest() for text in texts]
    draws = np.array([int.from_bytes(digest[:8]) / 2**64 for digest in digests])
    second = np.array([digest[8] < 128 for digest in digests], bool)
    out = draws < wanted.held_out
    found = np.flatnonzero(out), np.flatnonzero(~out & second), np.flatnonzero(~out & ~second)
    if not all(map(len, found)):
        raise InputError(f"{len(texts)} labelled barcodes are too few to part three ways; pass some hundred at least")
    return found


def figures(
    taxa: Int32[np.ndarray, "rows 7"], sure: Bool[np.ndarray, "rows 7"] | None, truth: Int32[np.ndarray, "rows 7"]
) -> list[str]:
    """How many guesses are right, rank by rank; and how many of those that are answered.

    Args:
        taxa: The guesses.
        sure: Which are answered; None without a calibration.
        truth: From `Taxa.truth`; rows with an unknown name do not count.
    """
    lines = []
    for rank, name in enumerate(RANKS):
        known = truth[:, rank] != -1
        if not known.any():
            continue
        right = (taxa[:, rank] == truth[:, rank]) & known
        line = f"{name:8} right {right.sum() / known.sum():.4f} of {known.sum():,}"
        if sure is not None:
            told = sure[:, rank] & known
            kept = f"{(right & told).sum() / told.sum():.4f}" if told.any() else "none"
            line += f"; answered {told.sum() / known.sum():.4f}, right of these {kept}"
        lines.append(line)
    return lines


def _truth(some: Matched) -> Int32[np.ndarray, "rows 7"]:
    assert some.truth is not None
    return some.truth


def _joined(blocks: list[Matched]) -> Matched:
    """All blocks as one."""
    heads = [block.heads for block in blocks if block.heads is not None]
    return dataclasses.replace(
        blocks[0],
        texts=[text for block in blocks for text in block.texts],
        **{name: np.concatenate([getattr(block, name) for block in blocks]) for name in _BY_QUERY},
        heads=None
        if not heads
        else HeadVotes(*(np.concatenate(part) for part in zip(*map(_fields, heads), strict=True))),
    )


_BY_QUERY = ("vectors", "rows", "similarity", "identity", "distances", "truth")


def _fields(heads: HeadVotes) -> tuple[Any, ...]:
    return heads.lineages, heads.probabilities, heads.entropy


def _picked(every: Matched, rows: np.ndarray) -> Matched:
    return dataclasses.replace(
        every,
        texts=[every.texts[row] for row in rows.tolist()],
        **{name: getattr(every, name)[rows] for name in _BY_QUERY},
        heads=None if every.heads is None else HeadVotes(*(part[rows] for part in _fields(every.heads))),
    )


def _best_weights(matcher: Matcher, some: Matched) -> tuple[float, float]:
    """The power and the head's weight with most right guesses over all ranks; the first of equals."""

    def tried() -> Iterator[tuple[int, float, float]]:
        for head_weight in HEAD_WEIGHTS if some.heads is not None else (0.0,):
            for power in POWERS:
                taxa = votes(matcher, some, power, head_weight).taxa
                yield int(((taxa == _truth(some)) & (taxa >= 0)).sum()), power, head_weight

    return max(tried(), key=lambda one: one[0])[1:]


def _novelty(parts: dict[str, tuple[Votes, Matched]], wanted: config.CalibrateConfig) -> tuple[Any, float | None]:
    """How novel a barcode is, fitted, and from where on it is called so; (None, None) without both kinds."""
    features, labels = _of_novelty(parts["fit"])
    if labels.all() or not labels.any():
        return None, None
    fitted = fit_logistic(features, labels)
    features, labels = _of_novelty(parts["test"])
    return fitted, novelty_threshold(fitted(features[~labels]), 1 - wanted.precision)


def _of_novelty(part: tuple[Votes, Matched]) -> tuple[Float64[np.ndarray, "rows features"], Bool[np.ndarray, " rows"]]:
    """Features of the rows with a known species, and whether it is missing from the reference."""
    result, some = part
    species = _truth(some)[:, -1]
    features = novelty_features(result, None if some.heads is None else some.heads.entropy)
    return features[species != -1], (species == -2)[species != -1]


def _lines(part: tuple[Votes, Matched], fitted: Calibration) -> list[str]:
    """Figures of the held-out barcodes."""
    result, some = part
    confidence = confidences(fitted.ranks, result)
    sure = answered(fitted.ranks, confidence)
    lines = [f"        vote  power {fitted.power:g}, head weight {fitted.head_weight:g}"]
    lines.append(f"    held out  {len(some.texts):,} barcodes; thresholds for precision {fitted.precision}:")
    lines += [f"              {line}" for line in figures(result.taxa, sure, _truth(some))]
    for rank, name in enumerate(RANKS):
        if fitted.ranks[rank].threshold is None:
            lines.append(f"              {name}: no threshold keeps the precision; it is never answered")
    if fitted.novelty is None:
        return [*lines, "     novelty  not fitted: it needs barcodes of species in the reference and of others"]
    from sklearn.metrics import roc_auc_score

    features, labels = _of_novelty(part)
    if labels.all() or not labels.any():
        return [*lines, "     novelty  no figure: the held-out barcodes are all of one kind"]
    scores = fitted.novelty(features)
    area = roc_auc_score(labels, scores)
    flagged = scores > (np.inf if fitted.novelty_threshold is None else fitted.novelty_threshold)
    return [
        *lines,
        f"     novelty  AUROC {area:.4f}; flagged {flagged[labels].mean():.4f} of {labels.sum():,} barcodes of species not "
        f"in the reference, {flagged[~labels].mean():.4f} of {(~labels).sum():,} of others",
    ]


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


def find_calibration(
    reference: config.ReferenceConfig, matcher: Matcher, path: str | None = None
) -> tuple[Calibration | None, str]:
    """The calibration for a table and settings, and a line that says which or why there is none.

    Args:
        reference: Where the table is.
        matcher: The table, its model and the settings.
        path: Another file than the one beside the table.

    Raises:
        InputError: The file is of another table, damaged, or not where `path` says.
    """
    where = path or sidecar_path(reference.uri, reference.table, "calibration")
    entries = _load(where, must_exist=path is not None)
    if not entries:
        return None, "none for this table: confidences are shares of the vote; scripts/calibrate.py makes one"
    table = table_binding(matcher.reference.facts, matcher.reference.dataset.count_rows())
    wanted = settings_binding(matcher.settings, matcher.search, matcher.heads_sha256)
    for entry in entries:
        different = [name for name, value in table.items() if entry.table.get(name) != value]
        if different:
            raise InputError(
                f"{where} is the calibration of another table (its {', '.join(different)} differ); run "
                "scripts/calibrate.py for this one, or remove it"
            )
    for entry in entries:
        if entry.settings == wanted:
            return entry, f"{where}, precision {entry.precision} on {entry.fitted_on['rows']:,} labelled barcodes"
    others = "; ".join(
        ", ".join(f"{name} {value}" for name, value in entry.settings.items() if wanted.get(name) != value)
        for entry in entries
    )
    return None, f"none for these settings (there are some with {others}): confidences are shares of the vote"


def save(reference: config.ReferenceConfig, fitted: Calibration) -> str:
    """Puts a calibration into the file beside its table, in place of one of other rows or of the same settings."""
    where = sidecar_path(reference.uri, reference.table, "calibration")
    others = [e for e in _load(where) if e.table == fitted.table and e.settings != fitted.settings]
    with storage_errors(where):
        write_whole(where, to_json([*others, fitted]).encode())
    return where


def _load(where: str, *, must_exist: bool = False) -> tuple[Calibration, ...]:
    try:
        text = read_if_exists(where)
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error}); mend that, or remove it") from error
    if text is None and must_exist:
        raise InputError(f"--calibration {where}: there is no such file; scripts/calibrate.py makes one")
    return () if text is None else from_json(text, where)


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
