"""The finetune demo, ended by SIGTERM at random moments, here or with its run directory in a bucket."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
from support.finetuned import check_same_run, metrics_of
from support.object_store import BUCKET, served_store
from support.places import SCRIPTS

MOST_SECONDS = 20.0
"""A run has to end within this time of its signal."""
_STEPS = 20
"""A run does up to this many steps before its signal; every third gets it at a moment of its start."""


def training_campaign(
    directory: Path, kills: int, seed: int, in_bucket: bool, say: Callable[[str], object]
) -> list[str]:
    """Ends `kills` runs by SIGTERM, finishes the last one and compares each finished one with an uninterrupted run.

    Returns:
        Descriptions of what is wrong.
    """
    if not in_bucket:
        return _campaign(directory, kills, seed, lambda number: str(directory / f"run-{number}"), say)
    with served_store():
        return _campaign(directory, kills, seed, lambda number: f"{BUCKET}/run-{number}", say)


def _campaign(
    directory: Path, kills: int, seed: int, place: Callable[[int], str], say: Callable[[str], object]
) -> list[str]:
    chance, wrong, slowest, sent = random.Random(seed), [], 0.0, 0
    began = time.monotonic()
    _, text = _ended(_start(directory, directory / "whole"))
    startup = (time.monotonic() - began) / 4
    say(f"uninterrupted: {4 * startup:.0f} s; {text.splitlines()[-1]}")
    number = 0
    while sent < kills:
        output, safe, finished = place(number), 0, False
        while sent < kills and not finished:
            run, before = _start(directory, output), _steps(directory, output)
            target = None if sent % 3 == 0 else before + chance.randint(1, _STEPS)
            until = time.monotonic() + (chance.random() * startup if target is None else 300)
            while run.poll() is None and time.monotonic() < until:
                if target is not None and _steps(directory, output) >= target:
                    time.sleep(chance.random())
                    break
                time.sleep(0.02)
            run.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            code, text = _ended(run)
            if code == 0:  # it ended before its signal
                finished = True
                break
            seconds, sent = time.monotonic() - asked, sent + 1
            slowest = max(slowest, seconds)
            stopped = re.search(r"stopped after step ([\d,]+) of", text)
            continued = re.search(r"continues after step ([\d,]+) of", text)
            at = int(stopped[1].replace(",", "")) if stopped else None
            say(
                f"signal {sent:2d}: {seconds:5.1f} s, "
                + (f"step {at} is saved" if stopped else "before the first step")
            )
            if code != 128 + signal.SIGTERM or "Traceback" in text:
                wrong.append(f"signal {sent}: exit code {code}: {text[-500:]}")
            if continued and int(continued[1].replace(",", "")) != safe:
                wrong.append(f"signal {sent}: continued after step {continued[1]}, and {safe} was saved")
            if stopped and not continued and safe:
                wrong.append(f"signal {sent}: began again although step {safe} was saved")
            if seconds > MOST_SECONDS:
                wrong.append(f"signal {sent}: took {seconds:.1f} s")
            safe = safe if at is None else at
        if not finished:
            code, text = _ended(_start(directory, output))
            if code:
                wrong.append(f"{output} cannot be continued: {text[-500:]}")
                break
        try:
            check_same_run(_local(output, directory / f"read-{number}"), directory / "whole")
            say(f"{output}: the metrics and parameters of the uninterrupted run")
        except AssertionError as error:
            wrong.append(f"{output} differs: {str(error)[:300]}")
        number += 1
    say(f"slowest end: {slowest:.1f} s")
    return wrong


def _start(directory: Path, output: Path | str) -> subprocess.Popen:
    barcodes = directory / "barcodes.parquet"
    flags = {
        "config": "finetune_demo",
        "data.path": barcodes,
        "simulate.path": barcodes,
        "train.output_dir": output,
        "train.epochs": 3,
        "train.log_every": 1,
        "checkpoint.interval_minutes": 0.05,
        "tracking.mode": "disabled",
        "mesh.data": 1,
        "mesh.compilation_cache": directory / "compiled",
    }
    command = [sys.executable, str(SCRIPTS / "finetune.py"), *(f"--{name}={value}" for name, value in flags.items())]
    environment = os.environ | {"XDG_CACHE_HOME": str(directory / "disk")}
    with (directory / "said").open("w") as said:  # a pipe that nobody reads would fill up and stop it
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)


def _ended(run: subprocess.Popen) -> tuple[int, str]:
    code = run.wait(timeout=900)
    directory = next(Path(word.split("=")[1]).parent for word in run.args if word.startswith("--data.path="))
    return code, (directory / "said").read_text()


def _steps(directory: Path, output: Path | str) -> int:
    """Returns the last step in metrics.jsonl, that of the working copy for a bucket."""
    name = str(output).rpartition("/")[2]
    places = (
        [Path(output)]
        if "://" not in str(output)
        else (directory / "disk" / "bioscan_jax" / "runs").glob(f"*/*/{name}")
    )
    lines = [line for place in places for line in metrics_of(place) if "train/loss" in line]
    return lines[-1]["train/global_step"] if lines else 0


def _local(output: str, copy: Path) -> Path:
    if "://" not in output:
        return Path(output)
    filesystem, root = fsspec.core.url_to_fs(output)
    filesystem.invalidate_cache()
    filesystem.get(f"{root}/", f"{copy}/", recursive=True)
    return copy
