"""PyTorch's ESM as the reference: small random models of both families, without downloads."""

import json
from pathlib import Path

import torch
from benchmarks.peers import esm_model
from transformers import EsmForMaskedLM

from bioscan_jax.model.config import TransformerConfig


def torch_model(config: TransformerConfig, seed: int = 0) -> EsmForMaskedLM:
    """Creates an untied EsmForMaskedLM of `config`, in float32, every parameter random (norms and biases too)."""
    model = esm_model(config, attention="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("LayerNorm.weight") or "norm" in name and name.endswith("weight"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def save_checkpoint(model: EsmForMaskedLM, config: TransformerConfig, directory: Path, form: str) -> Path:
    """Writes a checkpoint as on the hub; `form` is safetensors or bin, or one of them after `sharded-`."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(config.to_json())
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    state.setdefault("lm_head.bias", state.get("lm_head.decoder.bias"))
    names = sorted(state)
    stem, suffix = ("model", "safetensors") if "safetensors" in form else ("pytorch_model", "bin")

    def write(part: dict, name: str) -> None:
        if suffix == "bin":
            torch.save(part, directory / name)
        else:
            save_file({k: v.clone() for k, v in part.items()}, directory / name)

    if not form.startswith("sharded"):
        write(state, f"{stem}.{suffix}")
        return directory
    half = len(names) // 2
    weight_map = {}
    for i, part in enumerate((names[:half], names[half:]), start=1):
        file = f"{stem}-{i:05d}-of-00002.{suffix}"
        write({k: state[k] for k in part}, file)
        weight_map |= dict.fromkeys(part, file)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory
