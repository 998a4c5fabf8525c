"""Embeds DNA barcodes into a Lance table; the same command resumes a stopped run."""

import dataclasses

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags
from bioscan_jax.cli._simulated import name_for, write_if_wanted


def main(
    model: config.ModelConfig,
    data: config.DataConfig,
    sink: config.SinkConfig,
    embed: config.EmbedConfig = config.EmbedConfig(),  # noqa: B008 - frozen
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008
    tracking: config.TrackingConfig = config.TrackingConfig(mode="disabled"),  # noqa: B008
    fleet: config.FleetConfig | None = None,
    simulate: config.SimulateConfig | None = None,
    neighbours: int = 0,
    profile: str | None = None,
) -> None:
    """Embed DNA barcodes into a Lance table; the same command resumes a stopped run.

    Args:
        model: Which weights.
        data: Which sequences.
        sink: Which table.
        embed: How tokens become vectors.
        mesh: Which devices.
        tracking: Weights & Biases.
        fleet: Workers on a Ray cluster, instead of the devices of this machine.
        simulate: Simulated barcodes to embed.
        neighbours: Print this many nearest neighbours of the first row at the end.
        profile: Directory for a profiler trace of 20 batches, taken once nothing is left to compile.
    """
    import jax

    from bioscan_jax.checkpoints.hub import DEFAULT
    from bioscan_jax.fleet.run import embed as run_embed
    from bioscan_jax.matching.search import describe_neighbours

    simulated = write_if_wanted(simulate, data.path)
    if simulate is not None and not simulated and sink.table == config.SinkConfig.table:
        sink = dataclasses.replace(sink, table=name_for(data.path))
        print(f"{data.path}: your file instead of simulated barcodes; its vectors go to the table {sink.table!r}")
    if model.checkpoint.startswith("random:"):
        print(f"{model.checkpoint}: RANDOM weights, not trained; vectors only show that the machinery runs")
    summary = run_embed(model, data, sink, embed, mesh, tracking, fleet=fleet, profile=profile)
    if fleet is not None or jax.process_index() == 0:  # with a fleet, the devices of this machine may be a worker's
        print(summary)
        described = summary.provenance.get("projection_description")
        if model.checkpoint == DEFAULT and described:
            print(f"default model: {described}")
        if neighbours:
            print(describe_neighbours(sink.uri, sink.table, neighbours))


command = from_flags(main, "embed")
