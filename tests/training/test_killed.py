"""The real script, killed at random moments: every step's loss is that of a run never killed, bit by bit."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support.places import SCRIPTS

from bioscan_jax.barcodes.simulate import write_simulated
from bioscan_jax.training.state import restore_params

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SCRIPT = SCRIPTS / "finetune.py"
STEPS = 120
SECONDS = 240


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the script on the same barcodes, with one kept set of compiled programs."""
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
    """Step and loss of each line, also of one that is being written."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    found = [json.loads(line) for line in whole]
    return [(line["train/global_step"], line["train/loss"]) for line in found if "train/loss" in line]


def parameters(directory: Path) -> dict[str, np.ndarray]:
    from orbax.checkpoint import v1 as ocp

    [step] = [path.name for path in (directory / "best").iterdir()]
    metadata = ocp.checkpointables_metadata(str(directory / "best" / step)).metadata["params"]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for n, leaf in metadata.items()}
    return {name: np.asarray(value) for name, value in restore_params(directory, "best", abstract)[1].items()}


def test_three_kills_and_a_sigterm_change_nothing(start, tmp_path):
    whole, directory = tmp_path / "whole", tmp_path / "killed"
    run = start(whole)
    output, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, output
    expected = losses(whole)
    steps = [step for step, _ in expected]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= STEPS - 10

    rng = random.Random(0)
    targets = sorted(rng.sample(range(3, len(steps) - 60), 4))
    for number, (target, sent) in enumerate(zip(targets, [signal.SIGKILL] * 3 + [signal.SIGTERM], strict=True)):
        target = max([target, *(step + 3 for step, _ in losses(directory)[-1:])])  # a step that this run has to do
        run = start(directory)
        end = time.monotonic() + SECONDS
        while not losses(directory) or losses(directory)[-1][0] < target:
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        before = losses(directory)[-1][0]
        run.send_signal(sent)
        output, _ = run.communicate(timeout=SECONDS)
        assert ("continues after step" in output) == (number > 0)
        assert run.returncode == (-9 if sent == signal.SIGKILL else 128 + signal.SIGTERM), output
        if sent == signal.SIGTERM:
            assert f"stopped after step {losses(directory)[-1][0]:,} of" in output.splitlines()[-1]
            assert losses(directory)[-1][0] - before <= 2  # a step was in hand, another may have begun meanwhile
        assert losses(directory) == expected[: len(losses(directory))], number

    last = losses(directory)[-1][0]
    run = start(directory)
    output, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, output
    assert f"continues after step {last:,} of {len(steps):,}" in output  # SIGTERM lost nothing
    assert f"({last:,} of them before this run)" in output
    assert losses(directory) == expected
    ours, theirs = parameters(directory), parameters(whole)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])
    run = start(directory)
    output, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0
    assert "nothing was left to do" in output
