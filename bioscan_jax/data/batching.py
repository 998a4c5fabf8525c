"""Packs rows of tokens into padded batches of a few shapes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from bioscan_jax.barcodes.schemas import TokenBatch, TokenRows

WIDTH_STEP = 8
"""Widths are multiples of a TPU's eight sublanes."""
START_TOKENS = 8
"""Assumed cost of starting a batch, in computed tokens per device; keeps shapes from being split without need.

The 2.5B model computes them in 0.7 ms on a core of a v3 at its peak.
"""
_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)
_STARTS = (1.0, 0.25)
_SEARCHED_BLOCKS = 16
MOST_PADDING = 1.12
"""Computed over real tokens above which a block may add shapes."""
ATTEMPTS = 7
"""Most compilations in the search for the largest batch."""
_GROWTH = 16
"""Largest step up in that search, as a factor."""
LEAST_SAVED = 0.05
"""Share of a block's computed tokens that a shape must save to be added."""


@dataclass(frozen=True)
class BatchShape:
    """Rows and tokens per row of a batch; each shape is compiled once."""

    rows: int
    tokens: int


def choose_widths(
    lengths: Int[np.ndarray, " rows"], limit: int, most: int, among: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Chooses the widths that pad a sample of rows least.

    Exact dynamic programming; each row is padded to the smallest width that holds it.

    Args:
        lengths: Tokens of each sampled row, CLS included.
        limit: Longest row, in the sample or not.
        most: Largest number of widths.
        among: Ascending widths to choose from, the last of them at least `limit`; all multiples of `WIDTH_STEP` below
            `limit`, and `limit`, if absent.

    Returns:
        Ascending widths; the last is the last one of `among`.
    """
    if among is None:
        among = np.minimum(np.arange(WIDTH_STEP, limit + WIDTH_STEP, WIDTH_STEP), limit).tolist()
    widths = np.array(among)
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
    """Fits the rows of each width's batches to a token budget per device; every device gets equally many.

    Args:
        widths: Tokens per row of each shape.
        devices: Devices along the batch.
        tokens_per_device: Budget, padding included; a shape has at least one row per device.
        most_rows: Expected rows of a block; no batch is larger than these need.
    """
    shapes = []
    for width in widths:
        per_device = max(1, min(tokens_per_device // width, -(-most_rows // devices)))
        if per_device > WIDTH_STEP:
            per_device -= per_device % WIDTH_STEP
        shapes.append(BatchShape(per_device * devices, width))
    return tuple(shapes)


def fixed_widths(limit: int) -> list[int]:
    """Returns the multiples of `WIDTH_STEP` up to 8 of it, four per doubling beyond, and `limit`, below or at `limit`.

    Example:
        >>> fixed_widths(100)
        [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]
    """
    widths, step = [WIDTH_STEP], WIDTH_STEP
    while widths[-1] < limit:
        step *= 2 if widths[-1] == 8 * step else 1
        widths.append(widths[-1] + step)
    return [*(width for width in widths if width < limit), limit]


def fixed_shapes(
    lengths: Int[np.ndarray, " rows"], longest: int, limit: int, *, most: int, devices: int, tokens_per_device: int
) -> tuple[BatchShape, ...]:
    """Chooses shapes from a set that does not depend on the rows, so that many inputs share a few compiled shapes.

    Widths are `fixed_widths`, rows per device powers of two.

    Args:
        lengths: Tokens of each row, CLS included.
        longest: No row is longer.
        limit: Longest row that the settings allow.
        most: Largest number of shapes.
        devices: Devices along the batch.
        tokens_per_device: Budget of a batch, padding included; a shape has at least one row per device.
    """
    among = fixed_widths(limit)
    among = among[: int(np.searchsorted(among, longest)) + 1]
    widths = choose_widths(lengths, longest, most, among)
    counts = np.bincount(np.searchsorted(widths, lengths), minlength=len(widths)).tolist()
    shapes = []
    for width, count in zip(widths, counts, strict=True):
        budget, needed = max(1, tokens_per_device // width), max(1, -(-count // devices))
        # The power of two at or above what is needed, or else at or below the budget.
        per_device = 1 << (needed - 1).bit_length()
        shapes.append(BatchShape(devices * min(per_device, 1 << (budget.bit_length() - 1)), width))
    return tuple(shapes)


def spare_shapes(limit: int, *, devices: int, tokens_per_device: int) -> tuple[BatchShape, ...]:
    """Returns the fixed set of shapes, one for each of `fixed_widths`, from which a block may add some.

    Args:
        limit: Longest row that the settings allow.
        devices: Devices along the batch.
        tokens_per_device: Budget of a batch, padding included; rows per device are the largest power of two within it.
    """
    budgets = [(width, max(1, tokens_per_device // width)) for width in fixed_widths(limit)]
    return tuple(BatchShape(devices << (rows.bit_length() - 1), width) for width, rows in budgets)


def fitted_shapes(
    lengths: Int[np.ndarray, " rows"], shapes: Sequence[BatchShape], spare: Sequence[BatchShape]
) -> tuple[BatchShape, ...]:
    """Adds shapes for a block whose rows those of the input fit badly; most blocks get none.

    The result depends on the block alone, not on earlier ones, so that a resumed run batches it in the same way.

    Args:
        lengths: Tokens of each row of the block, CLS included.
        shapes: The shapes of the input, ascending in tokens; no row is longer than the last.
        spare: What may be added; the best first, while it saves `LEAST_SAVED` and more than `MOST_PADDING` is computed.
    """

    def computed(some: Sequence[BatchShape]) -> int:
        bucket = np.searchsorted([shape.tokens for shape in some], lengths)
        return int(_fill_tails(np.bincount(bucket, minlength=len(some))[None], some, 0)[0][0])

    chosen, cost = tuple(shapes), computed(shapes)
    while cost > MOST_PADDING * lengths.sum():
        widths = {shape.tokens for shape in chosen}
        others = [
            tuple(sorted((*chosen, shape), key=lambda one: one.tokens)) for shape in spare if shape.tokens not in widths
        ]
        price, best = min(
            ((computed(other), other) for other in others), key=lambda one: one[0], default=(cost, chosen)
        )
        if price > (1 - LEAST_SAVED) * cost:
            break
        chosen, cost = best, price
    return chosen


def choose_shapes(
    blocks: Sequence[Int[np.ndarray, " _"]], limit: int, *, most: int, devices: int, tokens_per_device: int
) -> tuple[BatchShape, ...]:
    """Chooses the shapes that compute fewest tokens for blocks of rows like these, the last batch of each included.

    A width that few rows of a block have gets smaller batches, since an almost empty batch costs as much as a full one.
    Descent over widths and rows from several starts; the result need not be optimal.

    Args:
        blocks: Tokens of the rows of some blocks, CLS included.
        limit: No row is longer; the last shape holds that many tokens.
        most: Largest number of shapes.
        devices: Devices along the batch.
        tokens_per_device: Budget of a batch, padding included; a shape has at least one row per device.
    """
    seen, most_rows = np.concatenate(blocks), max(1, *(len(block) for block in blocks))
    picked = np.unique(np.linspace(0, len(blocks) - 1, _SEARCHED_BLOCKS).astype(int))
    steps = -(-limit // WIDTH_STEP)
    histograms = [np.bincount(-(-blocks[i] // WIDTH_STEP), minlength=steps + 1) for i in picked]
    up_to = np.cumsum(histograms, axis=1)

    def shapes_of(wide: list[int], shares: list[float]) -> list[BatchShape]:
        budgets = [max(1, int(tokens_per_device * share)) for share in shares]
        pairs = [(min(step * WIDTH_STEP, limit), budget) for step, budget in zip(wide, budgets, strict=True)]
        return [
            batch_shapes([width], devices=devices, tokens_per_device=budget, most_rows=most_rows)[0]
            for width, budget in pairs
        ]

    def cost(wide: list[int], shares: list[float]) -> int:
        counts = np.diff(up_to[:, wide], axis=1, prepend=0)
        return int(_fill_tails(counts, shapes_of(wide, shares), START_TOKENS * devices)[0].sum())

    def neighbours(wide: list[int], shares: list[float]) -> Iterator[tuple[list[int], list[float]]]:
        for k in range(len(wide)):
            for share in _SHARES:
                yield wide, [*shares[:k], share, *shares[k + 1 :]]
            for step in (wide[k] - 1, wide[k] + 1):
                if k + 1 < len(wide) and (wide[k - 1] if k else 0) < step < wide[k + 1]:
                    yield [*wide[:k], step, *wide[k + 1 :]], shares

    found = []
    for count in range(max(1, most - 2), most + 1):
        start = [-(-width // WIDTH_STEP) for width in choose_widths(seen, limit, count)]
        for share in _STARTS:
            at, best = (start, [share] * len(start)), cost(start, [share] * len(start))
            better = True
            while better:
                better = False
                for other in neighbours(*at):
                    if (price := cost(*other)) < best:
                        at, best, better = other, price, True
            found.append((best, at))
    wide, shares = min(found, key=lambda one: one[0])[1]
    used = np.diff(up_to[:, wide], axis=1, prepend=0).sum(axis=0).tolist()
    return tuple(shapes_of(wide, [share if rows else 0.0 for share, rows in zip(shares, used, strict=True)]))


def _fill_tails(
    counts: Int[np.ndarray, "blocks shapes"], shapes: Sequence[BatchShape], start_tokens: int
) -> tuple[Int[np.ndarray, " blocks"], Int[np.ndarray, "shapes blocks"]]:
    """Decides where the rows left over from each shape's full batches go: one more batch, or up to the next shape.

    Exact dynamic programming over the shapes that get such a last batch; the leftover rows of those between move up.

    Returns:
        Fewest tokens computed for each block; and, for a last batch at shape k, the first shape whose leftover rows are
        in it.
    """
    waiting = np.zeros((len(shapes), len(counts)), np.int64)
    spent, first, best = np.zeros_like(waiting), np.zeros_like(waiting), np.zeros(len(counts), np.int64)
    for k, shape in enumerate(shapes):
        spent[k], price = best, shape.rows * shape.tokens + start_tokens
        full, left = np.divmod(waiting[: k + 1] + counts[:, k], shape.rows)
        spent[: k + 1] += full * price
        filled = spent[: k + 1] + (left > 0) * price
        first[k] = np.argmin(filled, axis=0)
        best = filled[first[k], np.arange(len(counts))]
        waiting[: k + 1] = left
    return best, first


def make_batches(tokens: TokenRows, shapes: Sequence[BatchShape], *, cls: int, pad: int) -> list[TokenBatch]:
    """Packs rows into padded batches, each row once.

    Rows left over after a width's full batches move up to the next width where that computes fewer tokens, over all
    widths, than filling a batch with empty rows.

    Args:
        tokens: The rows; none is longer than the last shape.
        shapes: Ascending in tokens.
        cls: Id of CLS, all that filler rows hold.
        pad: Id that pads each row on the right.
    """
    bucket = np.searchsorted([shape.tokens for shape in shapes], tokens.lengths)
    first = _fill_tails(np.bincount(bucket, minlength=len(shapes))[None], shapes, 0)[1][:, 0]
    filled, k = set(), len(shapes) - 1
    while k >= 0:
        filled.add(k)
        k = int(first[k]) - 1
    batches, waiting = [], np.empty(0, np.int64)
    for k, shape in enumerate(shapes):
        rows = np.concatenate([waiting, np.flatnonzero(bucket == k)])
        stop = len(rows) if k in filled else len(rows) - len(rows) % shape.rows
        waiting = rows[stop:]
        for start in range(0, stop, shape.rows):
            chosen = rows[start : min(start + shape.rows, stop)]
            ids = pad_rows(tokens, chosen, shape.rows, shape.tokens, cls=cls, pad=pad)
            batches.append(TokenBatch(ids, chosen))
    return batches


def pad_rows(
    tokens: TokenRows, chosen: Int[np.ndarray, " used"], rows: int, width: int, *, cls: int, pad: int
) -> Int[np.ndarray, "rows width"]:
    """Copies rows into a rectangle, padded on the right and cut at its width; the rows beyond them hold CLS alone."""
    ids = np.full((rows, width), pad, np.int32)
    ids[:, 0] = cls
    column = np.arange(width)
    real = column < tokens.lengths[chosen][:, None]
    index = tokens.offsets[chosen][:, None] + column
    ids[: len(chosen)][real] = tokens.ids[index[real]]
    return ids


def step_down(rows: int) -> int:
    """Rounds rows per device down to a number that batches have: any up to a TPU's eight sublanes, then multiples."""
    return rows if rows <= WIDTH_STEP else rows - rows % WIDTH_STEP


def step_up(rows: int) -> int:
    """Returns the next larger number of rows per device."""
    return rows + 1 if rows < WIDTH_STEP else rows + WIDTH_STEP


def largest_rows(
    bytes_of: Callable[[int], int],
    rows: int,
    used: int,
    *,
    fixed: int,
    available: int,
    attempts: int = ATTEMPTS,
) -> tuple[int, int | None]:
    """Finds how many rows fit on a device, whose memory use grows about linearly with them.

    Args:
        bytes_of: Compiles the program for a number of rows per device and returns the bytes it needs.
        rows: A number of rows for which the bytes are known.
        used: Bytes needed for these rows.
        fixed: Bytes needed without any row: a first guess.
        available: Bytes of memory on the device.
        attempts: Most compilations.

    Returns:
        The most rows that fit, 0 if none do, and the fewest tried that do not. If that is None or not the next larger
        number, so many compilations were not enough to narrow it down.
    """
    known = [(0, fixed), (rows, used)]
    fits, over = (rows, None) if used <= available else (0, rows)
    for _ in range(attempts):
        if over is not None and step_up(fits) >= over:
            break
        (x, a), (y, b) = known[-2:]
        slope = max((b - a) / (y - x), 1.0)
        guess = step_down(int(y + (available - b) / slope))
        guess = max(guess, step_up(fits))
        guess = min(guess, step_down(over - 1) if over is not None else fits * _GROWTH)
        need = bytes_of(guess)
        known.append((guess, need))
        if need <= available:
            fits = guess
        else:
            over = guess
    return fits, over
