"""Fits confidences and thresholds for identify on labelled barcodes, and keeps them beside the table."""

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags


def main(
    reference: config.ReferenceConfig,
    query: config.QueryConfig,
    settings: config.IdentifyConfig,
    fit: config.CalibrateConfig,
    model: config.ModelConfig | None = None,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
) -> None:
    """Fit confidences and thresholds for identify with the same settings, on labelled barcodes.

    Args:
        reference: Which table.
        query: Labelled barcodes like those to be identified.
        settings: The settings that identify will be run with.
        fit: The precision required of answers, and how the barcodes are split.
        model: Where the table's model is now, if not where the table records it.
        mesh: Which devices.
    """
    from bioscan_jax.matching.calibration import calibrate

    print(calibrate(reference, query, settings, fit, model=model, mesh=mesh))


command = from_flags(main, "calibrate", unprefixed=["settings", "fit"])
