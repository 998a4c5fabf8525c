"""Writes and reads the facts of an exported directory: `bioscan_jax_export.json`, and a model card for people."""

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bioscan_jax.checkpoints.head_files import Heads
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.errors import InputError, one_line, shown

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

FACTS_FILE = "bioscan_jax_export.json"
FORMAT = 1
_MOST_FILES = 20

_ADAPTER = """\
# LoRA adapter for DNA barcodes

A low-rank adapter of {model}, in PEFT's format. It needs those weights.

In PyTorch, with `model` an `EsmForMaskedLM` that holds the weights of {model} (for a v2 model: with the code published
with them):

    from peft import PeftModel
    model = PeftModel.from_pretrained(model, "DIRECTORY_OF_THIS_FILE")

The tensors are named as in `EsmForMaskedLM`; PEFT refuses to put them on an `EsmModel` (which `AutoModel` and
`AutoPeftModel` make). In JAX:

    import bioscan_jax as bj
    vectors = bj.load("DIRECTORY_OF_THIS_FILE").encode(barcodes)

or `bioscan embed --model.checkpoint {checkpoint} --model.adapter DIRECTORY_OF_THIS_FILE ...`.
"""
_MERGED = """\
# Nucleotide Transformer for DNA barcodes

The weights of {model} with a trained adapter merged in, named as in the published checkpoints. In JAX:

    import bioscan_jax as bj
    vectors = bj.load("DIRECTORY_OF_THIS_FILE").encode(barcodes)

or `bioscan embed --model.checkpoint DIRECTORY_OF_THIS_FILE ...`.

In PyTorch, for a v1 model: `transformers.EsmForMaskedLM.from_pretrained("DIRECTORY_OF_THIS_FILE")`; v2 models are not
part of transformers and need the code published with the weights of {model}.
"""
_PROJECTION = """\
# Projection for the vectors of DNA barcodes

From the pooled vectors of {model} to vectors of length 1 in which barcodes of one genus are near each other. It needs
that model:

    import bioscan_jax as bj
    vectors = bj.load({model!r}, adapter={adapter!r}, projection="DIRECTORY_OF_THIS_FILE").encode(barcodes)

or `bioscan embed --model.checkpoint {checkpoint} --model.projection DIRECTORY_OF_THIS_FILE ...`.
"""
_ONNX = """\
# DNA barcodes to vectors, in ONNX

The model {model} with its pooling and projection as one graph, in float32. `run_onnx.py` needs numpy and onnxruntime
alone; it says how DNA becomes token ids, for runners in other languages:

    python run_onnx.py barcodes.fasta vectors.npy
"""
_USAGE = {"adapter": _ADAPTER, "merged": _MERGED, "projection": _PROJECTION, "onnx": _ONNX}
_LIBRARIES = {"adapter": "peft", "merged": "transformers", "projection": "bioscan_jax", "onnx": "onnx"}
_HUB_LICENSES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "cc0-1.0"),
        *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0"),
    }
)
"""Licences that the hub knows by these identifiers; the card names others as `license_name`."""
_HEADS = """
`heads.safetensors` holds the taxonomic heads, kernels as [inputs, classes] with classes padded to a multiple of 128;
`label_space.json` maps classes to taxa (`bioscan_jax.checkpoints.head_files.read_heads` reads both).
"""


def write_facts(
    directory: Path,
    kind: Literal["adapter", "merged", "projection", "onnx"],
    provenance: Provenance,
    facts: Mapping[str, Any],
    *,
    heads: Heads | None = None,
    note: str = "",
) -> None:
    """Writes `bioscan_jax_export.json` and the model card `README.md`.

    Args:
        directory: Receives the files.
        kind: Type of export.
        provenance: Of the base weights.
        facts: Further entries; plain JSON values. The card shows `data` (what it was trained on) and `figures` (what it
            reached) as tables, each a mapping from a name to a value.
        heads: Taxonomic heads in the directory.
        note: A paragraph for the card.

    Raises:
        ValueError: `facts` has a key that is always written.
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
    _card(provenance, record, heads=heads is not None, note=note).save(directory / "README.md")


def read_facts(directory: Path) -> dict[str, Any] | None:
    """Reads the facts written by `write_facts`; None if another program made the directory.

    Raises:
        InputError: The file is damaged or has another version.
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
        raise InputError(f"{path}: damaged ({one_line(error)}); export again") from None
    if version != FORMAT:
        raise InputError(f"{path}: has format {shown(version)}, this library reads {FORMAT}; export again")
    return facts


def trained_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the facts of an export say of its training, which other forms of that model pass on."""
    kept = ("objective", "which", "step", "data", "figures", "run")
    return {name: facts[name] for name in kept if name in facts}


def data_facts(files: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns what a card says of input files: their names, rows and contents, not where they lay.

    Args:
        files: From `ParquetBlocks.fingerprint`, as runs and tables record it.
    """
    if len(files) > _MOST_FILES:
        return {"files": f"{len(files):,}", "rows": f"{sum(one['rows'] for one in files):,}"}
    return {f"file {one['name']}": f"{one['rows']:,} rows, sha256 {one['footer_sha256'][:12]}" for one in files}


def _card(provenance: Provenance, record: Mapping[str, Any], *, heads: bool, note: str) -> "ModelCard":
    from huggingface_hub import ModelCard, ModelCardData

    license = provenance.license and provenance.license.lower()
    front = ModelCardData(
        library_name=_LIBRARIES[record["kind"]],
        license=license if license in _HUB_LICENSES else license and "other",
        license_name=None if license in _HUB_LICENSES else license,
        base_model=None if provenance.revision is None else provenance.model,
        tags=["dna", "barcoding", "biology", "bioscan_jax"],
    )
    revision = "" if provenance.revision is None else f" --model.revision {provenance.revision}"
    licence = (
        f"Derived from the weights of {provenance.model}; their licence ({provenance.license}) applies."
        if provenance.license is not None
        else f"Derived from {provenance.model}, which names no licence; ask its authors before passing this on."
    )
    usage = _USAGE[record["kind"]].format(
        model=provenance.model, checkpoint=provenance.model + revision, adapter=provenance.adapter
    )
    parts = [
        usage + (_HEADS if heads else ""),
        *([f"{note}\n"] if note else []),
        "## Data\n\n" + _table(record.get("data"), "What it was trained on was not recorded."),
        "## Figures\n\n" + _table(record.get("figures"), "None were recorded."),
        f"## Licence\n\n{licence}\n",
        "## Facts\n\n" + textwrap.indent(json.dumps(record, indent=2), " " * 4) + "\n",
    ]
    return ModelCard(f"---\n{front.to_yaml()}\n---\n\n" + "\n".join(parts))


def _table(values: Mapping[str, Any] | None, otherwise: str) -> str:
    """Returns names and values as a Markdown table."""
    rows = [
        f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |"
        for name, value in (values or {}).items()
    ]
    return "\n".join(["| | |", "|---|---|", *rows, ""]) if rows else f"{otherwise}\n"
