"""What notebooks show: HTML whose texts are escaped, bars, exceptions in one line."""

import sys
from types import SimpleNamespace

import pyarrow as pa
import pytest
from tqdm import tqdm

from bioscan_jax.errors import InputError, Interrupted
from bioscan_jax.notebook import facts_html, in_notebook, picture_html, progress_bar, rows_html, same_again, text_html
from bioscan_jax.table.compact import CompactSummary

EVIL = "<script>alert(1)</script>&\"'"


def test_every_text_is_escaped():
    rows = pa.table({EVIL: [EVIL, None], "vector": [[1.0], [2.0]], "depth": [2.0, 1e-9], "n": [1, 2]})
    shown = rows_html(rows, most=1) + facts_html({EVIL: EVIL}, main=["none"]) + text_html(EVIL)
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 6
    assert "vector" not in shown
    assert "1 more rows" in shown


def test_results_show_as_the_text_that_they_print_as():
    summary = CompactSummary(3, 1)
    assert str(summary) in summary._repr_html_()


def test_consoles_print_the_text_of_a_result():
    lines: list[str] = []
    vars(CompactSummary)["_repr_pretty_"](CompactSummary(3, 1), SimpleNamespace(text=lines.append), False)
    assert lines == [str(CompactSummary(3, 1))]


def test_a_picture_that_is_absent_or_remote_is_left_out(tmp_path):
    assert picture_html("gs://bucket/curves.png", "curves") == picture_html(str(tmp_path), "curves") == ""


@pytest.mark.parametrize("error", [InputError("a.csv: is empty"), Interrupted("stopped", 2)])
def test_exceptions_are_one_line(error):
    assert error._render_traceback_() == [f"{type(error).__name__}: {error}"]


def test_outside_of_a_notebook_bars_are_text():
    assert not in_notebook()
    assert same_again() == "the same command"
    with progress_bar(total=1, file=sys.stdout) as bar:
        assert type(bar) is tqdm
