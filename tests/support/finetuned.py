"""A small training run, and what two runs must have in common."""

import json
from pathlib import Path

import jax
import numpy as np

from bioscan_jax import config
from bioscan_jax.training.run import TrainingSummary, finetune
from bioscan_jax.training.run_directory import RunDirectory
from bioscan_jax.training.state import restore_params

ONE = config.MeshConfig(data=1, compilation_cache=None)


def train(
    barcodes: str | Path,
    directory: str | Path,
    *,
    mesh: config.MeshConfig = ONE,
    data: dict | None = None,
    lora: config.LoRAConfig | None = None,
    loss: config.LossConfig | dict | None = None,
    tracking: str = "disabled",
    save_minutes: float = 60.0,
    profile: str | None = None,
    **settings,
) -> TrainingSummary:
    """Trains for three epochs of 14 steps with a line of metrics after each step; `settings` are of `TrainConfig`."""
    chosen = {"epochs": 3, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 5, "max_shapes": 1, "log_every": 1}
    chosen |= {"shortest": 60, "seed": 1, "output_dir": str(directory)}
    return finetune(
        config.ModelConfig(checkpoint="random:tiny-v2"),
        config.ExamplesConfig(path=str(barcodes), **({"validation": 0.25} | (data or {}))),
        lora or config.LoRAConfig(rank=4),
        config.LossConfig(**loss) if isinstance(loss, dict) else loss,
        config.TrainConfig(**(chosen | settings)),
        config.CheckpointConfig(interval_minutes=save_minutes),
        config.TrackingConfig(mode=tracking),
        mesh,
        progress=False,
        profile=profile,
    )


def metrics_of(directory: Path) -> list[dict]:
    """Returns the complete lines of metrics.jsonl, without what depends on the machine; none if there is no file."""
    path = directory / "metrics.jsonl"
    text = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [json.loads(line) for line in text if line.endswith("\n")]
    return [{name: value for name, value in line.items() if not name.startswith("hardware/")} for line in lines]


def best_parameters(directory: Path) -> dict[str, np.ndarray]:
    """Returns the best checkpoint's parameters."""
    from orbax.checkpoint import v1 as ocp

    [step] = [path.name for path in (directory / "best").iterdir()]
    metadata = ocp.checkpointables_metadata(str(directory / "best" / step)).metadata["params"]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for n, leaf in metadata.items()}
    return {
        name: np.asarray(value)
        for name, value in restore_params(RunDirectory(name=str(directory), local=directory), "best", abstract)[
            1
        ].items()
    }


def check_same_run(one: Path, other: Path) -> None:
    """Checks that two runs have the same metrics and the same best parameters, bit by bit."""
    assert metrics_of(one) == metrics_of(other)
    ours, theirs = best_parameters(one), best_parameters(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
