"""Identification of barcodes, ours and VSEARCH's: fraction right and seconds. Needs the program vsearch."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import vsearch
from benchmarks.figures import Figures, at_least, in_a_process, rounded, run_in_turns
from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS, read_lineages
from bioscan_jax.barcodes.simulate import simulate
from bioscan_jax.embedding.run import embed
from bioscan_jax.errors import InputError
from bioscan_jax.matching.identify import identify as run_identify
from bioscan_jax.matching.queries import open_queries

_OURS = "benchmarks.identifying:identify_ours"
_SETTINGS = {"vsearch_quick": vsearch.QUICK, "vsearch_deep": vsearch.DEEP}
_SHOWN = ("order", "family", "genus", "species")
_SIMULATED_SPECIES, _SIMULATED_ROWS = 120, 8
Names = list[list[str | None]]
"""For each of RANKS, one name per row."""


def identify(
    reference: str | None = None,
    queries: str | None = None,
    checkpoint: str = "random:nt-v2-50m",
    layer: int = 0,
    phases: int = 6,
    k: int = 50,
    processes: int = 2,
    group: str = "split",
    check_recall: int = 200,
    repeats: int = 3,
    seed: int = 0,
) -> Figures:
    """Compare identification by vectors and alignment with VSEARCH's, on the same labelled barcodes and cores.

    Each run is a process of its own from files to a file, in turns; seconds are wall time with start and imports,
    medians of the runs (ours finds its compiled programs in the cache after the first). `reference_seconds` is the
    embedding of the reference, which is done once. The fractions of right names count unnamed barcodes as wrong and
    leave out barcodes whose true name is unknown; there is no cutoff. VSEARCH is `--usearch_global` with the names of
    its best hit; quick is `--maxaccepts 8 --maxrejects 64`, deep `64 256`.

    Args:
        reference: Parquet with labels; simulated barcodes if absent.
        queries: Parquet with labels.
        checkpoint: The model; random weights show what untrained vectors achieve.
        layer: Hidden state to pool; 0 is the embeddings.
        phases: Start offsets of the 6-mers to average.
        k: Nearest neighbours of a query that are aligned.
        processes: Processes of ours, threads of VSEARCH.
        group: Column of the queries; results are given for each of its values.
        check_recall: Queries that are also aligned with the whole reference, outside the timing; 0 for none.
        repeats: Runs of each.
        seed: Random seed of the weights and the simulation.

    Raises:
        InputError: A number is too small, VSEARCH is not installed, or a file is missing or has no labels.
    """
    at_least(k=(k, 1), processes=(processes, 1), repeats=(repeats, 1), check_recall=(check_recall, 0))
    if (reference is None) != (queries is None):
        raise InputError("--reference and --queries go together; pass both, or none for simulated barcodes")
    vsearch.require_vsearch()
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        if reference is None or queries is None:
            reference, queries = simulated_files(at, seed)
            source = f"simulated, seed {seed}"
        else:
            source = f"{queries} against {reference}"
        library, asked = _read(reference, at / "reference.fasta"), _read(queries, at / "queries.fasta")
        uri, begun = str(at / "db"), time.perf_counter()
        embed(
            config.ModelConfig(checkpoint=checkpoint, seed=seed),
            config.DataConfig(path=reference),
            config.SinkConfig(uri=uri),
            config.EmbedConfig(layer=layer, phases=phases),
            config.MeshConfig(compilation_cache=None),
            progress=False,
        )
        found: Figures = {"input": source, "checkpoint": checkpoint, "references": library.num_rows}
        found |= {"rows": asked.num_rows, "k": k, "processes": processes, "repeats": repeats}
        found |= {"reference_seconds": rounded(time.perf_counter() - begun)}
        ours: dict[str, Any] = {
            "uri": uri,
            "queries": queries,
            "output": str(at / "ours.parquet"),
            "cache": str(at / "cache"),
        }

        def task(name: str) -> Callable[[], object]:
            files = at / "queries.fasta", at / "reference.fasta", at / f"{name}.tsv"
            return lambda: vsearch.usearch_global(*files, effort=_SETTINGS[name], threads=processes)

        tasks: dict[str, Callable[[], object]] = {
            "ours": lambda: in_a_process(_OURS, k=k, processes=processes, check_recall=0, seed=seed, **ours)
        }
        tasks |= {name: task(name) for name in _SETTINGS}
        seconds = run_in_turns(tasks, repeats)
        for name, taken in seconds.items():
            found[f"{name}_seconds"] = rounded(statistics.median(taken))
        for name in _SETTINGS:
            ratios = [b / a for a, b in zip(seconds["ours"], seconds[name], strict=True)]
            found[f"seconds_ratio_{name}_to_ours"] = rounded(statistics.median(ratios))
        answers = pq.read_table(at / "ours.parquet")
        named = {"ours": [answers[rank].to_pylist() for rank in RANKS]}
        named |= {name: _names_of_hits(at / f"{name}.tsv", library, asked.num_rows) for name in _SETTINGS}
        found |= _right(named, asked, group)
        if check_recall:
            wanted = {"k": k, "processes": processes, "check_recall": check_recall, "seed": seed}
            found["recall"] = in_a_process(_OURS, **ours, **wanted) or "none: no query has a vector"
        return found | {"vsearch_version": vsearch.version()}


def identify_ours(
    uri: str, queries: str, output: str, cache: str, k: int, processes: int, check_recall: int, seed: int
) -> str | None:
    """Runs `identify` once in this process; returns the recall that `--check_recall` measured."""
    summary = run_identify(
        config.ReferenceConfig(uri=uri),
        config.QueryConfig(path=queries),
        output,
        config.IdentifyConfig(k=k, rerank="alignment", processes=processes),
        mesh=config.MeshConfig(compilation_cache=cache),
        check_recall=check_recall,
        seed=seed,
        progress=False,
    )
    return summary.recall[0] if summary.recall else None


def simulated_files(at: Path, seed: int) -> tuple[str, str]:
    """Writes simulated barcodes and returns the two files, reference and queries.

    The reference lacks every fifth species; the queries are these and a quarter of the others' barcodes.
    """
    table = simulate(species=_SIMULATED_SPECIES, per_species=_SIMULATED_ROWS, seed=seed)
    species, place = np.divmod(np.arange(table.num_rows), _SIMULATED_ROWS)
    unseen = species % 5 == 0
    asked = unseen | (place < _SIMULATED_ROWS // 4)
    kinds = pa.array(np.where(unseen, "unseen_species", "seen")[asked])
    pq.write_table(table.filter(pa.array(~asked)), at / "reference.parquet")
    pq.write_table(table.filter(pa.array(asked)).append_column("split", kinds), at / "queries.parquet")
    return str(at / "reference.parquet"), str(at / "queries.parquet")


def _read(path: str, fasta: Path) -> pa.Table:
    """Reads all rows of a file, and writes their DNA to a FASTA file under the row numbers."""
    source = open_queries(config.QueryConfig(path=path), fasta.parent)
    table = pa.concat_tables([source[block].table for block in range(len(source))])
    if not {"taxonomy", "species"} & set(table.column_names):
        raise InputError(
            f"{path} has no labels; pass barcodes with a column of lineages, or rank columns such as genus and species"
        )
    vsearch.write_fasta(table[source.sequence_column].to_pylist(), fasta)
    return table


def _names_of_hits(path: Path, library: pa.Table, rows: int) -> Names:
    """Returns the names of each row's best hit; None where there is no hit."""
    hits = vsearch.read_hits(path, rows).rows[:, 0]
    target = pa.array(hits, mask=hits < 0)
    return [names.take(target).to_pylist() for names in read_lineages(library)]


def _right(named: dict[str, Names], asked: pa.Table, group: str) -> Figures:
    """Computes the fraction of right names for each method, group and rank."""
    truth = [names.to_pylist() for names in read_lineages(asked)]
    kinds = np.array(
        asked[group].cast(pa.string()).fill_null("none").to_pylist() if group in asked.column_names else []
    )
    found: Figures = {}
    for kind in np.unique(kinds).tolist() or ["all"]:
        rows = np.flatnonzero(kinds == kind).tolist() if len(kinds) else range(asked.num_rows)
        found[f"{kind}_rows"] = len(rows)
        for rank in _SHOWN:
            i = RANKS.index(rank)
            known = [row for row in rows if truth[i][row] is not None]
            if known:
                for method, names in named.items():
                    right = sum(names[i][row] == truth[i][row] for row in known)
                    found[f"{method}_{kind}_{rank}_right"] = rounded(right / len(known))
    return found
