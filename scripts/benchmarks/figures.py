"""What a benchmark found: as lines, as JSON, as a picture; and how times are taken."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bioscan_jax.errors import InputError
from bioscan_jax.output import whole_file

Figures = dict[str, int | float | str]
"""What a benchmark found and on what, in the order in which it is printed."""


def describe(figures: Figures) -> str:
    """The figures as lines for the terminal; numbers are those of `write_json`."""
    width = max(map(len, figures))
    return "\n".join(f"{k:>{width}}  {v if isinstance(v, str) else f'{v:,}'}" for k, v in figures.items())


def write_json(figures: Figures, path: str) -> None:
    """Writes the figures as one JSON object.

    Raises:
        InputError: It cannot be written.
    """
    try:
        with whole_file(path) as partial:
            partial.write_text(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--json {path}: cannot be written ({error.strerror}); pass another path") from error


def write_picture(figures: Figures, path: str, title: str) -> None:
    """Draws the rates, or else the seconds, that were compared, as bars; beside them the ratios as text.

    Raises:
        InputError: It cannot be written.
    """
    from matplotlib.figure import Figure

    numbers = {name: value for name, value in figures.items() if not isinstance(value, str)}
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
    try:
        with whole_file(path) as partial:
            picture.savefig(partial, dpi=120, format="png")
    except OSError as error:
        raise InputError(f"--picture {path}: cannot be written ({error.strerror}); pass another path") from error


def require(*modules: str) -> None:
    """Raises InputError where a peer to compare with is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)} is not installed: run pip install -e '.[parity]' to compare with it")


def at_least(**flags: tuple[int, int]) -> None:
    """Raises InputError for a flag whose value is below its least one."""
    for flag, (value, least) in flags.items():
        if value < least:
            raise InputError(f"--{flag} {value} is too small; pass at least {least}")


def median_core_seconds(tasks: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Processor time of each task, summed over cores: the median over rounds in which each is run once.

    Other work on the machine does not count, as it would in wall time, and a task gains nothing by using more cores.
    """
    return median_seconds(tasks, repeats, time.process_time)


def median_seconds(
    tasks: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Time of each task by a clock: the median over rounds in which each is run once."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = clock()
            task()
            seconds[name].append(clock() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def in_a_process(function: str, **arguments: Any) -> Any:
    """What `module:function` returns for these arguments in a fresh Python process; both are plain JSON values.

    Raises:
        RuntimeError: It failed; its last line is told.
    """
    module, name = function.split(":")
    program = f"import json, sys; from {module} import {name} as f; print(json.dumps(f(**json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def rest(memory: int) -> None:
    """Lets the disk take what was written, and touches so many bytes in a process that ends.

    The first touch of a page is dear on a virtual machine whose host has to back it: seconds a GiB where later ones
    take a tenth of one. What is measured next finds them touched.
    """
    os.sync()
    in_a_process("benchmarks.figures:touch", memory=memory)


def touch(memory: int) -> None:
    """Writes to each page of so many bytes."""
    np.empty(memory, np.uint8)[::4096] = 1


def rounded(value: float) -> float | int:
    """Four significant digits: more of them would be noise."""
    short = float(f"{value:.4g}")
    return int(short) if short >= 1000 else short
