"""Cleans raw DNA strings to the letters A, C, G, T and N, whole Arrow columns at a time."""

import itertools
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int8, Int64, UInt8

from bioscan_jax.errors import InputError

REASONS = {
    "null": "the value is null",
    "empty": "the string has nothing but white space",
    "no_acgt": "only N, ambiguity codes and gaps: no A, C, G, T or U",
    "not_dna": "a character outside the IUPAC nucleotide code, such as a protein letter, a digit or a non-ASCII byte "
    "('*' at the end is trimmed)",
}
"""Why a sequence is rejected; if several reasons hold, the first of null, not_dna, empty, no_acgt is reported."""

_BLOCK_BYTES = 1 << 19

# One bit per kind of character, so that the OR over a row gives all kinds in it.
_BASE, _FOREIGN, _LOWER, _U, _AMBIGUOUS, _GAP, _SPACE, _N = (1 << bit for bit in range(8))


def _character_tables() -> tuple[bytes, bytes]:
    """The kinds of each byte, and the byte that cleaning turns it into."""
    kinds = np.full(256, _FOREIGN, np.uint8)
    clean_bytes = np.full(256, ord("N"), np.uint8)
    letters = {"A": _BASE, "C": _BASE, "G": _BASE, "T": _BASE, "U": _BASE | _U, "N": _N}
    letters |= dict.fromkeys("RYSWKMBDHV", _AMBIGUOUS)
    for letter, kind in letters.items():
        becomes = ord(letter if kind == _BASE else "T" if kind & _U else "N")
        kinds[ord(letter)], kinds[ord(letter.lower())] = kind, kind | _LOWER
        clean_bytes[[ord(letter), ord(letter.lower())]] = becomes
    kinds[[ord(gap) for gap in "-."]] = _GAP
    kinds[[ord(space) for space in string.whitespace]] = _SPACE
    return kinds.tobytes(), clean_bytes.tobytes()


_KINDS, _CLEAN_BYTES = _character_tables()
_DNA = frozenset(chr(byte) for byte in range(128) if _KINDS[byte] != _FOREIGN)
_STOPS = re.compile(rb"\*[\s*]*\Z")
_STOPS_TEXT = re.compile(r"\*[\s*]*\Z", re.ASCII)
_COMPLEMENT = bytes(dict(zip(b"ACGTN", b"TGCAN", strict=True)).get(byte, 0) for byte in range(256))


@dataclass(frozen=True)
class CleaningCounts:
    """Number of characters that cleaning changed; a lower-case u, for example, counts twice."""

    lower_case: int = 0
    u_to_t: int = 0
    ambiguous_to_n: int = 0
    gaps_removed: int = 0
    """Includes white space."""
    stops_removed: int = 0
    """'*' at the end of a sequence."""

    def __add__(self, other: "CleaningCounts") -> "CleaningCounts":
        """Adds each count."""
        return CleaningCounts(
            self.lower_case + other.lower_case,
            self.u_to_t + other.u_to_t,
            self.ambiguous_to_n + other.ambiguous_to_n,
            self.gaps_removed + other.gaps_removed,
            self.stops_removed + other.stops_removed,
        )


@dataclass(frozen=True, eq=False)
class Cleaned:
    """A cleaned column, with one entry per row."""

    sequences: pa.LargeStringArray
    """Only A, C, G, T and N; "" for a rejected row; never null."""
    reasons: pa.StringArray
    """Null for a usable row, else a key of `REASONS`."""
    changes: CleaningCounts
    """Counts over the usable rows."""


def string_bytes(
    strings: pa.LargeStringArray,
) -> tuple[UInt8[np.ndarray, " bytes"], Int64[np.ndarray, " rows_plus_1"]]:
    """Returns an Arrow array's text as numpy views (bytes, offsets); row i is bytes[offsets[i]:offsets[i + 1]].

    Nothing is copied, except the offsets of a slice, which are shifted to start at 0.
    """
    rows = len(strings)
    if rows == 0:
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    _, offset_buffer, text_buffer = strings.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64, rows + 1, strings.offset * 8)
    first, last = int(offsets[0]), int(offsets[-1])
    text = np.frombuffer(text_buffer, np.uint8, last - first, first) if last > first else np.empty(0, np.uint8)
    return text, offsets - first if first else offsets


def row_blocks(offsets: Int64[np.ndarray, " rows_plus_1"]) -> Iterator[tuple[int, int]]:
    """Splits rows into blocks of about 512 KiB of text, so that temporary arrays stay in the CPU cache.

    Args:
        offsets: From `string_bytes`.

    Yields:
        First row and end row (exclusive) of each block, in order.
    """
    inner = np.searchsorted(offsets, np.arange(_BLOCK_BYTES, offsets[-1], _BLOCK_BYTES))
    yield from itertools.pairwise(np.unique([0, *inner, len(offsets) - 1]).tolist())


def _large_strings(
    text: UInt8[np.ndarray, " bytes"] | bytes, offsets: Int64[np.ndarray, " rows_plus_1"]
) -> pa.LargeStringArray:
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(text))


def _as_large_strings(sequences: pa.Array | pa.ChunkedArray) -> pa.LargeStringArray:
    value_type = sequences.type.value_type if pa.types.is_dictionary(sequences.type) else sequences.type
    text_types = (pa.string(), pa.large_string(), pa.string_view(), pa.null())
    if value_type not in text_types:
        raise InputError(f"sequences have the Arrow type {sequences.type}; pass a column of strings")
    large = sequences.cast(pa.large_string())
    return large.combine_chunks() if isinstance(large, pa.ChunkedArray) else large


def clean(sequences: pa.Array | pa.ChunkedArray) -> Cleaned:
    """Converts DNA strings to the letters A, C, G, T and N, and marks rows that are not usable DNA.

    Letters become upper case, U becomes T, the other IUPAC ambiguity codes become N (Cornish-Bowden 1985,
    doi:10.1093/nar/13.9.3021); alignment gaps ('-' and '.') and white space are removed, and so is '*' at the end.

    Args:
        sequences: Strings in any Arrow layout (string, large_string, string_view, dictionary-encoded, chunked).

    Raises:
        InputError: The Arrow type is not a string type. The content of a string never raises.

    Example:
        >>> cleaned = clean(pa.array(["acg-uR", "MEL", None]))
        >>> cleaned.sequences.to_pylist()
        ['ACGTN', '', '']
        >>> cleaned.reasons.to_pylist()
        [None, 'not_dna', 'null']
    """
    strings, stops = _without_stops(_as_large_strings(sequences))
    text, offsets = string_bytes(strings)
    null = strings.is_null().to_numpy(zero_copy_only=False)
    texts, lengths, reasons, changes = [b""], [np.zeros(1, np.int64)], [np.empty(0, np.int8)], CleaningCounts()
    for first, last in row_blocks(offsets):
        begin, end = offsets[first], offsets[last]
        block = _clean_block(text[begin:end], np.diff(offsets[first : last + 1]), null[first:last])
        texts.append(block[0])
        lengths.append(block[1])
        reasons.append(block[2])
        changes += block[3]
    reason = np.concatenate(reasons)
    usable = reason < 0
    if stops is not None:
        changes += CleaningCounts(stops_removed=int(stops[usable].sum()))
    named = pa.DictionaryArray.from_arrays(pa.array(reason, mask=usable), pa.array(REASONS)).dictionary_decode()
    if usable.all() and changes == CleaningCounts():
        return Cleaned(strings, named, changes)
    return Cleaned(_large_strings(b"".join(texts), np.cumsum(np.concatenate(lengths))), named, changes)


def _without_stops(strings: pa.LargeStringArray) -> tuple[pa.LargeStringArray, Int64[np.ndarray, " rows"] | None]:
    """Trims '*' off the ends; returns how many of each row, or None where there are none at all."""
    text, offsets = string_bytes(strings)
    if not (text == ord("*")).any():
        return strings, None
    raw = text.tobytes()
    rows = [raw[begin:end] for begin, end in itertools.pairwise(offsets.tolist())]
    bare = [_STOPS.sub(b"", row) if b"*" in row else row for row in rows]
    stops = np.array([row.count(b"*") - left.count(b"*") for row, left in zip(rows, bare, strict=True)], np.int64)
    if not stops.any():
        return strings, None
    lengths = np.array([0, *map(len, bare)], np.int64)
    # Rows are joined as bytes, since invalid UTF-8 must not stop the others.
    bits = None if strings.null_count == 0 else strings.is_valid().buffers()[1]
    joined = pa.py_buffer(np.cumsum(lengths)), pa.py_buffer(b"".join(bare))
    return pa.LargeStringArray.from_buffers(len(bare), *joined, bits), stops


def describe_foreign(sequence: str) -> str | None:
    """Returns which character makes a sequence `not_dna` and where, the position counted from 1; None if none does.

    Example:
        >>> describe_foreign("ACGTXACG?")
        "'X' at position 5, and 1 more"
    """
    found = foreign_characters(sequence)
    if not found:
        return None
    more = f", and {len(found) - 1:,} more" if len(found) > 1 else ""
    return f"{found[0]!r} at position {sequence.index(found[0]) + 1}{more}"


def foreign_characters(sequence: str) -> list[str]:
    """Returns the characters of a sequence that are outside the IUPAC nucleotide code, in order."""
    return [letter for letter in _STOPS_TEXT.sub("", sequence) if letter not in _DNA]


def _clean_block(
    text: UInt8[np.ndarray, " bytes"], lengths: Int64[np.ndarray, " rows"], null: Bool[np.ndarray, " rows"]
) -> tuple[bytes, Int64[np.ndarray, " rows"], Int8[np.ndarray, " rows"], CleaningCounts]:
    """Returns the cleaned text, its lengths, indices in REASONS (-1 if usable) and the counts of changes."""
    raw = text.tobytes()
    kinds = np.frombuffer(raw.translate(_KINDS), np.uint8)
    # reduceat treats an empty row as one of one character, so only the other rows are passed to it.
    filled = lengths > 0
    starts = (np.cumsum(lengths) - lengths)[filled]
    row_kinds = np.zeros(len(lengths), np.uint8)
    if len(starts):
        row_kinds[filled] = np.bitwise_or.reduceat(kinds, starts)
    reason = np.select(
        [null, (row_kinds & _FOREIGN) != 0, (row_kinds | _SPACE) == _SPACE, (row_kinds & _BASE) == 0],
        [list(REASONS).index(name) for name in ("null", "not_dna", "empty", "no_acgt")],
        default=-1,
    ).astype(np.int8)

    usable = reason < 0
    if not usable.all():
        kinds = np.where(np.repeat(usable, lengths), kinds, 0)
    occurring = int(np.bitwise_or.reduce(row_kinds[usable], initial=0))

    def count(kind: int) -> int:
        return int(np.count_nonzero(kinds & kind)) if occurring & kind else 0

    changes = CleaningCounts(count(_LOWER), count(_U), count(_AMBIGUOUS), count(_GAP | _SPACE))
    if changes != CleaningCounts():
        raw = raw.translate(_CLEAN_BYTES)
    if changes.gaps_removed or not usable.all():
        keep = (kinds & (_BASE | _AMBIGUOUS | _N)) != 0
        lengths = lengths.copy()
        if len(starts):
            lengths[filled] = np.add.reduceat(keep, starts, dtype=np.int64)
        raw = np.frombuffer(raw, np.uint8)[keep].tobytes()
    return raw, lengths, reason, changes


def reverse_complement(sequences: pa.LargeStringArray) -> pa.LargeStringArray:
    """Returns the reverse complement of cleaned sequences; N stays N.

    Raises:
        InputError: A character is not A, C, G, T or N.

    Example:
        >>> reverse_complement(pa.array(["AACGN"], pa.large_string())).to_pylist()
        ['NCGTT']
    """
    text, offsets = string_bytes(sequences)
    complement = text.tobytes().translate(_COMPLEMENT)
    if (unknown := complement.find(0)) >= 0:
        raise unclean_character(sequences, unknown, "reverse_complement")
    return pc.call_function("ascii_reverse", [_large_strings(complement, offsets)])


def start_at_phase(sequences: pa.LargeStringArray, phase: int) -> pa.LargeStringArray:
    """Removes the first `phase` bases of each stretch between Ns; of a shorter stretch nothing stays.

    The tokenizer reads each stretch in 6-mers from its left end. So a start phase applies to each of them: over six
    phases every 6-mer of a sequence is read once, whether or not it has Ns.

    Args:
        sequences: Cleaned sequences.
        phase: Number of bases.

    Raises:
        InputError: `phase` is negative.

    Example:
        >>> start_at_phase(pa.array(["ACGTA", "ACGTNNACGTN"], pa.large_string()), 2).to_pylist()
        ['GTA', 'GTNNGTN']
    """
    if phase < 0:
        raise InputError(f"start_at_phase got phase={phase}; pass 0 or more")
    if phase == 0:
        return sequences
    started = pc.call_function("utf8_slice_codeunits", [sequences], pc.SliceOptions(start=phase))
    has_n = pc.call_function("match_substring", [sequences], pc.MatchSubstringOptions("N"))
    if not has_n.true_count:
        return started
    from_n = pc.ReplaceSubstringOptions(f"(N|^)[ACGT]{{0,{phase}}}", r"\1")
    with_n = pc.call_function("replace_substring_regex", [sequences.filter(has_n)], from_n)
    return pc.call_function("replace_with_mask", [started, has_n, with_n])


def unclean_character(sequences: pa.LargeStringArray, position: int, function: str) -> InputError:
    """Returns the error for a character that is not A, C, G, T or N.

    Args:
        sequences: The argument of `function`.
        position: Index of the character in the bytes of `string_bytes`.
        function: Name of the function that refuses it.
    """
    text, offsets = string_bytes(sequences)
    row = int(np.searchsorted(offsets, position, side="right")) - 1
    return InputError(
        f"{function} got {chr(text[position])!r} at base {position - int(offsets[row])} of row {row}; "
        "it takes only A, C, G, T and N: pass the strings through bioscan_jax.clean first"
    )
