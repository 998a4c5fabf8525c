"""`bioscan project --reference.uri RAW --projection DIR --sink.uri OUT`: projects the raw vectors of a table."""

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags


def main(
    reference: config.ReferenceConfig,
    projection: str,
    sink: config.SinkConfig,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
) -> None:
    """Write a table's vectors, projected, into a new table, without the model; the same command goes on.

    Args:
        reference: Which table of raw vectors.
        projection: Directory of a projection, from fit-metric.
        sink: Which table to write.
        mesh: Which devices.
    """
    from bioscan_jax.embedding.project import project

    print(project(reference, projection, sink, mesh))


command = from_flags(main, "project")
