"""Converts a Hugging Face checkpoint to an orbax one, so that later starts read Flax weights directly."""

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags


def main(model: config.ModelConfig, output: str, mesh: config.MeshConfig = config.MeshConfig()) -> None:  # noqa: B008 - frozen
    """Convert a checkpoint once; pass the output directory as --model.checkpoint from then on.

    Args:
        model: Which weights; model.dtype auto keeps bfloat16 on TPU and GPU, float32 on CPU.
        output: Directory or URL to make.
        mesh: Which devices hold the weights meanwhile.
    """
    from bioscan_jax.checkpoints.convert import convert

    print(convert(model, output, mesh))


command = from_flags(main, "convert")
