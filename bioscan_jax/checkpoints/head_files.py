"""Taxonomic heads as files: parameters in safetensors, and the label space that maps classes to taxa."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from flax import nnx

from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.checkpoints.keys import shard_array
from bioscan_jax.checkpoints.readers import list_file, read_rows
from bioscan_jax.checkpoints.writers import PendingTensor, write_safetensors
from bioscan_jax.devices.sharding import Layout, stored_shardings
from bioscan_jax.errors import InputError, shown
from bioscan_jax.model.classifier import dotted, named_arrays, with_arrays
from bioscan_jax.model.heads import HeadKind, IndependentHead, MarginalHead, TaxonTree, make_head
from bioscan_jax.model.metadata import MetadataEncoder
from bioscan_jax.model.pooling import Pooling

HEADS_FILE = "heads.safetensors"
LABELS_FILE = "label_space.json"
FORMAT = "bioscan_jax heads 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """Taxonomic heads: a classifier of vectors, an optional one of sample metadata, and their taxa."""

    kind: HeadKind
    pooling: Pooling
    """Pooling of the vectors that `head` classifies."""
    space: LabelSpace
    """The taxa of the classes."""
    head: IndependentHead | MarginalHead
    encoder: MetadataEncoder | None

    @property
    def tree(self) -> TaxonTree:
        """The taxon tree of the label space."""
        return taxon_tree(self.space)

    @property
    def hidden_size(self) -> int:
        """Width of the vectors that `head` classifies."""
        return _hidden_sizes(_shapes(nnx.state(_modules(self.head, None))))[0]

    @property
    def scale(self) -> float | None:
        """Factor of the cosines; None for heads of another kind."""
        return self.head.scale if isinstance(self.head, IndependentHead) else None

    @property
    def facts(self) -> dict[str, str]:
        """Entries for `bioscan_jax_export.json`."""
        return {"head": self.kind, "pooling": self.pooling, "labels_sha256": self.space.sha256}


def taxon_tree(space: LabelSpace) -> TaxonTree:
    """Builds the taxon tree of a label space."""
    return TaxonTree(tuple(map(len, space.names)), space.leaf_paths())


def write_heads(directory: Path, heads: Heads) -> None:
    """Writes `heads.safetensors` and `label_space.json`.

    Tensors are float32 and named by dotted path (`head.leaves.linear.kernel`); kernels are [inputs, classes].

    Raises:
        ValueError: The heads do not match their label space or kind.
    """
    state = nnx.state(_modules(heads.head, heads.encoder))
    arrays = {name: np.asarray(array) for name, array in named_arrays(state).items()}
    hidden_sizes = _hidden_sizes({name: array.shape for name, array in arrays.items()})
    expected = _shapes(nnx.state(_abstract(heads.kind, heads.scale or 1.0, heads.space, *hidden_sizes)))
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise ValueError("the heads do not match their kind or label space")
    metadata = {
        "content": FORMAT,
        "kind": heads.kind,
        "pooling": heads.pooling,
        "label_space_sha256": heads.space.sha256,
    }
    if heads.scale is not None:
        metadata["scale"] = repr(heads.scale)
    tensors = [PendingTensor.from_array(name, arrays[name]) for name in sorted(arrays)]
    write_safetensors(directory / HEADS_FILE, tensors, metadata)
    heads.space.save(directory / LABELS_FILE)


def read_heads(directory: Path, layout: Layout) -> Heads:
    """Reads the files of `write_heads` onto the mesh.

    Raises:
        InputError: A file is missing or damaged, or the heads belong to another label space.
    """
    path = directory / HEADS_FILE
    if not path.is_file():
        raise InputError(f"{directory} has no {HEADS_FILE}; pass the directory of an export with taxonomic heads")
    space = LabelSpace.load(directory / LABELS_FILE)
    stored = {tensor.name: tensor for tensor in list_file(path)}
    metadata = _read_metadata(path)
    if metadata["label_space_sha256"] != space.sha256:
        raise InputError(
            f"{path} is for the label space {shown(metadata['label_space_sha256'][:12])[1:-1]}, but {directory / LABELS_FILE} is "
            f"{space.sha256[:12]}; copy both from the same export"
        )
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    try:
        modules = _abstract(metadata["kind"], _scale(metadata.get("scale", "1")), space, *_hidden_sizes(shapes))
    except ValueError as error:
        raise InputError(f"{path}: {error}; export again") from None
    graph, state = nnx.split(modules)
    expected = _shapes(state)
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name) or stored[name].dtype != np.float32:
            raise InputError(
                f"{path}: {shown(name, 200)[1:-1]} has shape {shapes.get(name)}, the label space needs {expected.get(name)} (float32); export again"
            )
    shardings = {dotted(path): sharding for path, sharding in stored_shardings(state, layout).items()}
    arrays = {name: shard_array(read_rows(stored[name]), sharding) for name, sharding in shardings.items()}
    found = nnx.merge(graph, with_arrays(state, arrays))
    return Heads(
        kind=metadata["kind"],
        pooling=metadata["pooling"],
        space=space,
        head=found["head"],
        encoder=found.get("encoder"),
    )


def _read_metadata(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as opened:
        metadata = opened.metadata() or {}
    known = metadata.get("kind") in get_args(HeadKind) and metadata.get("pooling") in get_args(Pooling)
    known &= (metadata.get("kind") == "cosine") == ("scale" in metadata)
    if metadata.get("content") != FORMAT or not known or "label_space_sha256" not in metadata:
        raise InputError(f"{path}: made by another version of bioscan_jax, or by another program; export again")
    return metadata


def _scale(text: str) -> float:
    """Returns the factor of the cosines that a file states.

    Raises:
        ValueError: It is no number above 0.
    """
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"the scale {shown(text)} is no number above 0")
    return scale


def _modules(head: IndependentHead | MarginalHead, encoder: MetadataEncoder | None) -> nnx.Dict:
    return nnx.Dict({"head": head} if encoder is None else {"head": head, "encoder": encoder})


def _abstract(kind: HeadKind, scale: float, space: LabelSpace, hidden_size: int, encoder_size: int | None) -> nnx.Dict:
    """Builds the modules with shapes in place of arrays."""
    tree = taxon_tree(space)

    def build() -> nnx.Dict:
        rngs, encoder = nnx.Rngs(0), None
        head = make_head(kind, hidden_size, tree, rngs=rngs, scale=scale)
        if encoder_size is not None:
            encoder = MetadataEncoder(kind, tree, rngs=rngs, hidden_size=encoder_size, scale=scale)
        return _modules(head, encoder)

    return nnx.eval_shape(build)


def _hidden_sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int | None]:
    """Returns the input width of the head, and the width of the metadata encoder's hidden layers if there is one."""
    kernels = sorted(name for name in shapes if name.startswith("head.") and name.endswith(".kernel"))
    if not kernels:
        raise ValueError("it holds no kernel of a head")
    second = shapes.get("encoder.second.kernel")
    return shapes[kernels[0]][0], None if second is None else second[0]


def _shapes(state: nnx.State) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in named_arrays(state).items()}
