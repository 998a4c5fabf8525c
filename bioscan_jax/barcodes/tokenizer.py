"""Converts DNA to Nucleotide Transformer token ids, equal to the published tokenizer's, whole Arrow arrays at a time."""

import hashlib
import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, UInt8

from bioscan_jax.barcodes.cleaning import row_blocks, string_bytes, unclean_character
from bioscan_jax.barcodes.columns import Columns, take_by_column
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.errors import InputError

_SPECIAL = ("<unk>", "<pad>", "<mask>", "<cls>")
_LETTERS = "ACGTN"
# Bits 1 and 2 of the ASCII code number the bases: A 0, C 1, T 2, G 3 (N is 3 too, but no 6-mer has an N).
_CODED = "ACTG"
_COLUMN_TOKEN = re.compile(r"([ACTG])(\d+)=(-?\d+)")
"""Such as A17=-22: the base A in column 17 of `Columns`, where its score is -22."""
_SIXMERS = tuple("".join(bases) for bases in itertools.product(_CODED, repeat=6))


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a checkpoint in the order of their ids.

    Example:
        >>> vocabulary = Vocabulary.published("v2")
        >>> len(vocabulary.tokens), vocabulary.cls_id, vocabulary.pad_id
        (4107, 3, 1)
    """

    tokens: tuple[str, ...] = field(repr=False)
    source: str = field(compare=False)
    """File that the tokens were read from, for messages."""

    def __post_init__(self) -> None:
        repeated = [token for token, times in Counter(self.tokens).items() if times > 1]
        if repeated:
            raise InputError(f"{self.source} has the token {repeated[0]!r} twice; use the checkpoint's own vocab.txt")
        for token in (*_SPECIAL, *_LETTERS, *_SIXMERS):
            if token not in self._ids:
                raise InputError(f"{self.source} lacks the token {token!r}; use the vocab.txt of a 6-mer checkpoint")
        for token in self._ids.keys() - {*_LETTERS, *_SIXMERS}:
            if not token.strip(_LETTERS):
                raise InputError(
                    f"{self.source} has the token {token!r}, which is neither one letter nor a 6-mer of A, C, G, T; "
                    "use the vocab.txt of a 6-mer checkpoint"
                )

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "Vocabulary":
        """Reads a checkpoint's vocab.txt: one token per line; its id is the line number from 0.

        Raises:
            InputError: The file cannot be read, a token is missing or repeated, or one is not a 6-mer vocabulary's.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the vocabulary {path}: {error}") from error
        return cls(tuple(line.strip() for line in lines), str(path))

    @classmethod
    def published(cls, family: Literal["v1", "v2"]) -> "Vocabulary":
        """Returns the vocabulary published with a model family, for checkpoints that have none.

        Source: vocab.txt of InstaDeepAI/nucleotide-transformer-2.5b-multi-species (v1) and
        InstaDeepAI/nucleotide-transformer-v2-500m-multi-species (v2).
        """
        sixmers = ("".join(bases) for bases in itertools.product("ATCG", repeat=6))
        ends = ("<eos>", "<bos>")
        before, after = {"v1": ((), ends), "v2": (ends, ())}[family]
        return cls((*_SPECIAL, *before, *sixmers, *"ATCGN", *after), f"published {family} vocabulary")

    def text(self) -> str:
        """Returns the content of the vocab.txt as published: no line end after the last token."""
        return "\n".join(self.tokens)

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal digest of `text`."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def with_columns(self, columns: Columns) -> "Vocabulary":
        """Returns the vocabulary with a token for each base in each column, after its own tokens."""
        return Vocabulary((*self.tokens, *_column_tokens(columns)), f"{self.source} with columns")

    @property
    def without_columns(self) -> "Vocabulary":
        """The vocabulary without the tokens of columns; a sequence then has one view per strand and phase."""
        own = len(self.tokens) - 4 * len(self.column_ids)
        return self if own == len(self.tokens) else Vocabulary(self.tokens[:own], self.source)

    @cached_property
    def columns(self) -> Columns | None:
        """The columns of an alignment that have tokens of their own; None if there are none.

        Raises:
            InputError: The tokens of a column are incomplete or in another order.
        """
        named = [found.groups() for token in self.tokens if (found := _COLUMN_TOKEN.fullmatch(token))]
        if not named:
            return None
        columns = Columns(np.array([score for _, _, score in named[: len(named) // 4 * 4]], np.int32).reshape(-1, 4))
        if self.tokens[-len(named) :] != _column_tokens(columns):
            raise InputError(
                f"{self.source}: the last tokens are not A, C, T and G of column 0, column 1 and so on; use the "
                "checkpoint's own vocab.txt"
            )
        return columns

    @cached_property
    def column_ids(self) -> Int32[np.ndarray, "columns 5"]:
        """Ids of the tokens of each column: A, C, T, G, then that of N, for no known base."""
        columns = 0 if self.columns is None else len(self.columns.scores)
        first = len(self.tokens) - 4 * columns
        ids = np.arange(first, len(self.tokens), dtype=np.int32).reshape(columns, 4)
        return np.append(ids, np.full((columns, 1), self.letter_ids[ord("N")]), axis=1)

    @property
    def cls_id(self) -> int:
        """Id of the token before each sequence."""
        return self._ids["<cls>"]

    @property
    def pad_id(self) -> int:
        """Id of padding."""
        return self._ids["<pad>"]

    @property
    def mask_id(self) -> int:
        """Id of a masked token, which the model predicts."""
        return self._ids["<mask>"]

    @property
    def unk_id(self) -> int:
        """Id of an unknown token; `encode` never returns it."""
        return self._ids["<unk>"]

    @cached_property
    def letter_ids(self) -> Int32[np.ndarray, "256"]:
        """Id of each single letter, indexed by ASCII code; -1 for all but A, C, G, T and N."""
        ids = np.full(256, -1, np.int32)
        for letter in _LETTERS:
            ids[ord(letter)] = self._ids[letter]
        return ids

    @cached_property
    def sixmer_ids(self) -> Int32[np.ndarray, "4096"]:
        """Id of each 6-mer, indexed by its number in base 4: most significant base first, A 0, C 1, T 2, G 3."""
        return np.array([self._ids[sixmer] for sixmer in _SIXMERS], np.int32)


def _column_tokens(columns: Columns) -> tuple[str, ...]:
    return tuple(
        f"{base}{number}={score}"
        for number, scores in enumerate(columns.scores.tolist())
        for base, score in zip(_CODED, scores, strict=True)
    )


def encode_columns(sequences: pa.LargeStringArray, vocabulary: Vocabulary) -> TokenRows:
    """Converts cleaned sequences to the tokens of their bases in the vocabulary's columns.

    A row has CLS, the tokens of the columns in which the sequence has a known base, and N for each base that is left.

    Args:
        sequences: Strings of A, C, G, T and N.
        vocabulary: One with columns.
    """
    assert vocabulary.columns is not None
    placed = vocabulary.columns.place(sequences)
    known = placed < 4
    lengths = np.diff(string_bytes(sequences)[1])
    found = known.sum(axis=1)
    tokens = 1 + np.maximum(lengths, found)
    offsets = np.concatenate([[0], np.cumsum(tokens)])
    ids = np.full(offsets[-1], vocabulary.letter_ids[ord("N")], np.int32)
    ids[offsets[:-1]] = vocabulary.cls_id
    parts = np.stack([np.ones_like(tokens), found, tokens - found - 1], axis=1)
    ids[np.repeat(np.tile([False, True, False], len(tokens)), parts.reshape(-1))] = take_by_column(
        vocabulary.column_ids, placed
    )[known]
    return TokenRows(ids, offsets)


def encode(sequences: pa.LargeStringArray, vocabulary: Vocabulary) -> TokenRows:
    """Converts cleaned sequences to token ids.

    The ids equal those of `transformers.EsmTokenizer(vocab_file, eos_token=None)`: CLS first; each stretch between Ns
    is read in 6-mers from its left end, and its rest as single letters; each N is a token of its own.

    Args:
        sequences: Strings of A, C, G, T and N, such as `clean` returns.
        vocabulary: The checkpoint's vocabulary.

    Raises:
        InputError: A row is null or has another character.

    Example:
        >>> vocabulary = Vocabulary.published("v2")
        >>> rows = encode(pa.array(["ACGTACGT", "ANC"], pa.large_string()), vocabulary)
        >>> [vocabulary.tokens[i] for i in rows.ids]
        ['<cls>', 'ACGTAC', 'G', 'T', '<cls>', 'A', 'N', 'C']
        >>> rows.lengths
        array([4, 4])
    """
    if sequences.null_count:
        row = int(np.flatnonzero(sequences.is_null().to_numpy(zero_copy_only=False))[0])
        raise InputError(f"encode got a null at row {row}; pass the strings through bioscan_jax.clean first")
    text, offsets = string_bytes(sequences)
    ids, lengths = [np.empty(0, np.int32)], [np.zeros(1, np.int64)]
    for first, last in row_blocks(offsets):
        begin, end = offsets[first], offsets[last]
        block = text[begin:end]
        not_base = np.flatnonzero((block != 65) & (block != 67) & (block != 71) & (block != 84))
        foreign = not_base[block[not_base] != ord("N")]
        if len(foreign):
            raise unclean_character(sequences, int(begin + foreign[0]), "encode")
        block_ids, block_lengths = _encode_block(block, offsets[first : last + 1] - begin, not_base, vocabulary)
        ids.append(block_ids)
        lengths.append(block_lengths)
    return TokenRows(np.concatenate(ids), np.cumsum(np.concatenate(lengths)))


def _encode_block(
    text: UInt8[np.ndarray, " bytes"],
    offsets: Int64[np.ndarray, " rows_plus_1"],
    n_positions: Int64[np.ndarray, " unknown_bases"],
    vocabulary: Vocabulary,
) -> tuple[Int32[np.ndarray, " tokens"], Int64[np.ndarray, " rows"]]:
    """Returns the ids of all rows, one row after another, and the number of tokens of each row."""
    # A run is a stretch without N and the token before it: CLS for the first run of a row, else N.
    row_starts = offsets[:-1]
    runs = len(row_starts) + len(n_positions)
    row_runs = np.arange(len(row_starts)) + np.searchsorted(n_positions, row_starts)
    after_n = np.ones(runs, bool)
    after_n[row_runs] = False
    starts = np.empty(runs, np.int64)
    starts[row_runs] = row_starts
    starts[after_n] = n_positions + 1
    ends = np.append(starts[1:], len(text))
    ends[:-1] -= after_n[1:]
    sixmers, rest = np.divmod(ends - starts, 6)
    tokens = 1 + sixmers + rest
    heads = np.cumsum(tokens) - tokens

    # The number of the 6-mer at each position, shifted by 6 since a run's head has the position 6 before its start.
    # Single letters read up to 25 positions past the end of their run and are overwritten below.
    bases = np.zeros(6 + len(text) + 25, np.uint8)
    bases[6 : 6 + len(text)] = (text >> 1) & 3
    trimers = (bases[:-2] << 4) | (bases[1:-1] << 2) | bases[2:]
    positions = np.repeat(starts - 6 * heads, tokens)
    positions += np.arange(0, 6 * len(positions), 6)
    numbers = trimers.take(positions).astype(np.uint16) << 6
    positions += 3
    numbers |= trimers.take(positions)
    ids = vocabulary.sixmer_ids.take(numbers)

    for letter in range(5):
        long_enough = rest > letter
        at = (heads + 1 + sixmers)[long_enough] + letter
        ids[at] = vocabulary.letter_ids[text[(ends - rest)[long_enough] + letter]]
    ids[heads] = np.where(after_n, vocabulary.letter_ids[ord("N")], np.int32(vocabulary.cls_id))
    return ids, np.diff(np.append(heads[row_runs], len(ids)))
