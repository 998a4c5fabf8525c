"""Shows how far a run is: a bar on the terminal, and lines on Weights & Biases."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from bioscan_jax import config
from bioscan_jax.dashboard import Dashboard, Mode
from bioscan_jax.embedding.summary import bytes_in_use, resident_bytes, versions
from bioscan_jax.notebook import progress_bar
from bioscan_jax.table.plan import Plan
from bioscan_jax.table.sink import VectorTable
from bioscan_jax.table.storage import table_path

ROWS_DONE = "embed/rows_done"
_SECONDS_BETWEEN_LINES = 2.0


class RunProgress:
    """Shows each commit of a run; created by `open_progress`."""

    def __init__(self, bar: tqdm, dashboard: Dashboard, rows: int, done: int) -> None:
        self._bar, self._dashboard, self._rows = bar, dashboard, rows
        self._done, self._seen = done, time.perf_counter()

    def update(
        self, done: int, table: VectorTable, distinct: int, *, workers: int | None = None, last: bool = False
    ) -> None:
        """Shows that rows are committed; Weights & Biases gets a line every few seconds.

        Args:
            done: Rows of the input that are in the table or its rejects.
            table: The table.
            distinct: Sequences that this run has embedded, copies of their vectors not counted.
            workers: Of a fleet, those that compute.
            last: There is nothing after this: closes the bar, and always writes a line.
        """
        self._bar.update(done - self._bar.n)
        if workers is not None:
            self._bar.set_postfix_str(f"{workers} workers")
        if last:
            self._bar.close()
        now = time.perf_counter()
        if not last and now - self._seen < _SECONDS_BETWEEN_LINES:
            return
        line = {
            ROWS_DONE: done,
            "embed/rows_pending": self._rows - done,
            "embed/vectors": table.vectors,
            "embed/rejects": table.rejects,
            "embed/distinct": distinct,
            # The driver of a fleet leaves the devices of its machine alone.
            "hardware/memory_used_gb": (bytes_in_use() if workers is None else resident_bytes()) / 1e9,
        }
        if done > self._done:
            line["hardware/throughput_rows_per_sec"] = (done - self._done) / (now - self._seen)
        if workers is not None:
            line["embed/workers"] = workers
        self._dashboard.send(line)
        self._done, self._seen = done, now


@contextmanager
def open_progress(
    tracking: config.TrackingConfig,
    mode: Mode,
    sink: config.SinkConfig,
    *,
    rows: int,
    resumed: int,
    plan: Plan,
    settings: Mapping[str, Any],
    shown: bool,
) -> Iterator[RunProgress]:
    """Opens the bar and a run on Weights & Biases; a run that continues a table is in the group of the earlier ones.

    Args:
        tracking: Project and name of the run.
        mode: From `mode_of`.
        sink: The table.
        rows: Rows of the input.
        resumed: How many of them were done by earlier runs.
        plan: What decides the rows of the table.
        settings: Shown as the run's config, with the plan, versions and the table.
        shown: Whether there is a bar.
    """
    facts = {
        "table": table_path(sink.uri, sink.table),
        "rows": rows,
        "resumed_at": resumed,
        "plan": plan.facts,
        "versions": versions(),
        **settings,
    }
    dashboard = Dashboard(
        tracking,
        mode if resumed < rows else "disabled",
        step=ROWS_DONE,
        settings=facts,
        elsewhere=f"its figures will be in {sink.table}.run.json",
        group=f"{sink.table} {plan.sha256[:12]}",
    )
    bar = progress_bar(total=rows, initial=resumed, unit="row", desc="embed", disable=not shown)
    with dashboard, bar:
        yield RunProgress(bar, dashboard, rows, resumed)
