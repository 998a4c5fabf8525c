"""The real script, killed at random moments: every step's loss is that of an uninterrupted run, bit by bit."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.finetuned import check_same_run, metrics_of
from support.places import SCRIPTS

from bioscan_jax.barcodes.simulate import write_simulated

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SCRIPT = SCRIPTS / "finetune.py"
STEPS = 120
SECONDS = 240


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the script on the same barcodes, with one cache of compiled programs."""
    root = tmp_path_factory.mktemp("killed")
    write_simulated(str(root / "barcodes.parquet"), species=20, per_species=10, length=150, seed=0)

    def begin(directory: Path) -> subprocess.Popen:
        flags = {
            "model.checkpoint": "random:tiny-v2",
            "data.path": root / "barcodes.parquet",
            "train.output_dir": directory,
            "train.batch_size": 9,
            "train.epochs": 6,
            "train.max_shapes": 1,
            "train.log_every": 1,
            "train.learning_rate": 0.01,
            "train.warmup_steps": 5,
            "checkpoint.interval_minutes": 0.01,
            "tracking.mode": "disabled",
            "mesh.data": 1,
            "mesh.compilation_cache": root / "compiled",
        }
        command = [sys.executable, str(SCRIPT), *(f"--{name}={value}" for name, value in flags.items())]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


def losses(directory: Path) -> list[tuple[int, float]]:
    """Step and loss of each line of metrics.jsonl."""
    lines = [line for line in metrics_of(directory) if "train/loss" in line]
    return [(line["train/global_step"], line["train/loss"]) for line in lines]


def test_three_kills_and_a_sigterm_change_nothing(start, tmp_path):
    seed = random.randrange(2**32)
    sys.stdout.write(f"seed {seed}\n")  # shown after a failure
    whole, directory = tmp_path / "whole", tmp_path / "killed"
    run = start(whole)
    output, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, output
    expected = losses(whole)
    steps = [step for step, _ in expected]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= STEPS - 10

    rng = random.Random(seed)
    targets = sorted(rng.sample(range(3, len(steps) - 60), 4))
    for number, (target, sent) in enumerate(zip(targets, [signal.SIGKILL] * 3 + [signal.SIGTERM], strict=True)):
        target = max([target, *(step + 3 for step, _ in losses(directory)[-1:])])  # a step that is still to come
        saved = any(path.name.isdecimal() for path in (directory / "checkpoints").glob("*"))
        run = start(directory)
        end = time.monotonic() + SECONDS
        while not losses(directory) or losses(directory)[-1][0] < target:
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        run.send_signal(sent)
        output, _ = run.communicate(timeout=SECONDS)
        assert ("continues after step" in output) == saved
        assert run.returncode == (-9 if sent == signal.SIGKILL else 128 + signal.SIGTERM), output
        if sent == signal.SIGTERM:
            assert f"stopped after step {losses(directory)[-1][0]:,} of" in output.splitlines()[-1]
        assert losses(directory) == expected[: len(losses(directory))], number

    last = losses(directory)[-1][0]
    run = start(directory)
    output, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, output
    assert f"continues after step {last:,} of {len(steps):,}" in output  # SIGTERM lost nothing
    assert f"({last:,} of them before this run)" in output
    check_same_run(directory, whole)
    run = start(directory)
    output, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0
    assert "nothing was left to do" in output
