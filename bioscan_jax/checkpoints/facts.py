"""What is known of an exported directory, for machines (JSON) and for people (a model card)."""

import dataclasses
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from bioscan_jax.checkpoints.converted import Provenance
from bioscan_jax.checkpoints.head_files import Heads
from bioscan_jax.errors import InputError

FACTS_FILE = "bioscan_jax_export.json"
FORMAT = 1

_ADAPTER = """\
# LoRA adapter for DNA barcodes

A low-rank adapter of {model}, in PEFT's own format. Without those weights it does nothing.

In PyTorch, `model` being an `EsmForMaskedLM` with the weights of {model} (of a v2 model: with the code published
beside them):

    from peft import PeftModel
    model = PeftModel.from_pretrained(model, "DIRECTORY_OF_THIS_FILE")

The tensors are named as in `EsmForMaskedLM`, so `EsmModel` alone (what `AutoModel` and `AutoPeftModel` make) is refused
by PEFT. In JAX:

    python scripts/embed.py --model.checkpoint {checkpoint} --model.adapter DIRECTORY_OF_THIS_FILE ...
"""
_MERGED = """\
# Nucleotide Transformer for DNA barcodes

The weights of {model} with what was trained on them merged in, under the names of the published checkpoints. In JAX:

    python scripts/embed.py --model.checkpoint DIRECTORY_OF_THIS_FILE ...

In PyTorch, of a v1 model: `transformers.EsmForMaskedLM.from_pretrained("DIRECTORY_OF_THIS_FILE")`; transformers has no
v2 models of its own, they need the code published beside the weights of {model}.
"""
_HEADS = """
`heads.safetensors` holds the taxonomic heads, kernels as [inputs, classes] with classes padded to a multiple of 128;
`label_space.json` says which class is which taxon (`bioscan_jax.checkpoints.head_files.read_heads` reads both).
"""
_LICENSE = """
## Licence

{licence}
"""


def write_facts(
    directory: Path,
    kind: Literal["adapter", "merged"],
    provenance: Provenance,
    facts: Mapping[str, Any],
    *,
    heads: Heads | None,
    note: str = "",
) -> None:
    """Writes `bioscan_jax_export.json` and the model card `README.md`.

    Args:
        directory: Takes the files.
        kind: What the directory is.
        provenance: Of the weights the export is made from.
        facts: Anything else worth keeping; plain JSON values.
        heads: Those in the directory.
        note: A paragraph for the card.

    Raises:
        ValueError: `facts` has a name that is written in any case.
    """
    record = {
        "format": FORMAT,
        "kind": kind,
        "library_version": metadata.version("bioscan_jax"),
        "base": dataclasses.asdict(provenance),
        **({} if heads is None else heads.facts),
    }
    if taken := record.keys() & facts.keys():
        raise ValueError(f"facts has {sorted(taken)}, which the export writes itself")
    record |= facts
    (directory / FACTS_FILE).write_text(json.dumps(record, indent=2) + "\n")
    (directory / "README.md").write_text(_card(provenance, record, heads=heads is not None, note=note))


def read_facts(directory: Path) -> dict[str, Any] | None:
    """What `write_facts` kept; None where another program made the directory.

    Raises:
        InputError: The file is damaged or of another version.
    """
    path = directory / FACTS_FILE
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text())
        version, base = facts["format"], facts["base"]
        if version == FORMAT and not isinstance(base["weights_sha256"] + base["model"], str):
            raise TypeError("base is not text")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error!r}); export again") from None
    if version != FORMAT:
        raise InputError(f"{path}: has format {version!r}, this library reads {FORMAT}; export again")
    return facts


def _card(provenance: Provenance, record: Mapping[str, Any], *, heads: bool, note: str) -> str:
    kind = record["kind"]
    front = {"library_name": "peft" if kind == "adapter" else "transformers", "tags": "[dna, barcoding, biology]"}
    if provenance.license is not None:
        front["license"] = provenance.license
    if provenance.revision is not None:
        front["base_model"] = provenance.model
    lines = ["---", *(f"{key}: {value}" for key, value in sorted(front.items())), "---", ""]
    revision = "" if provenance.revision is None else f" --model.revision {provenance.revision}"
    checkpoint = provenance.model + revision
    text = {"adapter": _ADAPTER, "merged": _MERGED}[kind].format(model=provenance.model, checkpoint=checkpoint)
    if heads:
        text += _HEADS
    if note:
        text += f"\n{note}\n"
    licence = (
        f"This is made from the weights of {provenance.model}, whose licence ({provenance.license}) holds for it."
        if provenance.license is not None
        else f"This is made from {provenance.model}, which names no licence; ask its maker before passing this on."
    )
    rows = "".join(f"    {line}\n" for line in json.dumps(record, indent=2).splitlines())
    return "\n".join(lines) + text + _LICENSE.format(licence=licence) + f"\n## Facts\n\n{rows}"
