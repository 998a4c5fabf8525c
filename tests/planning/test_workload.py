"""Predicted batches equal those that the runs make."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_jax import DataConfig, EmbedConfig, InputError, MeshConfig, ModelConfig, SinkConfig, config, embed
from bioscan_jax.barcodes.simulate import simulate
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.data.parquet import open_source
from bioscan_jax.model.config import PRESETS
from bioscan_jax.planning.workload import embedding_workload, training_workload
from bioscan_jax.training.batches import TrainingBatches
from bioscan_jax.training.examples import prepare_examples

TINY = PRESETS["tiny-v2"]


@pytest.fixture(scope="module")
def barcodes(tmp_path_factory):
    """Barcodes of all lengths, some twice, some unusable."""
    table = simulate(species=30, per_species=4, length=658, seed=0)
    random = np.random.default_rng(0)
    text = [bases[: int(random.integers(20, 658))] for bases in table["dna_sequence"].to_pylist()]
    text[3], text[50] = "", "-"
    text[10:20] = text[20:30]
    path = tmp_path_factory.mktemp("workload") / "barcodes.parquet"
    pq.write_table(table.set_column(table.column_names.index("dna_sequence"), "dna_sequence", pa.array(text)), path)
    return path


def test_embedding_as_predicted(barcodes, tmp_path):
    settings = EmbedConfig(batch_tokens=2048, max_shapes=2, strand="both", phases=2)
    data = DataConfig(path=str(barcodes), max_tokens=64, block_rows=48, overlong="window")
    predicted = embedding_workload(data, settings, TINY, devices=8)
    model = ModelConfig(checkpoint="random:tiny-v2")
    done = embed(
        model, data, SinkConfig(uri=str(tmp_path)), settings, MeshConfig(compilation_cache=None), progress=False
    )
    assert predicted.rows == done.rows == 120
    assert predicted.vectors == done.vectors == 118
    assert predicted.lengths.sum() == done.tokens_real
    assert sum(shape.rows * shape.tokens * count for shape, count in predicted.batches.items()) == done.tokens_computed
    assert {(shape.rows, shape.tokens) for shape in predicted.batches} == set(map(tuple, done.shapes))


@pytest.mark.parametrize("sampling", [{}, {"sampler": "genera", "rows_per_species": 4}, {"balance": "genus"}])
def test_training_as_predicted(barcodes, tmp_path, sampling):
    wanted = config.ExamplesConfig(path=str(barcodes), max_tokens=64, validation=0.0)
    still = {"reverse_complement": 0.0, "subsequence": 0.0}
    train = config.TrainConfig(epochs=1, batch_size=16, max_shapes=3, **still, **sampling)
    predicted = training_workload(wanted, train, TINY)
    source, vocabulary = open_source(DataConfig(path=str(barcodes)), scratch=None), Vocabulary.published("v2")
    examples = prepare_examples(source, wanted, vocabulary, tmp_path, labelled=bool(sampling))
    batches = TrainingBatches(examples, train, vocabulary, 64)
    assert (predicted.rows, predicted.vectors) == (120, 118)
    assert predicted.batches == Counter(BatchShape(*batches[step].ids.shape) for step in range(len(batches)))


def test_batches_are_no_wider_than_the_longest_row(tmp_path):
    path = tmp_path / "short.parquet"
    pq.write_table(pa.table({"dna_sequence": ["ACGTAC" * 11] * 40}), path)
    work = embedding_workload(config.DataConfig(path=str(path)), EmbedConfig(batch_tokens=64), TINY, devices=4)
    assert work.lengths.tolist() == [12]
    assert work.batches == {BatchShape(4, 16): 1}
    assert training_workload(config.ExamplesConfig(path=str(path)), config.TrainConfig(batch_size=7), TINY).batches == {
        BatchShape(7, 16): 6
    }


def test_an_input_without_usable_rows_is_refused(tmp_path):
    path = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"dna_sequence": ["", "-"]}), path)
    with pytest.raises(
        InputError, match="no sequence in column 'dna_sequence' can be embedded .*; is it DNA. pass another"
    ):
        embedding_workload(config.DataConfig(path=str(path)), EmbedConfig(), TINY, devices=1)
    with pytest.raises(InputError, match="no sequence in column 'dna_sequence' can be trained on; pass another"):
        training_workload(config.ExamplesConfig(path=str(path)), config.TrainConfig(), TINY)
