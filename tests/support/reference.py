"""PyTorch's ESM as the reference: tiny random models of both families, built here, nothing downloaded."""

from pathlib import Path

import torch
from torch import nn
from transformers import EsmConfig, EsmForMaskedLM

from bioscan_jax.model.config import TransformerConfig


class GatedUp(nn.Module):
    """The v2 feed-forward: SiLU of the first half times the second."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)

    def forward(self, x):
        first, second = self.dense(x).chunk(2, dim=-1)
        return nn.functional.silu(first) * second


class GatedDown(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, residual):
        return self.dense(x) + residual


def torch_model(config: TransformerConfig, seed: int = 0) -> EsmForMaskedLM:
    """An untied EsmForMaskedLM of `config`, in float32, every parameter random (norms and biases too)."""
    esm = EsmConfig(
        vocab_size=config.vocab_size,
        mask_token_id=config.mask_token_id,
        pad_token_id=config.pad_token_id,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=config.max_position_embeddings,
        layer_norm_eps=config.layer_norm_eps,
        position_embedding_type=config.position_embedding_type,
        emb_layer_norm_before=False,
        token_dropout=config.token_dropout,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = EsmForMaskedLM(esm).eval()
    if config.gated:
        for layer in model.esm.encoder.layer:
            layer.intermediate, layer.output = GatedUp(esm), GatedDown(esm)
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
    """Writes a checkpoint directory as the hub has it: `form` is safetensors, bin or their sharded forms."""
    import json

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
