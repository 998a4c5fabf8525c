"""Measurements that anyone can repeat: what is compared is first checked to give the same, then timed in turns."""

from collections.abc import Callable, Mapping

from benchmarks.embedding import embed
from benchmarks.figures import Figures
from benchmarks.finetuning import finetune
from benchmarks.identifying import identify
from benchmarks.loading import load
from benchmarks.pipeline import pipeline
from benchmarks.tokenizing import tokenizer

BENCHMARKS: Mapping[str, Callable[..., Figures]] = {
    "embed": embed,
    "tokenizer": tokenizer,
    "pipeline": pipeline,
    "load": load,
    "finetune": finetune,
    "identify": identify,
}
"""By the name that scripts/benchmark.py takes; the parameters are its flags."""
