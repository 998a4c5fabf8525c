"""From a training run's directory to files that others read: a PEFT adapter, or a whole Hugging Face checkpoint."""

import json
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from bioscan_jax import config
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.checkpoints.head_files import Heads, taxon_tree
from bioscan_jax.checkpoints.hub import resolve_checkpoint
from bioscan_jax.checkpoints.load import RANDOM, LoadedModel, load_weights
from bioscan_jax.checkpoints.peft import write_adapter
from bioscan_jax.checkpoints.publish import write_merged
from bioscan_jax.devices.sharding import make_layout, start_devices
from bioscan_jax.errors import InputError
from bioscan_jax.model.classifier import Classifier, make_classifier, named_arrays
from bioscan_jax.training.record import LABEL_SPACE_FILE, RUN_FILE
from bioscan_jax.training.state import restore_params
from bioscan_jax.training.step import split_trainable


def export(
    run: str,
    output: str,
    *,
    format: Literal["peft", "merged"] = "peft",
    which: Literal["best", "last"] = "best",
    checkpoint: str | None = None,
    mesh: config.MeshConfig | None = None,
) -> str:
    """Writes what a run has trained.

    Args:
        run: Directory of the training run.
        output: Directory to make.
        format: `peft` is the adapter with its heads and label space; `merged` a whole checkpoint, with them beside it.
        which: The parameters that did best on the validation rows, or those of the last checkpoint.
        checkpoint: Where the run's base weights are now, if they have moved.
        mesh: Devices that hold the model meanwhile.

    Returns:
        What was written, in a line.

    Raises:
        InputError: The run, its base weights or the output cannot be read or written, or do not fit.
    """
    directory, target = Path(run).expanduser(), Path(output).expanduser()
    record = _read_run(directory)
    loss, lora, train = _settings(record["decided_by"])
    if format == "peft" and lora is None:
        raise InputError(f"{run} trained the whole model and has no adapter; pass --format merged")
    mesh = mesh or config.MeshConfig()
    start_devices(mesh)
    loaded = _base(record, checkpoint, mesh)
    space = LabelSpace.load(directory / LABEL_SPACE_FILE) if train.objective == "taxonomy" else None
    step, classifier = _trained(directory, which, loaded, loss, lora, train, space)
    facts = {"objective": train.objective, "which": which, "step": step, "run": record["decided_by"]}
    heads = None
    if space is not None and classifier.head is not None:
        heads = Heads(
            kind=loss.head, pooling=loss.pooling, space=space, head=classifier.head, encoder=classifier.encoder
        )
    if format == "peft" and lora is not None:
        write_adapter(target, classifier.trunk, lora, provenance=loaded.provenance, heads=heads, facts=facts)
    else:
        name, revision = record["model"]["checkpoint"], record["model"]["revision"]
        published = None if name.startswith(RANDOM) else resolve_checkpoint(checkpoint or name, revision).directory
        write_merged(
            target,
            classifier.trunk,
            loaded.vocabulary,
            provenance=loaded.provenance,
            base=published,
            heads=heads,
            facts=facts,
        )
    return f"{output}: {format} of {which} parameters, after step {step:,}, on {loaded.provenance.model}"


def _read_run(directory: Path) -> dict[str, Any]:
    path = directory / RUN_FILE
    try:
        record = json.loads(path.read_text())
        if not {"decided_by", "model", "provenance"} <= record.keys():
            raise ValueError("it lacks what a run keeps")
    except FileNotFoundError:
        raise InputError(f"{path}: not found; pass the --train.output_dir of scripts/finetune.py as --run") from None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the run again") from None
    return record


def _settings(facts: dict[str, Any]) -> tuple[config.LossConfig, config.LoRAConfig | None, config.TrainConfig]:
    """The settings of the run, as far as they decide what is exported."""
    loss = config.LossConfig(**facts["loss"] | {"rank_weights": tuple(facts["loss"]["rank_weights"])})
    lora = facts["lora"]
    if lora is not None:
        lora = config.LoRAConfig(**lora | {"targets": tuple(lora["targets"])})
    return loss, lora, config.TrainConfig(**facts["train"])


def _base(record: dict[str, Any], checkpoint: str | None, mesh: config.MeshConfig) -> LoadedModel:
    """The weights the run began with, in the dtype it kept them in, with their language-model head."""
    wanted = config.ModelConfig(
        checkpoint=checkpoint or record["model"]["checkpoint"],
        revision=record["model"]["revision"],
        seed=record["model"]["seed"],
        dtype=record["provenance"]["dtype"],
    )
    loaded = load_weights(wanted, make_layout(mesh), lm_head=True)
    begun, found = record["provenance"]["weights_sha256"], loaded.provenance.weights_sha256
    if begun != found:
        raise InputError(
            f"{wanted.checkpoint} has weights {found[:12]}, but the run began with {begun[:12]} "
            f"({record['provenance']['model']}); pass --checkpoint with those"
        )
    return loaded


def _trained(
    directory: Path,
    which: Literal["best", "last"],
    loaded: LoadedModel,
    loss: config.LossConfig,
    lora: config.LoRAConfig | None,
    train: config.TrainConfig,
    space: LabelSpace | None,
) -> tuple[int, Classifier]:
    """The step, and the classifier after it, with the language-model head of the base if that was not trained."""
    tree = None if space is None else taxon_tree(space)
    lm_head = loaded.model.lm_head
    classifier = make_classifier(loaded.model, loss, lora, tree, loaded.layout, seed=train.seed)
    model = split_trainable(classifier, loaded.layout, loss, train, tree=tree, special_ids=())
    shardings = model.shardings
    abstract = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shardings[name])
        for name, array in named_arrays(model.trained).items()
    }
    step, params = restore_params(directory, which, abstract)
    whole = model.merge(params, model.frozen)
    if whole.trunk.lm_head is None:
        whole.trunk.lm_head = nnx.data(lm_head)
    return step, whole
