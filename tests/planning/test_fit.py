import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioscan_jax.planning.fit import ATTEMPTS, largest_rows, step_down, step_up


@given(st.integers(0, 3000))
def test_steps_are_the_batches_that_there_are(rows):
    assert step_down(rows) <= rows < step_up(step_down(rows))
    assert step_down(step_up(rows)) == step_up(rows) or rows > 8


@given(
    fixed=st.integers(0, 10_000),
    per_row=st.integers(1, 500),
    bent=st.floats(0.0, 0.3),
    start=st.integers(1, 400).map(step_down),
    available=st.integers(1, 40_000),
)
def test_finds_the_last_that_fits(fixed, per_row, bent, start, available):
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


def test_a_jump_in_memory_is_bisected_or_said():
    """The compiler may choose another layout from some size on."""
    jump = lambda rows: 10 * rows + 5_000 * (rows > 200)  # noqa: E731
    fits, over = largest_rows(jump, 16, jump(16), fixed=0, available=4_000)
    assert fits <= 200
    assert jump(fits) <= 4_000
    assert over is not None
    assert jump(over) > 4_000
