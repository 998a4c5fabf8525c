"""Barcodes to names: nearest references, alignment, vote, and what the answer is worth."""

import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.errors import InputError
from bioscan_jax.matching.alignment import workers
from bioscan_jax.matching.answers import ANSWERS, output_format, write
from bioscan_jax.matching.calibration import (
    Calibration,
    answered,
    confidences,
    figures,
    find_calibration,
    novelty_features,
)
from bioscan_jax.matching.candidates import Matched, Matcher, best_in_reach, index_recall, match, prepare, votes
from bioscan_jax.matching.novel_groups import group
from bioscan_jax.matching.queries import open_queries
from bioscan_jax.matching.vote import POWER, Votes

HEAD_WEIGHT = 0.5
"""Of a head in the vote, until a calibration has fitted it."""
_IN_REACH = "of the best alignments with the whole reference are among the candidates"
_BY_INDEX = "of the exact nearest neighbours are found by the index"


@dataclass(frozen=True, kw_only=True)
class IdentifySummary:
    """What was found."""

    output: str
    queries: int
    rejects: dict[str, int]
    """Queries without a vector, by reason."""
    search: str
    calibration: str
    """Which one was used, or why there is none."""
    figures: list[str]
    """Lines on what was answered, and how much of it is right where the queries have labels."""
    novel: int | None
    groups: int | None
    recall: tuple[str, ...]
    """Lines on what `check_recall` found."""
    seconds: float

    def __str__(self) -> str:
        """Lines for the terminal."""
        refused = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejects.items()))
        lines = [
            f"     answers  {self.output}",
            f"     queries  {self.queries:,}; {sum(self.rejects.values()):,} without a vector{refused and f': {refused}'}",
            f"      search  {self.search}",
            f" calibration  {self.calibration}",
            *(f"              {line}" for line in self.figures),
        ]
        if self.novel is not None:
            lines.append(f"       novel  {self.novel:,} queries")
        if self.groups is not None:
            lines.append(f"      groups  {self.groups:,} of novel queries")
        lines += [f"      recall  {line}" for line in self.recall]
        return "\n".join([*lines, f"     seconds  {self.seconds:.1f}"])


def identify(
    reference: config.ReferenceConfig,
    query: config.QueryConfig,
    output: str,
    settings: config.IdentifyConfig | None = None,
    *,
    format: config.AnswerFormat | None = None,
    model: config.ModelConfig | None = None,
    mesh: config.MeshConfig | None = None,
    calibration: str | None = None,
    groups: str | None = None,
    group_size: int = 3,
    check_recall: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> IdentifySummary:
    """Names barcodes by their nearest references, one row each.

    The columns are `answers.ANSWERS`. The seven ranks hold the best guess (see `vote.vote`). With a calibration for
    this table and these settings the confidences are probabilities, `abstained_at` is the coarsest rank whose
    confidence misses its threshold (it and all below are not answered; null where all seven are), and `novel` says
    whether the species is likely not in the reference. Without one, confidences are shares of the vote, `novelty` is
    1 - identity (1 - similarity where nothing is aligned), and `novel` and `abstained_at` are null.

    Args:
        reference: The table of vectors.
        query: The barcodes.
        output: FILE.parquet, FILE.tsv or FILE.sintax.
        settings: How they are compared.
        format: Of the file, where its name does not say.
        model: Where the table's model is now, if not where the table says.
        mesh: Devices.
        calibration: File made by `calibrate`; the one beside the table if absent.
        groups: File for groups of novel barcodes: candidate new taxa.
        group_size: Barcodes of a group at least.
        check_recall: Of so many queries drawn at random, say how often the best alignment with any reference was among
            the k (with `rerank` alignment), and how many of the exact k nearest the index found (where it is used).
        seed: Of that sample.
        progress: Show a bar on the terminal.

    Raises:
        InputError: Something the user can mend; then no file is written.
    """
    settings, begun = settings or config.IdentifyConfig(), time.perf_counter()
    form = output_format(output, format)
    group_form = None if groups is None else output_format(groups, None)
    if group_form == "sintax":
        raise InputError(f"--groups {groups}: groups are written as FILE.parquet or FILE.tsv")
    if group_size < 2 or check_recall < 0:
        raise InputError(f"--group_size {group_size} must be at least 2, --check_recall {check_recall} at least 0")
    with ExitStack() as held:
        scratch = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bioscan_jax-")))
        source = open_queries(query, scratch)
        matcher = prepare(reference, settings, model, mesh)
        if check_recall and settings.rerank == "none" and matcher.search == "exact":
            raise InputError("--check_recall has nothing to check; pass --rerank alignment or --search index with it")
        found, note = find_calibration(reference, matcher, calibration)
        if groups is not None and (found is None or found.novelty_threshold is None):
            raise InputError(f"--groups needs to know what is novel, and {note}; run scripts/calibrate.py first")
        worker = held.enter_context(workers(settings.processes if settings.rerank == "alignment" else 1))
        bar = held.enter_context(tqdm(total=source.rows, unit="row", desc="identify", disable=not progress))
        tables, judged, novel_vectors, rejects = [], [], [], Counter()
        sampled = _sample(source.rows, check_recall, seed)
        reached: dict[str, list[tuple[int, float]]] = {}
        first = 0
        for block in match(matcher, source, worker, bar.update):
            result = votes(matcher, block, *_weights(found, matcher))
            table, sure = answers(matcher, block, result, found)
            tables.append(table)
            rejects.update(block.rejects["reason"].to_pylist())
            if block.truth is not None:
                judged.append((result.taxa, sure, block.truth))
            if groups is not None:
                flags = np.array(table["novel"].to_pylist(), object)[block.kept].astype(bool)
                novel_vectors.append(block.vectors[flags])
            here = sampled[(sampled >= first) & (sampled < first + len(block.ids))] - first
            here = (np.cumsum(block.kept) - 1)[here[block.kept[here]]]
            if len(here) and settings.rerank == "alignment":
                reached.setdefault(_IN_REACH, []).append((len(here), best_in_reach(matcher, block, here, worker)))
            if len(here) and matcher.search == "index":
                reached.setdefault(_BY_INDEX, []).append((len(here), index_recall(matcher, block, here)))
            first += len(block.ids)
    every = pa.concat_tables(tables)
    count = None
    if groups is not None and group_form is not None:
        novel = every.filter(every["novel"].fill_null(False))
        grouped = group(novel["sequence_id"].to_pylist(), np.concatenate(novel_vectors), group_size)
        count = len(grouped["group"].drop_null().unique())
        write(grouped, groups, group_form)
    write(every, output, form, calibrated=found is not None)
    return IdentifySummary(
        output=output,
        queries=every.num_rows,
        rejects=dict(rejects),
        search=f"{matcher.search}, {len(matcher.reference.chosen):,} references, k {settings.k}, rerank {settings.rerank}",
        calibration=note,
        figures=_figures(every, judged, found),
        novel=None
        if every["novel"].null_count == every.num_rows
        else int(every["novel"].fill_null(False).to_numpy().sum()),
        groups=count,
        recall=tuple(_recall(what, shares, settings.k) for what, shares in reached.items()),
        seconds=time.perf_counter() - begun,
    )


def _weights(found: Calibration | None, matcher: Matcher) -> tuple[float, float]:
    if found is not None:
        return found.power, found.head_weight
    return POWER, 0.0 if matcher.heads is None else HEAD_WEIGHT


def answers(matcher: Matcher, block: Matched, result: Votes, found: Calibration | None) -> tuple[pa.Table, np.ndarray]:
    """The rows of a block, and which ranks of its kept queries are answered (all, without a calibration)."""
    entropy = None if block.heads is None else block.heads.entropy
    confidence, sure = result.share, np.ones(result.share.shape, bool)
    abstained, novel = pa.nulls(len(confidence), pa.string()), pa.nulls(len(confidence), pa.bool_())
    novelty = _distance(block).astype(np.float64)
    if found is not None:
        confidence = confidences(found.ranks, result)
        sure = answered(found.ranks, confidence)
        names = [None if row.all() else RANKS[int(np.argmin(row))] for row in sure]
        abstained = pa.array(names, pa.string())
        if found.novelty is not None:
            novelty = found.novelty(novelty_features(result, entropy))
            if found.novelty_threshold is not None:
                novel = pa.array(novelty > found.novelty_threshold)
    columns: list[pa.Array] = []
    for rank, names in enumerate(matcher.taxa.names):
        columns.append(names.take(pa.array(result.taxa[:, rank], mask=result.taxa[:, rank] < 0)))
    columns += [pa.array(confidence[:, rank]) for rank in range(len(RANKS))]
    columns += [
        matcher.reference.take(block.rows[:, 0], "sequence_id").cast(pa.string()),
        pa.array(block.similarity[:, 0]),
        pa.array(block.identity[:, 0], mask=np.isnan(block.identity[:, 0])),
        pa.array(novelty),
        novel,
        abstained,
    ]
    place = pa.array(np.cumsum(block.kept) - 1, mask=~block.kept)
    rows = [block.ids, *(column.take(place) for column in columns)]
    return pa.table([c.cast(f.type) for c, f in zip(rows, ANSWERS, strict=True)], schema=ANSWERS), sure


def _distance(block: Matched) -> np.ndarray:
    """1 - identity of the nearest reference, or 1 - similarity where it was not aligned."""
    identity = block.identity[:, 0]
    return np.where(np.isnan(identity), 1 - block.similarity[:, 0], 1 - identity)


def _figures(every: pa.Table, judged: list[tuple[np.ndarray, ...]], found: Calibration | None) -> list[str]:
    if judged:
        taxa, sure, truth = (np.concatenate(part) for part in zip(*judged, strict=True))
        return figures(taxa, sure if found is not None else None, truth)
    if found is None:
        return []
    stop = [RANKS.index(rank) if rank is not None else len(RANKS) for rank in every["abstained_at"].to_pylist()]
    there = every["nearest_id"].is_valid().to_numpy()
    shares = ((np.array(stop)[:, None] > np.arange(len(RANKS))) & there[:, None]).sum(axis=0)
    return [f"{rank:8} answered {int(share):,}" for rank, share in zip(RANKS, shares, strict=True)]


def _sample(rows: int, wanted: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(rows, min(wanted, rows), replace=False))


def _recall(what: str, shares: list[tuple[int, float]], k: int) -> str:
    """One line: the share over all blocks."""
    total = sum(count for count, _ in shares)
    share = sum(count * part for count, part in shares) / total
    return f"{share:.4f} {what} (k {k}, {total} sampled queries)"
