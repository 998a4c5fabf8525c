"""A sample of an input: how long its sequences are, and the batch shapes that suit them."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from bioscan_jax import config
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.data.batching import WIDTH_STEP, BatchShape, choose_shapes, fixed_shapes, spare_shapes
from bioscan_jax.data.encode import BlockCounts, Encoding, encode_block
from bioscan_jax.data.parquet import Block
from bioscan_jax.embedding.repeats import Window, window_blocks
from bioscan_jax.errors import InputError

SAMPLED_ROWS = 65536
"""Rows, spread over the input, whose lengths choose the batch shapes; somewhat more where blocks are large."""
STRETCHES = 16
"""Places of a longer input from which consecutive blocks are sampled."""
FEW_ROWS = 256
"""An input with fewer usable rows takes its shapes from a fixed set: compiling others costs more than padding."""
_FEW_SHAPES = 2


@runtime_checkable
class Blocks(Protocol):
    """Rows of an input, a block at a time: files (`ParquetBlocks`), or sequences in memory."""

    @property
    def rows(self) -> int:
        """Rows of all blocks."""
        ...

    @property
    def block_rows(self) -> int:
        """Rows per block."""
        ...

    def __len__(self) -> int:
        """Number of blocks."""
        ...

    def __getitem__(self, index: int, /) -> Block:
        """Reads a block."""
        ...

    def locate(self, row: int, first: int = 0) -> str:
        """Names a row, counted from row `first`, in messages."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some blocks of an input."""

    blocks: list[TokenRows]
    """The token rows of each block that are computed, not copied from a sampled block before it."""
    counts: BlockCounts
    whole: bool
    """Whether these blocks are the whole input."""
    max_tokens: int
    """Longest token row allowed."""

    @property
    def lengths(self) -> list[Int[np.ndarray, " _"]]:
        """Tokens of each token row of each block."""
        return [tokens.lengths for tokens in self.blocks]

    def shapes(self, embed: config.EmbedConfig, devices: int) -> tuple[BatchShape, ...]:
        """Chooses the batch shapes for the input.

        They depend on the input and the settings alone, so that the same input always gives the same vectors to the
        last bit.
        """
        if self.whole and self.counts.vectors < FEW_ROWS:
            return self.fixed_shapes(embed, devices, min(_FEW_SHAPES, embed.max_shapes))
        limit = min(self.max_tokens, self._widest) if self.whole else self.max_tokens
        return choose_shapes(
            self.lengths, limit, most=embed.max_shapes, devices=devices, tokens_per_device=embed.batch_tokens
        )

    def spare_shapes(self, embed: config.EmbedConfig, devices: int) -> tuple[BatchShape, ...]:
        """Returns what a block that was not sampled may add to the shapes if they fit it badly."""
        if self.whole:
            return ()
        return spare_shapes(self.max_tokens, devices=devices, tokens_per_device=embed.batch_tokens)

    def fixed_shapes(self, embed: config.EmbedConfig, devices: int, most: int) -> tuple[BatchShape, ...]:
        """Chooses at most so many shapes from a fixed set, which is the same for all inputs."""
        return fixed_shapes(
            np.concatenate(self.lengths),
            self._widest if self.whole else self.max_tokens,
            self.max_tokens,
            most=most,
            devices=devices,
            tokens_per_device=embed.batch_tokens,
        )

    @property
    def _widest(self) -> int:
        longest = max(int(lengths.max(initial=1)) for lengths in self.lengths)
        return -(-longest // WIDTH_STEP) * WIDTH_STEP

    def check(self, column: str) -> None:
        """Raises InputError if none of the sequences can be embedded."""
        if not self.counts.vectors:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.rejects.items())
            raise InputError(
                f"no sequence in column {column!r} can be embedded ({reasons}); "
                "is it DNA? pass another --data.sequence_column"
            )


def sample_blocks(source: Blocks, encoding: Encoding, embed: config.EmbedConfig, rows: int = SAMPLED_ROWS) -> Sample:
    """Reads blocks from evenly spread places of the input, about `rows` rows, and more until one can be embedded.

    Which blocks these are depends on the number of blocks and their rows alone. An input of at most `rows` rows is read
    whole.
    """
    blocks: list[TokenRows] = []
    counts, before = BlockCounts(), -2
    window = Window(0)
    sampled = _spread(len(source), -(-rows // source.block_rows), min(STRETCHES, rows))
    for number, index in enumerate(dict.fromkeys([*sampled, *range(len(source))])):
        if number >= len(sampled) and counts.vectors:
            break
        if index != before + 1:  # only the blocks just before one are known, as in a run
            window = Window(window_blocks(embed, source.block_rows))
        prepared, before = window.prepare(encode_block(source[index], encoding)), index
        counts += prepared.encoded.counts
        blocks.append(prepared.views.tokens)
    return Sample(blocks=blocks, counts=counts, whole=counts.rows == source.rows, max_tokens=encoding.max_tokens)


def _spread(blocks: int, wanted: int, stretches: int) -> list[int]:
    """Returns the numbers of at least `wanted` of the blocks, if there are so many: stretches, the first at the start."""
    each = -(-wanted // stretches)
    if each * stretches >= blocks:
        return list(range(blocks))
    starts = np.linspace(0, blocks - each, stretches).astype(int).tolist()
    return sorted({index for start in starts for index in range(start, start + each)})
