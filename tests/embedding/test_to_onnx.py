"""ONNX graphs against the encoder, and the runner's tokens against the library's."""

import dataclasses
import gzip
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pyarrow as pa
import pytest
from support.commands import call
from support.finetuned import ONE, train
from support.projections import write_projected_model

import bioscan_jax as bj
from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.columns import Columns
from bioscan_jax.barcodes.simulate import simulate, write_simulated
from bioscan_jax.barcodes.views import cut_views
from bioscan_jax.embedding import run_onnx

SEQUENCES = [
    *("ACGTTGCA" * 20, "TTGACANNACGTACGN" * 9, "NNACGTTGACCANN", "ACG", "T", "acgu-r.Y ACG*", "AC\tGTNA**", "ANNNNNNC"),
    *simulate(species=3, per_species=2, length=658, seed=0)["dna_sequence"].to_pylist(),
]


def barcodes_with_gaps():
    """Columns of an alignment, and sequences of that marker: whole, cut, turned, with gaps, with Ns, and of another one."""
    rng = np.random.default_rng(1)
    gene = rng.integers(0, 4, 300)
    table = rng.integers(-40, -10, (300, 4)).astype(np.int32)
    table[np.arange(300), gene] = rng.integers(10, 21, 300)

    def text(codes):
        return "".join("ACTG"[code] for code in codes)

    deleted = np.delete(gene, range(120, 126))
    inserted = np.insert(gene, 150, rng.integers(0, 4, 3))
    noisy = np.where(rng.random(300) < 0.15, rng.integers(0, 4, 300), gene)
    found = [text(codes) for codes in (gene, gene[40:], gene[:111], deleted, inserted, noisy, gene[90:180], gene[200:])]
    turned = [one[::-1].translate(str.maketrans("ACGT", "TGCA")) for one in found]
    around = text(rng.integers(0, 4, 400))
    return table, [*found, *turned, found[0][:50] + "NNN" + found[0][53:], around + found[0], found[3] + around, around]


@pytest.mark.parametrize("overlong", ["truncate", "window"])
@pytest.mark.parametrize(("strand", "phases", "most"), [("forward", 1, 2048), ("both", 6, 40), ("both", 3, 8)])
@pytest.mark.parametrize("columns", [False, True])
def test_the_runner_makes_the_same_tokens(columns, strand, phases, overlong, most):
    vocabulary, sequences = bj.Vocabulary.published("v2"), SEQUENCES
    if columns:
        table, more = barcodes_with_gaps()
        vocabulary, sequences = vocabulary.with_columns(Columns(table)), [*sequences, *more]
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    scores = run_onnx.column_scores(ids)
    settings = {"strand": strand, "phases": phases, "max_tokens": most, "overlong": overlong}
    cleaned = clean(pa.array(sequences, pa.large_string())).sequences
    views = cut_views(cleaned, vocabulary, **settings)
    rows = np.split(views.tokens.ids, views.tokens.offsets[1:-1])
    theirs: list[list] = [[] for _ in sequences]
    for row, owner in zip(rows, views.owner, strict=True):
        theirs[owner].append(row.tolist())
    assert [run_onnx.token_views(one, ids, scores, settings) for one in sequences] == theirs


@pytest.mark.parametrize("foreign", ["", " ", "*", "NNRY", "ACGTX", "ACG5", "A*CG", "ACÖ"])
def test_the_runner_refuses_what_the_library_refuses(foreign):
    assert clean(pa.array([foreign], pa.large_string())).reasons[0].as_py() is not None
    with pytest.raises(ValueError, match="letter of DNA|no A, C, G"):
        run_onnx.clean(foreign)


def test_the_runner_reads_fasta_with_any_header(tmp_path):
    text = ">a c.35A>G\nACG\nT\n>b\r\nTTT\r\n"
    for name, data in {"plain": text.encode(), "gz": gzip.compress(text.encode())}.items():
        (tmp_path / name).write_bytes(data)
        assert run_onnx.read_fasta(str(tmp_path / name)) == ["ACGT", "TTT"]


@pytest.mark.parametrize(
    ("words", "said"), [([], "pass a FASTA file"), (["none", "out"], "No such file"), (["raw", "out"], "is no FASTA")]
)
def test_the_runner_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_onnx, "OnnxEncoder", lambda: None)
    Path("raw").write_text("ACGT\n")
    with pytest.raises(SystemExit, match="2"):
        run_onnx._main(words)
    assert re.fullmatch(f"error: .*{said}.*\n", capsys.readouterr().err)
    assert not Path("out.npy").exists()


def test_without_jax2onnx_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    model = write_projected_model(tmp_path / "model", layers=0)
    assert model.dimension == 24
    done = call("export", "--format=onnx", f"--output={tmp_path / 'out'}", f"--model.checkpoint={tmp_path / 'model'}")
    assert done.returncode == 2
    assert "pip install 'bioscan_jax[onnx]'" in done.stderr
    assert not (tmp_path / "out").exists()
    assert "pass --run DIR, or --format onnx" in call("export", f"--output={tmp_path / 'out'}").stderr


@pytest.fixture
def symbolic():
    """While a graph is traced, sizes are symbols, which the checks of argument types take for errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def needs_onnx(test):
    """Marks a test that exports; jax2onnx takes a warning while it imports a part for a part that is not there."""
    for mark in (pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("symbolic"), pytest.mark.onnx):
        test = mark(test)
    return test


def opened(directory):
    """The runner in a directory, as a program without bioscan_jax would import it."""
    spec = importlib.util.spec_from_file_location("exported_runner", directory / "run_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OnnxEncoder(directory)


def assert_same(directory, model):
    expected = model.encode(SEQUENCES, normalize=True)
    for batch_tokens in (256, 16384):
        np.testing.assert_allclose(
            opened(directory).encode(SEQUENCES, batch_tokens=batch_tokens), expected, rtol=0, atol=1e-5
        )


@needs_onnx
def test_the_default_model(tmp_path):
    done = call(
        "export", "--format=onnx", f"--output={tmp_path / 'out'}", "--model.checkpoint=default", "--mesh.data=1"
    )
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out", bj.load(mesh=ONE))
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    # As a program of its own, which must find neither bioscan_jax nor JAX.
    (tmp_path / "in.fasta").write_text("".join(f">{i}\n{one}\n" for i, one in enumerate(SEQUENCES)))
    code = (
        "import runpy, sys; sys.argv = ['run_onnx.py', *sys.argv[1:]]; sys.modules.update(jax=None, bioscan_jax=None); "
    )
    code += "runpy.run_path('run_onnx.py', run_name='__main__')"
    files = [tmp_path / "in.fasta", tmp_path / "vectors.npy"]
    subprocess.run([sys.executable, "-c", code, *files], cwd=tmp_path / "out", check=True, env={"PATH": ""})
    vectors = np.load(files[1])
    np.testing.assert_allclose(vectors, opened(tmp_path / "out").encode(SEQUENCES), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="sequence 1: 'X' is no letter of DNA"):
        opened(tmp_path / "out").encode(["ACGT", "ACXGT"])


@needs_onnx
@pytest.mark.parametrize("preset", ["tiny-v1", "tiny-v2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"strand": "both", "phases": 6},
        {"pooling": "mean_no_cls", "phases": 2},
        {"pooling": "cls", "strand": "both"},
        {"pooling": "max", "layer": 1, "phases": 3},
    ],
)
def test_a_transformer(preset, settings, tmp_path):
    model = bj.load(f"random:{preset}", mesh=ONE)
    model = dataclasses.replace(model, settings=bj.EmbedConfig(**settings), max_tokens=60, overlong="window")
    model.save_onnx(tmp_path / "out")
    assert_same(tmp_path / "out", model)
    with pytest.raises(bj.InputError, match="not empty"):
        model.save_onnx(tmp_path / "out")


@needs_onnx
def test_a_transformer_with_its_projection(tmp_path):
    write_projected_model(tmp_path / "model", networks=((16, 8, None), (12, 10, 3.0)), layer=2, strand="both", phases=2)
    model = bj.load(tmp_path / "model", mesh=ONE)
    model.save_onnx(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "onnx.json").read_text())["dimension"] == 24 + 8 + 10
    assert_same(tmp_path / "out", model)


@needs_onnx
def test_a_training_run(tmp_path):
    barcodes = write_simulated(str(tmp_path / "barcodes.parquet"), species=12, per_species=6, length=120, seed=0)
    train(barcodes, tmp_path / "run", epochs=1)
    line = bj.export(str(tmp_path / "run"), str(tmp_path / "out"), format="onnx", mesh=ONE)
    assert "onnx of best parameters, after step" in line
    bj.export(str(tmp_path / "run"), str(tmp_path / "adapter"), mesh=ONE)
    assert_same(tmp_path / "out", bj.load(tmp_path / "adapter", mesh=ONE))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| validation loss | " in card
    assert "| file barcodes.parquet | 72 rows" in card
    assert str(tmp_path) not in card
