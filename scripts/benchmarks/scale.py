"""Tables of many rows and files, simulated: what a run over a hundred million barcodes does besides computing vectors."""

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.figures import Figures, at_least
from bioscan_jax import config
from bioscan_jax.barcodes.schemas import REJECTS
from bioscan_jax.bundles.bundle import bundle
from bioscan_jax.bundles.merge import import_bundle
from bioscan_jax.matching.reference import open_reference
from bioscan_jax.table.annotate import annotate
from bioscan_jax.table.columns import vector_schema
from bioscan_jax.table.compact import compact
from bioscan_jax.table.plan import Plan
from bioscan_jax.table.query import query
from bioscan_jax.table.reading import take_rows
from bioscan_jax.table.sink import VectorTable, write_fragments
from bioscan_jax.table.storage import table_path

_SCHEMA = vector_schema(pa.schema([("taxonomy", pa.string()), ("depth", pa.float64())]), 2, "float32")
_MADE_BY = dict.fromkeys(("dtype", "pooling", "layer", "strand", "phases", "max_tokens"), "-") | {"model": "simulated"}
_LARGE = 3 << 30
_LINEAGES = 1_000_000
_DIGITS = str.maketrans("0123456789", "abcdefghij")
_RESUME = "import sys; sys.path.append(sys.argv[4]); from benchmarks.scale import resume; resume(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"


def scale(
    part: Literal["labels", "search", "join", "fragments"],
    rows: int = 1_000_000,
    block_rows: int = 8192,
    directory: str | None = None,
) -> Figures:
    """Time one part of the work on simulated rows with vectors of two numbers, so that the disk holds them.

    labels: read the lineages of a reference, of which a million differ. search: prepare a reference, then turn the
    results of a query into rows. join: annotate a table, export a filtered bundle and import the bundle. fragments:
    commit, resume, query and compact a table of rows / block_rows fragments.

    Args:
        part: What to time.
        rows: Rows of the table.
        block_rows: Rows of a block, and of a fragment.
        directory: Where to write the tables; a temporary directory if absent.

    Raises:
        InputError: A number is too small, or the storage failed.
    """
    at_least(rows=(rows, 1), block_rows=(block_rows, 1))
    parts: dict[str, Callable[[str, int, int], Figures]] = {
        "labels": _labels,
        "search": _search,
        "join": _join,
        "fragments": _fragments,
    }
    with tempfile.TemporaryDirectory(dir=directory) as uri:
        figures: Figures = {"part": part, "rows": rows, "block_rows": block_rows}
        return figures | parts[part](uri, rows, block_rows) | {"peak_gb": _peak_gb()}


def _peak_gb() -> float:
    """Returns the largest resident memory of this process; getrusage counts that of its parent at the fork too."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9, 2)


def _open(uri: str, rows: int, block_rows: int) -> VectorTable:
    plan = Plan({"data": {"sequence_column": "dna_sequence"}, "rows": rows})
    return VectorTable.open(
        uri,
        "sequences",
        schema=_SCHEMA,
        plan=plan,
        provenance=_MADE_BY | {"weights_sha256": "0"},
        rows=rows,
        block_rows=block_rows,
        max_bytes_per_file=_LARGE,
    )


@functools.cache
def _lineages() -> pa.Array:
    """Returns a million different lineages, in letters, since a species with digits counts as unknown."""
    names = [f"{number:06d}".translate(str.maketrans("0123456789", "abcdefghij")) for number in range(_LINEAGES)]
    return pa.array(
        [f"Animalia;Arthropoda;Insecta;Diptera;Fam{s[:3]};Genus{s[:5]};Genus{s[:5]} species{s}" for s in names]
    )


def _block(first: int, stop: int) -> pa.Table:
    here = np.arange(first, stop)
    flat = pa.array(np.stack([np.cos(here), np.sin(here)], axis=1).astype(np.float32).reshape(-1))
    columns = [
        pa.array(here).cast(pa.string()),
        pa.array(here, pa.uint64()),
        pa.FixedSizeListArray.from_arrays(flat, 2),
        _lineages().take(pa.array(here % _LINEAGES)),
        pa.array(here % 4000 * 1.0),
    ]
    return pa.table(columns, schema=_SCHEMA)


def _fill(table: VectorTable, uri: str, rows: int, block_rows: int, stop: int, per_commit: int) -> None:
    """Commits blocks up to `stop`, each a fragment of its own."""
    while table.next_block < stop:
        blocks = range(table.next_block, min(table.next_block + per_commit, stop))
        files, count = [], 0
        for block in blocks:
            data = _block(block * block_rows, min((block + 1) * block_rows, rows))
            files += write_fragments(uri, "sequences", data, max_bytes_per_file=_LARGE)
            count += len(data)
        table.append_fragments(min(blocks.stop * block_rows, rows), files, count, REJECTS.empty_table())


def _make(uri: str, rows: int, block_rows: int) -> None:
    with _open(uri, rows, block_rows) as table:
        _fill(table, uri, rows, block_rows, -(-rows // block_rows), 500)


@contextmanager
def _timed(figures: Figures, name: str) -> Iterator[None]:
    """Notes the seconds of its block, and those of all its threads on processors."""
    begun, begun_on_core = time.perf_counter(), time.process_time()
    yield
    figures[name] = float(f"{time.perf_counter() - begun:.4g}")
    figures[name.replace("seconds", "core_seconds")] = float(f"{time.process_time() - begun_on_core:.4g}")


def _labels(uri: str, rows: int, block_rows: int) -> Figures:
    figures: Figures = {}
    _make(uri, rows, block_rows)
    reference = open_reference(config.ReferenceConfig(uri=uri))
    figures["peak_gb_before"] = _peak_gb()
    with _timed(figures, "read_seconds"):
        lineages = reference.lineages
    figures["text_gb"] = round(rows * len(_lineages()[0].as_py()) / 1e9, 2)
    figures["species"] = len(lineages[-1].dictionary)
    return figures


def _search(uri: str, rows: int, block_rows: int) -> Figures:
    """Times what a query costs besides Lance's own search, of which the row addresses are simulated."""
    figures: Figures = {}
    _make(uri, rows, block_rows)
    reference = open_reference(config.ReferenceConfig(uri=uri))
    with _timed(figures, "prepare_seconds"):
        addresses = reference.addresses
    random, seconds = np.random.default_rng(0), []
    figures["fragments"] = len(addresses.fragments)
    for _ in range(101):
        wanted = np.sort(random.integers(rows, size=10))
        given = (addresses.fragments[wanted // block_rows].astype(np.uint64) << np.uint64(32)) | (
            wanted % block_rows
        ).astype(np.uint64)
        begun = time.perf_counter()
        found = addresses.positions(given)
        seconds.append(time.perf_counter() - begun)
        if found.tolist() != wanted.tolist():
            raise RuntimeError(f"{found} were found for {wanted}")
    figures["positions_milliseconds_a_query"] = float(f"{1000 * np.median(seconds):.3g}")
    with _timed(figures, "read_10_rows_seconds"):
        take_rows(reference.dataset, np.sort(random.integers(rows, size=10)), ["sequence_id", "taxonomy"])
    return figures


def _join(uri: str, rows: int, block_rows: int) -> Figures:
    figures: Figures = {}
    _make(uri, rows, block_rows)
    side = Path(uri) / "side.parquet"
    ids = pa.array(np.random.default_rng(0).permutation(rows)).cast(pa.string())
    pq.write_table(pa.table({"sequence_id": ids, "ship": pa.array(np.arange(rows) % 7)}), side)
    with _timed(figures, "annotate_seconds"):
        annotate(uri, str(side))
    with _timed(figures, "export_filtered_seconds"):
        bundle(uri, f"{uri}/few", filter="depth >= 2000", part_bytes=2 << 20, progress=False)
    bundle(uri, f"{uri}/all", part_bytes=2 << 20, progress=False)
    figures["parts"] = len(list(Path(f"{uri}/all/vectors").iterdir()))
    with _timed(figures, "import_seconds"):
        import_bundle(f"{uri}/all", f"{uri}/new")
    with _timed(figures, "import_again_seconds"):
        if import_bundle(f"{uri}/all", f"{uri}/new").existing != rows:
            raise RuntimeError("rows were imported twice")
    return figures


def resume(uri: str, rows: int, block_rows: int) -> None:
    """Opens an unfinished table, and prints seconds, peak memory before and after, and the next block."""
    lance.dataset(table_path(uri, "sequences"))
    before, begun = _peak_gb(), time.perf_counter()
    with _open(uri, rows, block_rows) as table:
        seconds = time.perf_counter() - begun
        print(json.dumps([seconds, before, _peak_gb(), table.next_block]))


def _fragments(uri: str, rows: int, block_rows: int) -> Figures:
    figures: Figures = {}
    blocks = -(-rows // block_rows)
    _lineages()
    with _open(uri, rows, block_rows) as table:
        for name, stop in (("first", 0), ("middle", blocks // 2), ("last", blocks - 21)):
            _fill(table, uri, rows, block_rows, stop, 500)
            begun = table.next_block
            with _timed(figures, f"{name}_20_commits_seconds"):
                _fill(table, uri, rows, block_rows, begun + 20, 1)
    told = subprocess.run(
        [sys.executable, "-c", _RESUME, uri, str(rows), str(block_rows), str(Path(__file__).parents[1])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds, before, after, block = json.loads(told.stdout)
    figures |= {"resume_seconds": round(seconds, 2), "resume_gb": after, "of_which_imports_gb": before}
    if block != blocks - 1:
        raise RuntimeError(f"it resumed at block {block} of {blocks}")
    with _open(uri, rows, block_rows) as table:
        _fill(table, uri, rows, block_rows, blocks, 1)
        with _timed(figures, "finish_seconds"):
            table.finish()
    _ask(uri, figures, "")
    with _timed(figures, "compact_seconds"):
        done = compact(uri)
    figures |= {"fragments": done.before, "fragments_compacted": done.after}
    _ask(uri, figures, "_compacted")
    return figures


def _ask(uri: str, figures: Figures, when: str) -> None:
    with _timed(figures, f"open_seconds{when}"):
        lance.dataset(table_path(uri, "sequences"))
    with _timed(figures, f"query_depth_seconds{when}"):
        query("SELECT count(*) FROM sequences WHERE depth BETWEEN 100 AND 110", uri)
    with _timed(figures, f"query_id_seconds{when}"):
        query("SELECT taxonomy FROM sequences WHERE sequence_id = '99'", uri)
