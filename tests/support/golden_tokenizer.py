"""Makes golden/tokenizer.json: token ids as transformers.EsmTokenizer gives them."""

import json
import random
import tempfile
from pathlib import Path

from bioscan_jax.barcodes.tokenizer import Vocabulary

BY_HAND = ["", "A", "N", "ACGTA", "ACGTAC", "ACGTACG", "NACGTAC", "ACGTACN", "NN", "ACGNNTACGTACGTNACGTACGTACGTACG"]


def make(directory: Path) -> None:
    """Writes tokenizer.json with sequences and, for each published vocabulary, its digest and the ids."""
    from transformers import EsmTokenizer

    rng = random.Random(0)
    drawn = ["".join(rng.choices("ACGTN", (9, 9, 9, 9, 1), k=length)) for length in (36, 59, 130)]
    golden: dict = {"sequences": BY_HAND + drawn}
    for family in ("v1", "v2"):
        vocabulary = Vocabulary.published(family)
        with tempfile.TemporaryDirectory() as folder:
            vocab_file = Path(folder) / "vocab.txt"
            vocab_file.write_text(vocabulary.text(), encoding="utf-8")
            tokenizer = EsmTokenizer(str(vocab_file), eos_token=None)
            ids = [tokenizer(sequence)["input_ids"] for sequence in golden["sequences"]]
        golden[family] = {"vocabulary_sha256": vocabulary.sha256, "ids": ids}
    (directory / "tokenizer.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
