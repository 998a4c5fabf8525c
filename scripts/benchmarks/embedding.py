"""Embedding from a Parquet file to a Lance table: ours, PyTorch as it was used, and PyTorch at its best."""

import statistics
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.barcodes import barcodes, describe_input, write_repeated
from benchmarks.checkpoints import preset_size, write_random
from benchmarks.figures import Figures, at_least, in_a_process, require, rounded
from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.embedding.run import embed as run_embed
from bioscan_jax.errors import InputError
from bioscan_jax.table.storage import open_dataset

_AGREE = 1e-4
_PEERS = "benchmarks.peers:embed_rows"
_OURS = "benchmarks.embedding:embed_ours"


def embed(
    data: config.DataConfig | None = None,
    rows: int = 2000,
    preset: str = "nt-v2-50m",
    seed: int = 0,
    repeats: int = 3,
    batch_tokens: int = 8192,
    padded_rows: int = 4,
    deduplicated: bool = True,
) -> Figures:
    """Compare embedding with PyTorch: the same random weights and rows, end to end from Parquet to a Lance table.

    Each run is a process of its own on all cores, in turns; rates are rows per second of wall time, medians of the
    runs. Loading the model is never counted; `ours_with_compiling` includes the first compilation, which the cache
    saves in later runs. `padded` is the old workflow, in which each row is padded to the model's longest; it is
    measured on a few rows, and its rate is taken for all. `sorted` sorts by length, pads to the longest row of a batch
    and fills our token budget; `tuned` does so with the fastest of four budgets on this machine.

    Args:
        data: Barcodes to embed; 658 bp are simulated if absent.
        rows: Number of rows, from a random one on.
        preset: Size of the model.
        seed: Random seed of the weights, and of the simulation or the first row.
        repeats: Runs of each.
        batch_tokens: Token budget of a batch: ours, and the largest of theirs.
        padded_rows: Rows on which the old workflow is measured, as one batch.
        deduplicated: Also measure ours, `sorted` and `tuned` on the distinct rows alone.

    Raises:
        InputError: A number is too small, a preset unknown, PyTorch not installed, or there is nothing to embed.
    """
    at_least(rows=(rows, 1), repeats=(repeats, 1), batch_tokens=(batch_tokens, 2), padded_rows=(padded_rows, 1))
    transformer = preset_size(preset)
    require("torch")
    given = barcodes(data, rows, seed)
    cleaned = clean(given)
    usable = pa.chunked_array([cleaned.sequences.filter(cleaned.reasons.is_null())])
    if not len(usable):
        raise InputError(f"none of the {len(given)} rows can be embedded; pass another --data.path or --seed")
    inputs = {"": usable} | ({"deduplicated_": usable.unique()} if deduplicated else {})
    found: Figures = {"input": describe_input(data, seed), "preset": preset, "repeats": repeats}
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        write_random(at / "model", transformer, seed)
        common: dict[str, Any] = {"checkpoint": str(at / "model"), "batch_tokens": batch_tokens}
        for prefix, sequences in inputs.items():
            sequences = pa.chunked_array([sequences]) if isinstance(sequences, pa.Array) else sequences
            path = str(at / f"{prefix}rows.parquet")
            write_repeated(sequences, len(sequences), Path(path))
            ours: list[dict[str, float]] = []
            counts = {"sorted": len(sequences), "tuned": len(sequences)}
            if not prefix:
                counts["padded"] = min(padded_rows, len(sequences))
            seconds: dict[str, list[float]] = {how: [] for how in counts}
            for number in range(repeats):
                sink = str(at / f"{prefix}{number}")
                ours.append(in_a_process(_OURS, path=path, sink=sink, **common))
                peer = common | {"path": path, "batch_rows": padded_rows}
                for how, count in counts.items():
                    rival = f"{sink}/{how}.lance"
                    taken = in_a_process(_PEERS, sink=rival, how=how, rows=count, **peer)
                    seconds[how].append(taken["seconds"] * len(sequences) / count)
                    check_same_vectors(f"{sink}/sequences.lance", rival)
                    if how == "tuned":
                        found[f"{prefix}tuned_torch_batch_tokens"] = int(taken["batch_tokens"])
            found |= _compared(prefix, len(sequences), ours, seconds)
            if not prefix:
                found["padded_torch_measured_on_rows"] = counts["padded"]
    return found | {
        "torch_version": metadata.version("torch"),
        "transformers_version": metadata.version("transformers"),
    }


def _compared(prefix: str, rows: int, ours: list[dict[str, float]], seconds: dict[str, list[float]]) -> Figures:
    warm = [run["seconds"] for run in ours]
    cold = [run["seconds"] + run["compile"] for run in ours]
    found: Figures = {f"{prefix}rows": rows, f"{prefix}sequences_computed": int(ours[0]["distinct"])}
    found[f"{prefix}computed_over_real_tokens"] = rounded(ours[0]["padding"])
    times = {"ours": warm, "ours_with_compiling": cold} | {f"{k}_torch": v for k, v in seconds.items()}
    for name, taken in times.items():
        found[f"{prefix}{name}_rows_per_second"] = rounded(rows / statistics.median(taken))
    for name, taken in seconds.items():
        for kind, mine in (("", warm), ("_with_compiling", cold)):
            ratios = [theirs / one for theirs, one in zip(taken, mine, strict=True)]
            found[f"{prefix}ratio_to_{name}{kind}"] = rounded(statistics.median(ratios))
    return found


def embed_ours(checkpoint: str, path: str, sink: str, batch_tokens: int) -> dict[str, float]:
    """Runs `embed` once in this process; returns its seconds without loading, and those of compiling separately."""
    summary = run_embed(
        config.ModelConfig(checkpoint=checkpoint, dtype="float32"),
        config.DataConfig(path=path),
        config.SinkConfig(uri=sink),
        config.EmbedConfig(batch_tokens=batch_tokens),
        config.MeshConfig(compilation_cache=None),
        progress=False,
    )
    taken = summary.seconds
    return {
        "seconds": taken["total"] - taken["load"] - taken["compile"],
        "compile": taken["compile"],
        "distinct": summary.counts.distinct,
        "padding": summary.tokens_computed / summary.tokens_real,
    }


def check_same_vectors(ours: str, theirs: str) -> None:
    """Raises RuntimeError if the vectors of two tables differ for an id, since their speeds mean nothing then."""
    tables = []
    for path in (ours, theirs):
        dataset = open_dataset(path)
        if dataset is None:
            raise RuntimeError(f"{path} was not written")
        tables.append(dataset.to_table(columns=["sequence_id", "vector"]).combine_chunks())
    row_of = {name: row for row, name in enumerate(tables[0]["sequence_id"].to_pylist())}
    rows = [row_of[name] for name in tables[1]["sequence_id"].to_pylist()]
    values = [table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1) for table in tables]
    difference = float(np.abs(values[0][rows] - values[1]).max() / np.abs(values[1]).max())
    if not difference <= _AGREE:
        raise RuntimeError(f"{theirs} differs from {ours} by {difference:.2g} of the largest value")
