"""Repeatable comparisons with other programs: results are first checked to agree, then timed in turns.

To add one, write a function that returns `Figures` and enter it in `BENCHMARKS`.
"""

from collections.abc import Callable, Mapping

from benchmarks.embedding import embed
from benchmarks.figures import Figures
from benchmarks.finetuning import finetune
from benchmarks.identifying import identify
from benchmarks.loading import load
from benchmarks.pipeline import pipeline
from benchmarks.taxonomy import taxonomy
from benchmarks.tokenizing import tokenizer

BENCHMARKS: Mapping[str, Callable[..., Figures]] = {
    "embed": embed,
    "tokenizer": tokenizer,
    "pipeline": pipeline,
    "load": load,
    "finetune": finetune,
    "identify": identify,
    "taxonomy": taxonomy,
}
"""Benchmarks by the name that `bioscan benchmark` takes; a function's parameters are the flags."""
