"""Repeatable comparisons with other programs: results are first checked to agree, then timed in turns.

To add one, write a function that returns `Figures` and enter it in `BENCHMARKS`.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module

from benchmarks.figures import Figures


class _Benchmarks(Mapping[str, Callable[..., Figures]]):
    """Imports a benchmark when it is asked for: each needs other packages."""

    def __init__(self, places: Mapping[str, str]):
        self._places = places

    def __getitem__(self, name: str) -> Callable[..., Figures]:
        module, function = self._places[name].split(":")
        return getattr(import_module(f"benchmarks.{module}"), function)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


BENCHMARKS = _Benchmarks(
    {
        "embed": "embedding:embed",
        "tokenizer": "tokenizing:tokenizer",
        "pipeline": "pipeline:pipeline",
        "load": "loading:load",
        "finetune": "finetuning:finetune",
        "identify": "identifying:identify",
        "taxonomy": "taxonomy:taxonomy",
        "device": "device:device",
        "scale": "scale:scale",
        "fleet": "fleet:fleet",
    }
)
"""Benchmarks by the name that `bioscan benchmark` takes; a function's parameters are the flags."""
