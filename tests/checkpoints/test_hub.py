import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save
from support.hub import Hub, Repository, running_hub

from bioscan_jax.checkpoints.hub import ResolvedCheckpoint, resolve_checkpoint
from bioscan_jax.checkpoints.readers import list_tensors, read_rows, sha256_of, weight_files
from bioscan_jax.errors import InputError

NAME = "InstaDeepAI/nucleotide-transformer-v2-50m-multi-species"
COMMIT = "81b29e5786726d891dbf929404ef20adca5b36f1"
WEIGHTS = np.arange(6, dtype=np.float32)
SAFETENSORS = save({"a": WEIGHTS})
CARD = b"---\nlicense: cc-by-nc-sa-4.0\ntags:\n- DNA\n---\n# A model\n"
REPOSITORY = {
    "config.json": b"{}",
    "vocab.txt": b"<unk>\n",
    "README.md": CARD,
    "model.safetensors": SAFETENSORS,
    "pytorch_model.bin": b"never wanted",
    "modeling_esm.py": b"never wanted",
}


def refusal(checkpoint: str, revision: str | None) -> str:
    with pytest.raises(InputError) as raised:
        resolve_checkpoint(checkpoint, revision)
    message = str(raised.value)
    assert "\n" not in message
    return message


def unreachable(missing: str, reason: str) -> str:
    return (
        f"{NAME} at {COMMIT} is not in the local cache ({missing}) and the hub cannot be used ({reason}); where it "
        f"can, run `hf download {NAME} --revision {COMMIT} --local-dir DIR` and pass --model.checkpoint DIR"
    )


def fill_cache(cache: Path, files: dict[str, bytes], name: str = NAME) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for directory in (snapshot, repository / "blobs", repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file, content in files.items():
        blob = hashlib.sha256(content).hexdigest()
        (repository / "blobs" / blob).write_bytes(content)
        (snapshot / file).symlink_to(f"../../blobs/{blob}")
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
    return directory


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with running_hub(monkeypatch) as server:
        server.repositories[NAME] = Repository({COMMIT: dict(REPOSITORY)}, {"main": COMMIT})
        yield server


def files_of(hub: Hub) -> dict[str, bytes]:
    return hub.repositories[NAME].commits[COMMIT]


# Local directories


def test_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").touch()
    assert resolve_checkpoint(str(directory), None) == ResolvedCheckpoint(directory, str(directory), None, None)
    (directory / "README.md").write_bytes(CARD)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_checkpoint("~/checkpoint", None) == ResolvedCheckpoint(
        directory, "~/checkpoint", None, "cc-by-nc-sa-4.0"
    )
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("checkpoint", None).directory.resolve() == directory


def test_local_directory_wants_no_revision(tmp_path: Path):
    (tmp_path / "config.json").touch()
    assert refusal(str(tmp_path), COMMIT) == (
        f"--model.revision '{COMMIT}' is for a hub id, but --model.checkpoint '{tmp_path}' is a directory here; "
        "leave one of them out"
    )


def test_local_directory_without_config(tmp_path: Path):
    fix = "pass the directory that holds config.json and the weights"
    assert refusal(str(tmp_path), None) == f"--model.checkpoint '{tmp_path}' has no config.json, only nothing; {fix}"
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    assert refusal(str(tmp_path), None) == (
        f"--model.checkpoint '{tmp_path}' has no config.json, only blobs, snapshots; {fix}"
    )


def test_file_in_place_of_its_directory(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.touch()
    assert refusal(str(file), None) == f"--model.checkpoint '{file}' is a file; pass the directory it is in"


@pytest.mark.parametrize("path", ["/no/such", "./such", "../such", "~nobody-here/such", "a/b/c", "/gone"])
def test_path_that_is_not_there(path: str):
    assert refusal(path, None) == f"--model.checkpoint {path!r}: there is no such directory; check the path"


@pytest.mark.parametrize(
    "name", ["", "nucleotide", "owner/", "-o/name", "o/na--me", "o/na..me", "o/n.git", "o/n a", "ö/n"]
)
def test_neither_directory_nor_hub_id(name: str):
    assert refusal(name, COMMIT) == (
        f"--model.checkpoint {name!r} is neither a directory nor a hub id such as OWNER/NAME, nor 'default'"
    )


# Revisions


def test_hub_id_without_revision():
    assert refusal(NAME, None) == (
        f"--model.checkpoint '{NAME}' is a hub id and needs its commit, so that the run can be repeated; "
        f"pass --model.revision COMMIT, 40 hex digits from https://huggingface.co/{NAME}/commits/main"
    )


@pytest.mark.parametrize("revision", ["main", "81b29e5", COMMIT.upper(), COMMIT + "0", ""])
def test_revision_that_is_not_a_full_commit(revision: str):
    assert refusal(NAME, revision) == (
        f"--model.revision {revision!r} can move; pass a full commit, "
        f"40 hex digits from https://huggingface.co/{NAME}/commits/main"
    )


# The local cache, offline


def test_pinned_commit_in_the_cache_needs_no_network(cache: Path):
    snapshot = fill_cache(cache, {file: REPOSITORY[file] for file in ("config.json", "vocab.txt", "model.safetensors")})
    origin = resolve_checkpoint(NAME, COMMIT)
    assert origin == ResolvedCheckpoint(snapshot, NAME, COMMIT, "cc-by-nc-sa-4.0")
    np.testing.assert_array_equal(read_rows(list_tensors(origin.directory)["a"]), WEIGHTS)
    line = f"model.safetensors {hashlib.sha256(SAFETENSORS).hexdigest()}\n"
    assert sha256_of(weight_files(origin.directory)) == hashlib.sha256(line.encode()).hexdigest()


def test_offline_and_never_downloaded(cache: Path):
    assert refusal(NAME, COMMIT) == unreachable("it has never been downloaded", "HF_HUB_OFFLINE is set")
    fill_cache(cache, REPOSITORY)
    other = "0" * 40
    assert refusal(NAME, other) == unreachable("it has never been downloaded", "HF_HUB_OFFLINE is set").replace(
        COMMIT, other
    )


@pytest.mark.parametrize("absent", ["config.json", "vocab.txt"])
def test_offline_and_half_in_the_cache(cache: Path, absent: str):
    fill_cache(cache, {file: content for file, content in REPOSITORY.items() if file != absent})
    assert refusal(NAME, COMMIT) == unreachable(f"{absent} is missing", "HF_HUB_OFFLINE is set")


def test_offline_and_a_shard_is_not_in_the_cache(cache: Path):
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    snapshot = fill_cache(
        cache,
        {
            "config.json": b"{}",
            "vocab.txt": b"",
            "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
            "model-00001-of-00002.safetensors": SAFETENSORS,
        },
    )
    missing = (
        f"{snapshot / 'model.safetensors.index.json'} names shard 'model-00002-of-00002.safetensors', "
        f"which is missing from {snapshot}; download it"
    )
    assert refusal(NAME, COMMIT) == unreachable(missing, "HF_HUB_OFFLINE is set")


def test_offline_is_read_from_the_environment(tmp_path: Path):
    fill_cache(tmp_path, REPOSITORY)
    program = (
        "import sys; from bioscan_jax.checkpoints.hub import resolve_checkpoint; assert 'huggingface_hub' not in sys.modules; "
        f"print(resolve_checkpoint({NAME!r}, {COMMIT!r}).directory)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()).name == COMMIT


# A hub on this machine


def test_download_takes_one_format_and_then_needs_no_network(hub: Hub, cache: Path):
    origin = resolve_checkpoint(NAME, COMMIT)
    assert origin == ResolvedCheckpoint(
        cache / f"models--{NAME.replace('/', '--')}/snapshots/{COMMIT}", NAME, COMMIT, "cc-by-nc-sa-4.0"
    )
    assert sorted(hub.fetched) == ["README.md", "config.json", "model.safetensors", "vocab.txt"]
    np.testing.assert_array_equal(read_rows(list_tensors(origin.directory)["a"]), WEIGHTS)
    hub.status = 500
    hub.fetched.clear()
    assert resolve_checkpoint(NAME, COMMIT) == origin
    assert hub.fetched == []


def test_download_takes_the_shards_of_the_index(hub: Hub):
    del files_of(hub)["model.safetensors"]
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    files_of(hub).update({shard: shard.encode() for shard in shards})
    files_of(hub)["pytorch_model.bin.index.json"] = json.dumps(
        {"weight_map": dict(zip("ab", shards, strict=True))}
    ).encode()
    del files_of(hub)["pytorch_model.bin"]
    files_of(hub)["model-00001-of-00001.safetensors"] = b"never wanted"
    assert [path.name for path in weight_files(resolve_checkpoint(NAME, COMMIT).directory)] == shards
    assert sorted(hub.fetched) == ["README.md", "config.json", *shards, "pytorch_model.bin.index.json", "vocab.txt"]


def test_download_completes_a_half_filled_cache(hub: Hub, cache: Path):
    fill_cache(cache, {"config.json": b"{}", "pytorch_model.bin": b"older"})
    assert weight_files(resolve_checkpoint(NAME, COMMIT).directory)[0].name == "model.safetensors"
    assert sorted(hub.fetched) == ["README.md", "model.safetensors", "vocab.txt"]


def test_repository_without_readable_weights(hub: Hub):
    del files_of(hub)["model.safetensors"], files_of(hub)["pytorch_model.bin"]
    files_of(hub)["flax_model.msgpack"] = b""
    assert refusal(NAME, COMMIT) == (
        f"{NAME} at {COMMIT} has no weights this library reads "
        "(model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json)"
    )
    assert hub.fetched == []


def test_repository_without_vocabulary(hub: Hub):
    del files_of(hub)["vocab.txt"]
    assert refusal(NAME, COMMIT) == (
        f"{NAME} at {COMMIT} is not a checkpoint this library can read: vocab.txt is missing"
    )


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            403,
            "GatedRepo",
            f"{NAME} is gated; accept its terms at https://huggingface.co/{NAME}, then run `hf auth login` or set "
            "HF_TOKEN",
        ),
        (
            404,
            "RepoNotFound",
            f"the hub has no model {NAME}, or it is private; check --model.checkpoint, or run `hf auth login`",
        ),
        (
            404,
            "RevisionNotFound",
            f"{NAME} has no commit {COMMIT}; pass --model.revision from https://huggingface.co/{NAME}/commits/main",
        ),
        (403, None, f"the hub refused the token for {NAME} (403); run `hf auth login` or fix HF_TOKEN"),
        (401, None, f"the hub refused the token for {NAME} (401); run `hf auth login` or fix HF_TOKEN"),
        (500, None, unreachable("it has never been downloaded", "it answered 500")),
    ],
)
def test_what_the_hub_answers(hub: Hub, status: int, code: str | None, message: str):
    hub.status, hub.error_code = status, code
    assert refusal(NAME, COMMIT) == message


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refusal(NAME, COMMIT) == unreachable(
        "it has never been downloaded", "ConnectError [Errno 111] Connection refused"
    )


def test_cache_that_cannot_be_written(hub: Hub, cache: Path, tmp_path: Path):
    cache.write_text("a file where the cache should be")
    assert refusal(NAME, COMMIT).startswith(f"{NAME} cannot be stored: Not a directory {cache}")
    assert refusal(NAME, COMMIT).endswith("; set HF_HUB_CACHE to a directory with room")


# Licences


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: 'apache-2.0'\n---\n", "apache-2.0"),
        ("---\nlanguage: en\nlicense:\n- gpl-3.0\n- mit\n---\n", "gpl-3.0"),
        ("---\nlicense: [bsd-3-clause]\n---\n", "bsd-3-clause"),
        ("---\nlicense: other\nlicense_name: my-own\n---\n", "my-own"),
        ("---\nlicense:\nlanguage: en\n---\n", None),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("# No front matter\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_license_of_the_model_card(tmp_path: Path, card: str, license: str | None):
    (tmp_path / "config.json").touch()
    (tmp_path / "README.md").write_bytes(card.encode())
    assert resolve_checkpoint(str(tmp_path), None).license == license


def test_license_of_a_hub_model_without_a_card(cache: Path):
    files = {file: REPOSITORY[file] for file in ("config.json", "vocab.txt", "model.safetensors")}
    fill_cache(cache, files)
    fill_cache(cache, files, name="someone/else")
    assert resolve_checkpoint(NAME, COMMIT).license == "cc-by-nc-sa-4.0"
    assert resolve_checkpoint("someone/else", COMMIT).license is None
