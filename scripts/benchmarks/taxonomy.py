"""Taxonomy from vectors by the field's protocols: several models beside 6-mer frequencies and VSEARCH."""

import importlib
import importlib.util
import re
import tempfile
import time
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float32, Int32, Int64
from tqdm import tqdm

from benchmarks import vsearch
from benchmarks.figures import Cell, Figures, at_least, rounded
from benchmarks.identifying import simulated_files
from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean, reverse_complement, row_blocks, string_bytes
from bioscan_jax.barcodes.labels import name_codes
from bioscan_jax.barcodes.lineage import RANKS, read_lineages
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.embedding.load import load
from bioscan_jax.errors import InputError
from bioscan_jax.matching.neighbours import Neighbours, exact_in_blocks, unit
from bioscan_jax.matching.queries import open_queries

SPLITS = ("test_seen", "test_unseen_species", "test_unseen_genus")
"""Species that the reference has; species that it lacks, of genera that it has; genera that it lacks."""
_SPECIES, _GENUS = RANKS.index("species"), RANKS.index("genus")
_TASKS = ((0, "species"), (1, "genus"), (2, "family"), (2, "order"))
"""Which rank is asked of which of `SPLITS`."""
_FIXED = {"self", "return", "checkpoint", "sequences", "on_error", "normalize", "progress", "mesh", "heads"}
"""Parameters of `load` and `Encoder.encode` that are no settings of a model here."""
_SIX_MERS = 4**6
_LETTER = np.full(256, -1, np.int16)
_LETTER[np.frombuffer(b"ACGT", np.uint8)] = range(4)
_BLOCK_ROWS = 4096
_RESAMPLED = 4_000_000
"""Most counts of resampled queries that are held at a time."""
_STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Ridge penalties of the probe that are tried, in units of the mean variance of a dimension."""
_HELD_OUT = 1000
_COMPONENTS = 50
_BRIEF = 30.0
"""Seconds; a shorter embedding is timed a second time, without compiling."""

Embed = Callable[[pa.LargeStringArray], Float32[np.ndarray, "n d"]]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Cleaned barcodes and the codes of their names, -1 where unknown."""

    sequences: pa.LargeStringArray
    taxa: Int32[np.ndarray, "n 7"]


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model found."""

    neighbours: dict[str, Neighbours]
    """By variant of the queries."""
    seconds: dict[str, float]
    vectors: tuple[Float32[np.ndarray, "n d"], Float32[np.ndarray, "m d"]] | None = None
    """Of the reference and of the whole queries."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How neighbours are scored; see `taxonomy`."""

    k: int
    among: int
    temperature: float
    resamples: int
    seed: int


def taxonomy(
    reference: str | None = None,
    queries: str | None = None,
    models: tuple[str, ...] = ("6mer", "vsearch"),
    k: int = 5,
    among: int = 50,
    temperature: float = 0.02,
    lengths: tuple[int, ...] = (300, 150),
    probe: bool = True,
    cluster: int = 5000,
    resamples: int = 2000,
    threads: int = 2,
    seed: int = 0,
) -> Figures:
    """Compare models by the taxonomy of nearest neighbours, beside 6-mer frequencies and VSEARCH.

    A cell is the micro accuracy, its 95% interval over resampled queries (the same resamples for all models), and the
    macro accuracy, the mean over true taxa. `1nn` takes the name of the nearest reference; `knn_uniform` and
    `knn_softmax` let the k nearest vote, equally or with weight exp(similarity / temperature); `among` asks whether
    one of so many nearest is right; `probe` is a linear classifier on the frozen vectors (least squares on species with
    a ridge penalty that is chosen on held-out reference barcodes). `novelty` is the area under the ROC curve of the
    nearest similarity, seen species against unseen ones. `clustering` is the adjusted mutual information of Ward
    clusters of unseen queries with their genera and species, after UMAP (or PCA where umap-learn is not installed) to
    50 dimensions. `_300bp` are random stretches of the queries, `_reversed` their reverse complements. Queries whose
    true name is unknown are left out. Seconds are wall time on the whole queries; embedding under 30 s is timed a second
    time, so that compiling does not count, and VSEARCH's include reading the reference.

    Args:
        reference: Parquet with labels; simulated barcodes if absent.
        queries: Parquet with labels. A column `split` with test_seen, test_unseen_species and test_unseen_genus is
            used where there is one; otherwise the names that the reference has decide.
        models: Checkpoints as for `bioscan_jax.load`, each with settings of `load` and `Encoder.encode` after plus
            signs (random:nt-v2-50m+layer=0+phases=6); 6mer is the cosine of 6-mer frequencies over all phases
            (6mer+strand=both adds the other strand's); vsearch is usearch_global with maxaccepts 64, maxrejects 256, on
            both strands for reversed queries; it is left out where it is not installed.
        k: Neighbours that vote.
        among: Neighbours among which a right name is looked for.
        temperature: Of the softmax vote.
        lengths: Bases of the queries' random stretches.
        probe: Fit the linear probe.
        cluster: Most queries to cluster; 0 for none.
        resamples: Bootstrap resamples.
        threads: Of VSEARCH.
        seed: Random seed of stretches, resamples, held-out barcodes, clustering and the simulation.

    Raises:
        InputError: A number is too small, a model or a file is missing, or a file has no labels.
    """
    at_least(k=(k, 1), among=(among, 1), cluster=(cluster, 0), resamples=(resamples, 1), threads=(threads, 1))
    if temperature <= 0:
        raise InputError(f"--temperature {temperature} is too small; pass a number above 0")
    if min(lengths, default=6) < 6:
        raise InputError(f"--lengths {min(lengths)} is too small; pass at least 6 bases")
    if (reference is None) != (queries is None):
        raise InputError("--reference and --queries go together; pass both, or none for simulated barcodes")
    methods = [name for name in dict.fromkeys(models) if name != "vsearch" or vsearch.installed()]
    if not methods:
        raise InputError(
            f"--models {','.join(models)}: nothing to compare; pass a checkpoint, 6mer, or {vsearch.INSTALL}"
        )
    for name in methods:
        parse_model(name)
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        source = f"{queries} against {reference}"
        if reference is None or queries is None:
            reference, queries = simulated_files(at, seed)
            source = f"simulated, seed {seed}"
        library, asked, split, derived = read_labelled(reference, queries, at)
        variants = {"": asked.sequences}
        variants |= {f"_{length}bp": stretches(asked.sequences, length, seed) for length in lengths}
        variants["_reversed"] = reverse_complement(asked.sequences)
        found: Figures = {"input": source, "references": len(library.taxa), "rows": len(asked.taxa)}
        found |= {f"{name}_rows": int((split == i).sum()) for i, name in enumerate(SPLITS)}
        found |= {"splits": "by the reference's names" if derived else "column split"}
        found |= {"k": k, "among": among, "temperature": temperature, "resamples": resamples, "seed": seed}
        found["cells"] = "micro accuracy (95% interval) macro accuracy"
        if "vsearch" in models:
            missing = f"left out: not installed ({vsearch.INSTALL})"
            found["vsearch"] = f"{vsearch.version()}, {threads} threads" if "vsearch" in methods else missing
        if cluster:
            unseen = np.flatnonzero(split > 0)
            if len(unseen) > cluster:
                unseen = np.sort(np.random.default_rng(seed).choice(unseen, cluster, replace=False))
            found["clustering"] = f"{reducer(len(unseen))[1]}, then Ward; {len(unseen)} unseen queries"
        protocol = Protocol(k=k, among=among, temperature=temperature, resamples=resamples, seed=seed)
        nearest = min(max(k, among), len(library.taxa))
        rows: dict[str, dict[str, Cell]] = {}
        for name in tqdm(methods, desc="models", disable=None):
            if name == "vsearch":
                answers = ask_vsearch(library.sequences, variants, nearest, at, threads)
            else:
                answers = ask_vectors(make_embed(name), library.sequences, variants, nearest)
            of = {v: score(n, library.taxa, asked.taxa, split, protocol, v) for v, n in answers.neighbours.items()}
            cells: dict[str, Cell] = {**of.pop("")}
            if answers.vectors is not None:
                ours, theirs = answers.vectors
                seen = np.flatnonzero((split == 0) & (asked.taxa[:, _SPECIES] >= 0))
                if probe and len(seen):
                    truth = asked.taxa[seen, _SPECIES]
                    answer = linear_probe(ours, library.taxa[:, _SPECIES], theirs[seen], seed)
                    cells["seen_species_probe"] = accuracy(answer == truth, truth, resamples, seed)
                if cluster:
                    for rank, agreement in cluster_agreement(theirs[unseen], asked.taxa[unseen], seed).items():
                        cells[f"clustering_{rank}_ami"] = agreement
            for variant in of.values():
                cells |= variant
            for row, cell in (cells | {name: rounded(value) for name, value in answers.seconds.items()}).items():
                rows.setdefault(row, {})[name] = cell
        return found | rows


def parse_model(name: str) -> tuple[str, dict[str, str | int], dict[str, str | int]]:
    """Splits CHECKPOINT+setting=value+... into the checkpoint, settings of `load` and settings of `Encoder.encode`.

    Raises:
        InputError: There is no such setting.
    """
    checkpoint, *settings = re.split(r"\+(?=[a-z_]+=)", name)
    for_load, for_encode = typing.get_type_hints(load), typing.get_type_hints(Encoder.encode)
    known = {key: kind for key, kind in (for_encode | for_load).items() if key not in _FIXED}
    if checkpoint in ("6mer", "vsearch"):
        known = {"strand": known["strand"]} if checkpoint == "6mer" else {}
    of_load: dict[str, str | int] = {}
    of_encode: dict[str, str | int] = {}
    for setting in settings:
        key, text = setting.split("=", 1)
        if key not in known:
            has = f"its settings are {', '.join(known)}" if known else "it has no settings"
            raise InputError(f"--models {name}: {checkpoint} has no setting {key!r}; {has}")
        kinds = (known[key], *typing.get_args(known[key]))
        choices = [value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]
        if choices and text not in choices:
            raise InputError(f"--models {name}: {key}={text}; pass one of {', '.join(choices)}")
        if int in kinds and not re.fullmatch(r"-?\d+", text):
            raise InputError(f"--models {name}: {key}={text}; pass a whole number")
        (of_load if key in for_load else of_encode)[key] = int(text) if int in kinds else text
    return checkpoint, of_load, of_encode


def make_embed(name: str) -> Embed:
    """Returns the function that turns cleaned sequences into vectors, by a name from `--models`."""
    checkpoint, of_load, of_encode = parse_model(name)
    if checkpoint == "6mer":
        both = of_encode.get("strand", "forward") == "both"
        return lambda sequences: six_mers(sequences) + (six_mers(reverse_complement(sequences)) if both else 0)
    encoder = load(checkpoint, **of_load)  # pyright: ignore[reportArgumentType]
    # A stretch may have nothing but N: it has no vector, and zeros are near to nothing.
    return lambda sequences: np.nan_to_num(encoder.encode(sequences, on_error="nan", **of_encode))  # pyright: ignore


def six_mers(sequences: pa.LargeStringArray) -> Float32[np.ndarray, "n 4096"]:
    """Counts the 6-mers of cleaned sequences at every position; those with N are left out."""
    text, offsets = string_bytes(sequences)
    counts = np.empty((len(sequences), _SIX_MERS), np.float32)
    for first, last in row_blocks(offsets):
        letters = _LETTER[text[offsets[first] : offsets[last]]]
        row = np.repeat(np.arange(last - first), np.diff(offsets[first : last + 1]))
        places = max(len(letters) - 5, 0)
        code, whole = np.zeros(places, np.int64), row[:places] == row[len(row) - places :]
        for shift in range(6):
            window = letters[shift : shift + places]
            code, whole = 4 * code + window, whole & (window >= 0)
        cells = (row[:places] * _SIX_MERS + code)[whole]
        counts[first:last] = np.bincount(cells, minlength=(last - first) * _SIX_MERS).reshape(-1, _SIX_MERS)
    return counts


def read_labelled(
    reference: str, queries: str, scratch: Path
) -> tuple[Labelled, Labelled, Int64[np.ndarray, " queries"], bool]:
    """Reads both files; rows that are not DNA are left out.

    Returns:
        The reference, the queries, for each query the index in `SPLITS` or -1, and whether that was derived from names.

    Raises:
        InputError: A file cannot be read, has no labels or no DNA.
    """
    tables, sequences, names = [], [], []
    for path in (reference, queries):
        source = open_queries(config.QueryConfig(path=path), scratch)
        table = pa.concat_tables([source[block].table for block in range(len(source))])
        cleaned = clean(table[source.sequence_column])
        usable = cleaned.reasons.is_null()
        if not usable.true_count:
            raise InputError(f"{path}: none of the {table.num_rows} rows is DNA; pass barcodes")
        tables.append(table.filter(usable))
        try:
            names.append(read_lineages(tables[-1]))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        sequences.append(cleaned.sequences.filter(usable))
    taxa: tuple[list, list] = ([], [])
    for columns in zip(*names, strict=True):
        known = pa.concat_arrays(columns).drop_null().unique()
        for codes, column in zip(taxa, columns, strict=True):
            codes.append(name_codes(column, known))
    library, asked = (Labelled(text, np.stack(codes, axis=1)) for text, codes in zip(sequences, taxa, strict=True))
    if "split" in tables[1].column_names:
        split = name_codes(tables[1]["split"].cast(pa.string()).combine_chunks(), pa.array(SPLITS)).astype(np.int64)
        if (split >= 0).any():
            return library, asked, split, False
    return library, asked, derive_splits(library.taxa, asked.taxa), True


def derive_splits(
    library: Int32[np.ndarray, "n 7"], asked: Int32[np.ndarray, "queries 7"]
) -> Int64[np.ndarray, " queries"]:
    """Returns the index in `SPLITS` of each query by the names that the reference has; -1 where names are missing."""
    species, genus = asked[:, _SPECIES], asked[:, _GENUS]
    has_species, has_genus = np.isin(species, library[:, _SPECIES]), np.isin(genus, library[:, _GENUS])
    conditions = [(species >= 0) & has_species, (genus >= 0) & ~has_genus, (species >= 0) & (genus >= 0)]
    return np.select(conditions, [0, 2, 1], -1)


def stretches(sequences: pa.LargeStringArray, length: int, seed: int) -> pa.LargeStringArray:
    """Cuts a random stretch of at most `length` bases from each sequence."""
    texts = sequences.to_pylist()
    places = np.random.default_rng((seed, length)).random(len(texts))
    starts = [int(place * (max(len(text) - length, 0) + 1)) for place, text in zip(places, texts, strict=True)]
    return pa.array([text[a : a + length] for a, text in zip(starts, texts, strict=True)], pa.large_string())


def ask_vectors(
    embed: Embed, library: pa.LargeStringArray, variants: dict[str, pa.LargeStringArray], nearest: int
) -> Answers:
    """Finds the neighbours of each variant of the queries by cosine, the whole queries (the variant "") first."""
    seconds: dict[str, float] = {}
    neighbours: dict[str, Neighbours] = {}

    def timed(sequences: pa.LargeStringArray, name: str, per: int) -> Float32[np.ndarray, "n d"]:
        begun = time.perf_counter()
        vectors = embed(sequences)
        seconds[name] = (time.perf_counter() - begun) * per / len(sequences)
        return vectors

    references = timed(library, "reference_seconds", len(library))
    whole = timed(variants[""], "embed_seconds_per_1000", 1000)
    if seconds["embed_seconds_per_1000"] * len(whole) / 1000 < _BRIEF:
        timed(variants[""], "embed_seconds_per_1000", 1000)

    def blocks() -> Iterator[tuple[Int64[np.ndarray, " rows"], Float32[np.ndarray, "rows d"]]]:
        for first in range(0, len(references), _BLOCK_ROWS):
            block = references[first : first + _BLOCK_ROWS]
            yield np.arange(first, first + len(block)), block

    for variant, sequences in variants.items():
        vectors = embed(sequences) if variant else whole
        begun = time.perf_counter()
        neighbours[variant] = exact_in_blocks(vectors, blocks(), nearest)
        seconds.setdefault("search_seconds_per_1000", (time.perf_counter() - begun) * 1000 / len(vectors))
    return Answers(neighbours, seconds, (references, whole))


def ask_vsearch(
    library: pa.LargeStringArray, variants: dict[str, pa.LargeStringArray], nearest: int, at: Path, threads: int
) -> Answers:
    """Finds the neighbours of each variant of the queries by alignment."""
    neighbours: dict[str, Neighbours] = {}
    seconds: dict[str, float] = {}
    vsearch.write_fasta(library.to_pylist(), at / "reference.fasta")
    for variant, sequences in variants.items():
        vsearch.write_fasta(sequences.to_pylist(), at / "queries.fasta")
        begun = time.perf_counter()
        vsearch.usearch_global(
            at / "queries.fasta",
            at / "reference.fasta",
            at / "hits.tsv",
            effort=vsearch.DEEP,
            threads=threads,
            hits=nearest,
            both_strands=variant == "_reversed",
        )
        seconds.setdefault("search_seconds_per_1000", (time.perf_counter() - begun) * 1000 / len(sequences))
        neighbours[variant] = vsearch.read_hits(at / "hits.tsv", len(sequences), nearest)
    return Answers(neighbours, seconds)


def score(
    neighbours: Neighbours,
    library: Int32[np.ndarray, "n 7"],
    asked: Int32[np.ndarray, "queries 7"],
    split: Int64[np.ndarray, " queries"],
    protocol: Protocol,
    variant: str,
) -> dict[str, dict[str, float]]:
    """Computes what follows from the neighbours of the queries; votes for the whole ones (the variant "") alone."""
    cells: dict[str, dict[str, float]] = {}
    for place, rank in _TASKS:
        column = RANKS.index(rank)
        rows = np.flatnonzero((split == place) & (asked[:, column] >= 0))
        if not len(rows):
            continue
        truth, name = asked[rows, column], f"{SPLITS[place].removeprefix('test_')}_{rank}"
        taxa = np.append(library[:, column], np.int32(-1))[neighbours.rows[rows]]
        right = {"1nn": taxa[:, 0] == truth}
        if not variant:
            voters = taxa[:, : protocol.k]
            weights = softmax_weights(neighbours.similarity[rows, : protocol.k], protocol.temperature)
            right["knn_uniform"] = vote(voters, np.ones(voters.shape)) == truth
            right["knn_softmax"] = vote(voters, weights) == truth
            right[f"among_{protocol.among}"] = (taxa[:, : protocol.among] == truth[:, None]).any(axis=1)
        for method, correct in right.items():
            cells[f"{name}_{method}{variant}"] = accuracy(correct, truth, protocol.resamples, protocol.seed)
    known = np.flatnonzero(split >= 0)
    novel = split[known] > 0
    if novel.any() and not novel.all():
        nearest = np.maximum(neighbours.similarity[known, 0], -1.0)  # -inf where nothing was found
        cells[f"novelty_auroc{variant}"] = novelty(nearest, novel, protocol.resamples, protocol.seed)
    return cells


def softmax_weights(similarity: Float[np.ndarray, "n k"], temperature: float) -> Float[np.ndarray, "n k"]:
    """Returns exp(similarity / temperature), scaled so that the nearest has 1; 0 where there is no neighbour."""
    there = np.isfinite(similarity)
    fall = np.where(there, similarity, 0.0) - np.where(there, similarity, -np.inf).max(axis=1, keepdims=True)
    return np.where(there, np.exp(np.minimum(fall, 0.0) / temperature), 0.0)


def vote(taxa: Int32[np.ndarray, "n k"], weights: Float[np.ndarray, "n k"]) -> Int32[np.ndarray, " n"]:
    """Returns the taxon with the most weight; of equal ones that of the first neighbour; -1 if none has a name."""
    weights = np.where(taxa >= 0, weights, 0.0)
    total = np.zeros(taxa.shape)
    for j in range(taxa.shape[1]):
        total += (taxa == taxa[:, j : j + 1]) * weights[:, j : j + 1]
    best = np.where(taxa >= 0, total, -1.0).argmax(axis=1)
    return np.take_along_axis(taxa, best[:, None], axis=1)[:, 0]


def resampled(n: int, resamples: int, seed: int) -> Iterator[Int64[np.ndarray, "b n"]]:
    """Yields how often each of n queries is drawn in bootstrap resamples, in blocks; the same for the same numbers."""
    generator = np.random.default_rng(seed)
    size = max(1, _RESAMPLED // n)
    for first in range(0, resamples, size):
        block = min(size, resamples - first)
        drawn = generator.integers(n, size=(block, n)) + n * np.arange(block)[:, None]
        yield np.bincount(drawn.ravel(), minlength=block * n).reshape(block, n)


def accuracy(
    right: Bool[np.ndarray, " n"], truth: Int32[np.ndarray, " n"], resamples: int, seed: int
) -> dict[str, float]:
    """Computes micro accuracy and macro accuracy (the mean over true taxa) with 95% bootstrap intervals.

    Taxa that a resample lacks are left out of its mean.
    """
    order = np.argsort(truth, kind="stable")
    right, truth = right[order], truth[order]
    first = np.flatnonzero(np.append(True, np.diff(truth) != 0))

    def measure(counts: Int64[np.ndarray, "b n"]) -> tuple[Float[np.ndarray, " b"], Float[np.ndarray, " b"]]:
        drawn = np.add.reduceat(counts, first, axis=1)
        hits = np.add.reduceat(counts * right, first, axis=1)
        share = hits / np.maximum(drawn, 1)
        return hits.sum(axis=1) / drawn.sum(axis=1), share.sum(axis=1) / (drawn > 0).sum(axis=1)

    blocks = [measure(counts) for counts in resampled(len(right), resamples, seed)]
    found: dict[str, float] = {}
    for i, (name, value) in enumerate(zip(("", "macro"), measure(np.ones((1, len(right)), np.int64)), strict=True)):
        low, high = np.quantile(np.concatenate([block[i] for block in blocks]), (0.025, 0.975))
        found |= {name or "micro": rounded(value[0])}
        found |= {f"{name}_low".strip("_"): rounded(low), f"{name}_high".strip("_"): rounded(high)}
    return found


def auroc(
    score: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], counts: Int64[np.ndarray, "b n"]
) -> Float[np.ndarray, " b"]:
    """Computes the area under the ROC curve for each row of counts; nan where one class is not drawn.

    By hand, since scikit-learn takes one row of counts at a time, with a sort for each.
    """
    order = np.argsort(score, kind="stable")
    first = np.flatnonzero(np.append(True, np.diff(score[order]) != 0))
    above = np.add.reduceat(counts[:, order] * positive[order], first, axis=1)
    below = np.add.reduceat(counts[:, order] * ~positive[order], first, axis=1)
    pairs = (above.sum(axis=1) * below.sum(axis=1)).astype(float)
    return (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1) / np.where(pairs > 0, pairs, np.nan)


def novelty(
    similarity: Float[np.ndarray, " n"], novel: Bool[np.ndarray, " n"], resamples: int, seed: int
) -> dict[str, float]:
    """Computes how well a low similarity tells unseen species from seen ones, with a 95% bootstrap interval."""
    areas = np.concatenate([auroc(-similarity, novel, counts) for counts in resampled(len(novel), resamples, seed)])
    low, high = np.nanquantile(areas, (0.025, 0.975))
    (area,) = auroc(-similarity, novel, np.ones((1, len(novel)), np.int64))
    return {"area": rounded(area), "low": rounded(low), "high": rounded(high)}


def linear_probe(
    vectors: Float32[np.ndarray, "n d"],
    taxa: Int32[np.ndarray, " n"],
    asked: Float32[np.ndarray, "m d"],
    seed: int,
) -> Int32[np.ndarray, " m"]:
    """Names vectors by least squares on one-hot taxa with a ridge penalty, as scikit-learn's RidgeClassifier does.

    By hand, since RidgeClassifier needs a dense array of rows x taxa. The penalty is the one that names the most of up
    to 1,000 held-out vectors, one per taxon that has two.
    """
    from scipy.linalg import cho_factor, cho_solve

    vectors, taxa = unit(vectors[taxa >= 0]), taxa[taxa >= 0]
    names, of = np.unique(taxa, return_inverse=True)
    width, mean = vectors.shape[1], vectors.mean(axis=0)
    vectors, asked = vectors - mean, unit(asked) - mean
    if len(vectors) < width:  # the same in the space that the vectors span
        basis = np.linalg.qr(vectors.T)[0]
        vectors, asked = vectors @ basis, asked @ basis

    def scatter(rows: Int64[np.ndarray, " some"]) -> tuple[Float[np.ndarray, "d d"], Float[np.ndarray, "taxa d"]]:
        products, sums = np.zeros((vectors.shape[1],) * 2), np.zeros((len(names), vectors.shape[1]))
        for first in range(0, len(rows), _BLOCK_ROWS):
            some = rows[first : first + _BLOCK_ROWS]
            block = vectors[some]
            products += block.T @ block
            np.add.at(sums, of[some], block)
        return products, sums

    def classify(
        products: np.ndarray, sums: np.ndarray, counts: np.ndarray, strength: float, given: np.ndarray
    ) -> Int64[np.ndarray, " given"]:
        penalty = strength * np.trace(products) / width
        factor = cho_factor(products + penalty * np.eye(len(products)), overwrite_a=True)
        best = []
        for first in range(0, len(given), _BLOCK_ROWS):
            block = given[first : first + _BLOCK_ROWS]
            scores = cho_solve(factor, block.T.astype(float)).T @ sums.T + counts / counts.sum()
            best.append(scores.argmax(axis=1))
        return np.concatenate(best)

    products, sums = scatter(np.arange(len(vectors)))
    counts = np.bincount(of, minlength=len(names))
    shuffled = np.random.default_rng(seed).permutation(len(vectors))
    _, place = np.unique(of[shuffled], return_index=True)
    held = shuffled[place][counts > 1][:_HELD_OUT]
    strength = _STRENGTHS[0]
    if len(held):
        away, without = scatter(held)
        left = counts - np.bincount(of[held], minlength=len(names))
        right = [
            (classify(products - away, sums - without, left, one, vectors[held]) == of[held]).mean()
            for one in _STRENGTHS
        ]
        strength = _STRENGTHS[int(np.argmax(right))]
    return names[classify(products, sums, counts, strength, asked)]


def reducer(rows: int) -> tuple[str, str]:
    """Returns the method that reduces so many rows before clustering, and the words for it."""
    if rows <= 2 * _COMPONENTS:
        return "pca", "PCA (too few rows for UMAP)"
    if importlib.util.find_spec("umap") is None:
        return "pca", f"PCA to {_COMPONENTS} (umap-learn is not installed: pip install umap-learn)"
    return "umap", f"UMAP to {_COMPONENTS}"


def cluster_agreement(
    vectors: Float32[np.ndarray, "n d"], taxa: Int32[np.ndarray, "n 7"], seed: int
) -> dict[str, float]:
    """Computes the adjusted mutual information of Ward clusters, as many as there are taxa, with genera and species."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.decomposition import PCA
    from sklearn.metrics import adjusted_mutual_info_score

    if len(vectors) < 3:
        return {}
    vectors = unit(vectors)
    if reducer(len(vectors))[0] == "umap":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reduced = (
                importlib.import_module("umap")
                .UMAP(n_components=_COMPONENTS, random_state=seed, n_jobs=1)
                .fit_transform(vectors)
            )
    else:
        size = min(_COMPONENTS, len(vectors) - 1, vectors.shape[1])
        reduced = PCA(size, svd_solver="randomized", random_state=seed).fit_transform(vectors)
    found: dict[str, float] = {}
    for rank in ("genus", "species"):
        truth = taxa[:, RANKS.index(rank)]
        known = truth >= 0
        groups = len(np.unique(truth[known]))
        if groups > 1:
            clusters = AgglomerativeClustering(groups, linkage="ward").fit_predict(reduced[known])
            found[rank] = rounded(adjusted_mutual_info_score(truth[known], clusters))
    return found
