"""The object that turns sequences into vectors; every command that needs vectors is built on it."""

import dataclasses
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jax.typing import DTypeLike
from jaxtyping import Float, Float32

from bioscan_jax.barcodes.cleaning import REASONS
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.head_files import HEADS_FILE, Heads
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.load import LoadedModel
from bioscan_jax.checkpoints.push import push_to_hub
from bioscan_jax.checkpoints.save import save_model
from bioscan_jax.config import DataConfig, EmbedConfig, ModelConfig, check_value
from bioscan_jax.data.encode import EncodedBlock, Encoding, check_finite, encode_block, reject_not_finite
from bioscan_jax.data.in_memory import COLUMN, Sequences, SequencesInMemory, as_column
from bioscan_jax.devices.sharding import Layout
from bioscan_jax.embedding.block_encoder import BlockEncoder
from bioscan_jax.embedding.dispatch import Dispatcher
from bioscan_jax.embedding.hidden_states import HiddenStates
from bioscan_jax.embedding.predict import HeadPredictor
from bioscan_jax.embedding.repeats import VectorCache, Window, window_blocks
from bioscan_jax.embedding.sample import SAMPLED_ROWS, Blocks, Sample, sample_blocks
from bioscan_jax.embedding.step import CompiledSteps, CountingSteps, Projector, can_count_tokens
from bioscan_jax.embedding.to_onnx import write_onnx
from bioscan_jax.errors import InputError, logger
from bioscan_jax.location import output_directory
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.pooling import Pooling
from bioscan_jax.model.projection import Projection
from bioscan_jax.model.transformer import NucleotideTransformer, first_layers
from bioscan_jax.notebook import progress_bar
from bioscan_jax.table.columns import check_values

MOST_SHAPES = 64
"""From so many compiled shapes on, calls take theirs from a fixed set alone, so that their number stays bounded."""
_BLOCKS_AHEAD = 1
_VECTOR_SETTINGS = ("pooling", "layer", "strand", "phases")

Overlong = Literal["truncate", "window", "error"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamBlock:
    r"""Consecutive rows of a file with their vectors; unpacks as `rows, vectors`.

    Example:
        >>> import bioscan_jax as bj
        >>> from pathlib import Path
        >>> _ = Path("barcodes.fasta").write_text(">a\nACGTTGCAACGT\n>b\nTTGACATTGACA\n")
        >>> block = next(bj.load("random:tiny-v2").encode_stream("barcodes.fasta"))
        >>> block.rows["sequence_id"].to_pylist(), block.vectors.shape, block.rejects.num_rows
        (['a', 'b'], (2, 64), 0)
    """

    rows: pa.Table
    """The rows that have a vector: sequence_id and the file's other columns."""
    vectors: Float[np.ndarray, "rows d"]
    rejects: pa.Table
    """The rows that have none: sequence_id, source_row, reason, detail, sequence."""

    def __iter__(self) -> Iterator[Any]:
        """Yields the rows, then the vectors."""
        return iter((self.rows, self.vectors))


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """A model that turns DNA into vectors; made by `bioscan_jax.load`.

    Example:
        >>> import bioscan_jax as bj
        >>> model = bj.load("random:tiny-v2")
        >>> vectors = model.encode(["ACGTTGCA" * 20, "TTGACA" * 30], normalize=True)
        >>> vectors.shape, vectors.dtype
        ((2, 64), dtype('float32'))
        >>> model.similarity(vectors, vectors).shape
        (2, 2)
    """

    loaded: LoadedModel
    settings: EmbedConfig = EmbedConfig()
    """Used where a call does not say otherwise."""
    max_tokens: int | None = None
    """Longest token row, CLS included, where a call does not say otherwise; None for the model's limit."""
    overlong: Overlong = "truncate"
    """What happens to longer sequences, where a call does not say otherwise."""
    heads: Heads | None = None
    """Taxonomic heads, for `predict`."""
    wanted: ModelConfig | None = None
    """Where the weights came from, for `save_pretrained`."""
    make_steps: Callable[[NucleotideTransformer, Layout, EmbedConfig], CompiledSteps] = CompiledSteps
    """Compiles the step; replaced where only what surrounds the model is measured."""
    _steps: dict[tuple[str, int], CompiledSteps] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Makes what the projection was fitted on the default of all calls."""
        if self.projection is not None:
            inputs = self.projection.inputs
            needed = {name: getattr(inputs, name) for name in _VECTOR_SETTINGS}
            object.__setattr__(self, "settings", dataclasses.replace(self.settings, **needed))
            object.__setattr__(self, "max_tokens", inputs.max_tokens)
            object.__setattr__(self, "overlong", inputs.overlong)

    @property
    def projection(self) -> Projection | None:
        """From pooled vectors to those that are returned; None for a model without one."""
        return self.loaded.projection

    @property
    def config(self) -> TransformerConfig:
        """The architecture."""
        return self.loaded.config

    @property
    def layout(self) -> Layout:
        """The devices, and how arrays are laid over them."""
        return self.loaded.layout

    @property
    def vocabulary(self) -> Vocabulary:
        """The token ids."""
        return self.loaded.vocabulary

    @property
    def provenance(self) -> Provenance:
        """Which weights these are; waits until their files are hashed."""
        return self.loaded.provenance

    @property
    def dimension(self) -> int:
        """Numbers per vector; the projection's, if there is one."""
        return self.loaded.config.hidden_size if self.projection is None else self.projection.dimension

    def encode(
        self,
        sequences: Sequences,
        *,
        pooling: Pooling | None = None,
        layer: int | None = None,
        strand: Literal["forward", "both"] | None = None,
        phases: int | None = None,
        max_tokens: int | None = None,
        overlong: Overlong | None = None,
        batch_tokens: int | None = None,
        block_rows: int = DataConfig.block_rows,
        deduplicate: bool | None = None,
        project: bool = True,
        normalize: bool = False,
        dtype: DTypeLike = "float32",
        on_error: Literal["raise", "nan"] = "raise",
        progress: bool = False,
    ) -> Float[np.ndarray, "*n d"]:
        """Embeds DNA sequences.

        The vectors are, to the last bit, those that `embed` writes into a table for the same sequences in the same
        order with the same settings on the same single device. Other batch shapes, which follow from the sequences of
        a call, change them by rounding alone.

        Args:
            sequences: A string, or a list, tuple, numpy array, Arrow column or pandas Series of strings.
            pooling: `mean` (CLS counts, as in the model card), `mean_no_cls`, `cls` or `max` over tokens.
            layer: Hidden state to pool: 0 the embeddings, k after layer k, -1 after the final LayerNorm.
            strand: `both` averages a sequence and its reverse complement.
            phases: Average over so many start offsets (1 to 6) of the 6-mer frame.
            max_tokens: Longest token row, CLS included; at most the model's limit.
            overlong: A longer sequence is cut (`truncate`), embedded in windows (`window`) or an error (`error`).
            batch_tokens: Tokens per device in one batch, padding included.
            block_rows: Sequences tokenised and batched together.
            deduplicate: Embed a repeated sequence once.
            project: Apply the model's projection, where it has one; the settings must be those it was fitted on. False
                returns raw vectors.
            normalize: Scale each vector to length 1.
            dtype: Of the result.
            on_error: `raise` at a sequence without a vector (None, empty, not DNA), or return a row of NaN for it.
            progress: Show a bar on the terminal.

        Returns:
            One vector per sequence, in order; a single vector for a string.

        Raises:
            InputError: A ValueError that names the position of the first sequence that has no vector, or a setting
                does not fit the model.

        Example:
            >>> import bioscan_jax as bj
            >>> model = bj.load("random:tiny-v2")
            >>> model.encode("ACGTTGCA" * 20, strand="both", phases=6).shape
            (64,)
            >>> model.encode(["ACGTTGCA" * 20, None], on_error="nan")[1, :2]
            array([nan, nan], dtype=float32)
        """
        embed = self._settings(
            project,
            max_tokens,
            overlong,
            pooling=pooling,
            layer=layer,
            strand=strand,
            phases=phases,
            batch_tokens=batch_tokens,
            deduplicate=deduplicate,
        )
        check_value("on_error", on_error, Literal["raise", "nan"])
        column = as_column([sequences] if isinstance(sequences, str) else sequences)
        encoding = self.encoding(embed, COLUMN, max_tokens=max_tokens, overlong=overlong)
        width = self.dimension if project else self.config.hidden_size
        vectors = np.full((len(column), width), np.nan, np.dtype(dtype))
        source = SequencesInMemory(column, block_rows)
        with progress_bar(total=len(column), unit="seq", desc="encode", disable=not progress) as bar:
            for encoded, found in self.encode_blocks(
                source,
                encoding,
                embed,
                project=project,
                check=_refuse_rejects if on_error == "raise" else lambda block: None,
            ):
                found = unit(found) if normalize else found
                vectors[encoded.kept + encoded.block.first_row] = found
                bar.update(encoded.block.table.num_rows)
        return vectors[0] if isinstance(sequences, str) else vectors

    def encode_stream(
        self,
        path: str,
        *,
        sequence_column: str = DataConfig.sequence_column,
        id_column: str = DataConfig.id_column,
        pooling: Pooling | None = None,
        layer: int | None = None,
        strand: Literal["forward", "both"] | None = None,
        phases: int | None = None,
        max_tokens: int | None = None,
        overlong: Overlong | None = None,
        batch_tokens: int | None = None,
        block_rows: int = DataConfig.block_rows,
        deduplicate: bool | None = None,
        project: bool = True,
        normalize: bool = False,
        dtype: DTypeLike = "float32",
        on_error: Literal["reject", "raise"] = "reject",
        progress: bool = False,
    ) -> Iterator[StreamBlock]:
        """Embeds the sequences of files block by block, in bounded memory.

        Args:
            path: Parquet, FASTA or FASTQ (plain or gzipped): a file, a directory, a glob or an fsspec URL.
            sequence_column: Parquet column with the DNA.
            id_column: Parquet column with unique ids; where there is no `sequence_id`, ids are FILE:ROW.
            pooling: As for `encode`, like those that follow.
            layer: Hidden state to pool.
            strand: `forward` or `both`.
            phases: Start offsets to average over.
            max_tokens: Longest token row.
            overlong: What happens to longer sequences.
            batch_tokens: Tokens per device in one batch.
            block_rows: Rows per block.
            deduplicate: Embed a repeated sequence once.
            project: Apply the model's projection.
            normalize: Scale each vector to length 1.
            dtype: Of the vectors.
            on_error: Rows without a vector (null, empty, not DNA) are in the `rejects` of their block, and a warning at
                the end counts them (`reject`); or the first one is an error (`raise`).
            progress: Show a bar on the terminal.

        Yields:
            One block per `block_rows` rows: `for rows, vectors in ...`, or use its `rows`, `vectors` and `rejects`.

        Raises:
            InputError: The files cannot be read, a setting does not fit the model, or a row has no vector.
        """
        import tempfile

        from bioscan_jax.data.parquet import open_source

        embed = self._settings(
            project,
            max_tokens,
            overlong,
            pooling=pooling,
            layer=layer,
            strand=strand,
            phases=phases,
            batch_tokens=batch_tokens,
            deduplicate=deduplicate,
        )
        check_value("on_error", on_error, Literal["reject", "raise"])
        data = DataConfig(path=path, sequence_column=sequence_column, id_column=id_column, block_rows=block_rows)
        rejected: Counter[str] = Counter()
        with tempfile.TemporaryDirectory(prefix="bioscan_jax-") as scratch:
            source = open_source(data, scratch=Path(scratch))
            encoding = self.encoding(embed, source.sequence_column, max_tokens=max_tokens, overlong=overlong)
            check = _refuse_rejects if on_error == "raise" else lambda block: None
            with progress_bar(total=source.rows, unit="row", desc="encode", disable=not progress) as bar:
                for encoded, vectors in self.encode_blocks(source, encoding, embed, project=project, check=check):
                    rejected.update(encoded.counts.rejects)
                    yield StreamBlock(
                        rows=encoded.block.table.take(pa.array(encoded.kept)),
                        vectors=(unit(vectors) if normalize else vectors).astype(np.dtype(dtype), copy=False),
                        rejects=encoded.rejects,
                    )
                    bar.update(encoded.block.table.num_rows)
        if rejected:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items()))
            logger.warning(
                "%s: %s of %s rows have no vector (%s); they are in the rejects of their blocks",
                path,
                rejected.total(),
                source.rows,
                reasons,
            )

    def encode_blocks(
        self,
        source: Blocks,
        encoding: Encoding,
        embed: EmbedConfig,
        *,
        project: bool = True,
        check: Callable[[EncodedBlock], object] = lambda block: None,
        blocks: BlockEncoder | None = None,
    ) -> Iterator[tuple[EncodedBlock, Float32[np.ndarray, "kept d"]]]:
        """Embeds blocks of rows in order; one is on the devices while the next one is tokenised.

        Args:
            source: The blocks.
            encoding: From `encoding`.
            embed: The same settings as it was made from.
            project: Apply the projection, if there is one; `embed` must be what it was fitted on.
            check: Called with each block before it is computed.
            blocks: From `block_encoder`, of this or a similar input; made if absent.

        Yields:
            Each block, and one vector per row that was kept.

        Raises:
            InputError: A value cannot be read, or too many vectors are not finite.
        """
        if not len(source):
            return
        blocks = blocks or self.block_encoder(source, encoding, embed, project=project)
        remembered = window_blocks(embed, source.block_rows)
        window, cache, started = Window(remembered), VectorCache(remembered), deque()
        dtype, bad_rows, rows = np.dtype(np.float32), 0, 0

        def finished() -> tuple[EncodedBlock, Float32[np.ndarray, "kept d"]]:
            nonlocal bad_rows, rows
            prepared, results, futures = started.popleft()
            for future in futures:
                future.result()
            fresh = blocks.vectors(results, prepared.views, range(prepared.fresh), prepared.fresh)
            encoded = prepared.encoded
            vectors = cache.complete(prepared, fresh)[encoded.sequence_of]
            bad = np.atleast_1d(~np.isfinite(vectors).all(axis=1))
            rows += len(bad)
            if bad.any():
                bad_rows += int(bad.sum())
                name = source.locate(encoded.block.first_row + int(encoded.kept[bad][0]))
                check_finite(bad_rows, rows, name, dtype)
                encoded, vectors = reject_not_finite(encoded, bad, dtype, encoding.sequence_column), vectors[~bad]
                check(encoded)
            return encoded, vectors

        with blocks.memory_errors(), Dispatcher(blocks.steps) as dispatcher:
            for index in range(len(source)):
                block = source[index]
                check_values(block.table, partial(source.locate, first=block.first_row))
                prepared = window.prepare(encode_block(block, encoding))
                check(prepared.encoded)
                results = blocks.buffer(prepared.views, prepared.fresh)
                batches = blocks.batches(prepared.views, prepared.fresh)
                started.append((prepared, results, [dispatcher.start(batch, results) for batch in batches]))
                if len(started) > _BLOCKS_AHEAD:
                    yield finished()
            while started:
                yield finished()

    def encoding(
        self, embed: EmbedConfig, column: str, *, max_tokens: int | None = None, overlong: Overlong | None = None
    ) -> Encoding:
        """Settles how the sequences of a column become tokens.

        Raises:
            InputError: `max_tokens` or the layer is more than the model has.
        """
        check_value("overlong", overlong, Overlong | None)
        limit, wanted = self.config.max_tokens, max_tokens or self.max_tokens
        if wanted is not None and wanted > limit:
            raise InputError(
                f"--data.max_tokens {wanted} exceeds the {limit} positions of {self.provenance.model}; "
                f"pass at most {limit}"
            )
        self.config.resolve_layer(embed.layer)
        return Encoding(
            sequence_column=column,
            vocabulary=self.vocabulary,
            max_tokens=wanted or limit,
            overlong=overlong or self.overlong,
            strand=embed.strand,
            phases=embed.phases,
            deduplicate=embed.deduplicate,
        )

    def with_projection(self, embed: EmbedConfig, data: DataConfig) -> tuple[EmbedConfig, DataConfig]:
        """Replaces settings that are at their defaults by those that the projection was fitted on.

        Raises:
            InputError: A setting has another value.
        """
        if self.projection is None:
            return embed, data
        inputs, default = self.projection.inputs, EmbedConfig()
        given = {name: getattr(embed, name) for name in _VECTOR_SETTINGS}
        given = {f"embed.{name}": value for name, value in given.items() if value != getattr(default, name)}
        if data.max_tokens is not None:
            given["data.max_tokens"] = data.max_tokens
        if data.overlong != DataConfig.overlong:
            given["data.overlong"] = data.overlong
        self._check_projected(given)
        needed = {name: getattr(inputs, name) for name in _VECTOR_SETTINGS}
        return (
            dataclasses.replace(embed, **needed),
            dataclasses.replace(data, max_tokens=inputs.max_tokens, overlong=inputs.overlong),
        )

    def _settings(self, project: bool, max_tokens: int | None, overlong: Overlong | None, **wanted: Any) -> EmbedConfig:
        """Returns this encoder's settings with those that a call gives.

        Raises:
            InputError: The call gives one that is not what the projection was fitted on.
        """
        if project and self.projection is not None:
            given = {name: wanted[name] for name in _VECTOR_SETTINGS} | {"max_tokens": max_tokens, "overlong": overlong}
            self._check_projected({name: value for name, value in given.items() if value is not None})
        return _changed(self.settings, **wanted)

    def _check_projected(self, given: Mapping[str, Any]) -> None:
        assert self.projection is not None
        for flag, value in given.items():
            name = flag.rpartition(".")[2]
            needed = getattr(self.projection.inputs, name)
            if (self.config.resolve_layer(value) if name == "layer" else value) != needed:
                raw = "--model.projection none" if "." in flag else "project=False"
                shown = f"--{flag} {value}" if "." in flag else f"{name}={value!r}"
                raise InputError(
                    f"{shown}: the projection of {self.provenance.model} was fitted on vectors with {name} {needed}; "
                    f"leave it out, or pass {raw} for raw vectors"
                )

    def with_layers(self, layer: int) -> "Encoder":
        """Returns an encoder that has the layers up to one alone, for vectors of that layer or those below it.

        Raises:
            InputError: The model has no such layer.
        """
        model = first_layers(self.loaded.model, self.config.resolve_layer(layer))
        if model is self.loaded.model:
            return self
        return dataclasses.replace(self, loaded=dataclasses.replace(self.loaded, model=model), _steps={})

    def sample(self, source: Blocks, encoding: Encoding, embed: EmbedConfig, *, project: bool = True) -> Sample:
        """Reads as much of an input as `block_encoder` needs."""
        if not self._counts_tokens(embed, project):
            return sample_blocks(source, encoding, embed, SAMPLED_ROWS)
        # Token counts have one shape: of the sequences, only that there are some matters.
        quick = dataclasses.replace(encoding, vocabulary=self.vocabulary.without_columns, phases=1)
        return sample_blocks(source, quick, dataclasses.replace(embed, deduplicate=False), rows=1)

    def _counts_tokens(self, embed: EmbedConfig, project: bool) -> bool:
        """Whether vectors are computed from token counts, which changes the bits: with a projection, or with columns.

        With columns there is a token per base, which takes long to look up one by one.
        """
        counted = (project and self.projection is not None) or self.vocabulary.columns is not None
        return counted and self.make_steps is CompiledSteps and can_count_tokens(self.config, embed)

    def block_encoder(
        self,
        source: Blocks,
        encoding: Encoding,
        embed: EmbedConfig,
        *,
        project: bool = True,
        sample: Sample | None = None,
    ) -> BlockEncoder:
        """Settles how an input is computed, and its batch shapes; `sample` is of it, if there is one already."""
        if self._counts_tokens(embed, project):
            steps = self._counting_steps if project and self.projection is not None else self._raw_counting_steps
            return BlockEncoder(steps=steps, encoding=encoding, embed=embed, layout=self.layout)
        sample = sample or self.sample(source, encoding, embed, project=project)
        key, devices = (embed.pooling, self.config.resolve_layer(embed.layer)), self.layout.data_devices
        if key not in self._steps:
            self._steps[key] = self.make_steps(self.loaded.model, self.layout, embed)
        steps = self._steps[key]
        shapes = sample.shapes(embed, devices)
        if len({*steps.shapes, *shapes}) > MOST_SHAPES:
            shapes = sample.fixed_shapes(embed, devices, embed.max_shapes)
        return BlockEncoder(
            steps=steps,
            encoding=encoding,
            embed=embed,
            layout=self.layout,
            shapes=shapes,
            spare=sample.spare_shapes(embed, devices),
            projector=self._projector if project and self.projection is not None else None,
        )

    @cached_property
    def _counting_steps(self) -> CountingSteps:
        return CountingSteps(self.loaded.model, self.layout, self.projection)

    @cached_property
    def _raw_counting_steps(self) -> CountingSteps:
        return CountingSteps(self.loaded.model, self.layout, None)

    @cached_property
    def _projector(self) -> Projector:
        assert self.projection is not None
        return Projector(self.projection, self.layout)

    def similarity(
        self, a: Float[np.ndarray, "*n d"], b: Float[np.ndarray, "*m d"]
    ) -> Float32[np.ndarray, "rows columns"]:
        """Returns the cosine similarity of every vector of `a` with every vector of `b`.

        Raises:
            InputError: They are not vectors of one length, such as `encode` returns.

        Example:
            >>> import bioscan_jax as bj
            >>> model = bj.load("random:tiny-v2")
            >>> vector = model.encode("ACGTTGCA" * 20)
            >>> model.similarity(vector, vector).round(4)
            array([[1.]], dtype=float32)
        """
        try:
            left, right = (unit(np.atleast_2d(np.asarray(x, np.float32))) for x in (a, b))
            return left @ right.T
        except ValueError as error:
            raise InputError(
                f"similarity compares vectors of one length; pass what encode returns ({error})"
            ) from error

    def hidden_states(
        self, sequences: Sequences, *, layer: int | None = None, max_tokens: int | None = None
    ) -> list[Float32[np.ndarray, "*layers tokens d"]]:
        """Computes the states of every token, one array per sequence, CLS first.

        Args:
            sequences: As for `encode`, of one strand and phase; a sequence over `max_tokens` is cut.
            layer: One hidden state as for `encode`; all of them, stacked from the embeddings to the last, if absent.
            max_tokens: Longest token row, CLS included.

        Raises:
            InputError: A sequence has no tokens, or a setting does not fit the model.

        Example:
            >>> import bioscan_jax as bj
            >>> [states.shape for states in bj.load("random:tiny-v2").hidden_states(["ACGTAC" * 4, "ACGTAC"])]
            [(3, 5, 64), (3, 2, 64)]
        """
        embed = EmbedConfig(layer=-1 if layer is None else layer, deduplicate=False)
        encoding = self.encoding(embed, COLUMN, max_tokens=max_tokens, overlong="truncate")
        encoding = dataclasses.replace(encoding, vocabulary=self.vocabulary.without_columns)
        column = as_column([sequences] if isinstance(sequences, str) else sequences)
        blocks = [encode_block(block, encoding) for block in SequencesInMemory(column, DataConfig.block_rows)]
        for block in blocks:
            _refuse_rejects(block)
        return self._hidden_states(blocks, encoding.max_tokens, layer)

    @cached_property
    def _hidden_states(self) -> HiddenStates:
        return HiddenStates(self.loaded, self.settings)

    def predict(
        self,
        sequences: Sequences,
        *,
        strand: Literal["forward", "both"] | None = None,
        phases: int | None = None,
        on_error: Literal["raise", "nan"] = "raise",
    ) -> pa.Table:
        """Names sequences by the taxonomic heads that were trained with the model.

        Args:
            sequences: As for `encode`.
            strand: As for `encode`.
            phases: As for `encode`.
            on_error: As for `encode`; a sequence without a vector has nulls.

        Returns:
            The seven ranks, null where the tree ends above, and the probability of each as RANK_confidence.

        Raises:
            InputError: The model has no heads, or a sequence has no vector.
        """
        if self.heads is None:
            raise InputError(
                f"{self.provenance.model} has no taxonomic heads; load the directory of an export that has "
                f"{HEADS_FILE}, or pass it as heads="
            )
        vectors = self.encode(
            [sequences] if isinstance(sequences, str) else sequences,
            pooling=self.heads.pooling,
            layer=-1,
            strand=strand,
            phases=phases,
            project=False,
            on_error=on_error,
        )
        return self._predictor(vectors)

    @cached_property
    def _predictor(self) -> HeadPredictor:
        assert self.heads is not None
        return HeadPredictor(self.heads)

    def save_pretrained(self, directory: str | Path, *, merge: bool = True) -> None:
        """Writes the model with its heads and projection, so that `bioscan_jax.load(directory)` gives it back.

        Args:
            directory: Directory or URL to create, whole or not at all.
            merge: Write a whole checkpoint in Hugging Face's format, with any adapter merged into its weights; or the
                adapter alone in PEFT's format, which `load` puts on the checkpoint it was trained on.

        Raises:
            InputError: The directory is not empty or cannot be written, or there is no adapter to write alone.

        Example:
            >>> import tempfile, bioscan_jax as bj
            >>> model = bj.load("random:tiny-v2")
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     model.save_pretrained(f"{directory}/saved")
            ...     again = bj.load(f"{directory}/saved")
            >>> bool((again.encode("ACGTAC") == model.encode("ACGTAC")).all())
            True
        """
        with output_directory(os.fspath(directory), "output") as target:
            save_model(target, self.loaded, self.wanted, heads=self.heads, merge=merge)

    def push_to_hub(
        self,
        name: str,
        *,
        merge: bool = True,
        private: bool | None = None,
        branch: str = "main",
        commit_message: str | None = None,
    ) -> str:
        """Puts what `save_pretrained` writes on the Hugging Face hub, in one commit; see `bioscan_jax.push_to_hub`.

        Args:
            name: OWNER/NAME of the repository, which is made if there is none.
            merge: As for `save_pretrained`.
            private: Whether a new repository is private.
            branch: Made if there is none.
            commit_message: Of the commit.

        Returns:
            The commit: `bioscan_jax.load(name, revision=COMMIT)` gives the model back.

        Raises:
            InputError: See `bioscan_jax.push_to_hub`.

        Example:
            >>> import bioscan_jax as bj
            >>> bj.load("random:tiny-v2").push_to_hub("not a name")
            Traceback (most recent call last):
            bioscan_jax.errors.InputError: --name 'not a name' is not a hub id such as OWNER/NAME
        """
        import tempfile

        with tempfile.TemporaryDirectory(prefix="bioscan_jax-") as scratch:
            self.save_pretrained(f"{scratch}/model", merge=merge)
            return push_to_hub(f"{scratch}/model", name, private=private, branch=branch, commit_message=commit_message)

    def save_onnx(self, directory: str | Path) -> None:
        """Writes the model, its settings and its projection as an ONNX graph, for machines without JAX.

        The directory holds the graph, the vocabulary and `run_onnx.py`, which needs numpy and onnxruntime alone. Its
        vectors have length 1 and are those of `encode(..., normalize=True)` up to rounding. Needs the extra `onnx`, and
        a model in float32.

        Args:
            directory: Directory or URL to create, whole or not at all.

        Raises:
            InputError: jax2onnx is not installed, the model is not in float32 or has 2 GiB of weights, or the directory
                is not empty or cannot be written.

        Example:
            >>> import bioscan_jax as bj
            >>> bj.load().save_onnx("model_onnx")  # doctest: +SKIP
        """
        with output_directory(os.fspath(directory), "output") as target:
            write_onnx(target, self, self.provenance, self.loaded.trained_facts)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **settings: Any) -> "Encoder":
        """Loads a model by the name that Hugging Face users know; the same as `bioscan_jax.load`.

        Example:
            >>> import bioscan_jax as bj
            >>> bj.Encoder.from_pretrained("random:tiny-v2", seed=1).dimension
            64
        """
        from bioscan_jax.embedding.load import load

        return load(name, **settings)


def _changed(settings: EmbedConfig, **wanted: Any) -> EmbedConfig:
    """Replaces the settings that a call gives."""
    return dataclasses.replace(settings, **{name: value for name, value in wanted.items() if value is not None})


def unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Scales vectors to length 1; a vector of zeros stays."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(length, np.finfo(np.float32).tiny)


def _refuse_rejects(encoded: EncodedBlock) -> None:
    if not encoded.rejects.num_rows:
        return
    first = encoded.rejects.slice(0, 1).to_pylist()[0]
    reason = REASONS.get(first["reason"], first["detail"] or first["reason"])
    text = "None" if first["sequence"] is None else repr(first["sequence"][:60])
    raise InputError(
        f"sequence {first['source_row']} ({text}) has no vector: {reason}; pass DNA, or let on_error keep its place"
    )
