"""Every command of the README and the guide is run here, or is listed with what runs it or why nothing here can."""

import gzip
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import call
from support.places import GOLDEN, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "bioscan_jax" / "guide").glob("*.md"))]
PROGRAMS = (
    "bioscan",
    "python",
    "pytest",
    "pip",
    "pdoc",
    "bash",
    "xprof",
    "apt-get",
    "ray",
    "gcloud",
    "sbatch",
    "jupyter",
)

_ACCOUNT = "needs an account; tests/checkpoints/test_push.py has a hub on loopback"
ELSEWHERE = {
    "bioscan sync --source outputs --target rclone:gdrive:DeepBio/outputs": "needs an account; tests/bundles/test_rclone.py",
    "bioscan sync --source rclone:gdrive:DeepBio/outputs --target outputs": "needs an account; tests/bundles/test_rclone.py",
    "pip install -e .": "CI installs so",
    "pip install -e '.[test]'": "CI installs so",
    "pytest": "CI runs it",
    "pytest -m device": "CI runs it with its folder, tests/device",
    "pytest -m notebook": "CI runs it",
    "pip install 'jax[tpu]==0.10.2'": "CI installs it for -m aot",
    "JAX_PLATFORMS=cpu bioscan plan --config embed_nt_2.5b_v3-8 --topology v3-8": "tests/planning, -m aot",
    "pip install '.[data]'": "an install",
    "pip install gcsfs": "an install",
    "pip install -e '.[report]'": "an install: PaCMAP is in the test extra",
    "pip install 'bioscan_jax[onnx]'": "an install",
    "python run_onnx.py barcodes.fasta vectors.npy": "tests/embedding/test_to_onnx.py, in a directory that export wrote",
    "bioscan export --format onnx --model.checkpoint default --output model_onnx": "tests/embedding, -m onnx",
    "bioscan push coi-adapter me/coi-adapter --private true": _ACCOUNT,
    "bioscan export --run runs/coi --output coi-adapter --push me/coi-adapter": _ACCOUNT,
    "bioscan embed --model.checkpoint DIR --model.adapter me/coi-adapter@COMMIT --data.path reads.fasta --sink.uri tuned": (
        _ACCOUNT
    ),
    "pip install xprof": "an install",
    "pip install pdoc": "an install: pdoc is in the test extra",
    "pdoc bioscan_jax bioscan_jax.guide": "opens a browser; the test below writes the same pages to files",
    "xprof DIR": "opens a server",
    "apt-get install vsearch": "CI installs it",
    "bash scripts/benchmarks/device_lane.sh DIR": "minutes on an accelerator; tests/device checks its parts",
    "bioscan data parquet FILE.tsv --output FILE.parquet": "tests/table/test_as_parquet.py",
    "bioscan data get greengenes_16s --output data": "downloads 0.1 GB; tests/data/test_published.py has a small copy",
    "bioscan default-model --config default_model": "needs 15,868 barcodes; tests/training/test_default_model.py",
    "bioscan benchmark identify --reference FILE --queries FILE": "tests/benchmarks, -m vsearch",
    "bioscan benchmark taxonomy --reference FILE --queries FILE --models DIR,6mer,vsearch": "tests/benchmarks, -m vsearch",
    "pip install 'bioscan_jax[fleet]'": "an install",
    "bioscan embed --config demo --fleet.address local --fleet.workers 2": "starts Ray; tests/fleet, -m fleet",
    "bioscan fleet simulate": "a minute; tests/fleet/test_fleet_simulation.py has a small one",
    "ray get-auth-token --generate": "writes to the home directory",
    "ray up configs/fleet_tpu.yaml": "rents machines; tests/fleet/test_cluster_files.py checks the file and the flags",
    'ray exec configs/fleet_tpu.yaml --tmux "bioscan embed --config embed_nt_2.5b_v3-8 --data.path '
    "gs://BUCKET/barcodes.parquet --data.block_rows 30000 --sink.uri gs://BUCKET/vectors --fleet.address auto "
    """--fleet.workers 16 --fleet.resources '{\\"TPU\\": 8}' --fleet.start_seconds 900\"""": "needs a cluster in the cloud",
    "ray attach configs/fleet_tpu.yaml --tmux": "needs a cluster in the cloud",
    "ray down configs/fleet_tpu.yaml": "needs a cluster in the cloud",
    "ray start --head": "tests/fleet, -m fleet, start clusters of several nodes",
    "ray start --address=HOST:6379": "tests/fleet, -m fleet, start clusters of several nodes",
    "bioscan finetune --config finetune_nt_2.5b_v3-8 --mesh.distributed true --train.output_dir gs://BUCKET/runs/coi": (
        "needs a pod; tests/training has two processes"
    ),
    "bioscan benchmark scale --part fragments --rows 200000 --block_rows 20": "minutes; tests/benchmarks has a small one",
}
"""Commands that are not run below, each with what runs it, or what it needs."""

PLACES = {
    "DIR_OR_HUB_ID": "checkpoint",
    "DIR": "checkpoint",
    "FILE": "reference.parquet",
    "configs/demo.yaml": str(ROOT / "configs" / "demo.yaml"),
    "/media/stick/coi": "stick/coi",
    "ACGTTGCA...": "ACGTTGCA" * 40,
}
"""What stands in the pages for a file or a sequence of the reader's, and what the tests have in its place."""

STARTS_WITH_A_TABLE = {"tables"}
"""Pages whose reader has embedded already."""

SHORTER = {"finetune": ["--train.epochs=1"], "fleet": ["--rows=300000"]}
"""Flags that the tests add, by command: as in the pages, but shorter."""


def _commands(page: Path) -> list[str]:
    """Returns the commands of a page in order: lines of its code blocks, and those in prose between backticks."""
    text = page.read_text()
    found = []
    for block in re.finditer(r"(?m)^(?:    .*\n)(?:(?:    .*)?\n)*", text):
        lines = block[0].replace("\\\n", " ").splitlines()
        for part in (part for line in lines for part in line.split(" && ")):
            found.append((block.start(), re.sub(r"\s+#.*", "", " ".join(part.split()))))
    prose = re.sub(r"(?m)^    .*$", lambda match: " " * len(match[0]), text)
    found += [(match.start(), " ".join(match[1].split())) for match in re.finditer(r"`([^`]+)`", prose)]
    words = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)})(?: |$)")
    names = {
        "bioscan NAME",
        "python scripts/NAME.py",
        "bioscan benchmark NAME",
        "bash",
        "python",
        "bioscan",
        "ray",
        "pip",
    }
    return [text for _, text in sorted(found, key=lambda one: one[0]) if words.match(text) and text not in names]


def _is_run(command: str) -> bool:
    """Returns whether the test below runs a command: not one without flags, which is only its name."""
    return command.startswith(("bioscan ", "python scripts/")) and command not in ELSEWHERE and len(command.split()) > 2


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A directory with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    demo = pq.read_table(ROOT / "bioscan_jax" / "data" / "demo_coi.parquet")
    demo = demo.append_column("depth", pa.array([float(10 * row) for row in range(len(demo))]))
    pq.write_table(demo[:200], "reference.parquet")
    pq.write_table(demo[200:300], "labelled.parquet")
    Path("barcodes").mkdir()
    Path("stick").mkdir()
    for name, rows in (("a", demo[:150]), ("b", demo[150:300])):
        pq.write_table(rows, f"barcodes/{name}.parquet")
    reads = zip(demo["sequence_id"][300:320].to_pylist(), demo["dna_sequence"][300:320].to_pylist(), strict=True)
    with gzip.open("reads.fastq.gz", "wt") as file:
        file.writelines(f"@{name}\n{text}\n+\n{'I' * len(text)}\n" for name, text in reads)
    ids = demo["sequence_id"][:50].to_pylist()
    Path("cruise.csv").write_text("sequence_id,station\n" + "".join(f"{name},S{n % 5}\n" for n, name in enumerate(ids)))
    Path("prices.csv").write_text("device,price_per_hour\nv5e-8,1\n")
    Path("checkpoint").symlink_to(GOLDEN / "v2")
    return tmp_path


def test_every_command_is_run_or_says_what_runs_it():
    shown = {command: page.name for page in PAGES for command in _commands(page)}
    unknown = {command: page for command, page in shown.items() if not _is_run(command) and command not in ELSEWHERE}
    unknown = {
        command: page for command, page in unknown.items() if len(command.split()) > 2 or "bioscan" not in command
    }
    assert not unknown
    assert set(ELSEWHERE) <= set(shown), "no page shows these any more"
    assert sum(map(_is_run, shown)) > 15


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_in_order(page, desk):
    if page.stem in STARTS_WITH_A_TABLE:
        made = call("embed", "--model.checkpoint=default", "--data.path=reference.parquet", "--sink.uri=vectors")
        assert made.returncode == 0, made.stderr
    for command in filter(_is_run, _commands(page)):
        _, name, *words = shlex.split(re.sub(r"^python scripts/(\w+)\.py", r"bioscan \1", command))
        words = [PLACES.get(word, word) for word in words]
        done = call(name, *words, *SHORTER.get(name, []))
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error parsing type annotation:UserWarning")  # pdoc of names inside flax.nnx
def test_the_reference_of_the_api_has_every_public_name(tmp_path):
    import pdoc

    import bioscan_jax as bj

    pdoc.pdoc("bioscan_jax", "bioscan_jax.guide", output_directory=tmp_path)
    page, guide = (tmp_path / "bioscan_jax.html").read_text(), (tmp_path / "bioscan_jax" / "guide.html").read_text()
    assert [name for name in bj.__all__ if f'id="{name}"' not in page] == []
    for path in (ROOT / "bioscan_jax" / "guide").glob("*.md"):
        assert path.read_text().splitlines()[0].removeprefix("# ") in guide, f"{path.name} is not on the page"
