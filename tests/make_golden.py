"""Writes tests/golden: small checkpoints made by PyTorch and what PyTorch and transformers compute with them.

Needs the `parity` extra. The default test run reads the files, and so compares with PyTorch without installing it.

    python tests/make_golden.py
"""

import json
import shutil
import sys

import numpy as np
from support.golden import LOGIT_STEP, golden_config, make_tokenizer, reference_outputs
from support.places import GOLDEN, SCRIPTS

from bioscan_jax.barcodes.tokenizer import Vocabulary

SEQUENCES = ("ACGTACGTTGCAACGTACNNACGTACGATTTGCATGCAAA", "ACGTAC", "TTGANCA", "GATTACAGATTACAGATTACAGATTACAGG", "A")


def main() -> None:
    sys.path.append(str(SCRIPTS))  # for benchmarks.peers
    from support.torch_models import save_checkpoint, torch_model
    from transformers import EsmTokenizer

    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    make_tokenizer(GOLDEN)
    for family, form in (("v1", "bin"), ("v2", "safetensors")):
        config, directory = golden_config(family), GOLDEN / family
        model = torch_model(config)
        save_checkpoint(model, config, directory, form)
        (directory / "vocab.txt").write_text(Vocabulary.published(family).text())
        tokenizer = EsmTokenizer(str(directory / "vocab.txt"), eos_token=None)
        ids = np.array(tokenizer(list(SEQUENCES), padding=True)["input_ids"])
        outputs = reference_outputs(model, ids, config.pad_token_id)
        outputs["logits"] = outputs["logits"][:, :, ::LOGIT_STEP]
        np.savez_compressed(directory / "outputs.npz", ids=ids, **outputs)
        (directory / "sequences.json").write_text(json.dumps(SEQUENCES) + "\n")


if __name__ == "__main__":
    main()
