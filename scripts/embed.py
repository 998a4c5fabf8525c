"""Embeds DNA barcodes into a Lance table; the same command goes on where it stopped."""

from command import run

from bioscan_jax import config


def main(
    model: config.ModelConfig,
    data: config.DataConfig,
    sink: config.SinkConfig,
    embed: config.EmbedConfig = config.EmbedConfig(),  # noqa: B008 - frozen
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008
    simulate: config.SimulateConfig | None = None,
    neighbours: int = 0,
) -> None:
    """Embed DNA barcodes into a Lance table; the same command goes on where it stopped.

    Args:
        model: Which weights.
        data: Which sequences.
        sink: Which table.
        embed: How tokens become vectors.
        mesh: Which devices.
        simulate: Make simulated barcodes at data.path first.
        neighbours: Print this many nearest neighbours of the first row at the end.
    """
    import jax

    from bioscan_jax.barcodes.simulate import write_simulated
    from bioscan_jax.embedding.run import embed as run_embed
    from bioscan_jax.matching.search import describe_neighbours

    if simulate is not None:
        write_simulated(data.path, **vars(simulate))
        print(f"{data.path}: SIMULATED barcodes, evolved along a random tree; not biology")
    if model.checkpoint.startswith("random:"):
        print(f"{model.checkpoint}: RANDOM weights, not trained; vectors only show that the machinery runs")
    summary = run_embed(model, data, sink, embed, mesh)
    if jax.process_index() == 0:
        print(summary)
        if neighbours:
            print(describe_neighbours(sink.uri, sink.table, neighbours))


if __name__ == "__main__":
    run(main)
