"""Exports the result of bioscan finetune: a PEFT adapter, or a whole Hugging Face checkpoint."""

from typing import Literal

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags


def main(
    run: str,
    output: str,
    format: Literal["peft", "merged"] = "peft",
    which: Literal["best", "last"] = "best",
    checkpoint: str | None = None,
    push: str | None = None,
    private: bool | None = None,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
) -> None:
    """Export the result of a training run; the run's directory is not changed.

    Args:
        run: Directory or URL of the training run (--train.output_dir of bioscan finetune).
        output: Directory or URL to make.
        format: peft is the adapter, heads and label space; merged a whole checkpoint.
        which: The parameters that did best on the validation rows, or those of the last checkpoint.
        checkpoint: Where the base weights are now, if they have moved.
        push: OWNER/NAME on the Hugging Face hub, where the output is put as well; see bioscan push.
        private: Whether a new repository there is private.
        mesh: Which devices hold the weights while they are written.
    """
    from bioscan_jax.checkpoints.push import push_to_hub
    from bioscan_jax.training.export import export

    print(export(run, output, format=format, which=which, checkpoint=checkpoint, mesh=mesh))
    if push is not None:
        print(f"{push} at commit {push_to_hub(output, push, private=private)}")


command = from_flags(main, "export")
