import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioscan_jax.barcodes.cleaning import reverse_complement, start_at_phase
from bioscan_jax.barcodes.tokenizer import Vocabulary, encode
from bioscan_jax.barcodes.views import cut_views

VOCABULARY = Vocabulary.published("v2")
dna = st.text("ACGTN", min_size=1, max_size=80)


def strings(texts):
    return pa.array(texts, pa.large_string())


def row(tokens, i):
    return tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist()


def views(texts, **changes):
    options = {"max_tokens": 1000, "overlong": "truncate", "strand": "forward", "phases": 1} | changes
    return cut_views(strings(texts), VOCABULARY, **options)


@given(st.lists(dna, min_size=1, max_size=5))
def test_plain_views_are_the_token_rows(texts):
    seen, expected = views(texts), encode(strings(texts), VOCABULARY)
    np.testing.assert_array_equal(seen.tokens.ids, expected.ids)
    np.testing.assert_array_equal(seen.owner, np.arange(len(texts)))
    assert not seen.overlong.any()


@given(st.lists(dna, min_size=1, max_size=4), st.integers(1, 6), st.sampled_from(["forward", "both"]))
def test_strands_and_phases_are_every_oriented_suffix(texts, phases, strand):
    seen = views(texts, strand=strand, phases=phases)
    for i, text in enumerate(texts):
        oriented = [strings([text])] + [reverse_complement(strings([text]))] * (strand == "both")
        expected = [encode(start_at_phase(o, p), VOCABULARY).ids.tolist() for o in oriented for p in range(phases)]
        expected = [tokens for tokens in expected if len(tokens) > 1]
        assert [row(seen.tokens, v) for v in np.flatnonzero(seen.owner == i)] == expected


@given(st.lists(dna, min_size=1, max_size=4))
def test_six_phases_read_every_sixmer_once_on_both_sides_of_an_n(texts):
    names = np.array(VOCABULARY.tokens)
    for text in texts:
        seen = names[views([text], phases=6).tokens.ids]
        windows = (text[i : i + 6] for i in range(len(text) - 5))
        assert sorted(t for t in seen if len(t) == 6) == sorted(w for w in windows if "N" not in w)


@given(st.lists(dna, min_size=1, max_size=5), st.integers(2, 12), st.integers(1, 6))
def test_windows_tile_the_tokens_evenly(texts, max_tokens, phases):
    whole = views(texts, phases=phases, max_tokens=1000)
    seen = views(texts, phases=phases, max_tokens=max_tokens, overlong="window")
    assert seen.tokens.lengths.max() <= max_tokens
    for i in range(len(texts)):
        windows = [row(seen.tokens, v) for v in np.flatnonzero(seen.owner == i)]
        assert all(w[0] == VOCABULARY.cls_id for w in windows)
        full = [row(whole.tokens, v)[1:] for v in np.flatnonzero(whole.owner == i)]
        assert [t for w in windows for t in w[1:]] == [t for tokens in full for t in tokens]
        assert len(windows) == sum(-(-len(tokens) // (max_tokens - 1)) for tokens in full)
        for tokens in full:
            sizes = [len(w) - 1 for w in windows[: -(-len(tokens) // (max_tokens - 1))]]
            windows = windows[len(sizes) :]
            assert max(sizes) - min(sizes) <= 1


def test_truncate_keeps_the_beginning_and_reports_it():
    seen = views(["ACGTAC" * 9, "ACGTAC"], max_tokens=5)
    assert seen.tokens.lengths.tolist() == [5, 2]
    assert seen.overlong.tolist() == [True, False]


def test_error_drops_every_view_of_an_overlong_sequence():
    seen = views(["ACGTAC" * 9, "ACGTACG"], max_tokens=5, overlong="error", strand="both", phases=2)
    assert seen.overlong.tolist() == [True, False]
    assert seen.owner.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("phases", [1, 6])
def test_a_single_base_has_a_view(phases):
    assert views(["G"], phases=phases, strand="both").owner.tolist() == [0, 0]
