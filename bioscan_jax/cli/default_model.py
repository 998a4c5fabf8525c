"""`bioscan default-model --data.path FILE --output DIR --work DIR`: trains a model like the one in the package."""

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags


def main(
    data: config.DataConfig,
    output: str,
    work: str,
    settings: config.MetricConfig,
    columns: bool = True,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
) -> None:
    """Train a model like the one in the package from labelled barcodes: bases and 6-mers, whitened, with a network.

    Args:
        data: Labelled barcodes.
        output: Directory to make; pass it as --model.checkpoint.
        work: Directory for intermediate files.
        settings: How the projection is fitted.
        columns: Align the barcodes, which must be of one marker; otherwise 6-mers are counted alone.
        mesh: Which devices.
    """
    from bioscan_jax.training.default_model import train_default_model

    print(train_default_model(data, output, settings, work=work, columns=columns, mesh=mesh))


command = from_flags(main, "default-model", unprefixed=["settings"])
