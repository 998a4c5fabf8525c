"""PyTorch and transformers on the same weights and rows, as an alternative. Needs the extra `parity`."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.figures import median_seconds
from bioscan_jax.model.config import TransformerConfig, read_config

if TYPE_CHECKING:
    from transformers import EsmForMaskedLM

_TIMED_WIDTH = 128


def torch_model(directory: str) -> "EsmForMaskedLM":
    """Loads a published checkpoint in float32, in evaluation mode.

    Args:
        directory: Directory with config.json and model.safetensors.

    Raises:
        RuntimeError: A parameter has no value in the file.
    """
    from safetensors.torch import load_file

    model = esm_model(read_config(Path(directory)), attention="sdpa")
    state = load_file(f"{directory}/model.safetensors")
    missing = model.load_state_dict(state, strict=False).missing_keys
    lacking = [name for name in missing if "inv_freq" not in name and "decoder.bias" not in name]
    if lacking:
        raise RuntimeError(f"{directory} lacks {', '.join(lacking)}")
    return model


def esm_model(transformer: TransformerConfig, attention: Literal["sdpa", "eager"]) -> "EsmForMaskedLM":
    """Creates an ESM model in evaluation mode, with untied embeddings; transformers has no class for v2's gates."""
    from transformers import EsmConfig, EsmForMaskedLM

    esm = EsmConfig(
        vocab_size=transformer.vocab_size,
        mask_token_id=transformer.mask_token_id,
        pad_token_id=transformer.pad_token_id,
        hidden_size=transformer.hidden_size,
        num_hidden_layers=transformer.num_hidden_layers,
        num_attention_heads=transformer.num_attention_heads,
        intermediate_size=transformer.intermediate_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=transformer.max_position_embeddings,
        layer_norm_eps=transformer.layer_norm_eps,
        position_embedding_type=transformer.position_embedding_type,
        emb_layer_norm_before=False,
        token_dropout=transformer.token_dropout,
        tie_word_embeddings=False,
        attn_implementation=attention,  # pyright: ignore[reportCallIssue] - taken by the base class
    )
    model = EsmForMaskedLM(esm).eval()
    if transformer.gated:
        _gate(model, transformer)
    return model


def _gate(model: "EsmForMaskedLM", transformer: TransformerConfig) -> None:
    """Replaces ESM's feed-forward by that of v2: SiLU of the first half times the second, no biases."""
    import torch

    width, inner = transformer.hidden_size, transformer.intermediate_size

    class Up(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = torch.nn.Linear(width, 2 * inner, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.dense(x).chunk(2, dim=-1)
            return torch.nn.functional.silu(first) * second

    class Down(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = torch.nn.Linear(inner, width, bias=False)

        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return self.dense(x) + residual

    for layer in model.esm.encoder.layer:
        layer.intermediate, layer.output = Up(), Down()


def embed_rows(
    checkpoint: str,
    path: str,
    sink: str,
    how: Literal["padded", "sorted", "tuned"],
    rows: int,
    batch_rows: int,
    batch_tokens: int,
) -> dict[str, float]:
    """Embeds a Parquet file into a Lance table; returns the seconds without loading the model, and the token budget.

    Args:
        checkpoint: Directory of the checkpoint.
        path: Parquet with sequence_id and cleaned dna_sequence.
        sink: Path of the table.
        how: `padded` pads each row to the model's longest, in the order of the file; `sorted` sorts by length, pads to
            the longest row of a batch, and fills a token budget; `tuned` does so with the fastest of four budgets,
            found before the clock starts.
        rows: Number of rows, from the first on.
        batch_rows: Rows of a padded batch.
        batch_tokens: Tokens of a sorted batch; the most of a tuned one.
    """
    import lance
    import torch
    from transformers import EsmTokenizer

    model = torch_model(checkpoint)
    longest = read_config(Path(checkpoint)).max_tokens
    tokenizer = EsmTokenizer(f"{checkpoint}/vocab.txt", eos_token=None)  # pyright: ignore[reportArgumentType]
    pad = model.config.pad_token_id

    def vectors(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            given = torch.from_numpy(ids)
            real = given != pad
            hidden = model.esm(given, attention_mask=real.long()).last_hidden_state
            return ((hidden * real[:, :, None]).sum(1) / real.sum(1)[:, None]).numpy()

    def padded(rows_of_ids: list[list[int]], width: int) -> np.ndarray:
        ids = np.full((len(rows_of_ids), width), pad, np.int64)
        for i, row in enumerate(rows_of_ids):
            ids[i, : len(row)] = row
        return ids

    def batches(lengths: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Yields the rows and the width of each batch."""
        if how == "padded":
            for first in range(0, len(lengths), batch_rows):
                yield np.arange(first, min(first + batch_rows, len(lengths))), longest
            return
        order = np.argsort(-lengths, kind="stable")
        first = 0
        while first < len(order):
            width = int(lengths[order[first]])
            chosen = order[first : first + max(1, batch_tokens // width)]
            yield chosen, width
            first += len(chosen)

    vectors(padded([[3, 4, 5]], 16))
    if how == "tuned":
        budgets = {str(part): max(2, batch_tokens // part) for part in (1, 2, 4, 8)}
        given = {
            part: np.full((max(1, budget // _TIMED_WIDTH), _TIMED_WIDTH), 3, np.int64)
            for part, budget in budgets.items()
        }
        taken = median_seconds({part: partial(vectors, ids) for part, ids in given.items()}, 2)
        batch_tokens = budgets[min(taken, key=lambda part: taken[part] / given[part].size)]
    start = time.perf_counter()
    table = pq.read_table(path).slice(0, rows)
    encoded = tokenizer(table["dna_sequence"].to_pylist())["input_ids"]
    encoded = [row[:longest] for row in encoded]
    found = np.empty((len(encoded), model.config.hidden_size), np.float32)
    for chosen, width in batches(np.array([len(row) for row in encoded])):
        found[chosen] = vectors(padded([encoded[i] for i in chosen], width))
    column = pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), found.shape[1])
    lance.write_dataset(table.append_column("vector", column), sink)
    return {"seconds": time.perf_counter() - start, "batch_tokens": batch_tokens}
