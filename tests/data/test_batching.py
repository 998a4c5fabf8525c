import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.data.batching import (
    ATTEMPTS,
    WIDTH_STEP,
    BatchShape,
    batch_shapes,
    choose_shapes,
    choose_widths,
    fitted_shapes,
    fixed_shapes,
    fixed_widths,
    largest_rows,
    make_batches,
    spare_shapes,
    step_down,
    step_up,
)

CLS, PAD = 3, 1


def rows_of(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.int32) + 10
    return TokenRows(ids, offsets)


def cost(lengths, widths):
    return sum(min(w for w in widths if w >= n) for n in lengths)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=12), st.integers(1, 4))
def test_widths_are_the_optimum(lengths, most):
    """Exhaustive search over the multiples of 8 finds nothing cheaper."""
    limit = 64
    widths = choose_widths(np.array(lengths), limit, most)
    assert widths[-1] == limit
    assert len(widths) <= most
    assert list(widths) == sorted(set(widths))
    candidates = range(WIDTH_STEP, limit, WIDTH_STEP)
    best = min(cost(lengths, (*chosen, limit)) for n in range(most) for chosen in itertools.combinations(candidates, n))
    assert cost(lengths, widths) == best


def test_a_limit_that_is_no_multiple_is_the_last_width():
    assert choose_widths(np.array([5, 30]), 30, 8) == (8, 30)
    assert choose_widths(np.array([3]), 5, 8) == (5,)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 3), st.integers(1, 4))
def test_fixed_shapes_come_from_a_set_that_does_not_depend_on_the_rows(lengths, most, devices):
    shapes = fixed_shapes(np.array(lengths), max(lengths), 300, most=most, devices=devices, tokens_per_device=1024)
    allowed = {BatchShape(devices << k, width) for width in fixed_widths(300) for k in range(8)}
    assert set(shapes) <= allowed
    assert len(shapes) <= most
    assert shapes[-1].tokens >= max(lengths)
    assert all(shape.tokens * shape.rows <= 1024 * devices or shape.rows == devices for shape in shapes)
    assert make_batches(rows_of(lengths), shapes, cls=CLS, pad=PAD)


def test_batch_shapes_keep_the_budget_and_divide_over_devices():
    shapes = batch_shapes((128, 1000), devices=8, tokens_per_device=16384, most_rows=8192)
    assert shapes == (BatchShape(1024, 128), BatchShape(128, 1000))
    assert batch_shapes((2048,), devices=2, tokens_per_device=1000, most_rows=10) == (BatchShape(2, 2048),)
    assert batch_shapes((64,), devices=4, tokens_per_device=16384, most_rows=10) == (BatchShape(12, 64),)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 3))
def test_every_row_lands_once_and_whole(lengths, devices):
    tokens = rows_of(lengths)
    shapes = batch_shapes((8, 16, 40), devices=devices, tokens_per_device=64, most_rows=60)
    batches = make_batches(tokens, shapes, cls=CLS, pad=PAD)
    seen = np.concatenate([b.rows for b in batches]) if batches else np.empty(0, int)
    assert sorted(seen) == list(range(len(lengths)))
    for batch in batches:
        assert BatchShape(*batch.ids.shape) in shapes
        for i, row in enumerate(batch.rows):
            n = lengths[row]
            np.testing.assert_array_equal(batch.ids[i, :n], tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]])
            assert (batch.ids[i, n:] == PAD).all()
        filler = batch.ids[len(batch.rows) :]
        assert (filler[:, 0] == CLS).all()
        assert (filler[:, 1:] == PAD).all()


def test_a_small_rest_moves_up_and_a_large_one_is_filled():
    shapes = (BatchShape(4, 8), BatchShape(4, 16))
    few = make_batches(rows_of([8] * 5 + [16] * 3), shapes, cls=CLS, pad=PAD)
    assert [b.ids.shape for b in few] == [(4, 8), (4, 16)]
    many = make_batches(rows_of([8] * 7 + [16] * 4), shapes, cls=CLS, pad=PAD)
    assert [b.ids.shape for b in many] == [(4, 8), (4, 8), (4, 16)]


@given(
    st.lists(st.integers(1, 24), max_size=40),
    st.lists(st.integers(1, 6), min_size=3, max_size=3),
)
def test_no_other_way_of_moving_rests_up_computes_less(lengths, rows):
    shapes = [BatchShape(n, width) for n, width in zip(rows, (8, 16, 24), strict=True)]
    computed = sum(batch.ids.size for batch in make_batches(rows_of(lengths), shapes, cls=CLS, pad=PAD))
    counts = np.bincount(np.searchsorted([8, 16, 24], lengths), minlength=3)
    costs = []
    for moves in itertools.product((False, True), repeat=2):
        waiting = cost = 0
        for shape, own, up in zip(shapes, counts, (*moves, False), strict=True):
            batches, left = divmod(waiting + own, shape.rows)
            waiting, batches = (left, batches) if up else (0, batches + (left > 0))
            cost += batches * shape.rows * shape.tokens
        costs.append(cost)
    assert computed == min(costs)


def barcode_lengths(rng, rows):
    """Most are of one length, some shorter, few long: as barcodes are."""
    kinds = rng.choice(4, rows, p=[0.6, 0.3, 0.09, 0.01])
    return np.choose(
        kinds, [114, rng.integers(90, 114, rows), rng.integers(20, 140, rows), rng.integers(140, 480, rows)]
    )


def test_shapes_fit_what_blocks_have_left_over():
    """With batches as large as the budget allows, rests cost more than the padding."""
    rng = np.random.default_rng(0)
    blocks = [barcode_lengths(rng, 6000) for _ in range(5)]
    settings = {"devices": 8, "tokens_per_device": 16384}
    shapes = choose_shapes(blocks, 480, most=8, **settings)
    plain = batch_shapes(choose_widths(np.concatenate(blocks), 480, 8), most_rows=6000, **settings)

    def ratio(shapes, seed):
        fresh = [barcode_lengths(np.random.default_rng(seed + i), 6000) for i in range(5)]
        computed = sum(b.ids.size for one in fresh for b in make_batches(rows_of(one), shapes, cls=CLS, pad=PAD))
        return computed / sum(map(sum, fresh))

    assert len(shapes) <= 8
    assert shapes[-1].tokens == 480
    assert all(shape.rows % 8 == 0 and shape.rows * shape.tokens <= 8 * 16384 for shape in shapes)
    assert ratio(shapes, 100) < 1.12 < 1.2 < ratio(plain, 100)


def test_a_width_that_no_row_has_gets_the_smallest_batch():
    shapes = choose_shapes([np.full(500, 30)], 2048, most=4, devices=2, tokens_per_device=4096)
    assert shapes[-1] == BatchShape(2, 2048)
    assert choose_shapes([np.empty(0, np.int64), np.array([5])], 8, most=8, devices=1, tokens_per_device=2) == (
        BatchShape(1, 8),
    )


def computed(lengths, shapes):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    batches = make_batches(TokenRows(np.zeros(offsets[-1], np.int32), offsets), shapes, cls=3, pad=1)
    return sum(batch.ids.size for batch in batches)


def test_a_block_that_fits_badly_adds_shapes_from_a_fixed_set():
    shapes = choose_shapes([np.full(512, 110)], 1000, most=4, devices=2, tokens_per_device=2048)
    spare = spare_shapes(1000, devices=2, tokens_per_device=2048)
    assert all(shape.rows % 2 == 0 and shape.rows * shape.tokens <= 4096 for shape in spare[:-1])
    assert fitted_shapes(np.full(512, 109), shapes, spare) == shapes
    assert fitted_shapes(np.empty(0, np.int64), shapes, spare) == shapes
    random = np.random.default_rng(0)
    for lengths in (random.integers(50, 86, 512), random.integers(250, 270, 512), random.integers(2, 1001, 512)):
        fitted = fitted_shapes(lengths, shapes, spare)
        assert set(shapes) <= set(fitted) <= {*shapes, *spare}
        assert [shape.tokens for shape in fitted] == sorted({shape.tokens for shape in fitted})
        before, after = computed(lengths, shapes), computed(lengths, fitted)
        assert before > 1.2 * lengths.sum()
        assert after < 0.95 * before
        assert after < 1.25 * lengths.sum()


@given(st.integers(0, 3000))
def test_steps_are_sizes_that_batches_have(rows):
    assert step_down(rows) <= rows < step_up(step_down(rows))
    assert step_down(step_up(rows)) == step_up(rows) or rows > 8


@given(
    fixed=st.integers(0, 10_000),
    per_row=st.integers(1, 500),
    bent=st.floats(0.0, 0.3),
    start=st.integers(1, 400).map(step_down),
    available=st.integers(1, 40_000),
)
def test_finds_the_largest_that_fits(fixed, per_row, bent, start, available):
    """Also where memory grows a little faster than linearly, as attention's does."""
    tried = []

    def bytes_of(rows):
        tried.append(rows)
        return fixed + int(per_row * rows * (1 + bent * rows / 1000))

    fits, over = largest_rows(bytes_of, start, bytes_of(start), fixed=fixed, available=available)
    assert len(tried) <= ATTEMPTS + 1
    assert step_down(fits) == fits
    if fits:
        assert bytes_of(fits) <= available
    if over is not None:
        assert over > fits
        assert bytes_of(over) > available
    else:
        assert len(tried) > ATTEMPTS


@pytest.mark.parametrize(("available", "expected"), [(99, (0, 1)), (100, (1, 2)), (850, (8, 16)), (8_000, (80, 88))])
def test_is_exact_for_linear_memory(available, expected):
    asked = []

    def bytes_of(rows):
        asked.append(rows)
        return 100 * rows

    assert largest_rows(bytes_of, 16, 1600, fixed=0, available=available) == expected
    assert len(asked) <= 4


def test_a_jump_in_memory_is_bisected():
    """The compiler may choose another layout from some size on."""
    jump = lambda rows: 10 * rows + 5_000 * (rows > 200)  # noqa: E731
    fits, over = largest_rows(jump, 16, jump(16), fixed=0, available=4_000)
    assert fits <= 200
    assert jump(fits) <= 4_000
    assert over is not None
    assert jump(over) > 4_000
