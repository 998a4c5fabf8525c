"""Converts a Hugging Face checkpoint to an orbax one, so that later starts read Flax weights directly."""

from pathlib import Path

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags


def main(model: config.ModelConfig, output: str, mesh: config.MeshConfig = config.MeshConfig()) -> None:  # noqa: B008 - frozen
    """Convert a checkpoint once; pass the output directory as --model.checkpoint from then on.

    Args:
        model: Which weights; model.dtype auto keeps bfloat16 on TPU and GPU, float32 on CPU.
        output: Directory to make.
        mesh: Which devices hold the weights meanwhile.
    """
    from bioscan_jax.checkpoints.converted import save
    from bioscan_jax.checkpoints.load import load_weights
    from bioscan_jax.devices.sharding import make_layout, start_devices

    start_devices(mesh)
    loaded = load_weights(model, make_layout(mesh), lm_head=True)
    save(Path(output), loaded.model, loaded.config, loaded.vocabulary, loaded.provenance)
    print(
        f"{output}: {loaded.provenance.model} in {loaded.provenance.dtype}, sha256 {loaded.provenance.weights_sha256}"
    )


command = from_flags(main, "convert")
