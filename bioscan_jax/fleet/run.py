"""Embeds an input into a table, on the devices of this process or on the workers of a fleet."""

from bioscan_jax import config
from bioscan_jax.dashboard import NOT_TRACKED
from bioscan_jax.embedding import run
from bioscan_jax.embedding.summary import RunSummary
from bioscan_jax.errors import InputError


def embed(
    model: config.ModelConfig,
    data: config.DataConfig,
    sink: config.SinkConfig,
    embed: config.EmbedConfig | None = None,
    mesh: config.MeshConfig | None = None,
    tracking: config.TrackingConfig | None = None,
    *,
    fleet: config.FleetConfig | None = None,
    progress: bool = True,
    profile: str | None = None,
) -> RunSummary:
    r"""Embeds every sequence of the input into a Lance table, once, continuing where an earlier run stopped.

    Args:
        model: Which weights.
        data: Which sequences.
        sink: Which table.
        embed: Pooling and batching.
        mesh: Devices; those of each worker, with a fleet.
        tracking: Weights & Biases; disabled if absent.
        fleet: The workers of a Ray cluster to embed on; this process's devices if absent. Rows are the same either way,
            to the last bit on one kind of device.
        progress: Show bars on the terminal.
        profile: Directory for a trace of some batches, once the run is warm; none if absent.

    Raises:
        InputError: An input, setting, table or cluster is wrong; nothing is left half written.
        Interrupted: Ctrl-C or SIGTERM; the same call continues.

    Example:
        >>> import bioscan_jax as bj
        >>> from pathlib import Path
        >>> _ = Path("barcodes.fasta").write_text(">a\nACGTTGCAACGT\n>b\nTTGACATTGACA\n")
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path="barcodes.fasta")
        >>> bj.embed(model, data, bj.SinkConfig(uri="vectors"), progress=False).vectors
        2
    """
    if fleet is None:
        return run.embed(model, data, sink, embed, mesh, tracking, progress=progress, profile=profile)
    from bioscan_jax.fleet.driver import embed_by_fleet

    if profile is not None:
        raise InputError("--profile traces this process, which has no device in a fleet; leave it out")
    settings = embed or config.EmbedConfig(), mesh or config.MeshConfig(), tracking or NOT_TRACKED
    return embed_by_fleet(model, data, sink, *settings, fleet, progress=progress)
