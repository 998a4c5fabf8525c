"""Fine-tunes a model on labelled DNA barcodes; the same command goes on where it stopped."""

from command import run

from bioscan_jax import config


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
) -> None:
    """Fine-tune a model on labelled DNA barcodes; the same command goes on where it stopped.

    Args:
        model: Which weights to start from.
        data: Which barcodes, and which of them are kept aside.
        lora: The adapters.
        loss: What is minimised.
        train: How training goes, and where its checkpoints are.
        checkpoint: How often the state is saved.
        tracking: Weights & Biases.
        mesh: Which devices.
        simulate: Make simulated barcodes at data.path first.
    """
    import jax

    from bioscan_jax.barcodes.simulate import write_simulated
    from bioscan_jax.training.run import finetune

    if simulate is not None:
        write_simulated(data.path, **vars(simulate))
        print(f"{data.path}: SIMULATED barcodes, evolved along a random tree; not biology")
    if model.checkpoint.startswith("random:"):
        print(f"{model.checkpoint}: RANDOM weights, not trained before; adapters and heads learn on top of noise")
    summary = finetune(model, data, lora, loss, train, checkpoint, tracking, mesh)
    if jax.process_index() == 0:
        print(summary)


if __name__ == "__main__":
    run(main)
