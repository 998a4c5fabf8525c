"""Pushes to a hub on this machine, and what is loaded from it again."""

import json
import logging
import shutil

import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants
from support.commands import call
from support.golden_models import BASE, EVERY, adapt, golden_model, random_heads
from support.hub import TOKEN, running_hub
from support.projections import random_projection, write_projected_model

import bioscan_jax as bj
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.checkpoints.model_card import write_facts
from bioscan_jax.checkpoints.peft import write_adapter
from bioscan_jax.checkpoints.projection_files import write_projection
from bioscan_jax.checkpoints.push import push_to_hub

# Of httpx, about how huggingface_hub uploads a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
MESH = bj.MeshConfig(data=1, compilation_cache=None)
DNA = ["ACGTTGCA" * 20, "TTGACANNACGTACG" * 9]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running_hub(monkeypatch) as server:
        yield server


@pytest.fixture
def model(tmp_path):
    """A checkpoint without layers and its projection, in a directory whose name nobody else should see."""
    directory = tmp_path / "of_ada" / "model"
    write_projected_model(directory, layers=0)
    return directory


def pushed(hub, name, branch="main"):
    repository = hub.repositories[name]
    return repository.files(branch)


def refusal(directory, name="me/model", **settings):
    with pytest.raises(bj.InputError) as raised:
        push_to_hub(str(directory), name, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_model_comes_back_bit_for_bit(hub, model, caplog):
    here = bj.load(model, mesh=MESH)
    (model / "README.md").write_text("---\nlicense: mit\n---\n")  # as its authors told
    commit = push_to_hub(str(model), "me/model", commit_message="the first")
    assert hub.repositories["me/model"].log == ["the first"]
    assert pushed(hub, "me/model").keys() == {".gitattributes"} | {path.name for path in model.iterdir()}
    with caplog.at_level(logging.WARNING, "bioscan_jax"):
        there = bj.load("me/model", mesh=MESH)
    assert f"newest commit, {commit}" in caplog.text
    np.testing.assert_array_equal(there.encode(DNA), here.encode(DNA))
    assert (there.provenance.model, there.provenance.revision) == ("me/model", commit)
    assert there.provenance.weights_sha256 == here.provenance.weights_sha256
    assert there.provenance.license == "mit"
    # The next push, from Python: files that it lacks go, in the same commit.
    plain = bj.load("me/model", revision=commit, projection="none", mesh=MESH)
    assert plain.push_to_hub("me/model") != commit
    assert len(hub.repositories["me/model"].log) == 2
    assert not {"projection.json", "projection.safetensors"} & pushed(hub, "me/model").keys()
    assert "projection.json" in pushed(hub, "me/model", commit)
    # The first one is still there, and in the cache.
    hub.status = 500
    assert bj.load("me/model", revision=commit, mesh=MESH).projection is not None


def test_an_adapter_and_a_projection_are_pinned_in_the_provenance(hub, model, tmp_path):
    trunk, base = adapt(golden_model("v2")), bj.load(model, projection="none", mesh=MESH)
    private = tmp_path / "of_ada" / "base"
    facts = {"figures": {"validation genus accuracy": 0.8123456}, "data": {"file coi.parquet": "9 rows"}}
    facts["made_of"] = str(private)
    heads = random_heads("marginal")
    write_adapter(tmp_path / "adapter", trunk, EVERY, provenance=BASE, heads=heads, facts=facts)
    done = call("push", tmp_path / "adapter", "me/adapter", "--private=true", "--branch=trial")
    assert done.returncode == 0, done.stderr
    commit = done.stdout.split()[-1]
    files = pushed(hub, "me/adapter", "trial")
    assert hub.repositories["me/adapter"].private
    assert pushed(hub, "me/adapter").keys() == {".gitattributes"}
    for name in ("adapter_model.safetensors", "heads.safetensors", "label_space.json"):
        assert files[name] == (tmp_path / "adapter" / name).read_bytes()
    card = files["README.md"].decode()
    assert "license: cc-by-nc-sa-4.0" in card
    assert "base_model: mine/v" in card
    assert "| validation genus accuracy | 0.8123 |" in card
    assert "| file coi.parquet | 9 rows |" in card
    assert "of_ada" not in b"".join(files.values()).decode("latin-1")
    assert json.loads(files["bioscan_jax_export.json"])["made_of"] == "base"

    own = {"weights_sha256": base.provenance.weights_sha256, "max_tokens": base.config.max_tokens}
    write_projection(tmp_path / "p", random_projection(64, layer=0, phases=1, **own))
    write_facts(tmp_path / "p", "projection", BASE, {})
    place = f"me/p@{push_to_hub(str(tmp_path / 'p'), 'me/p')}"
    found = bj.load(str(model), projection=place, mesh=MESH)
    assert found.loaded.facts["projection"] == place
    assert found.projection.sha256 == bj.load(str(model), projection=tmp_path / "p", mesh=MESH).projection.sha256
    with pytest.raises(bj.InputError, match="--model.projection me/p@main can move; pass a full commit"):
        bj.load(str(model), projection="me/p@main", mesh=MESH)
    with pytest.raises(bj.InputError, match="me/adapter@COMMIT"):
        load_weights(bj.ModelConfig(checkpoint=str(model), adapter="me/adapter"), base.layout)
    assert commit in hub.repositories["me/adapter"].commits


@pytest.mark.slow
def test_an_adapter_brings_its_base_and_heads(hub, tmp_path):
    base = bj.load("random:tiny-v2", seed=3, mesh=MESH)
    trunk = adapt(nnx.merge(*nnx.split(base.loaded.model)))
    heads = random_heads("marginal")
    write_adapter(tmp_path / "adapter", trunk, EVERY, provenance=base.provenance, heads=heads)
    commit = push_to_hub(str(tmp_path / "adapter"), "me/adapter")
    there, here = bj.load("me/adapter", revision=commit, mesh=MESH), bj.load(tmp_path / "adapter", mesh=MESH)
    assert there.provenance.adapter == f"me/adapter@{commit}"
    assert there.provenance.adapter_sha256 == here.provenance.adapter_sha256
    assert there.heads.space.sha256 == here.heads.space.sha256
    np.testing.assert_array_equal(there.encode(DNA[:1]), here.encode(DNA[:1]))
    beside = bj.load("random:tiny-v2", seed=3, adapter=f"me/adapter@{commit}", mesh=MESH)
    assert beside.provenance == there.provenance


def test_a_push_that_is_cut_off_leaves_the_repository_as_it_was(hub, model):
    commit = push_to_hub(str(model), "me/model", private=True)
    before = dict(pushed(hub, "me/model"))
    shutil.rmtree(model)
    write_projected_model(model, layers=0, seed=1)
    hub.refused = {"/commit/": 500}
    assert "me/model has all of it or nothing; run `bioscan push` again" in refusal(model, private=True)
    assert pushed(hub, "me/model") == before
    assert len(hub.objects) > 2  # the new weights had been uploaded
    hub.refused = {}
    assert push_to_hub(str(model), "me/model") != commit


def test_refusals(hub, model, tmp_path, monkeypatch):
    assert "nobody may pass on what is derived from it; pass --private true" in refusal(model)
    assert refusal(model, "no name").startswith("--name 'no name' is not a hub id")
    assert "there is no such directory" in refusal(tmp_path / "gone")
    assert "(403); it needs write access to others" in refusal(model, "others/model", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "the hub refused the token for me/model (401)" in refusal(model, private=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    assert refusal(model, private=True).startswith("there is no token")
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    (model / "notes.txt").write_text("mine")
    assert "notes.txt is no part of a model" in refusal(model, private=True)
    (model / "notes.txt").rename(model / "pytorch_model.bin")
    assert "pytorch_model.bin is not safetensors" in refusal(model, private=True)
    (model / "pytorch_model.bin").unlink()
    facts = json.loads((model / "bioscan_jax_export.json").read_text())
    facts["base"]["license"] = "cc-by-nc-sa-4.0"
    (model / "bioscan_jax_export.json").write_text(json.dumps(facts))
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    assert "have cc-by-nc-sa-4.0, which applies to what is derived from them" in refusal(model)
    assert not hub.repositories  # nothing was made for any of these

    (model / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n")
    commit = push_to_hub(str(model), "me/model")
    assert "exists and is public; leave --private out" in refusal(model, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "the hub refused the token for me/model (401)" in refusal(model)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    files = hub.repositories["me/model"].commits[commit]
    del files["bioscan_jax_export.json"]
    files["train.py"] = b""
    assert "me/model holds files of something else (config.json, model.safetensors" in refusal(model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(model) == "HF_HUB_OFFLINE is set, so me/model cannot be pushed; unset it"
    (model / "bioscan_jax_export.json").unlink()
    assert "its base and licence are not known" in refusal(model)
