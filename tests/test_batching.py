import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bioscan_jax.data.batching import WIDTH_STEP, BatchShape, batch_shapes, choose_widths, make_batches
from bioscan_jax.schemas import TokenRows

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
