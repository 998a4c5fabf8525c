"""What tests/golden holds: small models of both families, and outputs of PyTorch and transformers to compare with."""

import dataclasses
import json
import random
import tempfile
from pathlib import Path

import numpy as np

from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.model.config import PRESETS, TransformerConfig

_SEQUENCES = ["", "A", "N", "ACGTA", "ACGTAC", "ACGTACG", "NACGTAC", "ACGTACN", "NN", "ACGNNTACGTACGTNACGTACGTACGTACG"]
LOGIT_STEP = 64
"""Only every 64th logit is kept."""


def golden_config(family: str) -> TransformerConfig:
    """Returns the configuration of a model small enough to keep in the repository."""
    return dataclasses.replace(
        PRESETS[f"tiny-{family}"],
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        max_position_embeddings=66,
    )


def reference_outputs(model, ids: np.ndarray, pad: int) -> dict[str, np.ndarray]:
    """Computes hidden states, logits and the mean over attended tokens with PyTorch."""
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


def make_tokenizer(directory: Path) -> None:
    """Writes tokenizer.json: sequences, and for each published vocabulary its digest and EsmTokenizer's ids."""
    from transformers import EsmTokenizer

    rng = random.Random(0)
    drawn = ["".join(rng.choices("ACGTN", (9, 9, 9, 9, 1), k=length)) for length in (36, 59, 130)]
    golden: dict = {"sequences": _SEQUENCES + drawn}
    for family in ("v1", "v2"):
        vocabulary = Vocabulary.published(family)
        with tempfile.TemporaryDirectory() as folder:
            vocab_file = Path(folder) / "vocab.txt"
            vocab_file.write_text(vocabulary.text(), encoding="utf-8")
            tokenizer = EsmTokenizer(str(vocab_file), eos_token=None)
            ids = [tokenizer(sequence)["input_ids"] for sequence in golden["sequences"]]
        golden[family] = {"vocabulary_sha256": vocabulary.sha256, "ids": ids}
    (directory / "tokenizer.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
