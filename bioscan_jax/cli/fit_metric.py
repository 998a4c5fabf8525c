"""Fits a projection to a vector table and its labels: `bioscan fit-metric --reference.uri DIR --output DIR`."""

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags


def main(
    reference: config.ReferenceConfig,
    output: str,
    settings: config.MetricConfig,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
) -> None:
    """Fit a projection to a vector table and its labels, so that the nearest neighbour shares the taxon.

    Args:
        reference: Which table; its vectors must be raw.
        output: Directory or URL to make, with the projection and a record of how it was fitted.
        settings: How to fit; what is absent is chosen by species held out inside the table.
        mesh: Which devices.
    """
    from bioscan_jax.training.metric import fit_metric

    print(fit_metric(reference, output, settings, mesh=mesh))


command = from_flags(main, "fit-metric", unprefixed=["settings"])
