"""Places barcodes of one marker in the columns of an alignment: which base of the marker each letter is.

Barcodes of a coding marker such as COI hardly differ in length, so that a barcode lies in the alignment where its bases
agree with those that are usual there. The place, on either strand, is the greatest of all cross-correlations with the
columns' scores, by Fourier transform (Brutlag et al. 1990 do so with words). Where a stretch then reads worse than
chance, as behind a gap, blocks of columns are shifted, by dynamic programming.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int32, Int64, UInt8

from bioscan_jax.barcodes.cleaning import string_bytes
from bioscan_jax.errors import InputError

UNIT = 16
"""Scores are whole numbers, in 1/16 of the natural logarithm: sums are exact, whatever the order of their terms."""
_UNKNOWN = 4
"""Code of N, and of a column without a base; those of the bases are A 0, C 1, T 2, G 3."""
_LEAST_SCORE = 30 * UNIT
"""A sequence that scores less, a likelihood ratio of e^30, is of another marker and has no columns."""
_BLOCK = 18
_SHIFTS = np.array([0, -1, 1, -2, 2, -3, 3, -6, 6, -9, 9, -12, 12])
_GAP, _GAP_BASE = 14 * UNIT, UNIT // 3
"""Costs of another shift than that of the block before, and of each base by which it differs."""
_ROUNDS = 5
_MARGIN = 64
_LEAST_KNOWN = 0.05
"""Share of the barcodes that must have a base in a column."""
_CHUNK_BYTES = 1 << 23
_THREADS = 2
_SIZES = np.unique(np.outer([1, 3, 5, 9, 15, 25, 27, 45, 75], 1 << np.arange(24)))
"""Lengths at which Fourier transforms are fast."""
_FEW = 4096
"""Rows whose transforms take no longer than the import of a faster library."""


@dataclass(frozen=True, eq=False)
class Columns:
    """How usual each base is in each column of an alignment.

    Example:
        >>> gene = "".join(np.random.default_rng(0).choice(list("ACGT"), 200))
        >>> columns = Columns.of(pa.array([gene] * 40 + [gene[5:], gene[:-9]], pa.large_string()))
        >>> placed = columns.place(pa.array([gene, gene[20:180]], pa.large_string()))
        >>> placed.shape, placed[1, 18:22].tolist() == [4, 4, *placed[0, 20:22].tolist()]
        ((2, 200), True)
    """

    scores: Int32[np.ndarray, "columns 4"]
    """Logarithm of the frequency of A, C, T and G over 1/4, in units of 1/16."""

    @staticmethod
    def of(sequences: pa.LargeStringArray) -> "Columns":
        """Finds the columns of cleaned barcodes of one marker, on the strand of most of those of the commonest length.

        Raises:
            InputError: There is none.
        """
        text, offsets = string_bytes(sequences)
        lengths = np.diff(offsets)
        if not len(lengths) or not lengths.max():
            raise InputError("there are no barcodes to align; pass some")
        common = int(np.bincount(lengths).argmax())
        some = np.flatnonzero(lengths == common)
        placed = np.full((len(some), common + 2 * _MARGIN), _UNKNOWN, np.uint8)
        placed[:, _MARGIN:-_MARGIN] = _codes(text)[offsets[some][:, None] + np.arange(common)]
        for _ in range(_ROUNDS):
            placed = Columns(_scores(placed)).place(sequences)
        known = (placed < _UNKNOWN).mean(axis=0) >= _LEAST_KNOWN
        found = np.flatnonzero(known)
        if not len(found):
            raise InputError(
                "the barcodes are too few, or not of one marker: no column of their alignment has a base of many"
            )
        return Columns(_scores(placed[:, found[0] : found[-1] + 1]))

    def place(self, sequences: pa.LargeStringArray) -> UInt8[np.ndarray, "rows columns"]:
        """Returns the base of each cleaned sequence in each column: A 0, C 1, T 2, G 3, none or N 4.

        A sequence and its reverse complement have the same bases; a sequence of another marker has none.
        """
        text, offsets = string_bytes(sequences)
        codes, lengths = _codes(text), np.diff(offsets)
        placed = np.full((len(lengths), len(self.scores)), _UNKNOWN, np.uint8)
        fft = _fourier(len(lengths))

        def place_some(rows: Int64[np.ndarray, " some"]) -> None:
            within = np.arange(int(lengths[rows].max()))
            inside = within < lengths[rows][:, None]
            padded = np.where(inside, codes[np.where(inside, offsets[rows][:, None] + within, 0)], np.uint8(_UNKNOWN))
            placed[rows] = self._placed(padded, lengths[rows], fft)

        with ThreadPoolExecutor(_THREADS, "columns") as threads:
            for _ in threads.map(place_some, _chunks(lengths, len(self.scores))):
                pass
        return placed

    def _placed(
        self, codes: UInt8[np.ndarray, "rows width"], lengths: Int64[np.ndarray, " rows"], fft: ModuleType
    ) -> UInt8[np.ndarray, "rows columns"]:
        first, reverse, score = self._best_place(codes, lengths, fft)
        turned = np.flatnonzero(reverse)
        back = lengths[turned][:, None] - 1 - np.arange(codes.shape[1])
        bases = np.take_along_axis(codes[turned], np.maximum(back, 0), 1)
        codes[turned] = np.where((back >= 0) & (bases < _UNKNOWN), bases ^ 2, np.uint8(_UNKNOWN))
        columns = np.arange(len(self.scores))
        margin = len(columns) + int(_SHIFTS.max())
        wide = np.pad(codes, ((0, 0), (margin, margin)), constant_values=_UNKNOWN)
        start = np.clip(margin - first, 0, wide.shape[1] - len(columns))
        placed = np.take_along_axis(wide, start[:, None] + columns, 1)
        placed[score < _LEAST_SCORE] = _UNKNOWN
        blocks = self._by_block(placed)
        whole = _in_blocks(placed < _UNKNOWN).all(axis=2)
        gapped = np.flatnonzero(((blocks < 0) & whole).any(axis=1))
        if len(gapped):
            placed[gapped] = self._shifted(wide[gapped], start[gapped])
        return placed

    def _best_place(
        self, codes: UInt8[np.ndarray, "rows width"], lengths: Int64[np.ndarray, " rows"], fft: ModuleType
    ) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """Returns the column of the first base of the strand that fits better, which strand that is, and its score."""
        columns = len(self.scores)
        size = int(_SIZES[np.searchsorted(_SIZES, codes.shape[1] + columns)])
        letters = (codes[:, None] == np.arange(4, dtype=np.uint8)[:, None]).astype(np.float32)
        spectrum = np.asarray(fft.rfft(letters, size, axis=2))
        both = []
        for scores in (self.scores, self.scores[::-1, [2, 3, 0, 1]]):
            kernel = np.conj(np.asarray(fft.rfft(scores.T.astype(np.float32), size, axis=1)))
            sums = np.rint(np.asarray(fft.irfft((spectrum * kernel).sum(axis=1), size, axis=1)))
            at = sums.argmax(axis=1)
            both.append((np.where(at >= size - columns, at - size, at), np.take_along_axis(sums, at[:, None], 1)[:, 0]))
        (forward, score), (backward, other) = both
        reverse = other > score
        first = np.where(reverse, columns - lengths + backward, -forward)
        return first, reverse, np.maximum(score, other).astype(np.int64)

    def _by_block(self, placed: UInt8[np.ndarray, "rows columns"]) -> Int32[np.ndarray, "rows blocks"]:
        """Sums the scores of the bases in each block of columns."""
        table = np.append(self.scores, np.zeros((len(self.scores), 1), np.int32), axis=1)
        return _in_blocks(take_by_column(table, placed)).sum(axis=2, dtype=np.int32)

    def _shifted(
        self, wide: UInt8[np.ndarray, "rows more"], start: Int64[np.ndarray, " rows"]
    ) -> UInt8[np.ndarray, "rows columns"]:
        """Returns the bases with the shift of each block that makes the sum of scores, less costs, greatest."""
        columns, most = np.arange(len(self.scores)), int(_SHIFTS.max())
        around = np.clip(start[:, None] + np.arange(-most, len(columns) + most), 0, wide.shape[1] - 1)
        near = np.take_along_axis(wide, around, 1)
        sums = np.stack([self._by_block(near[:, most + i : most + i + len(columns)]) for i in _SHIFTS.tolist()], axis=1)
        away = np.abs(_SHIFTS[:, None] - _SHIFTS)
        cost = _GAP * (away > 0) + _GAP_BASE * away
        best, before = sums[:, :, 0], []
        for block in range(1, sums.shape[2]):
            paths = best[:, :, None] - cost
            before.append(paths.argmax(axis=1))
            best = paths.max(axis=1) + sums[:, :, block]
        chosen = [best.argmax(axis=1)]
        for step in reversed(before):
            chosen.append(step[np.arange(len(step)), chosen[-1]])
        shifts = _SHIFTS[np.stack(chosen[::-1], axis=1)]
        shift = np.repeat(shifts, _BLOCK, axis=1)[:, np.minimum(columns, shifts.shape[1] * _BLOCK - 1)]
        return np.take_along_axis(near, most + columns + shift, 1)


def take_by_column(
    table: Int32[np.ndarray, "columns 5"], placed: UInt8[np.ndarray, "rows columns"]
) -> Int32[np.ndarray, "rows columns"]:
    """Returns the number that `table` has for each base of an alignment in its column."""
    return table.reshape(-1).take(placed + np.arange(0, table.size, table.shape[1]))


def _fourier(rows: int) -> ModuleType:
    """Returns the module with the Fourier transforms: scipy's takes half the time, but a fifth of a second to import."""
    return import_module("scipy.fft" if rows > _FEW or "scipy.fft" in sys.modules else "numpy.fft")


def _in_blocks(values: np.ndarray) -> np.ndarray:
    """Cuts columns into blocks; those of the last, incomplete one are left out, unless it is the only one."""
    size = min(_BLOCK, values.shape[1])
    blocks = values.shape[1] // size
    return values[:, : blocks * size].reshape(len(values), blocks, size)


def _codes(text: UInt8[np.ndarray, " bytes"]) -> UInt8[np.ndarray, " bytes"]:
    return np.where(text == ord("N"), np.uint8(_UNKNOWN), (text >> 1) & 3)


def _scores(placed: UInt8[np.ndarray, "rows columns"]) -> Int32[np.ndarray, "columns 4"]:
    """Counts the bases of each column, with 5 more of each."""
    times = np.stack([(placed == base).sum(axis=0) for base in range(_UNKNOWN)], axis=1) + 5.0
    return np.rint(UNIT * np.log(4 * times / times.sum(axis=1, keepdims=True))).astype(np.int32)


def _chunks(lengths: Int64[np.ndarray, " rows"], columns: int) -> Iterator[Int64[np.ndarray, " some"]]:
    """Yields rows of similar lengths, as many as fit the memory."""
    order = np.argsort(lengths, kind="stable")
    first = 0
    while first < len(order):
        rows = max(_CHUNK_BYTES // (16 * int(lengths[order[first]] + columns)), 1)
        some = order[first : first + rows]
        fits = lengths[some] <= 2 * lengths[some[0]] + columns
        some = some[fits]
        yield some
        first += len(some)
