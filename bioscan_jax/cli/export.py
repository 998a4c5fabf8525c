"""Exports the result of bioscan finetune: a PEFT adapter, a whole Hugging Face checkpoint, or any model as an ONNX graph."""

import dataclasses
from typing import Literal

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags


def main(
    output: str,
    run: str | None = None,
    format: Literal["peft", "merged", "onnx"] = "peft",
    which: Literal["best", "last"] = "best",
    checkpoint: str | None = None,
    model: config.ModelConfig | None = None,
    embed: config.EmbedConfig | None = None,
    push: str | None = None,
    private: bool | None = None,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
) -> None:
    """Export the result of a training run, or any model as an ONNX graph; the run's directory is not changed.

    Args:
        output: Directory or URL to make.
        run: Directory or URL of the training run (--train.output_dir of bioscan finetune).
        format: peft is the adapter, heads and label space; merged a whole checkpoint; onnx a graph with its projection
            and a runner for machines without JAX, of a run or of --model.checkpoint.
        which: The parameters that did best on the validation rows, or those of the last checkpoint.
        checkpoint: Where the base weights are now, if they have moved.
        model: With --format onnx and without --run, the model, such as --model.checkpoint default.
        embed: With --format onnx, layer, strand, phases and pooling of a model without a projection.
        push: OWNER/NAME on the Hugging Face hub, where the output is put as well; see bioscan push.
        private: Whether a new repository there is private.
        mesh: Which devices hold the weights while they are written.
    """
    from bioscan_jax.checkpoints.push import push_to_hub
    from bioscan_jax.embedding.load import load
    from bioscan_jax.errors import InputError
    from bioscan_jax.training.export import export

    if (run is None) == (model is None) or (model is not None and format != "onnx"):
        raise InputError("pass --run DIR, or --format onnx with --model.checkpoint")
    if model is None:
        assert run is not None
        print(export(run, output, format=format, which=which, checkpoint=checkpoint, embed=embed, mesh=mesh))
    else:
        found = load(
            model.checkpoint,
            revision=model.revision,
            adapter=model.adapter,
            projection=model.projection,
            dtype="float32",
            seed=model.seed,
            mesh=mesh,
        )
        settings, _ = found.with_projection(embed or config.EmbedConfig(), config.DataConfig(path=""))
        dataclasses.replace(found, settings=settings).save_onnx(output)
        print(f"{output}: onnx of {found.provenance.model}")
    if push is not None:
        print(f"{push} at commit {push_to_hub(output, push, private=private)}")


command = from_flags(main, "export")
