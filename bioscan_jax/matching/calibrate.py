"""Confidences, thresholds and a novelty flag for one table and one way of using it, from labelled barcodes."""

import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from jaxtyping import Bool, Float64, Int32
from tqdm import tqdm

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.errors import InputError
from bioscan_jax.matching.alignment import workers
from bioscan_jax.matching.calibration import (
    Calibration,
    answered,
    confidences,
    fit_logistic,
    fit_ranks,
    from_json,
    novelty_features,
    novelty_threshold,
    settings_binding,
    table_binding,
    to_json,
)
from bioscan_jax.matching.match import Matched, Matcher, match, prepare, votes
from bioscan_jax.matching.queries import open_queries
from bioscan_jax.matching.vote import HeadVotes, Votes
from bioscan_jax.table.storage import local_directory, storage_errors

POWERS = (4.0, 8.0, 16.0, 32.0, 64.0)
HEAD_WEIGHTS = (0.0, 0.25, 0.5, 0.75)


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
    where = path or _beside(reference)
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
    where = _beside(reference)
    others = [e for e in _load(where) if e.table == fitted.table and e.settings != fitted.settings]
    text = to_json([*others, fitted]).encode()
    with storage_errors(where):
        if local_directory(reference.uri) is not None:
            partial = Path(f"{where}.partial")
            partial.write_bytes(text)
            partial.replace(where)
        else:
            filesystem, path = fsspec.core.url_to_fs(where)
            filesystem.pipe_file(path, text)
    return where


def _beside(reference: config.ReferenceConfig) -> str:
    local = local_directory(reference.uri)
    return f"{reference.uri.rstrip('/') if local is None else local}/{reference.table}.calibration.json"


def _load(where: str, *, must_exist: bool = False) -> tuple[Calibration, ...]:
    filesystem, path = fsspec.core.url_to_fs(where)
    try:
        text = filesystem.cat_file(path)
    except FileNotFoundError:
        if must_exist:
            raise InputError(f"--calibration {where}: there is no such file; scripts/calibrate.py makes one") from None
        return ()
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error}); mend that, or remove it") from error
    return from_json(text, where)


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
