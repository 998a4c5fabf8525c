"""The pipeline around the model: its rate, and whether its cost grows with the number of rows done."""

import dataclasses
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.barcodes import barcodes, describe_input, write_repeated
from benchmarks.figures import Figures, at_least, in_a_process, rounded, settle
from bioscan_jax import config
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.keys import abstract_model
from bioscan_jax.checkpoints.load import LoadedModel
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.sharding import Layout
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.embedding.run import embed_with
from bioscan_jax.embedding.step import CompiledSteps
from bioscan_jax.errors import InputError, Interrupted
from bioscan_jax.model.config import PRESETS
from bioscan_jax.table.storage import open_dataset, table_path

_SIZED_LIKE = "nt-v1-2.5b"
_ONCE = ("open", "load", "compile", "index")
"""Stages of a run whose time hardly depends on its rows."""
_HERE = "benchmarks.pipeline"
_MEMORY = 2 << 30
"""Bytes, more than a run needs."""


@dataclasses.dataclass
class NoCompute(CompiledSteps):
    """A model that costs nothing: its vectors are zeros, created on the devices."""

    def __post_init__(self) -> None:
        """Takes no parameters."""

    def __call__(self, ids: Int[np.ndarray, "b s"]) -> Float[Array, "b d"]:
        """Starts a batch on the devices and returns at once."""
        shape, sharding = BatchShape(*ids.shape), self.layout.batched(2)
        if shape not in self.shapes:
            start = time.perf_counter()
            width = self.model.config.hidden_size

            def zeros(ids: Int[Array, "b s"]) -> Float[Array, "b d"]:
                return jnp.zeros((ids.shape[0], width), jnp.float32)

            abstract = jax.ShapeDtypeStruct(ids.shape, jnp.int32, sharding=sharding)
            self.shapes[shape] = jax.jit(zeros, out_shardings=sharding).lower(abstract).compile()
            self.seconds += time.perf_counter() - start
        return self.shapes[shape](jax.device_put(ids, sharding))


def pipeline(
    data: config.DataConfig | None = None,
    rows: int = 60_000,
    more_rows: int = 0,
    resume_at: int = 0,
    seed: int = 0,
    repeats: int = 1,
    embed: config.EmbedConfig | None = None,
) -> Figures:
    """Measure the pipeline around a model that costs nothing, its vectors 2,560 wide as those of the 2.5B models.

    Reads, cleans, tokenises, batches, gathers and commits float32 vectors. Each run is a process of its own, started
    after earlier writes are on disk and with memory touched before; its rate counts the wall time from the first block
    read to the last one committed, without compiling.

    Args:
        data: Barcodes to use; 658 bp are simulated if absent.
        rows: Rows of a run; the barcodes are repeated under new ids where there are fewer.
        more_rows: Rows of a second, longer run, to compare rate and host memory; 0 for none.
        resume_at: Row near which that longer run (or the first, if there is none) is stopped within a block or two and
            resumed, to compare the time to the first commit; 0 for none.
        seed: Random seed of the simulation, or of the first row.
        repeats: Runs of each, whose medians are reported.
        embed: Batching and de-duplication.

    Raises:
        InputError: A number is too small or too large.
    """
    at_least(rows=(rows, 1), more_rows=(more_rows, 0), resume_at=(resume_at, 0), repeats=(repeats, 1))
    longest = max(rows, more_rows)
    if resume_at >= longest:
        raise InputError(f"--resume_at {resume_at} is past the {longest} rows; pass a smaller one")
    settings = {} if data is None else dataclasses.asdict(data)
    settings |= {"sequence_column": "dna_sequence", "id_column": "sequence_id"}
    found: Figures = {"input": describe_input(data, seed), "hidden_size": PRESETS[_SIZED_LIKE].hidden_size}
    with tempfile.TemporaryDirectory() as directory:
        given = barcodes(data, longest, seed)
        sizes = {"": rows} | ({"more_": more_rows} if more_rows else {})
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*sizes, "resumed_")}
        for name, size in sizes.items():
            write_repeated(given, size, Path(directory) / f"{name}input.parquet")
        for number in range(repeats):
            for name in sizes:
                runs[name].append(_run(directory, f"{name}input.parquet", f"{name}{number}", settings, embed))
            if resume_at:
                source, sink = f"{list(sizes)[-1]}input.parquet", f"stopped{number}"
                if _run(directory, source, sink, settings, embed, stop_at=resume_at):
                    raise InputError(f"--resume_at {resume_at}: the run ended before it stopped; pass fewer rows")
                runs["resumed_"].append(_run(directory, source, sink, settings, embed))
    for name, size in sizes.items():
        found[f"{name}rows"] = size
        for key in ("rows_per_second", "peak_host_gib", "device_busy", "waiting_for_input", "seconds_to_first_commit"):
            found[f"{name}{key}"] = _median(runs[name], key)
        found[f"{name}stage_seconds"] = str(runs[name][0]["stages"])
    if more_rows:
        for key in ("rows_per_second", "peak_host_gib"):
            found[f"{key}_ratio_more_to_less"] = rounded(_median(runs["more_"], key) / _median(runs[""], key))
    if resume_at:
        fresh = _median(runs[list(sizes)[-1]], "seconds_to_first_commit")
        found["resumed_at_row"] = runs["resumed_"][0]["resumed_at"]
        found["resumed_seconds_to_first_commit"] = _median(runs["resumed_"], "seconds_to_first_commit")
        found["resume_ratio_to_fresh_start"] = rounded(found["resumed_seconds_to_first_commit"] / fresh)
    return found


def _median(runs: list[dict[str, Any]], key: str) -> float | int:
    return rounded(float(np.median([run[key] for run in runs])))


def _run(
    directory: str, source: str, sink: str, settings: dict, embed: config.EmbedConfig | None, stop_at: int = 0
) -> dict[str, Any]:
    data = settings | {"path": f"{directory}/{source}"}
    wanted = dataclasses.asdict(embed or config.EmbedConfig())
    settle(_MEMORY)
    return in_a_process(f"{_HERE}:run_once", data=data, sink=f"{directory}/{sink}", embed=wanted, stop_at=stop_at)


def run_once(data: dict[str, Any], sink: str, embed: dict[str, Any], stop_at: int) -> dict[str, Any]:
    """Runs once in this process; with `stop_at`, it is interrupted once about that many rows are committed."""
    ended = threading.Event()
    if stop_at:
        # The block being written and the next one are committed before the run stops
        safe = max(1, stop_at - 2 * config.DataConfig(**data).block_rows)
        threading.Thread(target=_stop_at, args=(sink, safe, ended), daemon=True).start()
    try:
        summary = embed_with(
            _sized_like_the_largest,
            config.DataConfig(**data),
            config.SinkConfig(uri=sink),
            config.EmbedConfig(**embed),
            config.MeshConfig(compilation_cache=None),
            progress=False,
        )
    except Interrupted:
        return {}
    finally:
        ended.set()
    seconds = summary.seconds
    return {
        "rows_per_second": summary.counts.rows / (seconds["total"] - sum(seconds.get(name, 0.0) for name in _ONCE)),
        "peak_host_gib": summary.peak_host_bytes / 2**30,
        "device_busy": summary.device_busy,
        "waiting_for_input": summary.waiting_for_input,
        "seconds_to_first_commit": summary.seconds_to_first_commit,
        "resumed_at": summary.resumed_at,
        "stages": {name: round(seconds, 2) for name, seconds in summary.seconds.items()},
    }


def _stop_at(sink: str, rows: int, ended: threading.Event) -> None:
    path = table_path(sink, "sequences")
    while not ended.wait(0.02):
        dataset = open_dataset(path)
        if dataset is not None and dataset.count_rows() >= rows:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _sized_like_the_largest(layout: Layout) -> Encoder:
    transformer = PRESETS[_SIZED_LIKE]
    loaded = LoadedModel(
        model=abstract_model(transformer, jnp.float32, lm_head=False),
        config=transformer,
        vocabulary=Vocabulary.published("v1"),
        layout=layout,
        get_provenance=lambda: Provenance(
            model="zeros instead of a model", revision=None, weights_sha256="none", license=None, dtype="float32"
        ),
    )
    return Encoder(loaded=loaded, make_steps=NoCompute)
