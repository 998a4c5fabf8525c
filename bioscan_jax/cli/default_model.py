"""`bioscan default-model --data.path FILE --output DIR --work DIR`: trains a model like the one in the package."""

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags


def main(
    data: config.DataConfig,
    output: str,
    work: str,
    settings: config.MetricConfig,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
) -> None:
    """Train a model like the one in the package from labelled barcodes: 6-mers, whitened, with a network beside.

    Args:
        data: Labelled barcodes.
        output: Directory to make; pass it as --model.checkpoint.
        work: Directory for intermediate files.
        settings: How the projection is fitted.
        mesh: Which devices.
    """
    from bioscan_jax.training.default_model import train_default_model

    print(train_default_model(data, output, settings, work=work, mesh=mesh))


command = from_flags(main, "default-model", unprefixed=["settings"])
