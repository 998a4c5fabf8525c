"""Turns DNA into vectors with the files beside this one, by numpy and onnxruntime alone.

    python run_onnx.py barcodes.fasta vectors.npy

writes one row of float32 per sequence, in order. From Python, with this directory on the path:

    from run_onnx import OnnxEncoder
    vectors = OnnxEncoder("DIRECTORY").encode(["ACGTTGCA...", "TTGACAGG..."])

How a sequence becomes token ids: stops (*) are trimmed off its end, gaps and white space removed, letters made upper case,
U becomes T, other IUPAC codes N. Each strand (`strand` both: also the reverse complement) is read from each of `phases`
start bases of every stretch between Ns: CLS, then 6-mers from the left end of each stretch, its rest as single letters,
each N as a token. Where the vocabulary has tokens such as A17=-22 (the base A in column 17 of an alignment, its score
there), one more view has the token of each column in which the sequence has a base, and N for each base that is left;
`place` finds the columns. Views of a sequence are rows of one array [sequences, views, tokens], padded with <pad>; the
graph pools each, averages them by their tokens, projects, and scales to length 1. Where onnx.json says one_row, the views
may stand in one row, one behind the other, which gives the same mean over tokens.
"""

import gzip
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path

import numpy as np

_CLEAN = (
    {letter: letter for letter in "ACGTN"} | {"U": "T"} | dict.fromkeys("RYSWKMBDHV", "N") | dict.fromkeys("-.", "")
)
_CLEAN |= {letter.lower(): becomes for letter, becomes in _CLEAN.items()} | dict.fromkeys(" \t\n\r\v\f", "")
_STOPS = re.compile(r"\*[\s*]*\Z", re.ASCII)
_COMPLEMENT = str.maketrans("ACGT", "TGCA")
_COLUMN_TOKEN = re.compile(r"[ACTG]\d+=(-?\d+)")
_CODES = {letter: code for code, letter in enumerate("ACTGN")}
_UNKNOWN = 4
# The placing in columns, as bioscan_jax.barcodes.columns does it for many sequences at a time.
_LEAST_SCORE, _BLOCK, _GAP, _GAP_BASE = 480, 18, 224, 5
_SHIFTS = np.array([0, -1, 1, -2, 2, -3, 3, -6, 6, -9, 9, -12, 12])


class OnnxEncoder:
    """A model exported by `bioscan export --format onnx`."""

    def __init__(self, directory: str | os.PathLike[str] = Path(__file__).parent, *, threads: int = 0):
        """Opens the graph.

        Args:
            directory: Holds model.onnx, onnx.json and vocab.txt.
            threads: Of onnxruntime; 0 for its choice.
        """
        onnxruntime = import_module("onnxruntime")  # not among what bioscan_jax itself needs
        where = Path(directory)
        self.settings = json.loads((where / "onnx.json").read_text())
        tokens = (where / "vocab.txt").read_text().splitlines()
        self._ids = {token.strip(): index for index, token in enumerate(tokens)}
        self._scores = column_scores(self._ids)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # it warns of each constant that the exporter left unused
        self._session = onnxruntime.InferenceSession(where / "model.onnx", options, providers=["CPUExecutionProvider"])

    def encode(self, sequences: Sequence[str], *, batch_tokens: int = 16384) -> np.ndarray:
        """Returns one float32 vector per sequence.

        Args:
            sequences: DNA.
            batch_tokens: Tokens that the graph is given at a time, padding included.

        Raises:
            ValueError: A sequence has no vector; the message names its position.
        """
        views = []
        for position, sequence in enumerate(sequences):
            try:
                views.append(token_views(sequence, self._ids, self._scores, self.settings))
            except ValueError as error:
                raise ValueError(f"sequence {position}: {error}") from None
        vectors = np.empty((len(views), self.settings["dimension"]), np.float32)
        if self.settings["one_row"]:
            views = [[list(chain.from_iterable(of_one))] for of_one in views]
        for rows in _batches(views, batch_tokens):
            vectors[rows] = self._session.run(None, {self._session.get_inputs()[0].name: self._padded(views, rows)})[0]
        return vectors

    def _padded(self, views: list[list[list[int]]], rows: list[int]) -> np.ndarray:
        most = max(len(views[row]) for row in rows), max(len(view) for row in rows for view in views[row])
        ids = np.full((len(rows), *most), self._ids["<pad>"], np.int32)
        for i, row in enumerate(rows):
            for j, view in enumerate(views[row]):
                ids[i, j, : len(view)] = view
        return ids


def column_scores(ids: dict[str, int]) -> np.ndarray:
    """Returns the scores of A, C, T and G in each column that has tokens, [columns, 4]."""
    found = [match[1] for token in ids if (match := _COLUMN_TOKEN.fullmatch(token))]
    return np.array(found, np.int32).reshape(-1, 4)


def token_views(sequence: str, ids: dict[str, int], scores: np.ndarray, settings: dict) -> list[list[int]]:
    """Returns the token ids of each view of a sequence.

    Args:
        sequence: DNA.
        ids: Of each token.
        scores: Of `column_scores`.
        settings: `strand`, `phases`, `max_tokens` and `overlong`, as in onnx.json.

    Raises:
        ValueError: It is not DNA, has no A, C, G or T, or is too long where `overlong` is error.
    """
    forward = clean(sequence)
    strands = [forward, forward.translate(_COMPLEMENT)[::-1]][: 1 + (settings["strand"] == "both")]
    most, found = settings["max_tokens"] - 1, []

    def add(row: list[int], windows: bool) -> None:
        pieces = -(-len(row) // most) if windows else 1
        for piece in range(pieces if row else 0):
            part = row[piece * len(row) // pieces : (piece + 1) * len(row) // pieces]
            found.append([ids["<cls>"], *part[:most]])

    for strand in strands:
        for phase in range(settings["phases"]):
            row = [ids[token] for token in _tokens([stretch[phase:] for stretch in strand.split("N")])]
            if len(row) > most and settings["overlong"] == "error":
                raise ValueError(f"more than {most + 1} tokens")
            add(row, settings["overlong"] == "window")
    if len(scores):
        placed = place(np.array([_CODES[letter] for letter in forward]), scores)
        known = np.flatnonzero(placed < _UNKNOWN)
        row = (len(ids) - scores.size + 4 * known + placed[known]).tolist()
        add(row + [ids["N"]] * (len(forward) - len(known)), True)
    return found


def place(codes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the base of a sequence in each column: A 0, C 1, T 2, G 3, none or N 4."""
    columns, length = len(scores), len(codes)
    at, score = _best_lag(codes, scores)
    back, other = _best_lag(codes, scores[::-1, [2, 3, 0, 1]])
    if max(score, other) < _LEAST_SCORE:
        return np.full(columns, _UNKNOWN)
    first = -at
    if other > score:
        first = columns - length + back
        codes = np.where(codes < _UNKNOWN, codes ^ 2, _UNKNOWN)[::-1]
    margin = columns + int(_SHIFTS.max())
    wide = np.pad(codes, margin, constant_values=_UNKNOWN)
    where = margin - first + np.arange(columns)
    placed = wide[where]
    size = min(_BLOCK, columns)
    blocks = columns // size
    table = np.append(scores, np.zeros((columns, 1), np.int32), axis=1)

    def in_blocks(values: np.ndarray) -> np.ndarray:
        return values[: blocks * size].reshape(blocks, size)

    def sums(bases: np.ndarray) -> np.ndarray:
        return in_blocks(table[np.arange(columns), bases]).sum(axis=1)

    if not ((sums(placed) < 0) & in_blocks(placed < _UNKNOWN).all(axis=1)).any():
        return placed
    # A stretch reads worse than chance, as behind a gap: the shifts of the blocks that make the sum greatest.
    shifted = np.stack([sums(wide[np.clip(where + shift, 0, len(wide) - 1)]) for shift in _SHIFTS])
    away = np.abs(_SHIFTS[:, None] - _SHIFTS)
    cost = _GAP * (away > 0) + _GAP_BASE * away
    best, before = shifted[:, 0], []
    for block in range(1, blocks):
        paths = best[:, None] - cost
        before.append(paths.argmax(axis=0))
        best = paths.max(axis=0) + shifted[:, block]
    chosen = [int(best.argmax())]
    for step in reversed(before):
        chosen.append(int(step[chosen[-1]]))
    shifts = np.repeat(_SHIFTS[chosen[::-1]], _BLOCK)[np.minimum(np.arange(columns), blocks * _BLOCK - 1)]
    return wide[np.clip(where + shifts, 0, len(wide) - 1)]


def _best_lag(codes: np.ndarray, scores: np.ndarray) -> tuple[int, int]:
    """Returns the position of the sequence on column 0 at which the bases' scores sum to most, and that sum."""
    each = [np.correlate((codes == base).astype(float), scores[:, base].astype(float), "full") for base in range(4)]
    sums = np.sum(each, axis=0)
    before = len(scores) - 1
    sums = np.concatenate(
        [sums[before:], sums[:before]]
    )  # of equal ones, that of the least position from 0 on is taken
    lag = int(sums.argmax())
    return lag if lag < len(codes) else lag - len(sums), int(sums[lag])


def _tokens(stretches: list[str]) -> list[str]:
    """Returns the tokens of a sequence that is cut at its Ns."""
    found = []
    for number, stretch in enumerate(stretches):
        whole = len(stretch) - len(stretch) % 6
        found += ["N"] * (number > 0) + [stretch[i : i + 6] for i in range(0, whole, 6)] + list(stretch[whole:])
    return found


def clean(sequence: str) -> str:
    """Returns a sequence in the letters A, C, G, T and N.

    Raises:
        ValueError: It has another letter, or no A, C, G or T.
    """
    text = _STOPS.sub("", sequence)
    if foreign := [letter for letter in text if letter not in _CLEAN]:
        raise ValueError(f"{foreign[0]!r} is no letter of DNA")
    cleaned = "".join(map(_CLEAN.__getitem__, text))
    if not cleaned.strip("N"):
        raise ValueError("no A, C, G, T or U")
    return cleaned


def _batches(views: list[list[list[int]]], batch_tokens: int) -> Iterator[list[int]]:
    """Yields the positions of sequences of similar length."""
    batch: list[int] = []
    wide = high = 0
    for row in sorted(range(len(views)), key=lambda row: max(map(len, views[row]))):
        wide, high = max(wide, max(map(len, views[row]))), max(high, len(views[row]))
        if batch and (len(batch) + 1) * wide * high > batch_tokens:
            yield batch
            batch, wide, high = [], max(map(len, views[row])), len(views[row])
        batch.append(row)
    if batch:
        yield batch


def read_fasta(path: str) -> list[str]:
    """Returns the sequences of a FASTA file, plain or gzip, in order.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no FASTA.
    """
    data = Path(path).read_bytes()
    text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig", errors="replace")
    before, *records = re.split(r"(?<![^\r\n])>", text)
    if before.strip() or not records:
        raise ValueError(f"{path} is no FASTA: it must begin with >")
    return ["".join(record.splitlines()[1:]) for record in records]


def _main(words: Sequence[str]) -> None:
    try:
        if len(words) != 2:
            raise ValueError(
                "pass a FASTA file and the .npy file to write: python run_onnx.py barcodes.fasta vectors.npy"
            )
        sequences = read_fasta(words[0])
        np.save(words[1], OnnxEncoder().encode(sequences))
    except (OSError, EOFError, ValueError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    _main(sys.argv[1:])
