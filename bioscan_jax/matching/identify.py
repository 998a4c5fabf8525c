"""Identifies barcodes: nearest references, alignment, vote, confidences, novelty."""

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import REASONS
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.data.fasta import SIZE_COLUMN
from bioscan_jax.devices.memory import memory_errors
from bioscan_jax.errors import InputError, logger
from bioscan_jax.location import check_output, output_file
from bioscan_jax.matching.alignment import worker_pool
from bioscan_jax.matching.answers import ANSWERS, DETAILS, output_format, write
from bioscan_jax.matching.calibration import (
    Calibration,
    answered,
    confidences,
    find_calibration,
    novelty_features,
    passed,
    rank_accuracy,
)
from bioscan_jax.matching.candidates import (
    Candidates,
    Evidence,
    Matcher,
    Ranked,
    alignment_recall,
    count_support,
    count_votes,
    find_candidates,
    index_recall,
    nearest_alignments,
    nearest_evidence,
    open_matcher,
    rank_candidates,
)
from bioscan_jax.matching.novel_groups import group_novel
from bioscan_jax.matching.partial import BlockAnswers, partial_answers
from bioscan_jax.matching.queries import check_query_ids, open_queries
from bioscan_jax.matching.vote import Votes, Voting, default_voting, without_names
from bioscan_jax.notebook import Shown, progress_bar, rows_html, text_html
from bioscan_jax.reports.darwin_core import Method, read_taxon_ids, write_archive

_HEAD = 10
"""Answers that a notebook shows,"""
_SHOWN = ["sequence_id", *RANKS[2:], "species_confidence", "nearest_id", "similarity", "identity", "novelty"]
"""and their columns."""
_DISTANT = 0.9
"""Identity with the nearest reference below which COI barcodes, and those of most other markers, are of other species."""
_BY_ALIGNMENT = "of the best alignments with the whole reference are among the candidates"
_BY_INDEX = "of the exact nearest neighbours are found by the index"


@dataclass(frozen=True, kw_only=True)
class IdentifySummary(Shown):
    """Counts and figures of one run of `identify`; prints as a few lines of text.

    Example:
        >>> counts = {"output": "names.tsv", "queries": 20, "rejects": {"empty": 1}, "unnamed": {"overlap": 2}, "novel": 3, "groups": None}
        >>> notes = {"search": "exact", "vote": "power 32, weight of the heads 0", "calibration": "none", "by_rank": [], "recall": (), "seconds": 1.5}
        >>> print(bj.IdentifySummary(**counts, **notes))
             answers  names.tsv
             queries  20; 1 without a vector: 1 empty
              search  exact
                vote  power 32, weight of the heads 0
         calibration  none
             unnamed  2 overlap below the floor
               novel  3 queries are likely of species not in the reference
             seconds  1.5
    """

    output: str
    queries: int
    rejects: dict[str, int]
    """Number of queries without a vector, by reason."""
    unnamed: dict[str, int]
    """Number of queries without names, by what their nearest reference lacks: `overlap` or `identity`."""
    search: str
    vote: str
    """The weights of the vote: fitted by the calibration, or the default."""
    calibration: str
    """The calibration that was used, or why there is none."""
    by_rank: list[str]
    """Lines on how many queries are answered at each rank, and how many correctly where they have labels."""
    novel: int | None
    groups: int | None
    recall: tuple[str, ...]
    """Lines on what `check_recall` measured."""
    seconds: float
    archive: tuple[str, ...] = ()
    """Lines on what a Darwin Core archive lacks."""
    distant: int | None = None
    """Without a calibration: queries that are named, although their nearest reference has an identity below 0.9."""
    head: pa.Table | None = dataclasses.field(default=None, repr=False, compare=False)
    """The first answers."""

    def __str__(self) -> str:
        """Lines for the terminal."""
        refused = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejects.items()))
        lines = [
            f"     answers  {self.output}",
            f"     queries  {self.queries:,}; {sum(self.rejects.values()):,} without a vector{refused and f': {refused}'}",
            f"      search  {self.search}",
            f"        vote  {self.vote}",
            f" calibration  {self.calibration}",
            *(f"              {line}" for line in self.by_rank),
        ]
        if self.unnamed:
            lacking = ", ".join(f"{count:,} {what}" for what, count in sorted(self.unnamed.items()))
            lines.append(f"     unnamed  {lacking} below the floor")
        if self.distant:
            lines.append(
                f"     distant  {self.distant:,} named queries have an identity under {_DISTANT} with their nearest "
                "reference, so that their species is hardly right; bioscan calibrate fits how far names hold"
            )
        if self.novel is not None:
            lines.append(f"       novel  {self.novel:,} queries are likely of species not in the reference")
        if self.groups is not None:
            lines.append(f"      groups  {self.groups:,} of novel queries")
        lines += [f"      recall  {line}" for line in self.recall]
        lines += [f"     archive  {line}" for line in self.archive]
        return "\n".join([*lines, f"     seconds  {self.seconds:.1f}"])

    def _repr_html_(self) -> str:
        return text_html(str(self)) + ("" if self.head is None else rows_html(self.head.select(_SHOWN)))


@memory_errors("identifying", "lower --k, or take a machine with more memory; bioscan doctor shows what there is")
def identify(
    reference: config.ReferenceConfig,
    query: config.QueryConfig,
    output: str,
    settings: config.IdentifyConfig | None = None,
    *,
    archive: config.ArchiveConfig | None = None,
    format: config.AnswerFormat | None = None,
    model: config.ModelConfig | None = None,
    mesh: config.MeshConfig | None = None,
    calibration: str | None = None,
    groups: str | None = None,
    group_size: int = 3,
    check_recall: int = 0,
    details: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> IdentifySummary:
    """Identifies barcodes by their nearest references and writes one row of names and confidences per barcode.

    The columns are `answers.ANSWERS`. The seven ranks hold the best guess (see `vote.vote`). With a calibration for
    this table and these settings the confidences are probabilities, `abstained_at` is the highest named rank whose confidence
    misses its threshold (this rank and all below are not answered; null if all seven are), and `novel` is true if the
    species is likely not in the reference. Without one, confidences are shares of the vote, `novelty` is 1 - identity
    (1 - similarity where nothing is aligned), and `novel` and `abstained_at` are null. A query has no names where its
    nearest reference is no evidence: `overlap` or `identity` is below `min_overlap` or `min_identity`; with `rerank`
    alignment, other such references do not vote either.

    Args:
        reference: The table of vectors.
        query: The barcodes to identify.
        output: FILE.parquet, FILE.tsv, FILE.sintax, or FILE.dwca.zip for a Darwin Core archive.
        settings: How barcodes are compared.
        archive: What a Darwin Core archive says beside the identifications.
        format: Format of the file, where its name does not tell.
        model: Where the table's model is now, if not where the table records it.
        mesh: Which devices.
        calibration: File made by `calibrate`; the one beside the table if absent.
        groups: File for groups of novel barcodes: candidate new taxa.
        group_size: Fewest barcodes in a group.
        check_recall: Number of random queries for which to measure how often the best alignment with any reference is
            among the k candidates (with `rerank` alignment), and how many of the exact k nearest the index finds (where
            it is used).
        details: Also write the DNA of each query as it was compared, its vector, and its alignment with the nearest
            reference (see `answers.DETAILS`), which `report` draws; a few kB per query, in FILE.parquet only.
        seed: Seed for drawing these queries.
        progress: Show a progress bar on the terminal.

    Raises:
        InputError: The table, the model, the settings or the barcodes are invalid; no file is written then.

    The answers of each block of 2,048 queries are kept in .NAME.blocks beside the output, also in a bucket, until it is
    whole: after a kill or an error, the same call continues there.

    Example:
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> _ = write_simulated("barcodes.parquet", species=20, per_species=4, length=120, seed=0)
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path="barcodes.parquet")
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri="vectors"), progress=False)
        >>> reference, query = bj.ReferenceConfig(uri="vectors"), bj.QueryConfig(path="barcodes.parquet")
        >>> summary = bj.identify(reference, query, "names.tsv", bj.IdentifyConfig(k=5), progress=False)
        >>> summary.queries, summary.search
        (80, 'exact, 80 references (68 distinct), k 5, rerank none')
    """
    start, settings = time.perf_counter(), settings or config.IdentifyConfig()
    form = output_format(output, format)
    group_form = None if groups is None else output_format(groups, None)
    if group_form not in (None, "parquet", "tsv"):
        raise InputError(f"--groups {groups}: groups are written as FILE.parquet or FILE.tsv")
    if group_size < 2 or check_recall < 0:
        raise InputError(f"--group_size {group_size} must be at least 2, --check_recall {check_recall} at least 0")
    if details and form != "parquet":
        raise InputError(f"--details with --output {output}: only Parquet holds vectors; pass FILE.parquet")
    archive = archive or config.ArchiveConfig()
    if form != "dwca" and archive != config.ArchiveConfig():
        raise InputError(
            "--taxon_ids, --title and the like describe a Darwin Core archive; pass --output FILE.dwca.zip"
        )
    taxon_ids = None if archive.taxon_ids is None else read_taxon_ids(archive.taxon_ids)
    with ExitStack() as held:
        scratch = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bioscan_jax-")))
        source = open_queries(query, scratch)
        check_output(output, inputs=source.urls)
        if groups is not None:
            check_output(groups, "groups", inputs=[*source.urls, output])
        try:
            check_query_ids(source)
        except InputError as error:
            if form == "dwca":
                raise
            logger.warning(f"{error}; the answers are in the order of the queries")
        pool = held.enter_context(worker_pool(settings.processes if settings.rerank == "alignment" else 1))
        matcher = open_matcher(reference, settings, model, mesh)
        if check_recall and settings.rerank == "none" and matcher.search == "exact":
            raise InputError("--check_recall has nothing to measure; pass --rerank alignment or --search index with it")
        found, note = find_calibration(reference, matcher, calibration)
        if groups is not None and (found is None or found.novelty_threshold is None):
            raise InputError(
                f"--groups needs a calibration with a novelty threshold: {note}; run bioscan calibrate first"
            )
        bar = held.enter_context(progress_bar(total=source.rows, unit="row", desc="identify", disable=not progress))
        sampled, voting = _sample(source.rows, check_recall, seed), _voting(found, matcher)
        facts = {
            "queries": [dataclasses.asdict(query), source.fingerprint, source.block_rows],
            "reference": [dataclasses.asdict(reference), matcher.reference.dataset.version, matcher.reference.facts],
            "settings": dataclasses.asdict(settings),
            "calibration": None if found is None else dataclasses.asdict(found),
            "heads": matcher.heads_sha256,
            "measured": [groups is not None, check_recall, details, seed],
            "software": metadata.version("bioscan_jax"),
        }
        kept = held.enter_context(partial_answers(output, facts, blocks=len(source)))
        bar.update(kept.rows)
        for block in _ahead(find_candidates(matcher, source, pool, bar.update, first_block=len(kept.blocks))):
            ranked = rank_candidates(block, voting, settings.aligned)
            result = count_votes(matcher, ranked, voting, block.heads)
            evidence = nearest_evidence(matcher, block.texts, ranked, pool)
            result = without_names(result, evidence.missing)
            table, sure = answers(matcher, block, ranked, evidence, result, found)
            if details:
                table = _with_details(table, matcher, block, ranked)
            arrays = {}
            if block.truth is not None:
                arrays |= {"taxa": result.taxa, "sure": sure, "truth": block.truth}
            if groups is not None:
                arrays["novel"] = block.vectors[_is_novel(table)[block.kept]]
            first = kept.rows
            in_block = sampled[(sampled >= first) & (sampled < first + len(block.ids))] - first
            sample = (np.cumsum(block.kept) - 1)[in_block[block.kept[in_block]]]
            recall = {}
            if len(sample) and settings.rerank == "alignment":
                recall[_BY_ALIGNMENT] = (len(sample), alignment_recall(matcher, block, sample, pool))
            if len(sample) and matcher.search == "index":
                recall[_BY_INDEX] = (len(sample), index_recall(matcher, block, sample))
            kept.add(BlockAnswers(answers=table, rejects=block.rejects, arrays=arrays, recall=recall))
        rows = pa.concat_tables([block.answers for block in kept.blocks])
        rejects = pa.concat_tables([block.rejects for block in kept.blocks])
        lacks = ()
        if form == "dwca":
            method = _method(reference, matcher, voting, found)
            with output_file(output) as path:
                lacks = write_archive(path, rows, source, _reasons(rejects), method, archive, taxon_ids)
        else:
            write(rows, output, form, calibrated=found is not None)
    count = None
    if groups is not None and group_form is not None:
        novel = rows.filter(pa.array(_is_novel(rows)))
        grouped = group_novel(
            novel["sequence_id"].to_pylist(),
            np.concatenate([block.arrays["novel"] for block in kept.blocks]),
            group_size,
        )
        count = len(grouped["group"].drop_null().unique())
        write(grouped, groups, group_form)
    return IdentifySummary(
        output=output,
        queries=rows.num_rows,
        rejects=dict(Counter(rejects["reason"].to_pylist())),
        unnamed=dict(Counter(rows["unnamed"].drop_null().to_pylist())),
        search=_search(matcher),
        vote=str(voting),
        calibration=note,
        by_rank=_by_rank(rows, [block.arrays for block in kept.blocks if "truth" in block.arrays], found),
        novel=None if rows["novel"].null_count == rows.num_rows else int(_is_novel(rows).sum()),
        groups=count,
        recall=_recall([block.recall for block in kept.blocks], settings.k),
        seconds=time.perf_counter() - start,
        archive=lacks,
        distant=None if found is not None else _count_distant(rows),
        head=rows.slice(0, _HEAD),
    )


def _count_distant(rows: pa.Table) -> int:
    """Counts the rows with a species whose nearest reference has a low identity."""
    identity = rows["identity"].to_numpy(zero_copy_only=False)
    return int((rows["species"].is_valid().to_numpy() & (identity < _DISTANT)).sum())


def _ahead(blocks: Iterator[Candidates]) -> Iterator[Candidates]:
    """Yields blocks of which a thread prepares the next one meanwhile."""
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            yield block


def _search(matcher: Matcher) -> str:
    """Describes the search in one line."""
    rows, distinct = len(matcher.reference.chosen), matcher.reference.copies.distinct
    copies = "" if distinct == rows else f" ({distinct:,} distinct)"
    return f"{matcher.search}, {rows:,} references{copies}, k {matcher.settings.k}, rerank {matcher.settings.rerank}"


def _reasons(rejects: pa.Table) -> dict[int, str]:
    """Returns why each rejected query has no vector, by its number."""
    return {
        row["source_row"]: f"{row['reason']} ({row['detail'] or REASONS[row['reason']]})" for row in rejects.to_pylist()
    }


def _method(reference: config.ReferenceConfig, matcher: Matcher, voting: Voting, found: Calibration | None) -> Method:
    settings, facts = matcher.settings, matcher.reference.facts
    version, rows = matcher.reference.dataset.version, len(matcher.reference.chosen)
    where = f" where {settings.filter}" if settings.filter else ""
    return Method(
        software=f"bioscan_jax {metadata.version('bioscan_jax')}",
        model=f"{facts['model']} (weights {facts['weights_sha256'][:12]})",
        reference=f"{reference.uri}, table {reference.table}, version {version}, {rows:,} sequences{where}",
        how=f"vote of the {settings.k} nearest references, rerank {settings.rerank}, {voting}",
        calibrated=found is not None,
    )


def _is_novel(rows: pa.Table) -> np.ndarray:
    return rows["novel"].fill_null(False).to_numpy()


def _voting(found: Calibration | None, matcher: Matcher) -> Voting:
    if found is not None:
        return found.voting
    return default_voting(matcher.settings, heads=matcher.heads is not None)


def answers(
    matcher: Matcher,
    block: Candidates,
    ranked: Ranked,
    evidence: Evidence,
    result: Votes,
    found: Calibration | None,
) -> tuple[pa.Table, np.ndarray]:
    """Makes the rows of a block, and which ranks of its kept queries are answered (all, without a calibration)."""
    confidence, sure = result.share, np.ones(result.share.shape, bool)
    abstained, novel = pa.nulls(len(confidence), pa.string()), pa.nulls(len(confidence), pa.bool_())
    similarity, identity = ranked.similarity[:, 0], evidence.identity
    novelty = np.where(np.isnan(identity), 1 - similarity, 1 - identity).astype(np.float64)
    if found is not None:
        confidence = confidences(found.ranks, result)
        sure, reached = answered(found.ranks, confidence), passed(found.ranks, confidence)
        names = [None if row.all() else RANKS[int(np.argmin(row))] for row in reached]
        abstained = pa.array(names, pa.string())
        if found.novelty is not None:
            novelty = found.novelty(novelty_features(result, block))
            if found.novelty_threshold is not None:
                novel = pa.array(novelty > found.novelty_threshold, mask=evidence.missing)
    columns: list[pa.Array] = []
    for rank, names in enumerate(matcher.taxa.names):
        columns.append(names.take(pa.array(result.taxa[:, rank], mask=result.taxa[:, rank] < 0)))
    columns += [pa.array(confidence[:, rank]) for rank in range(len(RANKS))]
    columns += [
        matcher.reference.take(ranked.rows[:, 0], "sequence_id").cast(pa.string()),
        pa.array(similarity),
        pa.array(identity, mask=np.isnan(identity)),
        pa.array(evidence.overlap, mask=np.isnan(identity)),
        pa.array(evidence.coverage, mask=np.isnan(identity)),
        pa.nulls(len(identity), pa.string()) if block.reverse is None else pa.array(np.where(block.reverse, "-", "+")),
        pa.array(count_support(matcher, ranked, result)),
        pa.array(evidence.lacks, pa.string()),
        pa.array(novelty, mask=evidence.missing),
        novel,
        abstained,
    ]
    place = pa.array(np.cumsum(block.kept) - 1, mask=~block.kept)
    rows = [block.ids, *(column.take(place) for column in columns)]
    table = pa.table([c.cast(f.type) for c, f in zip(rows, ANSWERS, strict=True)], schema=ANSWERS)
    return table if block.size is None else table.append_column(SIZE_COLUMN, block.size), sure


def _with_details(table: pa.Table, matcher: Matcher, block: Candidates, ranked: Ranked) -> pa.Table:
    """Adds the columns DETAILS, and the vectors."""
    found = nearest_alignments(matcher, block.texts, ranked)
    starts, cigars = ([None if one is None else one[part] for one in found] for part in (0, 1))
    place = pa.array(np.cumsum(block.kept) - 1, mask=~block.kept)
    for field, values in zip(DETAILS, (block.texts, starts, cigars), strict=True):
        table = table.append_column(field, pa.array(values, field.type).take(place))
    flat = pa.array(np.ascontiguousarray(block.vectors, np.float32).reshape(-1))
    return table.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, block.vectors.shape[1]).take(place))


def _by_rank(rows: pa.Table, judged: list[dict[str, np.ndarray]], found: Calibration | None) -> list[str]:
    if judged:
        taxa, sure, truth = (np.concatenate([block[name] for block in judged]) for name in ("taxa", "sure", "truth"))
        return rank_accuracy(taxa, sure if found is not None else None, truth)
    if found is None:
        return []
    stop = [RANKS.index(rank) if rank is not None else len(RANKS) for rank in rows["abstained_at"].to_pylist()]
    named = np.stack([rows[rank].is_valid().to_numpy() for rank in RANKS], axis=1)
    shares = ((np.array(stop)[:, None] > np.arange(len(RANKS))) & named).sum(axis=0)
    return [f"{rank:8} {int(share):,} are answered" for rank, share in zip(RANKS, shares, strict=True)]


def _sample(rows: int, wanted: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(rows, min(wanted, rows), replace=False))


def _recall(measured: list[dict[str, tuple[int, float]]], k: int) -> tuple[str, ...]:
    """Describes the shares over all blocks, one line for each measure."""
    lines = []
    for what in (_BY_ALIGNMENT, _BY_INDEX):
        shares = [block[what] for block in measured if what in block]
        if shares:
            total = sum(count for count, _ in shares)
            share = sum(count * part for count, part in shares) / total
            lines.append(f"{share:.4f} {what} (k {k}, {total} sampled queries)")
    return tuple(lines)
