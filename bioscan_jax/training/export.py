"""Export of a training run as a PEFT adapter, a whole Hugging Face checkpoint or an ONNX graph."""

import dataclasses
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from bioscan_jax import config
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.checkpoints.head_files import Heads, taxon_tree
from bioscan_jax.checkpoints.hub import Provenance, resolve_checkpoint
from bioscan_jax.checkpoints.load import RANDOM, LoadedModel, load_weights
from bioscan_jax.checkpoints.model_card import data_facts, read_facts, trained_facts
from bioscan_jax.checkpoints.peft import write_adapter
from bioscan_jax.checkpoints.publish import write_merged
from bioscan_jax.devices.sharding import make_layout, start_devices
from bioscan_jax.embedding.load import load
from bioscan_jax.embedding.to_onnx import write_onnx
from bioscan_jax.errors import InputError
from bioscan_jax.location import output_directory
from bioscan_jax.model.classifier import Classifier, make_classifier, named_arrays
from bioscan_jax.training.record import configs_of, read_record
from bioscan_jax.training.run_directory import LABEL_SPACE_FILE, METRICS, RunDirectory, locate_run, open_run_directory
from bioscan_jax.training.state import restore_params
from bioscan_jax.training.step import split_trainable
from bioscan_jax.training.tracking import STEP, read_metrics


def export(
    run: str,
    output: str,
    *,
    format: Literal["peft", "merged", "onnx"] = "peft",
    which: Literal["best", "last"] = "best",
    checkpoint: str | None = None,
    embed: config.EmbedConfig | None = None,
    mesh: config.MeshConfig | None = None,
) -> str:
    """Writes the trained parameters of a run in a format that other libraries read.

    Args:
        run: Directory or URL of the training run.
        output: Directory or URL to create.
        format: `peft` writes the adapter with heads and label space; `merged` a whole checkpoint, with these beside it;
            `onnx` a graph for machines without JAX, as `Encoder.save_onnx` does, without heads.
        which: The parameters with the lowest validation loss, or those of the last checkpoint.
        checkpoint: Location of the run's base weights, if they have moved.
        embed: Strand, phases and layer of the graph; its pooling is that of the run.
        mesh: Devices that hold the model during the export.

    Returns:
        A line that describes what was written.

    Raises:
        InputError: The run or its base weights cannot be read, do not match, or the output cannot be written.

    Example:
        >>> import bioscan_jax as bj
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> _ = write_simulated("barcodes.parquet", species=8, per_species=4, length=60, seed=0)
        >>> _ = bj.finetune(
        ...     bj.ModelConfig(checkpoint="random:tiny-v2"),
        ...     bj.ExamplesConfig(path="barcodes.parquet", validation=0.25),
        ...     train=bj.TrainConfig(output_dir="runs/coi", epochs=1, max_shapes=1),
        ...     tracking=bj.TrackingConfig(mode="disabled"),
        ...     progress=False,
        ... )
        >>> line = bj.export("runs/coi", "adapter")
        >>> "peft of best parameters, after step 1" in line
        True
    """
    with ExitStack() as held:
        scratch = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bioscan_jax-")))
        directory = held.enter_context(open_run_directory(locate_run(run, flag="run"), scratch))
        target = held.enter_context(output_directory(output))
        mesh = mesh or config.MeshConfig()
        if format != "onnx":
            return f"{output}: {_export(directory, target, format, which, checkpoint, mesh)}"
        merged = scratch / "merged"
        line = _export(directory, merged, "merged", which, checkpoint, mesh)
        facts = read_facts(merged)
        assert facts is not None
        settings = dataclasses.replace(embed or config.EmbedConfig(), pooling=facts["run"]["loss"]["pooling"])
        encoder = dataclasses.replace(load(merged, dtype="float32", mesh=mesh), settings=settings)
        write_onnx(target, encoder, Provenance(**facts["base"]), trained_facts(facts))
        return f"{output}: {line.replace('merged', format, 1)}"


def _export(
    directory: RunDirectory,
    target: Path,
    format: Literal["peft", "merged"],
    which: Literal["best", "last"],
    checkpoint: str | None,
    mesh: config.MeshConfig,
) -> str:
    """Writes the trained parameters to a directory and returns what they are."""
    record = read_record(directory)
    loss, lora, train = configs_of(record["decided_by"])
    if format == "peft" and lora is None:
        raise InputError(f"{directory.name} trained the whole model and has no adapter; pass --format merged")
    start_devices(mesh)
    loaded = _base(record, checkpoint, mesh, lm_head=format == "merged" or train.objective == "mlm")
    space = LabelSpace.load(directory.local / LABEL_SPACE_FILE) if train.objective == "taxonomy" else None
    step, classifier = _trained(directory, which, loaded, loss, lora, train, space)
    facts = {
        "objective": train.objective,
        "which": which,
        "step": step,
        "data": _data(record["decided_by"], space),
        "figures": _figures(directory.local / METRICS, step),
        "run": record["decided_by"],
    }
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
    return f"{format} of {which} parameters, after step {step:,}, on {loaded.provenance.model}"


def _base(record: dict[str, Any], checkpoint: str | None, mesh: config.MeshConfig, *, lm_head: bool) -> LoadedModel:
    """Loads the weights that the run started from, in its dtype."""
    wanted = config.ModelConfig(
        checkpoint=checkpoint or record["model"]["checkpoint"],
        revision=record["model"]["revision"],
        seed=record["model"]["seed"],
        dtype=record["provenance"]["dtype"],
        projection="none",
    )
    loaded = load_weights(wanted, make_layout(mesh), lm_head=lm_head)
    expected, found = record["provenance"]["weights_sha256"], loaded.provenance.weights_sha256
    if expected != found:
        raise InputError(
            f"{wanted.checkpoint} has weights {found[:12]}, but the run started from {expected[:12]} "
            f"({record['provenance']['model']}); pass --checkpoint with those"
        )
    return loaded


def _data(settings: dict[str, Any], space: LabelSpace | None) -> dict[str, Any]:
    """Returns what a run was trained on."""
    split = settings["data"]
    found: dict[str, Any] = data_facts(settings["input"])
    found["split"] = (
        f"column {split['split_column']}"
        if split["split_column"]
        else f"{split['split']}, validation {split['validation']:g}, test {split['test']:g}, seed {split['split_seed']}"
    )
    if space is not None:
        found |= {f"taxa, {rank}": len(names) for rank, names in zip(RANKS, space.names, strict=True) if names}
    return found


def _figures(metrics: Path, step: int) -> dict[str, float]:
    """Returns what the run recorded of the validation rows after a step; nothing where it did not evaluate."""
    records = [record for _, record in read_metrics(metrics) if record[STEP] == step] if metrics.exists() else []
    return {
        f"validation {name.removeprefix('eval/').replace('_', ' ')}": value
        for record in records
        for name, value in record.items()
        if name.startswith("eval/") and value is not None
    }


def _trained(
    directory: RunDirectory,
    which: Literal["best", "last"],
    loaded: LoadedModel,
    loss: config.LossConfig,
    lora: config.LoRAConfig | None,
    train: config.TrainConfig,
    space: LabelSpace | None,
) -> tuple[int, Classifier]:
    """Restores the step and the classifier, with the base's language-model head if that was not trained."""
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
    if whole.trunk.lm_head is None and lm_head is not None:
        whole.trunk.lm_head = nnx.data(lm_head)
    return step, whole
