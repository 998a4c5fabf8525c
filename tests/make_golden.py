"""Writes tests/golden: small checkpoints made by PyTorch and what PyTorch and transformers compute with them.

Needs the `parity` extra. The plain test run reads the files, so that it compares with PyTorch without having it.

    python tests/make_golden.py
"""

import dataclasses
import json
import shutil

import numpy as np
from support.places import GOLDEN

from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.model.config import PRESETS, TransformerConfig

SEQUENCES = ("ACGTACGTTGCAACGTACNNACGTACGATTTGCATGCAAA", "ACGTAC", "TTGANCA", "GATTACAGATTACAGATTACAGATTACAGG", "A")
LOGIT_STEP = 64


def golden_config(family: str) -> TransformerConfig:
    """A model of the family small enough to keep in the repository."""
    return dataclasses.replace(
        PRESETS[f"tiny-{family}"],
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        max_position_embeddings=66,
    )


def reference_outputs(model, ids: np.ndarray, pad: int) -> dict[str, np.ndarray]:
    """Hidden states, logits and the mean over attended tokens, as PyTorch computes them."""
    import torch

    with torch.no_grad():
        out = model(torch.tensor(ids), attention_mask=torch.tensor(ids != pad), output_hidden_states=True)
    hidden = torch.stack(out.hidden_states).numpy()
    real = (ids != pad)[..., None]
    return {
        "hidden": hidden,
        "logits": out.logits.numpy(),
        "pooled": (hidden[-1] * real).sum(1) / real.sum(1),
    }


def main() -> None:
    from support import golden_tokenizer
    from support.reference import save_checkpoint, torch_model
    from transformers import EsmTokenizer

    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    golden_tokenizer.make(GOLDEN)
    for family, form in (("v1", "bin"), ("v2", "safetensors")):
        config, directory = golden_config(family), GOLDEN / family
        model = torch_model(config)
        save_checkpoint(model, config, directory, form)
        (directory / "vocab.txt").write_text(Vocabulary.published(family).text())
        tokenizer = EsmTokenizer(str(directory / "vocab.txt"), eos_token=None)
        ids = np.array(tokenizer(list(SEQUENCES), padding=True)["input_ids"])
        outputs = reference_outputs(model, ids, config.pad_token_id)
        outputs["logits"] = outputs["logits"][:, :, ::LOGIT_STEP]
        np.savez_compressed(directory / "outputs.npz", ids=ids, **outputs)
        (directory / "sequences.json").write_text(json.dumps(SEQUENCES) + "\n")


if __name__ == "__main__":
    main()
