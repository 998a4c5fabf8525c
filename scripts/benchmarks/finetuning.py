"""One LoRA training step: ours, and PyTorch with PEFT."""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.checkpoints import preset_size, write_random
from benchmarks.figures import Figures, at_least, median_seconds, require, rounded
from benchmarks.peers import torch_model
from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.devices.memory import NeededMemory, needed_memory
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.model.classifier import make_classifier, named_arrays
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.transformer import NucleotideTransformer
from bioscan_jax.training.batches import ExampleBatch
from bioscan_jax.training.losses import masked_lm_loss
from bioscan_jax.training.step import MicroBatches, init_optimizer, make_train_step, place, split_trainable

_AGREE = 1e-4
_STEPS = 1000
_CLS = 3


def finetune(
    preset: str = "nt-v2-50m", batch_size: int = 16, tokens: int = 112, rank: int = 16, seed: int = 0, repeats: int = 5
) -> Figures:
    """Compare a LoRA step with PyTorch and PEFT: same weights, batch, adapters (query and value), AdamW and clipping.

    The objective is masked 6-mers, whose loss is first checked to agree. Both run in one process on all cores in
    turns; rates are rows per second of the median wall time of a step, after two warm-up steps.

    Args:
        preset: Size of the model.
        batch_size: Rows of a step.
        tokens: Tokens of each row, without padding; 112 are a barcode of 658 bp.
        rank: Rank of the adapters.
        seed: Random seed of the weights and the rows.
        repeats: Timed steps of each.

    Raises:
        InputError: A number is too small, a preset unknown, or PyTorch or PEFT not installed.
    """
    at_least(batch_size=(batch_size, 1), tokens=(tokens, 2), rank=(rank, 1), repeats=(repeats, 1))
    transformer = preset_size(preset)
    require("torch", "peft")
    ids = random_rows(transformer, batch_size, tokens, seed)
    lora, train = (
        config.LoRAConfig(rank=rank),
        config.TrainConfig(objective="mlm", batch_size=batch_size, batch_tokens=batch_size * tokens),
    )
    with tempfile.TemporaryDirectory() as directory:
        trunk = write_random(Path(directory) / "model", transformer, seed)
        theirs = torch_model(str(Path(directory) / "model"))
    check_same_loss(trunk, theirs, ids)
    tasks = {"ours": our_step(trunk, ids, lora, train).run, "theirs": partial(peft_step(theirs, lora, train), ids)}
    for _ in range(2):
        for task in tasks.values():
            task()
    seconds = median_seconds(tasks, repeats)
    return {
        "preset": preset,
        "batch": f"{batch_size} x {tokens}",
        "adapters": f"rank {rank}, {' and '.join(lora.targets)}",
        "repeats": repeats,
        "rows_per_second": rounded(batch_size / seconds["ours"]),
        "peft_rows_per_second": rounded(batch_size / seconds["theirs"]),
        "ratio": rounded(seconds["theirs"] / seconds["ours"]),
        "torch_version": metadata.version("torch"),
        "peft_version": metadata.version("peft"),
    }


def random_rows(transformer: TransformerConfig, rows: int, tokens: int, seed: int) -> np.ndarray:
    """Returns rows of random 6-mers after CLS; the lowest ids are special tokens."""
    ids = np.random.default_rng(seed).integers(10, transformer.vocab_size - 10, (rows, tokens)).astype(np.int32)
    ids[:, 0] = _CLS
    return ids


def check_same_loss(ours: NucleotideTransformer, theirs: Any, ids: np.ndarray) -> None:
    """Raises RuntimeError if the losses over all tokens differ, since the speeds mean nothing then."""
    import torch

    given = jnp.asarray(ids)
    count = jnp.float32(given.size)
    mine = float(masked_lm_loss(ours.logits(ours.hidden_state(given)), given, jnp.ones(given.shape, bool), count))
    with torch.inference_mode():
        expected = torch.from_numpy(ids.astype(np.int64))
        other = float(theirs(expected, attention_mask=torch.ones_like(expected), labels=expected).loss)
    if not abs(mine - other) <= _AGREE * abs(other):
        raise RuntimeError(f"the loss is {mine}, that of PyTorch {other}")


@dataclass(frozen=True, kw_only=True)
class OurStep:
    """One of our optimizer steps, compiled."""

    run: Callable[[], None]
    """Puts the batch on the devices, runs the step and waits for it."""
    memory: NeededMemory | None
    """What the compiler says it needs, where the platform tells."""


def our_step(
    trunk: NucleotideTransformer, ids: np.ndarray, lora: config.LoRAConfig, train: config.TrainConfig
) -> OurStep:
    """Compiles a step for these rows, on the first device."""
    layout, loss = make_layout(config.MeshConfig(data=1)), config.LossConfig()
    classifier = make_classifier(trunk, loss, lora, None, layout, seed=train.seed)
    model = split_trainable(classifier, layout, loss, train, tree=None, special_ids=(0, 1, 2, _CLS))
    params = jax.tree.map(jnp.copy, named_arrays(model.trained))
    held = [params, init_optimizer(model, _STEPS, params)]
    rows = len(ids)
    batch = ExampleBatch(
        np.arange(rows), ids, np.full((rows, len(RANKS)), -1, np.int32), np.full((rows, 3), np.nan, np.float32)
    )

    def placed() -> MicroBatches:
        return place(batch, layout, train.batch_tokens, pad=trunk.config.pad_token_id)

    number = jnp.uint32(1)
    step = make_train_step(model, _STEPS).lower(*held, model.frozen, number, placed()).compile()

    def run() -> None:
        held[0], held[1], numbers = step(held[0], held[1], model.frozen, number, placed())
        jax.block_until_ready((held, numbers))

    return OurStep(run=run, memory=needed_memory(step))


def peft_step(
    model: Any, lora: config.LoRAConfig, train: config.TrainConfig, device: str = "cpu"
) -> Callable[[np.ndarray], None]:
    """Adds PEFT's adapters to a model; returns a function that runs one step on rows of ids, and waits for it."""
    import torch
    from peft import LoraConfig, get_peft_model

    targets = list(lora.targets)
    wanted = LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), lora_dropout=lora.dropout, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses a deprecated name of transformers
        adapted = get_peft_model(model, wanted).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, weight_decay=train.weight_decay)
    mask, pad, share = model.config.mask_token_id, model.config.pad_token_id, config.LossConfig().mask_rate

    def run(ids: np.ndarray) -> None:
        whole = torch.from_numpy(ids.astype(np.int64)).to(device)
        real = whole != pad
        hidden = (torch.rand(whole.shape, device=device) < share) & real
        labels = torch.where(hidden, whole, -100)
        given = torch.where(hidden, mask, whole)
        # Without padding no mask is given, so that PyTorch may take its fastest attention.
        loss = adapted(input_ids=given, attention_mask=real.long() if (ids == pad).any() else None, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()

    return run
