"""Results of a benchmark as lines, JSON and picture, and functions that measure time."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bioscan_jax.errors import InputError
from bioscan_jax.location import output_file

Cell = int | float | str | dict[str, float]
"""A number, or a named value with its interval `low` to `high` and perhaps further numbers."""
Figures = dict[str, int | float | str | dict[str, Cell]]
"""Results of a benchmark and what they were measured on, in the order in which they are printed.

A dictionary is a row of a table: one cell per thing compared.
"""


def describe(figures: Figures) -> str:
    """Formats the figures as lines for the terminal, with the same numbers as `write_json`; rows form a table."""
    width = max(map(len, figures))
    rows = {name: row for name, row in figures.items() if isinstance(row, dict)}
    lines = [f"{name:>{width}}  {_text(value)}" for name, value in figures.items() if not isinstance(value, dict)]
    if rows:
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        table = [columns, *([_text(row.get(column, "-")) for column in columns] for row in rows.values())]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for name, cells in zip(["", *rows], table, strict=True):
            padded = "  ".join(f"{cell:<{size}}" for cell, size in zip(cells, widths, strict=True))
            lines.append(f"{name:>{width}}  {padded}".rstrip())
    return "\n".join(lines)


def _text(value: Cell) -> str:
    """Formats a cell: .721 (.702-.739) .661 for a value, its interval and another number without it."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else f"{value:,}"
    first, *others = (f"{v:.3f}" for name, v in value.items() if not name.endswith(("low", "high")))
    return " ".join([first, f"({value['low']:.3f}-{value['high']:.3f})", *others])


def write_json(figures: Figures, path: str) -> None:
    """Writes the figures as one JSON object.

    Raises:
        InputError: It cannot be written.
    """
    with output_file(path, "json") as partial:
        partial.write_text(json.dumps(figures, indent=2) + "\n")


def write_picture(figures: Figures, path: str, title: str) -> None:
    """Draws the rows of a table, or else the compared rates, or else seconds, with the ratios in the title.

    Raises:
        InputError: It cannot be written.
    """
    rows = {name: row for name, row in figures.items() if isinstance(row, dict)}
    picture = _draw_intervals(rows, title) if rows else _draw_bars(figures, title)
    with output_file(path, "picture") as partial:
        picture.savefig(partial, dpi=120, format="png")


def _draw_bars(figures: Figures, title: str) -> Any:
    """Draws the compared rates, or else seconds, with the ratios in the title."""
    from matplotlib.figure import Figure

    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    for unit in ("rows_per_second", "seconds"):
        bars = {name.removesuffix(unit).strip("_") or "ours": v for name, v in numbers.items() if name.endswith(unit)}
        if bars:
            break
    else:
        raise ValueError(f"nothing to draw among {', '.join(figures)}")
    ratios = [f"{name} {value:g}" for name, value in numbers.items() if "ratio" in name]
    picture = Figure(figsize=(8, 1.2 + 0.4 * len(bars)), layout="constrained")
    axes = picture.subplots()
    drawn = axes.barh([name.replace("_", " ") for name in bars], list(bars.values()), color="#4878a8")
    axes.bar_label(drawn, fmt="{:,.4g}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(unit.replace("_", " "))
    axes.set_title("\n".join([title, *ratios]), fontsize=9)
    return picture


def _draw_intervals(rows: dict[str, dict[str, Cell]], title: str) -> Any:
    """Draws the values that have an interval, one colour per column of the table."""
    from matplotlib.figure import Figure

    kept = {name: {c: v for c, v in row.items() if isinstance(v, dict)} for name, row in rows.items()}
    kept = {name: row for name, row in kept.items() if row}
    if not kept:
        raise InputError("--picture: this benchmark has no intervals to draw; pass --json instead")
    columns = list(dict.fromkeys(column for row in kept.values() for column in row))
    picture = Figure(figsize=(9, 1.5 + 0.3 * len(kept)), layout="constrained")
    axes = picture.subplots()
    for place, column in enumerate(columns):
        found = [(y, row[column]) for y, row in enumerate(kept.values()) if column in row]
        value = np.array([next(iter(cell.values())) for _, cell in found])
        reach = np.abs([[cell["low"] for _, cell in found], [cell["high"] for _, cell in found]] - value)
        height = [y + 0.6 * ((place + 0.5) / len(columns) - 0.5) for y, _ in found]
        axes.errorbar(value, height, xerr=reach, fmt="o", markersize=4, label=column)
    axes.set_yticks(range(len(kept)), [name.replace("_", " ") for name in kept], fontsize=8)
    axes.set_ylim(len(kept) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    axes.set_title(title, fontsize=9)
    return picture


def require(*modules: str) -> None:
    """Raises InputError if a package to compare with is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)} is not installed: run pip install -e '.[parity]' to compare with it")


def at_least(**flags: tuple[int, int]) -> None:
    """Raises InputError for a flag whose value is below its minimum."""
    for flag, (value, least) in flags.items():
        if value < least:
            raise InputError(f"--{flag} {value} is too small; pass at least {least}")


def median_core_seconds(tasks: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median processor time of each task, summed over cores.

    Unlike wall time it does not include other work on the machine, and a task gains nothing from more cores.
    """
    return median_seconds(tasks, repeats, time.process_time)


def median_seconds(
    tasks: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Returns the median time of each task."""
    return {name: statistics.median(taken) for name, taken in run_in_turns(tasks, repeats, clock).items()}


def run_in_turns(
    tasks: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Runs all tasks once in each of `repeats` rounds; returns the times of each."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = clock()
            task()
            seconds[name].append(clock() - start)
    return seconds


def in_a_process(function: str, *, seconds: float | None = None, **arguments: Any) -> Any:
    """Calls `module:function` in a new Python process; arguments and result are plain JSON values.

    Args:
        function: What to call.
        seconds: The process is ended after this time; None for no limit.
        arguments: Of the function.

    Raises:
        RuntimeError: It failed; the message ends with the last line of its stderr.
        subprocess.TimeoutExpired: It took longer than `seconds`.
    """
    module, name = function.split(":")
    program = f"import json, sys; from {module} import {name} as f; print(json.dumps(f(**json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths}  # it finds this package from any current directory
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{function} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def settle(memory: int) -> None:
    """Flushes files to disk and touches `memory` bytes in a short-lived process, before a measurement.

    On a virtual machine the first touch of a page is slow, since the host has to provide it: seconds per GiB, against
    a tenth of a second later. The measured process then finds its pages provided.
    """
    os.sync()
    in_a_process("benchmarks.figures:touch", memory=memory)


def touch(memory: int) -> None:
    """Writes to each page of `memory` bytes."""
    np.empty(memory, np.uint8)[::4096] = 1


def rounded(value: float) -> float | int:
    """Rounds to four significant digits; more would be noise."""
    short = float(f"{value:.4g}")
    return int(short) if short >= 1000 else short
