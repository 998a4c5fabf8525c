"""run.json in a run's directory: the settings that a resumed run must repeat, and the origin of the base weights."""

import dataclasses
import json
from typing import Any

from bioscan_jax import config
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.checkpoints.load import LoadedModel
from bioscan_jax.data.parquet import ParquetBlocks
from bioscan_jax.embedding.summary import versions
from bioscan_jax.errors import InputError
from bioscan_jax.output import whole_file
from bioscan_jax.table.plan import differences
from bioscan_jax.training.run_directory import LABEL_SPACE_FILE, RUN_FILE, RunDirectory


def run_settings(
    source: ParquetBlocks,
    data: config.ExamplesConfig,
    loaded: LoadedModel,
    lora: config.LoRAConfig,
    loss: config.LossConfig,
    train: config.TrainConfig,
    space: LabelSpace | None,
) -> dict[str, Any]:
    """Returns everything that determines the trained parameters, which excludes devices, logging and micro-batches."""
    without_effect = {"output_dir", "batch_tokens", "remat", "log_every"}
    settings = {
        "input": source.fingerprint,
        "data": {name: value for name, value in vars(data).items() if name not in ("path", "scratch")},
        "model": {
            "name": loaded.provenance.model,
            "weights_sha256": loaded.provenance.weights_sha256,
            "dtype": loaded.provenance.dtype,
            "float32_products": loaded.model.float32_products,
            "vocabulary_sha256": loaded.vocabulary.sha256,
            "config": dataclasses.asdict(loaded.config),
        },
        "lora": vars(lora) if train.mode == "lora" else None,
        "loss": vars(loss),
        "train": {name: value for name, value in vars(train).items() if name not in without_effect},
        "label_space_sha256": None if space is None else space.sha256,
    }
    return json.loads(json.dumps(settings))


def check_or_write_record(
    directory: RunDirectory,
    settings: dict[str, Any],
    model: config.ModelConfig,
    loaded: LoadedModel,
    space: LabelSpace | None,
) -> None:
    """Checks that the directory has a run with the same settings, or writes the record of a new run.

    Raises:
        InputError: It has a run with other settings, or a record that cannot be read.
    """
    path = directory.local / RUN_FILE
    try:
        found = json.loads(path.read_text())["decided_by"]
    except FileNotFoundError:
        found = None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); pass another --train.output_dir") from error
    if found is not None:
        changed = differences(found, settings)
        if changed:
            longer = (
                "; to train further, bioscan export --format merged and pass that as --model.checkpoint of a new run"
                if found["train"].get("epochs") != settings["train"]["epochs"]
                else ""
            )
            raise InputError(
                f"{directory.name} is the run of another configuration: {changed}; pass these again, or another "
                f"--train.output_dir{longer}"
            )
        return
    if space is not None:
        space.save(directory.local / LABEL_SPACE_FILE)
    record = {
        "decided_by": settings,
        "model": {"checkpoint": model.checkpoint, "revision": model.revision, "seed": model.seed},
        "provenance": dataclasses.asdict(loaded.provenance),
        "versions": versions(),
    }
    with whole_file(path, locked=True) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")
    directory.put_files()


def read_record(directory: RunDirectory) -> dict[str, Any]:
    """Reads run.json.

    Raises:
        InputError: The file is missing or damaged.
    """
    path = directory.local / RUN_FILE
    try:
        record = json.loads(path.read_text())
        if not {"decided_by", "model", "provenance"} <= record.keys():
            raise ValueError("it lacks the settings of a run")
    except FileNotFoundError:
        raise InputError(
            f"{directory.name}/{RUN_FILE}: not found; pass the --train.output_dir of bioscan finetune as --run"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the run again") from None
    return record


def configs_of(settings: dict[str, Any]) -> tuple[config.LossConfig, config.LoRAConfig | None, config.TrainConfig]:
    """Returns the configs of heads, adapters (None without) and training, from `run_settings`."""
    given = settings["loss"]
    tuples = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    loss = config.LossConfig(**given | tuples)
    lora = settings["lora"]
    if lora is not None:
        lora = config.LoRAConfig(**lora | {"targets": tuple(lora["targets"])})
    return loss, lora, config.TrainConfig(**settings["train"])
