"""Measurements that anyone can repeat: what is compared is first checked to give the same, then timed in turns."""

from collections.abc import Callable, Mapping

from bioscan_jax.benchmarks.embedding import embed
from bioscan_jax.benchmarks.figures import Figures
from bioscan_jax.benchmarks.finetuning import finetune
from bioscan_jax.benchmarks.identifying import identify
from bioscan_jax.benchmarks.loading import load
from bioscan_jax.benchmarks.pipeline import pipeline
from bioscan_jax.benchmarks.tokenizing import tokenizer

BENCHMARKS: Mapping[str, Callable[..., Figures]] = {
    "embed": embed,
    "tokenizer": tokenizer,
    "pipeline": pipeline,
    "load": load,
    "finetune": finetune,
    "identify": identify,
}
"""By the name that scripts/benchmark.py takes; the parameters are its flags."""
