import functools
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import make_tokenizer
from support.places import GOLDEN

from bioscan_jax.barcodes import cleaning
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.barcodes.tokenizer import Vocabulary, encode
from bioscan_jax.errors import InputError

SHA256 = {
    "v1": "f1b544e27897936b50bbd925850fa8a08b421c33bb9c26e3711c140c061d0d4c",
    "v2": "c00e0ad166d6ab3f7540ebc92270392e581bb3106763412f29034b49323e1052",
}
V1, V2 = (Vocabulary.published(family) for family in ("v1", "v2"))

# Other work on the machine must not fail a test.
unhurried = settings(deadline=None)

# Text of many Ns, and runs long enough for several 6-mers.
sequence = st.text("ACGTN", max_size=40) | st.lists(st.text("ACGT", max_size=30), max_size=5).map("N".join)


@functools.cache
def esm_tokenizer(vocabulary: Vocabulary):
    from transformers import EsmTokenizer

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "vocab.txt").write_text(vocabulary.text())
        return EsmTokenizer(str(Path(directory) / "vocab.txt"), eos_token=None)


def large(values) -> pa.LargeStringArray:
    return pa.array(values, pa.large_string())


def as_lists(rows: TokenRows) -> list[list[int]]:
    assert rows.ids.dtype == np.int32
    assert rows.offsets.dtype == np.int64
    return [rows.ids[a:b].tolist() for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]


@pytest.mark.parametrize("vocabulary", [V1, V2], ids=["v1", "v2"])
@given(values=st.lists(sequence, max_size=6))
@unhurried
def test_ids_are_those_of_esm_tokenizer(vocabulary: Vocabulary, values: list[str]):
    expected = [esm_tokenizer(vocabulary)(value)["input_ids"] for value in values]
    assert as_lists(encode(large(values), vocabulary)) == expected


@given(st.lists(sequence, max_size=8))
@unhurried
def test_a_batch_equals_its_rows_one_by_one(values: list[str]):
    assert as_lists(encode(large(values), V2)) == [as_lists(encode(large([value]), V2))[0] for value in values]


@given(st.lists(sequence, max_size=8), st.data())
@unhurried
def test_a_slice_equals_its_rows(values: list[str], data: st.DataObject):
    begin = data.draw(st.integers(0, len(values)))
    end = data.draw(st.integers(begin, len(values)))
    assert as_lists(encode(large(values)[begin:end], V1)) == as_lists(encode(large(values), V1))[begin:end]


@given(st.lists(sequence, max_size=8), st.integers(1, 40))
@unhurried
def test_the_block_size_does_not_change_the_result(values: list[str], block_bytes: int):
    whole = encode(large(values), V2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleaning, "_BLOCK_BYTES", block_bytes)
        blocked = encode(large(values), V2)
    assert as_lists(blocked) == as_lists(whole)


def test_golden_ids():
    golden = json.loads((GOLDEN / "tokenizer.json").read_text())
    for family, vocabulary in (("v1", V1), ("v2", V2)):
        assert golden[family]["vocabulary_sha256"] == SHA256[family]
        assert as_lists(encode(large(golden["sequences"]), vocabulary)) == golden[family]["ids"]


def test_the_golden_file_can_be_regenerated(tmp_path: Path):
    make_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (GOLDEN / "tokenizer.json").read_text()


def test_frame_restarts_after_n():
    ids = as_lists(encode(large(["ACGTACGNACGTACTT"]), V2))[0]
    assert [V2.tokens[i] for i in ids] == ["<cls>", "ACGTAC", "G", "N", "ACGTAC", "T", "T"]


def test_more_rows_take_no_more_python_calls():
    rng = np.random.default_rng(0)
    letters = rng.choice(np.frombuffer(b"ACGT", np.uint8), (4000, 658))
    letters[::10, 300] = ord("N")
    rows = large([row.tobytes().decode() for row in letters])
    few = rows[:150]
    assert as_lists(encode(few, V2)) == esm_tokenizer(V2)(few.to_pylist())["input_ids"]
    assert as_lists(encode(rows, V2))[:150] == as_lists(encode(few, V2))

    def calls(rows: pa.LargeStringArray) -> int:
        """Calls of Python and C functions; seconds would depend on what else the machine does."""
        events = []
        sys.setprofile(lambda frame, event, argument: events.append(event))
        try:
            encode(rows, V2)
        finally:
            sys.setprofile(None)
        return sum(event in ("call", "c_call") for event in events)

    blocks = 4000 * 658 // (1 << 19) + 1
    assert calls(rows) < 2 * blocks * calls(few)  # scripts/benchmarks/tokenizing.py measures the speed


@pytest.mark.parametrize("letter", ["a", "R", "U", "-", " ", "\n"])
@pytest.mark.parametrize("bases_before", ["", "ACG"])
@pytest.mark.parametrize("block_bytes", [4, 1000])
def test_a_character_that_clean_would_have_removed_is_refused(
    letter: str, bases_before: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cleaning, "_BLOCK_BYTES", block_bytes)
    rows = large(["TTTT", "ACGTNN", "", f"{bases_before}{letter}ACG", "AR"])[1:]
    message = f"encode got {letter!r} at base {len(bases_before)} of row 2; it takes "
    with pytest.raises(InputError, match="^" + re.escape(message)):
        encode(rows, V2)


def test_a_null_is_refused():
    with pytest.raises(InputError, match=r"encode got a null at row 1; .*bioscan_jax\.clean"):
        encode(large(["ACGT", None]), V2)


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_published_vocabularies_are_the_published_files(family, tmp_path: Path):
    vocabulary = Vocabulary.published(family)
    assert vocabulary.sha256 == SHA256[family]
    assert len(vocabulary.tokens) == 4107
    path = tmp_path / "vocab.txt"
    for text in (vocabulary.text(), vocabulary.text() + "\n", vocabulary.text().replace("\n", "\r\n")):
        path.write_bytes(text.encode())
        read = Vocabulary.from_file(path)
        assert read.tokens == vocabulary.tokens
        assert read.text() == vocabulary.text()
        assert read.sha256 == SHA256[family]


def test_ids_of_the_published_vocabularies():
    for vocabulary, first_sixmer in ((V1, 4), (V2, 6)):
        assert (vocabulary.unk_id, vocabulary.pad_id, vocabulary.mask_id, vocabulary.cls_id) == (0, 1, 2, 3)
        assert sorted(vocabulary.sixmer_ids) == list(range(first_sixmer, first_sixmer + 4096))
        letters = vocabulary.letter_ids[[ord(letter) for letter in "ATCGN"]]
        assert letters.tolist() == list(range(first_sixmer + 4096, first_sixmer + 4101))
        assert np.count_nonzero(vocabulary.letter_ids >= 0) == 5


def test_ids_come_from_the_file_whatever_its_order(tmp_path: Path):
    tokens = list(np.random.default_rng(0).permutation(V2.tokens))
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(tokens))
    vocabulary = Vocabulary.from_file(path)
    value = "NACGTACGTTGCAANNGGGTTTCCCAAAT"
    assert as_lists(encode(large([value]), vocabulary)) == [esm_tokenizer(vocabulary)(value)["input_ids"]]


@pytest.mark.parametrize("token", ["<cls>", "<pad>", "<mask>", "<unk>", "N", "A", "ACGTAC"])
def test_a_vocabulary_that_lacks_a_token_is_refused(token: str, tmp_path: Path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(t for t in V2.tokens if t != token))
    with pytest.raises(InputError, match=re.escape(f"{path} lacks the token {token!r}")):
        Vocabulary.from_file(path)


@pytest.mark.parametrize("token", ["<cls>", "GGGGGG", "<eos>"])
def test_a_vocabulary_that_repeats_a_token_is_refused(token: str, tmp_path: Path):
    path = tmp_path / "vocab.txt"
    path.write_text(V2.text() + "\n" + token)
    with pytest.raises(InputError, match=re.escape(f"{path} has the token {token!r} twice")):
        Vocabulary.from_file(path)


@pytest.mark.parametrize("token", ["", "ACG", "NNNNNN", "ACGTACGT"])
def test_a_vocabulary_with_other_dna_tokens_is_refused(token: str, tmp_path: Path):
    path = tmp_path / "vocab.txt"
    path.write_text(f"{token}\n" + V2.text())
    with pytest.raises(InputError, match=re.escape(f"{path} has the token {token!r}, which is neither")):
        Vocabulary.from_file(path)


def test_a_vocabulary_that_cannot_be_read_is_refused(tmp_path: Path):
    missing = tmp_path / "none.txt"
    with pytest.raises(InputError, match=re.escape(f"cannot read the vocabulary {missing}")):
        Vocabulary.from_file(missing)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=re.escape(f"cannot read the vocabulary {binary}")):
        Vocabulary.from_file(binary)
