"""Plans; tests marked `aot` check full-size programs against their memory budgets with the real TPU compiler."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.commands import call
from support.places import ROOT, SCRIPTS

from bioscan_jax import InputError, MeshConfig, ModelConfig, config
from bioscan_jax.cli._command import shipped_configs
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.chips import CHIPS, find_slice
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.model.config import PRESETS
from bioscan_jax.planning import aot
from bioscan_jax.planning.flops import dots
from bioscan_jax.planning.plan import model_size, plan, roofline, write_json
from bioscan_jax.planning.programs import EmbedProgram, FinetuneProgram

TINY = ModelConfig(checkpoint="random:tiny-v1")
BIG = ModelConfig(checkpoint="random:nt-v1-2.5b")
KEYS = {
    *("topology", "devices", "step", "batch", "tokens", "params", "hbm_gib", "hbm_available_gib", "fits"),
    *("matmul_flops", "collectives", "while_loops", "compile_seconds", "roofline_seconds", "vectors_per_hour_bound"),
}


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr("bioscan_jax.planning.plan.has_compiler", lambda: False)


@pytest.fixture
def traced_here(without_compiler, monkeypatch):
    """Traces for eight devices in this process, which has them: another process would import JAX anew."""

    def answer(program, tpu, mesh, traced, compiled):
        assert tpu.devices == jax.device_count()
        return aot._answer(aot._Request(program=program, tpu=tpu, mesh=mesh, traced=tuple(traced), compiled=compiled))

    monkeypatch.setattr("bioscan_jax.planning.plan.trace_and_compile", answer)


def compiles(test):
    """Marks a test that needs libtpu and takes as long as its compiler."""
    return pytest.mark.aot(pytest.mark.timeout(1200)(test))


def script(*flags):
    command = [sys.executable, str(SCRIPTS / "plan.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)


def test_arithmetic_without_the_compiler(traced_here, tmp_path):
    path = tmp_path / "barcodes.parquet"
    pq.write_table(pa.table({"dna_sequence": ["ACGTAC" * 11, "ACGTAC" * 30] * 20}), path)
    data = config.DataConfig(path=str(path))
    settings = config.EmbedConfig(batch_tokens=64, deduplicate=False, strand="both")
    found = plan("v3-32", TINY, data=data, embed=settings, batch=64, tokens=16, params="fsdp")
    values = json.loads(found.to_json())
    assert values.keys() >= KEYS
    assert (values["devices"], values["hosts"], values["params"], values["compiled"]) == (32, 4, "fsdp", False)
    assert values["matmul_flops"] == PRESETS["tiny-v1"].forward_flops(64 * 16, 16)
    assert values["roofline_seconds"] == max(
        values["matmul_flops"] / (32 * 61.5e12), values["arguments_gib"] * 2**30 / 450e9
    )
    assert values["vectors_per_hour_bound"] == pytest.approx(3600 * 32 / values["roofline_seconds"])
    assert [values[key] for key in ("hbm_gib", "fits", "collectives", "while_loops", "compile_seconds")] == [None] * 5
    # 40 sequences on two strands: 12 tokens in rows of 16, and 31 in rows of 32, all batches full or nearly.
    real = sum(PRESETS["tiny-v1"].forward_flops(n, n) for n in [12, 31] * 40)
    computed = sum(
        count * PRESETS["tiny-v1"].forward_flops(shape.rows * shape.tokens, shape.tokens)
        for shape, count in found.workload.batches.items()
    )
    assert values["not_padding"] == real / computed
    assert 0.3 < values["not_padding"] < 1
    write_json(found, str(tmp_path / "plan.json"))
    assert json.loads((tmp_path / "plan.json").read_text()) == values
    with pytest.raises(InputError, match="plan.json: there is no directory"):
        write_json(found, str(tmp_path / "none" / "plan.json"))
    text = str(found)
    assert "fsdp" in text
    assert "40 vectors of 80 rows of 22 tokens on average" in text
    assert "nothing was compiled: libtpu is not installed; pip install 'jax[tpu]==0.10.2'" in text
    assert "compiled for the 8 devices of one host" in text


def test_the_training_step_s_arithmetic(without_compiler, tmp_path):
    """For sixteen devices, and so in a process of its own, as every plan is made outside the tests."""
    path = tmp_path / "barcodes.parquet"
    pq.write_table(pa.table({"dna_sequence": ["ACGTAC" * 11] * 20 + ["ACGTAC" * 31] * 20}), path)
    train = config.TrainConfig(batch_size=20, batch_tokens=64)
    data = config.ExamplesConfig(path=str(path))
    found = plan("v5e-16", TINY, "finetune", data=data, train=train, tokens=32, species=50, mesh=MeshConfig(data=4))
    values = json.loads(found.to_json())
    assert (values["step"], values["devices"], values["batch"], values["hosts"]) == ("finetune", 16, 20, 4)
    flops = PRESETS["tiny-v1"].forward_flops
    # 20 rows are filled up to two for each of 16 devices.
    assert 2.0 * flops(32 * 32, 32) < values["matmul_flops"] < 3.5 * flops(32 * 32, 32)
    assert values["not_padding"] == 20 * (flops(12, 12) + flops(32, 32)) / (flops(32 * 16, 16) + flops(32 * 32, 32))
    assert any("mesh.data 4 is for another slice: planned with 16" in note for note in values["notes"])


def test_arguments_alone_can_be_too_large(traced_here):
    found = plan("v3-8", BIG, "finetune", train=config.TrainConfig(mode="full"), tokens=128, species=9)
    assert found.fits is False
    assert found.traced.argument_bytes > 3 * 4 * 2.5e9
    assert any("--train.remat layer" in note for note in found.notes)
    assert any("--mesh.params fsdp keeps" in note for note in found.notes)


def test_bounds_are_from_the_chip():
    traced = aot.Traced(shape=BatchShape(8, 8), matmul_flops=10**15, matmul_passes=6 * 10**15, argument_bytes=2**30)
    products, memory = roofline(traced, CHIPS["v5e"], 8)
    assert products == 6e15 / (8 * 197e12)
    assert memory == 2**30 / 819e9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topology": "v3-9"}, "--topology 'v3-9' is not a known slice"),
        ({"batch": 100}, "--batch 100 does not split over 8 devices; pass 104"),
        ({"batch": 0}, "--batch 0 is too small; pass at least 1"),
        ({"tokens": 1001}, "--tokens 1001 is outside 2 to the 1000 positions of the model"),
        ({"tokens": 1}, "--tokens 1 is outside 2 to"),
        (
            {"data": config.DataConfig(path="", max_tokens=2000)},
            "--data.max_tokens 2000 is outside 2 to the 1000 positions",
        ),
        ({"mesh": MeshConfig(model=3)}, "--mesh.model 3 does not divide the 8 devices that share a batch"),
        ({"embed": config.EmbedConfig(layer=9)}, "--embed.layer 9 is outside the hidden states 0 to 2"),
        ({"model": ModelConfig(checkpoint="a/b")}, "'a/b' is not a directory here and its size is unknown"),
        (
            {"model": ModelConfig(checkpoint="random:x")},
            "'random:x' is not a directory here .* one of random:nt-v1-500m",
        ),
        (
            {"model": ModelConfig(checkpoint="random:tiny-v1", adapter="x")},
            "--model.adapter cannot be planned",
        ),
        (
            {"model": ModelConfig(checkpoint="random:tiny-v1", attention="splash")},
            "--model.attention splash needs a TPU v4 or newer, not TPU v3; pass auto or dense",
        ),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(InputError, match=message):
        plan(**({"topology": "v3-8", "model": TINY} | settings))


def test_settings_of_the_other_step_are_refused():
    with pytest.raises(InputError, match="--train does not apply to --step embed"):
        plan("v3-8", TINY, train=config.TrainConfig())
    with pytest.raises(InputError, match="--embed does not apply to --step finetune"):
        plan("v3-8", TINY, "finetune", embed=config.EmbedConfig())
    with pytest.raises(InputError, match="--step embed takes data as a DataConfig, not ExamplesConfig"):
        plan("v3-8", TINY, data=config.ExamplesConfig(path="a.parquet"))
    assert call("plan", "--topology=v3-8", "--model.checkpoint=random:tiny-v1", "--species=9").returncode == 2


def test_mistakes_of_training():
    with pytest.raises(InputError, match="--species 0 is too small"):
        plan("v3-8", TINY, "finetune", species=0)
    with pytest.raises(InputError, match="--train.batch_size 0 is too small"):
        plan("v3-8", TINY, "finetune", batch=0)


def test_an_input_error_of_the_compiling_process_is_raised_here():
    program = EmbedProgram(transformer=PRESETS["tiny-v1"], dtype="bfloat16", embed=config.EmbedConfig())
    narrow = dataclasses.replace(program, transformer=dataclasses.replace(program.transformer, hidden_size=60))
    with pytest.raises(InputError, match=r"hidden 60 is not divisible by --mesh.data 8"):
        aot.trace_and_compile(narrow, find_slice("v3-8"), MeshConfig(params="fsdp"), [BatchShape(8, 8)], None)


def test_sizes_come_from_names_or_config_json(tmp_path):
    hub = "InstaDeepAI/nucleotide-transformer-"
    assert model_size(ModelConfig(checkpoint=f"{hub}2.5b-multi-species")) == PRESETS["nt-v1-2.5b"]
    assert model_size(ModelConfig(checkpoint=f"{hub}v2-500m-multi-species")) == PRESETS["nt-v2-500m"]
    (tmp_path / "config.json").write_text(PRESETS["tiny-v2"].to_json())
    assert model_size(ModelConfig(checkpoint=str(tmp_path))) == PRESETS["tiny-v2"]


def test_the_command_reads_every_config_file_of_a_run_and_refuses_in_one_line():
    """The files up to the last flag, which is wrong on purpose: nothing is traced."""
    wrong = {
        ("--step", "x"): "--step 'x' is unknown; pass one of embed, finetune",
        ("--model.checkpoint", "random:tiny-v1"): "--topology required",
        ("--model.checkpoint", "random:tiny-v1", "--topology", "v3-8", "--batch", "x"): "--batch: ",
    }
    for path in shipped_configs().values():
        groups = yaml.safe_load(path.read_text())
        if "model" in groups:
            step = "finetune" if groups.keys() & {"train", "lora", "loss"} else "embed"
            wrong["--step", step, "--config", str(path), "--topology", "v3-8", "--tokens", "1"] = (
                "--model.checkpoint default has no layers" if path.stem == "demo" else "--tokens 1 is outside"
            )
    assert len(wrong) > 6
    for flags, message in wrong.items():
        done = call("plan", *flags)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {message}")
        assert done.stderr.count("\n") == 1


def test_a_demonstration_is_planned_before_its_barcodes_are_there(traced_here, tmp_path):
    (tmp_path / "demo.yaml").write_text(
        f"model: {{checkpoint: 'random:tiny-v1'}}\ndata: {{path: {tmp_path}/absent.parquet}}\nsimulate: {{}}\n"
    )
    ran = call("plan", "--config", tmp_path / "demo.yaml", "--topology", "v5e-8", "--json")
    assert ran.returncode == 0, ran.stderr
    assert "absent.parquet is not simulated yet: planned without the lengths of its barcodes\n" in ran.stderr
    assert json.loads(ran.stdout)["not_padding"] is None


@compiles
@pytest.mark.parametrize("topology", ["v3-8", "v5e-8"])
@pytest.mark.parametrize(("rows", "tokens", "most"), [(128, 1000, 7.0), (1024, 128, 6.0)])
def test_2_5b_embeds_replicated(topology, rows, tokens, most, tmp_path):
    """By the script and the shipped config, as people run it."""
    path = ROOT / "configs" / "embed_nt_2.5b_v3-8.yaml"
    flags = ["--config", str(path), "--topology", topology, "--batch", str(rows), "--tokens", str(tokens)]
    ran = script("--step", "embed", *flags, "--params", "replicated", "--json")
    assert ran.returncode == 0, ran.stderr
    values = json.loads(ran.stdout)
    assert values["compiled"]
    assert values["fits"]
    assert values["hbm_gib"] <= most
    assert values["collectives"] == []
    assert (values["while_loops"], values["trip_counts"]) == (1, [32])
    analytic = rows * tokens * (2 * 2.517e9 + 32 * 4 * tokens * 2560)
    assert values["matmul_flops"] == pytest.approx(analytic, rel=1e-3)
    assert values["vectors_per_hour_bound"] == pytest.approx(3600 * rows / values["roofline_seconds"])


@compiles
@pytest.mark.parametrize("topology", ["v3-8", "v5e-8"])
def test_2_5b_embeds_fully_sharded(topology):
    found = plan(topology, BIG, batch=128, tokens=1000, params="fsdp")
    assert isinstance(found.compiled, aot.Compiled)
    assert found.hbm_gib <= 2.6
    assert found.compiled.trip_counts == (32,)
    layer = PRESETS["nt-v1-2.5b"].layer_matmul_parameters * 2
    gathers = [one for one in found.compiled.collectives if one.kind == "all-gather" and one.in_loop]
    assert 1 <= len(gathers) <= 7
    assert sum(one.bytes for one in gathers) <= 1.01 * layer
    assert not [one for one in found.compiled.collectives if one.kind not in ("all-gather", "all-reduce")]
    # The compiler gathers biases and norms by summing zeros: no activation is as small.
    assert sum(one.bytes for one in found.compiled.collectives if one.kind == "all-reduce") < 16 * 2 * 2560


def big_finetuning(remat):
    return FinetuneProgram(
        transformer=PRESETS["nt-v1-2.5b"],
        dtype="bfloat16",
        lora=config.LoRAConfig(),
        loss=config.LossConfig(),
        train=config.TrainConfig(remat=remat),
        species=10_000,
    )


@pytest.mark.parametrize(("remat", "most"), [("none", 2.1), ("layer", 2.8)])
def test_2_5b_lora_makes_no_gradients_of_frozen_weights(remat, most):
    step, arguments = big_finetuning(remat).build(make_layout(MeshConfig()), BatchShape(32, 1000))
    forward = PRESETS["nt-v1-2.5b"].forward_flops(32 * 1000, 1000)
    assert forward < sum(dot.flops for dot in dots(step.trace(*arguments).jaxpr)) <= most * forward


@compiles
@pytest.mark.parametrize("topology", ["v3-8", "v5e-8"])
def test_2_5b_trains_adapters(topology):
    train = config.TrainConfig(remat="layer")
    found = plan(topology, BIG, "finetune", train=train, batch=32, tokens=1000, params="replicated")
    assert isinstance(found.compiled, aot.Compiled)
    assert found.hbm_gib <= 8.2
    assert found.compiled.trip_counts == (32, 32)
    params = big_finetuning("layer").build(make_layout(MeshConfig()), BatchShape(32, 1000))[1][0]
    trained = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    reduced = [one for one in found.compiled.collectives if one.kind == "all-reduce"]
    assert {one.dtype for one in reduced} == {"f32"}
    assert sum(one.bytes * (32 if one.in_loop else 1) for one in reduced) == pytest.approx(trained, rel=0.05)
    assert not [one for one in found.compiled.collectives if one.kind == "all-to-all"]


@compiles
def test_a_batch_that_does_not_fit_is_answered_with_one_that_does():
    found = plan("v3-8", BIG, batch=1024, tokens=1000)
    assert isinstance(found.compiled, aot.TooLarge)
    assert found.fits is False
    fits, over = found.largest
    assert 512 <= fits < over <= 1024
    assert plan("v3-8", BIG, batch=fits, tokens=1000).fits
    assert f"--embed.batch_tokens {fits // 8 * 1000}" in str(found)
    assert "--mesh.params fsdp keeps 0.59 GiB per device instead of 4.71" in str(found)


@compiles
def test_the_table_of_chips_is_the_compiler_s():
    """Devices, their kind, and the memory that the compiler reports when a program needs too much."""
    program = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from bioscan_jax.devices.chips import CHIPS, Slice
found = {}
for name, chip in CHIPS.items():
    for number, shape in chip.slices.items():
        topology, options = Slice(name, shape).topology
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
        hosts = len({device.process_index for device in devices})
        found[f"{name}-{number}"] = [len(devices), hosts, devices[0].device_kind]
        if number != 8:
            continue
        mesh = jax.sharding.Mesh(np.array(devices), ("x",))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        huge = jax.jit(lambda x: jnp.sort(jnp.sin(x[:, None] * x[None, :]), axis=0))
        try:
            huge.lower(jax.ShapeDtypeStruct((1 << 18,), jnp.float32, sharding=whole)).compile()
        except jax.errors.JaxRuntimeError as error:
            found[name] = float(re.search(r"available HBM \\(([\\d.]+)G\\)", str(error)).group(1))
print(json.dumps(found))
"""
    environment = os.environ | aot.ENVIRONMENT
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900, env=environment)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    for name, chip in CHIPS.items():
        assert found[name] == chip.hbm_gib
        for number in chip.slices:
            tpu = find_slice(f"{name}-{number}")
            assert found[f"{name}-{number}"] == [tpu.devices, tpu.hosts, chip.device_kind]


@compiles
@pytest.mark.parametrize("topology", ["v4-8", "v5p-8", "v6e-8"])
def test_other_generations_compile_a_small_model(topology):
    found = plan(topology, TINY, batch=64, tokens=128)
    assert isinstance(found.compiled, aot.Compiled)
    assert found.fits
    assert found.compiled.collectives == ()
    assert found.compiled.trip_counts == (2,)
    np.testing.assert_allclose(found.compiled.arguments, found.traced.argument_bytes, rtol=0.5)


@compiles
def test_the_attention_asked_for_is_the_one_compiled():
    """Rows of 1000 tokens on v5e: dense holds the logits of all heads, splash does not, and `auto` is splash."""
    asked = [dataclasses.replace(TINY, attention=kind) for kind in ("dense", "splash", "auto")]
    found = [plan("v5e-8", model, batch=128, tokens=1000) for model in asked]
    dense, splash, auto = (one.compiled.temporaries for one in found)
    assert splash == auto < 0.8 * dense
    assert len({one.traced.matmul_flops for one in found}) == 1


@compiles
def test_no_second_copy_of_the_weights_is_kept():
    """Without recomputation the backward pass keeps activations; the layers' gathered weights would be 5 GB more."""
    assert plan("v3-8", BIG, "finetune", batch=32, tokens=128).hbm_gib <= 9.0
