"""Converts a Hugging Face checkpoint to an orbax one, which later starts read faster and shard by shard."""

from dataclasses import dataclass

from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.checkpoints.orbax import save_converted
from bioscan_jax.config import MeshConfig, ModelConfig
from bioscan_jax.devices.sharding import make_layout, start_devices
from bioscan_jax.location import output_directory
from bioscan_jax.notebook import Shown


@dataclass(frozen=True)
class ConversionSummary(Shown):
    """Result of `convert`."""

    output: str
    """Directory to pass as `--model.checkpoint`."""
    provenance: Provenance

    def __str__(self) -> str:
        weights = self.provenance
        return f"{self.output}: {weights.model} in {weights.dtype}, sha256 {weights.weights_sha256}"


def convert(model: ModelConfig, output: str, mesh: MeshConfig = MeshConfig()) -> ConversionSummary:  # noqa: B008 - frozen
    """Converts a checkpoint once; pass the output directory as the checkpoint from then on.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from bioscan_jax.config import ModelConfig
        >>> with TemporaryDirectory() as directory:
        ...     summary = convert(ModelConfig(checkpoint="random:tiny-v2"), f"{directory}/converted")
        >>> summary.provenance.model
        'random:tiny-v2 (seeded random weights, seed 0: not trained)'

    Args:
        model: The weights to convert; dtype "auto" keeps bfloat16 on TPU and GPU, float32 on CPU.
        output: Directory or URL to create.
        mesh: Devices that hold the weights during the conversion.

    Raises:
        InputError: The checkpoint is wrong, has an adapter, or `output` is not empty or cannot be written.
    """
    with output_directory(output) as directory:
        start_devices(mesh)
        loaded = load_weights(model, make_layout(mesh), lm_head=None)
        parts = loaded.model, loaded.config, loaded.vocabulary, loaded.provenance, loaded.projection
        save_converted(directory, *parts)
    return ConversionSummary(output, loaded.provenance)
