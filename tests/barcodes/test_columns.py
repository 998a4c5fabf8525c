"""Bases in the columns of an alignment, and their tokens."""

import numpy as np
import pyarrow as pa
import pytest

from bioscan_jax.barcodes.cleaning import reverse_complement
from bioscan_jax.barcodes.columns import Columns
from bioscan_jax.barcodes.tokenizer import Vocabulary, encode_columns
from bioscan_jax.barcodes.views import cut_views
from bioscan_jax.errors import InputError

RANDOM = np.random.default_rng(0)
GENE = "".join(RANDOM.choice(list("ACGT"), 300))
CODED = {base: number for number, base in enumerate("ACTGN")}


def strings(texts):
    return pa.array(texts, pa.large_string())


def varied(text, share=0.1):
    """Substitutes a share of the bases."""
    letters = np.array(list(text))
    some = RANDOM.random(len(letters)) < share
    letters[some] = RANDOM.choice(list("ACGT"), some.sum())
    return "".join(letters)


def coded(text):
    return [CODED[base] for base in text]


@pytest.fixture(scope="module")
def columns():
    cut = [(0, 300), (0, 300), (0, 300), (40, 300), (0, 250), (90, 210)]
    return Columns.of(strings([varied(GENE)[first:last] for _ in range(20) for first, last in cut]))


def test_the_columns_are_the_bases_of_the_gene(columns):
    assert len(columns.scores) == 300
    np.testing.assert_array_equal(columns.scores.argmax(axis=1), coded(GENE))
    np.testing.assert_allclose(np.exp(columns.scores / 16).sum(axis=1) / 4, 1, atol=0.05)


def test_stretches_lie_where_they_come_from_on_either_strand(columns):
    barcode = varied(GENE)
    texts = strings([barcode, barcode[100:220], "ACCT" + barcode + "GGT", barcode[:50] + "NNN" + barcode[53:]])
    placed = columns.place(texts)
    whole = coded(barcode)
    none = [4] * 300
    assert placed[0].tolist() == placed[2].tolist() == whole
    assert placed[1].tolist() == none[:100] + whole[100:220] + none[220:]
    assert placed[3].tolist() == whole[:50] + [4, 4, 4] + whole[53:]
    np.testing.assert_array_equal(columns.place(reverse_complement(texts)), placed)


def test_behind_a_gap_the_bases_are_in_their_columns(columns):
    lacking, more = GENE[:120] + GENE[123:], GENE[:150] + "GTC" + GENE[150:]
    placed = columns.place(strings([lacking, more]))
    right = (placed == coded(GENE)).mean(axis=1)
    assert (right > 0.93).all()


def test_another_gene_has_no_columns(columns):
    others = ["".join(RANDOM.choice(list("ACGT"), 300)) for _ in range(50)]
    assert (columns.place(strings([*others, "A", "N" * 40])) == 4).all()


def test_long_and_short_sequences_of_one_call_do_not_change_each_other(columns):
    texts = [varied(GENE), "ACGT" * 5000 + varied(GENE), varied(GENE)[:90]]
    together = columns.place(strings(texts))
    for text, placed in zip(texts, together, strict=True):
        np.testing.assert_array_equal(columns.place(strings([text]))[0], placed)
    assert (together[1] < 4).all()


def test_a_vocabulary_with_columns_is_written_and_read(columns, tmp_path):
    vocabulary = Vocabulary.published("v2").with_columns(columns)
    (tmp_path / "vocab.txt").write_text(vocabulary.text())
    again = Vocabulary.from_file(tmp_path / "vocab.txt")
    assert again.sha256 == vocabulary.sha256
    assert again.columns is not None
    np.testing.assert_array_equal(again.columns.scores, columns.scores)
    assert again.without_columns.tokens == Vocabulary.published("v2").tokens
    assert again.tokens[again.column_ids[299, 2]].startswith("T299=")
    swapped = Vocabulary((*vocabulary.tokens[:-2], *vocabulary.tokens[:-3:-1]), "here")
    with pytest.raises(InputError, match="here: the last tokens are not A, C, T and G of column 0"):
        swapped.columns  # noqa: B018


def test_each_base_is_one_token(columns):
    vocabulary = Vocabulary.published("v2").with_columns(columns)
    names = np.array(vocabulary.tokens)
    rows = encode_columns(strings(["GG" + GENE[10:200] + "N", "ACGTN"]), vocabulary)
    assert rows.lengths.tolist() == [1 + 193, 1 + 5]
    first, second = names[rows.ids[:194]], names[rows.ids[194:]]
    assert first[0] == second[0] == "<cls>"
    found = [token.split("=")[0] for token in first[1:193]]
    assert found == ["G8", "G9", *(f"{GENE[i]}{i}" for i in range(10, 200))]
    assert [first[193], *second[1:]] == ["N"] * 6


def test_a_view_of_columns_is_cut_into_windows_and_is_never_too_long(columns):
    vocabulary = Vocabulary.published("v2").with_columns(columns)
    views = cut_views(strings([GENE]), vocabulary, max_tokens=64, overlong="error", strand="forward", phases=6)
    assert not views.overlong.any()
    assert views.tokens.lengths.tolist() == [51, *[1 + 49 + r for r in (5, 4, 3, 2, 1)], 61, 61, 61, 61, 61]
