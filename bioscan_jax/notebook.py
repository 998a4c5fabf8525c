"""What notebooks show: progress bars, and results as HTML, in which every text from the data is escaped."""

import base64
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

_START, _END = 16, 32
"""Characters of a long cell that a table shows: of a lineage, the kingdom and the species."""


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook, such as Jupyter's, Colab's or Kaggle's."""
    return getattr(_shell(), "kernel", None) is not None


def _shell() -> Any:
    """Returns the IPython shell of this process; None outside of one."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def same_again() -> str:
    """Returns what a stopped run asks the user to run again."""
    return "the same cell" if in_notebook() else "the same command"


def progress_bar(**settings: Any) -> tqdm:
    """Returns a bar of tqdm: a widget in a notebook that has ipywidgets, else text.

    Args:
        settings: As for `tqdm.tqdm`.
    """
    if not in_notebook():
        return tqdm(**settings)
    if find_spec("ipywidgets"):
        from tqdm.notebook import tqdm as widget

        return widget(**settings)
    return tqdm(file=sys.stdout, **settings)  # a notebook shows stderr in red


if in_notebook() and not find_spec("ipywidgets"):
    # huggingface_hub imports tqdm.auto, which asks for ipywidgets
    warnings.filterwarnings("ignore", "IProgress not found")


class Shown:
    """Shows a result in IPython and notebooks as the text that it prints as, not as its fields."""

    def __init_subclass__(cls) -> None:
        cls._repr_pretty_ = Shown._repr_pretty_  # IPython prefers a __repr__ of the class, which dataclass makes

    def _repr_html_(self) -> str:
        return text_html(str(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def text_html(text: str) -> str:
    """Returns lines of text as HTML that keeps their columns."""
    return f'<pre style="font-family:monospace;line-height:1.35">{escape(text)}</pre>'


def facts_html(facts: Mapping[str, str], main: Sequence[str] = ()) -> str:
    """Returns names and values as a table.

    Args:
        facts: A text for each name.
        main: Names to show at first, where not all are; the others open at a click.
    """
    shown = {name: text for name, text in facts.items() if not main or name in main}
    rest = {name: text for name, text in facts.items() if name not in shown}
    more = f"<details><summary>more figures</summary>{_facts(rest)}</details>" if rest else ""
    return _facts(shown) + more


def _facts(facts: Mapping[str, str]) -> str:
    style = "text-align:left;vertical-align:top;white-space:pre-line"
    rows = "".join(
        f'<tr><th style="{style}">{escape(name)}</th><td style="{style}">{escape(text)}</td></tr>'
        for name, text in facts.items()
    )
    return f'<table class="dataframe"><tbody>{rows}</tbody></table>'


def rows_html(table: pa.Table, most: int = 10) -> str:
    """Returns the first rows of an Arrow table as a table of HTML, without columns of lists.

    Args:
        table: The rows.
        most: How many to show.
    """
    kept = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    first = table.slice(0, most).select(kept)
    left = len(table) - len(first)
    lines = zip(*(column.to_pylist() for column in first.columns), strict=True)
    more = f"<p>{left:,} more rows</p>" if left else ""
    return f'<div style="overflow-x:auto">{_grid(kept, lines)}</div>{more}'


def _grid(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    top = "".join(f'<th style="text-align:left">{escape(head)}</th>' for head in heads)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<table class="dataframe"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f'<td style="text-align:right">{value:.4g}</td>'
    text = "" if value is None else str(value)
    cut = text if len(text) <= _START + _END else f"{text[:_START]}…{text[-_END:]}"
    side = "right" if isinstance(value, int) and not isinstance(value, bool) else "left"
    return f'<td style="text-align:{side};white-space:nowrap" title="{escape(text)}">{escape(cut)}</td>'


def picture_html(path: str, what: str) -> str:
    """Returns a picture as an image that needs no other file; nothing if there is no such file on this machine.

    Args:
        path: A PNG file.
        what: What it shows, for those who cannot see it.
    """
    file = Path(path)
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(what)}" style="max-width:100%" src="data:image/png;base64,{data}">'


@dataclass(frozen=True)
class Html:
    """HTML that a notebook shows, and the text in its place elsewhere."""

    html: str
    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def show_arrow_tables() -> None:
    """Lets this notebook show Arrow tables as `rows_html` does; pyarrow has only text for them. Else does nothing."""
    if in_notebook():
        _shell().display_formatter.formatters["text/html"].for_type(pa.Table, rows_html)
