"""Opens the barcodes to identify, and embeds them with the model and settings that made a table."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from bioscan_jax import config
from bioscan_jax.checkpoints.load import LoadedModel, load_weights, recorded_model
from bioscan_jax.data.encode import EncodedBlock
from bioscan_jax.data.parquet import ParquetBlocks, check_unique_ids, open_source
from bioscan_jax.devices.sharding import make_layout, start_devices
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.errors import InputError
from bioscan_jax.matching.reference import Reference

_BLOCK_ROWS = 4096


def encoder_of_table(
    reference: Reference, model: config.ModelConfig | None, mesh: config.MeshConfig | None = None
) -> Encoder:
    """Loads the model that made a table's vectors, with the settings that made them, and checks its identity.

    Args:
        reference: The table.
        model: Where model and adapter are now, if not where the table says.
        mesh: Devices.

    Raises:
        InputError: The model cannot be loaded, or is not the table's.
    """
    mesh = mesh or config.MeshConfig()
    facts, plan = reference.facts, reference.plan
    recorded = recorded_model(facts)
    if model is not None:
        dtype = recorded.dtype if model.dtype == "auto" else model.dtype
        projection = recorded.projection if model.projection == "auto" else model.projection
        model = dataclasses.replace(model, dtype=dtype, projection=projection)
    start_devices(mesh)
    try:
        loaded = load_weights(model or recorded, make_layout(mesh))
    except InputError as error:
        if model is not None:
            raise
        raise InputError(
            f"{error} (the vectors of {reference.dataset.uri} were made by {facts['model']!r}"
            f"{' with adapter ' + repr(facts['adapter']) if 'adapter' in facts else ''}"
            f"{' and projection ' + repr(facts['projection']) if 'projection' in facts else ''}; pass where it is now "
            "as --model.checkpoint, with --model.adapter and --model.projection if there were any)"
        ) from error
    _check_same(loaded, plan["model"], reference)
    settings = {name: plan["embed"][name] for name in ("pooling", "layer", "strand", "phases")}
    return Encoder(
        loaded=loaded,
        settings=config.EmbedConfig(**settings),
        max_tokens=plan["data"]["max_tokens"],
        overlong=plan["data"]["overlong"],
        wanted=model or recorded,
    )


def _check_same(loaded: LoadedModel, wanted: dict[str, Any], reference: Reference) -> None:
    found = {
        "weights_sha256": loaded.provenance.weights_sha256,
        "adapter_sha256": loaded.provenance.adapter_sha256,
        "vocabulary_sha256": loaded.vocabulary.sha256,
        "dtype": loaded.provenance.dtype,
        "projection_sha256": None if loaded.projection is None else loaded.projection.sha256,
    }
    different = [name for name, value in found.items() if wanted.get(name) != value]
    if different:
        listed = ", ".join(f"{name} {_short(wanted.get(name))} is {_short(found[name])} here" for name in different)
        raise InputError(
            f"{reference.dataset.uri} was made by another model ({listed}); its vectors are those of "
            f"{reference.facts['model']!r}: pass that one as --model.checkpoint, its adapter as --model.adapter "
            "and its projection as --model.projection"
        )


def _short(value: str | None) -> str:
    return "none" if value is None else value[:12]


@contextmanager
def _as_query_flags() -> Iterator[None]:
    """Replaces the --data flags, which messages about input name, by those of queries."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--data.", "--query.")) from error


def open_queries(query: config.QueryConfig, scratch: Path) -> ParquetBlocks:
    """Opens the barcodes to identify.

    Args:
        query: Where they are.
        scratch: Directory for the Parquet form of FASTA.

    Raises:
        InputError: There is nothing to read, or a column is missing.
    """
    data = config.DataConfig(
        path=query.path,
        sequence_column=query.sequence_column,
        id_column=query.id_column,
        id=query.id,
        block_rows=_BLOCK_ROWS,
    )
    with _as_query_flags():
        return open_source(data, scratch=scratch)


def check_query_ids(source: ParquetBlocks) -> None:
    """Checks that no two queries have the same id.

    Raises:
        InputError: Two have, or one has none.
    """
    with _as_query_flags():
        check_unique_ids(source)


def encode_queries(
    encoder: Encoder, source: ParquetBlocks
) -> Iterator[tuple[EncodedBlock, Float32[np.ndarray, "kept hidden"]]]:
    """Embeds the queries block by block.

    Args:
        encoder: From `encoder_of_table`.
        source: From `open_queries`.

    Raises:
        InputError: A value cannot be read.
    """
    with _as_query_flags():
        encoding = encoder.encoding(encoder.settings, source.sequence_column)
        yield from encoder.encode_blocks(source, encoding, encoder.settings)
