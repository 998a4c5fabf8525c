"""Fine-tunes a model on labelled DNA barcodes; the same command resumes a stopped run."""

import dataclasses

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags
from bioscan_jax.cli._simulated import name_for, write_if_wanted


def main(
    model: config.ModelConfig,
    data: config.ExamplesConfig,
    lora: config.LoRAConfig = config.LoRAConfig(),  # noqa: B008 - frozen
    loss: config.LossConfig = config.LossConfig(),  # noqa: B008
    train: config.TrainConfig = config.TrainConfig(),  # noqa: B008
    checkpoint: config.CheckpointConfig = config.CheckpointConfig(),  # noqa: B008
    tracking: config.TrackingConfig = config.TrackingConfig(),  # noqa: B008
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008
    simulate: config.SimulateConfig | None = None,
    profile: str | None = None,
) -> None:
    """Fine-tune a model on labelled DNA barcodes; the same command resumes a stopped run.

    Args:
        model: Which weights to start from.
        data: Which barcodes, and which of them are kept aside.
        lora: The adapters.
        loss: What training minimises.
        train: Schedule, batches, and the directory of the checkpoints.
        checkpoint: How often the state is saved.
        tracking: Weights & Biases.
        mesh: Which devices.
        simulate: Simulated barcodes to train on.
        profile: Directory for a profiler trace of 20 steps, taken once nothing is left to compile.
    """
    import jax

    from bioscan_jax.training.run import finetune

    simulated = write_if_wanted(simulate, data.path)
    if simulate is not None and not simulated:
        train = dataclasses.replace(train, output_dir=f"{train.output_dir}_{name_for(data.path)}")
        print(f"{data.path}: your file instead of simulated barcodes; the run goes to {train.output_dir}")
    if model.checkpoint.startswith("random:"):
        print(f"{model.checkpoint}: RANDOM weights, not pretrained; adapters and heads learn on top of them")
    summary = finetune(model, data, lora, loss, train, checkpoint, tracking, mesh, profile=profile)
    if jax.process_index() == 0:
        print(summary)


command = from_flags(main, "finetune")
