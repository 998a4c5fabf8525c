"""Rows of tokens to padded batches of a few shapes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from bioscan_jax.schemas import TokenBatch, TokenRows

WIDTH_STEP = 8
"""Widths are multiples of a TPU's eight sublanes."""


@dataclass(frozen=True)
class BatchShape:
    """One compiled shape."""

    rows: int
    tokens: int


def choose_widths(lengths: Int[np.ndarray, " rows"], limit: int, most: int) -> tuple[int, ...]:
    """The widths that pad a sample of rows least.

    Exact dynamic programming over the multiples of `WIDTH_STEP`: a row is padded to the least width that holds it.

    Args:
        lengths: Tokens of each sampled row, CLS included.
        limit: No row is longer; the last width holds that many, for rows longer than any in the sample.
        most: Number of widths at most.

    Returns:
        Ascending widths; the last is `limit`.
    """
    widths = np.minimum(np.arange(WIDTH_STEP, limit + WIDTH_STEP, WIDTH_STEP), limit)
    rows = np.searchsorted(np.sort(lengths), widths, side="right").astype(np.float64)
    step = np.maximum(rows[None, :] - rows[:, None], 0) * widths[None, :]
    step[np.tril_indices(len(widths))] = np.inf
    # cost[j]: fewest computed tokens for all rows up to width j, j being the widest; each round allows one width more.
    cost, before = rows * widths, []
    for _ in range(1, min(most, len(widths))):
        total = cost[:, None] + step
        previous = np.argmin(total, axis=0)
        better = total[previous, np.arange(len(widths))]
        before.append(np.where(better < cost, previous, -1))
        cost = np.minimum(better, cost)
    at = len(widths) - 1
    picked = [at]
    for previous in reversed(before):
        if previous[at] >= 0:
            at = int(previous[at])
            picked.append(at)
    return tuple(int(widths[i]) for i in reversed(picked))


def batch_shapes(
    widths: Sequence[int], *, devices: int, tokens_per_device: int, most_rows: int
) -> tuple[BatchShape, ...]:
    """Rows per batch for each width: a token budget a device, equal rows a device.

    Args:
        widths: Tokens of each shape.
        devices: Devices along the batch.
        tokens_per_device: Budget, padding included; a shape has at least one row a device.
        most_rows: Rows that a block is expected to have; a batch is not made larger than that needs.
    """
    shapes = []
    for width in widths:
        per_device = max(1, min(tokens_per_device // width, -(-most_rows // devices)))
        if per_device > WIDTH_STEP:
            per_device -= per_device % WIDTH_STEP
        shapes.append(BatchShape(per_device * devices, width))
    return tuple(shapes)


def make_batches(tokens: TokenRows, shapes: Sequence[BatchShape], *, cls: int, pad: int) -> list[TokenBatch]:
    """Pads rows into batches, each row once.

    What is left of a width after its full batches moves up to the next width in use, where that costs fewer computed
    tokens than filling a batch with empty rows.

    Args:
        tokens: None longer than the last shape.
        shapes: Ascending in tokens.
        cls: Id that filler rows hold alone.
        pad: Id to the right of each row.
    """
    bucket = np.searchsorted([shape.tokens for shape in shapes], tokens.lengths)
    used = [k for k in range(len(shapes)) if (bucket == k).any()]
    batches, waiting = [], np.empty(0, np.int64)
    for position, k in enumerate(used):
        shape = shapes[k]
        rows = np.concatenate([waiting, np.flatnonzero(bucket == k)])
        full = len(rows) - len(rows) % shape.rows
        waiting = rows[full:]
        if len(waiting):
            last = position == len(used) - 1
            wider = 0 if last else shapes[used[position + 1]].tokens - shape.tokens
            if last or (shape.rows - len(waiting)) * shape.tokens <= len(waiting) * wider:
                full, waiting = len(rows), rows[:0]
        for start in range(0, full, shape.rows):
            chosen = rows[start : min(start + shape.rows, full)]
            ids = pad_rows(tokens, chosen, shape.rows, shape.tokens, cls=cls, pad=pad)
            batches.append(TokenBatch(ids, chosen))
    return batches


def pad_rows(
    tokens: TokenRows, chosen: Int[np.ndarray, " used"], rows: int, width: int, *, cls: int, pad: int
) -> Int[np.ndarray, "rows width"]:
    """Some rows as a rectangle, padded on the right and cut at its width; rows past them hold CLS alone."""
    ids = np.full((rows, width), pad, np.int32)
    ids[:, 0] = cls
    column = np.arange(width)
    real = column < tokens.lengths[chosen][:, None]
    index = tokens.offsets[chosen][:, None] + column
    ids[: len(chosen)][real] = tokens.ids[index[real]]
    return ids
