"""Metrics of a training run: metrics.jsonl always, and Weights & Biases if configured.

metrics.jsonl has one JSON object per line: `train/global_step` (optimizer steps done), then values by dashboard name.
NaN and infinities are written as null, since JSON has neither.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from bioscan_jax.config import TrackingConfig
from bioscan_jax.dashboard import Dashboard, mode_of
from bioscan_jax.errors import InputError
from bioscan_jax.output import whole_file
from bioscan_jax.training.run_directory import METRICS

STEP = "train/global_step"


@dataclass(kw_only=True)
class Tracker:
    """Logs the metrics of one run; created by `open_tracking`."""

    run_id: str | None
    """Run id of Weights & Biases, to be passed to `open_tracking` on resume; unchanged if tracking is disabled."""
    _file: BinaryIO
    _resumed_at: int
    _written: set[str]
    """Names that the file already has at the step resumed from."""
    _dashboard: Dashboard = field(repr=False)

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Appends one line to metrics.jsonl (written through to the operating system) and sends it to the dashboard.

        Call it before the checkpoint of the same step, since a resumed run does not repeat that step. A resumed run may
        repeat the evaluation after that step: values that the file already has are not written twice.

        Args:
            metrics: Values by dashboard name; NaN and infinities are allowed.
            step: Optimizer steps done.

        Raises:
            InputError: The file cannot be written.
        """
        values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        record = {STEP: step} | values | {STEP: step}
        if step == self._resumed_at and self._written.issuperset(record):
            return
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        try:
            self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise InputError(f"{self._file.name}: {error.strerror}; fix it and run the same command again") from error
        self._dashboard.send(record)


@contextmanager
def open_tracking(
    tracking: TrackingConfig, directory: Path, *, settings: dict[str, Any], resumed_at: int, run_id: str | None
) -> Iterator[Tracker]:
    """Opens metrics.jsonl and Weights & Biases for one process of a run.

    Lines after `resumed_at` and an incomplete last line are first removed atomically, so that the finished file has
    each step once, like that of an uninterrupted run.

    A kill loses what wandb's own process had not yet sent or written (up to 32 KiB). A resumed run, which keeps its id,
    is therefore first sent the missing lines of metrics.jsonl, at half a millisecond per line. Online, these are the
    lines from the last step that the server has. Offline, each start creates its own directory
    `wandb/offline-run-TIME-ID` with all lines from the first step on: upload the newest one with the logged command.
    `wandb sync` of all of them sends each row under the same `_step` with the same values, so their order does not
    matter, but it stops at a file that a kill left empty. Rows sent later have the time of sending.

    Args:
        tracking: Mode, project, name.
        directory: Directory of the run, created if absent; Weights & Biases uses `directory`/wandb.
        settings: Shown as the run's config on the dashboard.
        resumed_at: Step of the restored checkpoint; 0 for a new run.
        run_id: `Tracker.run_id` stored in that checkpoint; None for a new run.

    Raises:
        InputError: Online is requested without an API key, WANDB_MODE is unknown, or metrics.jsonl is damaged.
    """
    mode = mode_of(tracking)
    path = directory / METRICS
    directory.mkdir(parents=True, exist_ok=True)
    kept = _truncate(path, resumed_at)
    kept_here = f"all metrics are in {METRICS}"
    given = {"step": STEP, "settings": settings, "elsewhere": kept_here, "directory": directory, "run_id": run_id}
    with Dashboard(tracking, mode, **given) as dashboard, path.open("ab", buffering=0) as file:
        for record in kept:
            dashboard.send({name: math.nan if value is None else value for name, value in record.items()})
        written = {name for record in kept if record[STEP] == resumed_at for name in record}
        yield Tracker(
            run_id=dashboard.run_id, _dashboard=dashboard, _file=file, _resumed_at=resumed_at, _written=written
        )


def read_metrics(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Returns the lines of metrics.jsonl and their parsed records, without an incomplete last line.

    Raises:
        InputError: A line is not an object with a step.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            valid = isinstance(record[STEP], int)
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise InputError(f"{path}, line {number}: {line[:60]!r} is not an object with {STEP!r}; remove the line")
        lines.append((line, record))
    return lines


def _truncate(path: Path, resumed_at: int) -> list[dict[str, Any]]:
    """Removes the lines after `resumed_at` and returns the records that remain."""
    if not path.exists():
        return []
    kept = [(line, record) for line, record in read_metrics(path) if record[STEP] <= resumed_at]
    whole = b"".join(line for line, _ in kept)
    if whole != path.read_bytes():
        with whole_file(path, locked=True) as partial:
            partial.write_bytes(whole)
    return [record for _, record in kept]
