import re
import string

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax.barcodes import cleaning
from bioscan_jax.barcodes.cleaning import (
    REASONS,
    CleaningCounts,
    clean,
    reverse_complement,
    row_blocks,
    start_at_phase,
    string_bytes,
)
from bioscan_jax.errors import InputError

AMBIGUITY = "RYSWKMBDHV"
COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}

# Other work on the machine must not fail a test.
unhurried = settings(deadline=None)

dirty = (
    st.none() | st.text("ACGTNacgtnUuRYSWKMBDHVryswkmbdhv-. \t\n\r\v\f") | st.text("ACG-E*4?é ", max_size=9) | st.text()
)
dna = st.lists(st.text("ACGTN", max_size=20), max_size=8)


def large(values) -> pa.LargeStringArray:
    return pa.array(values, pa.large_string())


def clean_one(value: str | None) -> tuple[str, str | None, CleaningCounts]:
    """The rules, applied to one character at a time."""
    if value is None:
        return "", "null", CleaningCounts()
    iupac = "ACGTUN" + AMBIGUITY
    given, value = value, re.sub(r"\*[\s*]*\Z", "", value, flags=re.ASCII)
    if any(letter not in iupac + iupac.lower() + "-." + string.whitespace for letter in value):
        return "", "not_dna", CleaningCounts()
    if not value.strip(string.whitespace):
        return "", "empty", CleaningCounts()
    letters = [letter for letter in value if letter not in "-." + string.whitespace]
    cleaned = "".join("T" if x in "Uu" else x.upper() if x in "ACGTNacgtn" else "N" for x in letters)
    if not set(cleaned) & set("ACGT"):
        return "", "no_acgt", CleaningCounts()
    counts = CleaningCounts(
        lower_case=sum(x in string.ascii_lowercase for x in letters),
        u_to_t=sum(x in "Uu" for x in letters),
        ambiguous_to_n=sum(x.upper() in AMBIGUITY for x in letters),
        gaps_removed=len(value) - len(letters),
        stops_removed=given.count("*") - value.count("*"),
    )
    return cleaned, None, counts


@given(st.lists(dirty, max_size=12))
@unhurried
def test_cleaning_follows_the_rules_for_each_row(values: list[str | None]):
    cleaned = clean(pa.array(values, pa.string()))
    cleaned.sequences.validate(full=True)
    expected = [clean_one(value) for value in values]
    assert cleaned.sequences.to_pylist() == [text for text, _, _ in expected]
    assert cleaned.reasons.to_pylist() == [reason for _, reason, _ in expected]
    assert cleaned.changes == sum((counts for _, _, counts in expected), CleaningCounts())


@given(st.lists(dirty, max_size=12))
@unhurried
def test_cleaning_twice_equals_cleaning_once(values: list[str | None]):
    once = clean(pa.array(values, pa.string()))
    twice = clean(once.sequences)
    assert twice.sequences.equals(once.sequences)
    assert twice.changes == CleaningCounts()


@given(st.lists(dirty, max_size=12), st.data())
@unhurried
def test_the_arrow_layout_does_not_matter(values: list[str | None], data: st.DataObject):
    cut = data.draw(st.integers(0, len(values)))
    plain = pa.array(values, pa.string())
    expected = clean(plain)
    padded = pa.array(["ACGT", None, *values, "xx"], pa.string())
    for layout in (
        plain.cast(pa.large_string()),
        plain.cast(pa.string_view()),
        plain.dictionary_encode(),
        padded.slice(2, len(values)),
        padded.cast(pa.large_string()).slice(2, len(values)),
        pa.chunked_array([plain[:cut], plain[cut:]], pa.string()),
        pa.chunked_array([plain[:cut].dictionary_encode(), plain[cut:].dictionary_encode()]),
    ):
        cleaned = clean(layout)
        assert cleaned.sequences.equals(expected.sequences)
        assert cleaned.reasons.equals(expected.reasons)
        assert cleaned.changes == expected.changes


@given(st.lists(dirty, min_size=1, max_size=12))
@unhurried
def test_the_block_size_does_not_change_the_result(values: list[str | None]):
    whole = clean(pa.array(values, pa.string()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleaning, "_BLOCK_BYTES", 7)
        blocked = clean(pa.array(values, pa.string()))
    assert blocked.sequences.equals(whole.sequences)
    assert blocked.reasons.equals(whole.reasons)
    assert blocked.changes == whole.changes


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null"),
        ("", "empty"),
        (" \n", "empty"),
        ("NNN", "no_acgt"),
        ("n-RY.", "no_acgt"),
        ("----", "no_acgt"),
        ("MKTAYIAKQR", "not_dna"),
        ("ACGT4", "not_dna"),
        ("ACGTX", "not_dna"),
        ("AC*GT", "not_dna"),
        ("*", "empty"),
        ("ACGé", "not_dna"),
        ("AC\0GT", "not_dna"),
    ],
)
def test_reasons(value: str | None, reason: str):
    cleaned = clean(pa.array([value, "ACGT"], pa.string()))
    assert cleaned.reasons.to_pylist() == [reason, None]
    assert cleaned.sequences.to_pylist() == ["", "ACGT"]
    assert cleaned.changes == CleaningCounts()
    assert reason in REASONS


def test_counts_are_of_usable_rows_and_add_up():
    first = clean(pa.array(["acgU-R", "acgu-rE", "nnn---"])).changes
    assert first == CleaningCounts(lower_case=3, u_to_t=1, ambiguous_to_n=1, gaps_removed=1)
    assert first + first == CleaningCounts(lower_case=6, u_to_t=2, ambiguous_to_n=2, gaps_removed=2)


def test_invalid_utf8_and_bytes_under_a_null_are_handled():
    offsets = pa.py_buffer(np.array([0, 3, 6, 8], np.int32))
    rows = pa.Array.from_buffers(pa.string(), 3, [pa.py_buffer(b"\x05"), offsets, pa.py_buffer(b"A\xff\xfeGGGCC")])
    cleaned = clean(rows)
    assert cleaned.sequences.to_pylist() == ["", "", "CC"]
    assert cleaned.reasons.to_pylist() == ["not_dna", "null", None]


def test_columns_without_rows_or_values():
    for empty in (pa.array([], pa.string()), pa.chunked_array([], pa.large_string()), pa.array([], pa.null())):
        assert len(clean(empty).sequences) == 0
        assert len(clean(empty).reasons) == 0
    assert clean(pa.nulls(2)).reasons.to_pylist() == ["null", "null"]


def test_clean_input_is_not_copied():
    rows = large(["ACGT", "NACG"])
    assert clean(rows).sequences.buffers()[2].address == rows.buffers()[2].address


@pytest.mark.parametrize(
    ("column", "named"),
    [
        (pa.array([1, 2]), "int64"),
        (pa.array([b"ACGT"]), "binary"),
        (pa.chunked_array([[1.5]]), "double"),
        (pa.array([1]).dictionary_encode(), "dictionary<values=int64"),
    ],
)
def test_another_arrow_type_is_refused_by_name(column: pa.Array | pa.ChunkedArray, named: str):
    with pytest.raises(InputError, match=re.escape(f"the Arrow type {named}")):
        clean(column)


@given(dna)
@unhurried
def test_reverse_complement(values: list[str]):
    other = reverse_complement(large(values))
    assert other.to_pylist() == ["".join(COMPLEMENT[base] for base in reversed(value)) for value in values]
    assert reverse_complement(other).to_pylist() == values


@given(dna, st.integers(0, 25))
@unhurried
def test_a_start_phase_applies_to_each_stretch_between_ns(values: list[str], bases: int):
    expected = ["N".join(stretch[bases:] for stretch in value.split("N")) for value in values]
    assert start_at_phase(large(values), bases).to_pylist() == expected


def test_reverse_complement_and_start_at_phase_accept_slices():
    rows = large(["AAA", "ACG", "TTN", "CCC"])[1:3]
    assert reverse_complement(rows).to_pylist() == ["CGT", "NAA"]
    assert start_at_phase(rows, 1).to_pylist() == ["CG", "TN"]


def test_reverse_complement_refuses_what_was_not_cleaned():
    rows = large(["GGGG", "ACGT", "", "ACrT"])[1:]
    with pytest.raises(InputError, match=r"reverse_complement got 'r' at base 2 of row 2; .*bioscan_jax\.clean"):
        reverse_complement(rows)


def test_start_at_phase_refuses_a_negative_number():
    with pytest.raises(InputError, match="phase=-1"):
        start_at_phase(large(["ACGT"]), -1)


@given(dna, st.data())
@unhurried
def test_string_bytes_are_views_of_the_rows(values: list[str], data: st.DataObject):
    begin = data.draw(st.integers(0, len(values)))
    end = data.draw(st.integers(begin, len(values)))
    rows = large(values)[begin:end]
    text, offsets = string_bytes(rows)
    assert [text[a:b].tobytes().decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)] == rows.to_pylist()
    assert len(text) == offsets[-1]
    assert not text.size or text.ctypes.data - rows.buffers()[2].address == sum(map(len, values[:begin]))


@given(st.lists(st.integers(0, 2_000_000), max_size=9))
@unhurried
def test_row_blocks_hold_each_row_once_and_stay_small(lengths: list[int]):
    offsets = np.cumsum([0, *lengths])
    blocks = list(row_blocks(offsets))
    assert [row for first, last in blocks for row in range(first, last)] == list(range(len(lengths)))
    for first, last in blocks:
        assert last == first + 1 or offsets[last - 1] - offsets[first] < 2 * cleaning._BLOCK_BYTES
