"""bioscan doctor: what it says of devices, versions, credentials, disks and the step, and its exit codes."""

import dataclasses
import json
import socket
import time

import jax
import pytest
from support.commands import call

from bioscan_jax import config
from bioscan_jax.devices.chips import find_slice
from bioscan_jax.devices.memory import Memory
from bioscan_jax.errors import InputError
from bioscan_jax.model.config import PRESETS
from bioscan_jax.planning import doctor, probe
from bioscan_jax.planning.doctor import Diagnosis, Finding, Run
from bioscan_jax.planning.probe import Devices, Failure, ask
from bioscan_jax.planning.programs import EmbedProgram, FinetuneProgram

CPU = Devices(platform="cpu", kind="cpu", count=1, memory=Memory(16 << 30, 8 << 30))
TPU = Devices(platform="tpu", kind="TPU v3", count=8, memory=Memory(16 << 30, 16 << 30))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def machine(monkeypatch):
    """Pretends that there are accelerators, and that nothing limits JAX to some."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    def has(**chips: int) -> None:
        monkeypatch.setattr(doctor, "accelerators", lambda: chips)

    return has


@pytest.mark.parametrize(
    ("chips", "found", "level", "words"),
    [
        ({}, CPU, "ok", ["1 x cpu", "16.0 GiB", "no TPU, no GPU"]),
        ({"tpu": 8}, TPU, "ok", ["8 x TPU v3 (tpu), 16.0 GiB each"]),
        ({"tpu": 4}, CPU, "problem", ["4 TPU chips", "libtpu is not installed", "pip install 'jax[tpu]'"]),
        ({"gpu": 1}, CPU, "problem", ["1 NVIDIA GPUs", "no CUDA plugin", "pip install 'jax[cuda12]'"]),
        ({"tpu": 4}, Failure(""), "problem", ["no answer within", "another process may hold the TPU"]),
        (
            {"tpu": 4},
            Failure("RuntimeError: The TPU is already in use by process with pid 77"),
            "problem",
            ["pid 77", "end the other process"],
        ),
    ],
    ids=["a laptop", "a TPU", "no libtpu", "no CUDA plugin", "a TPU that does not answer", "a busy TPU"],
)
def test_devices(machine, monkeypatch, chips, found, level, words):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    machine(**chips)
    finding = doctor._devices(found)
    assert finding.level == level
    missing = [word for word in words if word not in f"{finding.text}; {finding.fix}"]
    assert not missing, (missing, finding)


def test_devices_that_the_user_left_out_are_a_warning(machine, monkeypatch):
    machine(tpu=8)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    finding = doctor._devices(CPU)
    assert finding.level == "warning"
    assert "JAX_PLATFORMS=cpu leaves out; unset it" in f"{finding.text}; {finding.fix}"


def test_the_reason_why_jax_fell_back_is_told(machine, monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    machine(tpu=4)
    finding = doctor._devices(
        dataclasses.replace(CPU, errors={"tpu": "The TPU is already in use by process with pid 7"})
    )
    assert finding.level == "problem"
    assert "4 TPU chips (The TPU is already in use by process with pid 7)" in finding.text
    assert "end the process" in finding.fix


def test_nothing_is_waited_for_longer_than_said(monkeypatch):
    assert ask(None, 0.05) == Failure("")  # a new process cannot have imported JAX by then
    assert doctor._within(0.05, time.sleep, 600) is None
    monkeypatch.setattr(doctor, "DISK_SECONDS", 0.05)
    monkeypatch.setattr(doctor, "bytes_below", lambda directory: time.sleep(600))
    assert doctor._cache("downloads", doctor.downloads_directory(), "").level == "warning"


def test_a_process_that_has_the_devices_asks_itself(monkeypatch):
    """As a notebook on a TPU, which no other process can use meanwhile."""
    jax.devices()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(probe.subprocess, "Popen", None)
    found = ask(None, 60.0)
    assert isinstance(found, Devices)
    assert found.count == jax.local_device_count()


def test_a_requirement_that_is_violated(monkeypatch):
    assert doctor._versions().level == "ok"
    wanted = {"bioscan_jax": ["jax>=0.10.2", "lancedb>=999", "no-such-package>=2", "torch>=999; extra == 'parity'"]}
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted.get(name, []))
    finding = doctor._versions()
    assert finding.level == "problem"
    assert "no-such-package is not installed" in finding.text
    assert finding.fix == "pip install 'lancedb>=999' 'no-such-package>=2'"


def test_credentials_are_found_without_network_and_never_shown(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    secrets = {"HF_TOKEN": "hf_" + "s" * 34, "WANDB_API_KEY": "k" * 40}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "key.json"
    file.write_text(json.dumps({"type": "service_account", "private_key": "very secret"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    remotes = tmp_path / "rclone.conf"
    remotes.write_text("[drive]\ntype = drive\ntoken = very secret\n")
    monkeypatch.setenv("RCLONE_CONFIG", str(remotes))
    run = Run(model=config.ModelConfig(checkpoint="OWNER/NAME", revision=COMMIT))
    found = {one.subject: one for one in (*doctor._credentials(run), *doctor._model(run, run.model))}
    text = str(Diagnosis(tuple(found.values())))
    assert {found[name].level for name in ("hub token", "W&B", "Google", "rclone")} == {"ok"}
    assert "service_account" in text
    assert not [secret for secret in (*secrets.values(), "very secret") if secret in text]
    assert found["weights"].level == "problem"  # the tests set HF_HUB_OFFLINE
    assert "unset HF_HUB_OFFLINE" in found["weights"].fix
    monkeypatch.setenv("HF_TOKEN", "my password")
    file.write_text("{")
    again = list(doctor._credentials(run))
    assert [one.level for one in again if one.subject in ("hub token", "Google")] == ["warning"] * 2


def test_room_is_that_of_the_nearest_directory(tmp_path):
    (tmp_path / "file").touch()
    sinks = [config.SinkConfig(uri=str(tmp_path / name / "db")) for name in ("new", "file")]
    levels = [next(iter(doctor._space(Run(sink=sink)))).level for sink in sinks]
    assert levels[1] == "problem"
    assert levels[0] != "problem"


@pytest.mark.parametrize(("free", "level"), [(10 << 20, "problem"), (1 << 30, "warning"), (1 << 40, "ok")])
def test_a_disk_without_room_is_a_problem(monkeypatch, free, level):
    monkeypatch.setattr(doctor, "_room", lambda directory: (directory, 1, free, True))
    assert next(iter(doctor._space(Run(sink=config.SinkConfig(uri="db"))))).level == level


def test_an_input_that_is_not_there_is_a_problem(tmp_path):
    (tmp_path / "x.fasta").write_text(">a\nACGT\n")
    assert doctor._input(str(tmp_path / "x.fasta")).level == "ok"
    missing = doctor._input(str(tmp_path / "none.parquet"))
    assert (missing.level, "nothing found at" in missing.text) == ("problem", True)
    assert doctor._input("gs://b/x").level == "ok"


STEPS = {
    "embed": EmbedProgram(transformer=PRESETS["tiny-v2"], dtype="auto", embed=config.EmbedConfig(batch_tokens=4096)),
    "finetune": FinetuneProgram(
        transformer=PRESETS["tiny-v2"],
        dtype="auto",
        lora=config.LoRAConfig(),
        loss=config.LossConfig(),
        train=config.TrainConfig(batch_size=64, batch_tokens=4096),
        species=50,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STEPS))
def test_the_batch_that_fits_is_one_that_the_compiler_says_fits(monkeypatch, name):
    program, mesh = STEPS[name], config.MeshConfig(data=2, compilation_cache=None)
    compiled, needed = [], probe.find_fit

    def spy(compile_step, shape, devices, free, **rest):
        compiled.append(compile_step)
        return needed(compile_step, shape, devices, free, **rest)

    monkeypatch.setattr(probe, "find_fit", spy)
    monkeypatch.setattr(probe, "device_memory", lambda device: Memory(8 << 20, 8 << 20))
    found = probe._fit(probe.Step(program=program, mesh=mesh, rows=64, tokens=128))
    assert (found.shape.rows, found.shape.tokens, found.dtype) == (64, 128, "float32")
    assert found.found is not None
    assert not found.found.fits
    flag = "embed.batch_tokens" if name == "embed" else "train.batch_tokens"
    train = None if name == "embed" else program.train
    finding = doctor._verdict(found, found.found.rows, flag, Run(train=train))
    assert finding.level == "problem"
    if found.found.rows:
        smaller = probe.BatchShape(2 * found.found.rows, 128)
        memory = compiled[0](smaller).memory_analysis()
        assert memory.temp_size_in_bytes + memory.argument_size_in_bytes <= found.found.available
        assert f"--{flag} {found.found.rows * 128}" in finding.fix


def test_what_the_run_itself_would_refuse_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "ask", lambda step, seconds: InputError("--mesh.data 99 needs more"))
    model = config.ModelConfig(checkpoint="random:tiny-v2")
    [finding] = doctor._fit(Run(), model, CPU)
    assert (finding.level, finding.text) == ("problem", "--mesh.data 99 needs more")
    [finding] = doctor._fit(Run(data=config.DataConfig(path="x", max_tokens=1 << 20)), model, CPU)
    assert (finding.level, "exceeds the" in finding.text) == ("problem", True)
    monkeypatch.setattr(doctor, "ask", lambda step, seconds: Failure(""))
    [finding] = doctor._fit(Run(), config.ModelConfig(checkpoint="random:nt-v1-2.5b"), TPU)
    assert finding.level == "warning"
    assert "the weights alone take 4.7" in finding.text
    [finding] = doctor._fit(Run(), config.ModelConfig(checkpoint="default"), CPU)
    assert (finding.level, finding.text) == ("ok", "it fits any device, and there is nothing to plan")


@pytest.mark.parametrize(("gib", "level"), [(3.0, "ok"), (40.0, "problem"), (None, "warning")])
def test_a_slice_that_is_elsewhere_is_planned(monkeypatch, gib, level):
    """The plan itself is tested with the compiler elsewhere; here, what is asked of it and made of its answer."""
    asked, tpu = {}, find_slice("v3-8")

    class Found:
        fits = None if gib is None else gib < tpu.chip.hbm_gib
        hbm_gib, notes, shape = gib, ("smaller batch: --embed.batch_tokens 64",), probe.BatchShape(64, 100)
        traced = type("Traced", (), {"argument_bytes": 1 << 30})

    Found.tpu = tpu
    monkeypatch.setattr(doctor, "plan", lambda *words, **flags: asked.update(flags, words=words) or Found)
    run = Run(data=config.DataConfig(path="x", max_tokens=100), topology="v3-8")
    [finding] = doctor._fit(run, config.ModelConfig(checkpoint="random:tiny-v2"), CPU)
    assert finding.level == level
    assert "64 x 100 tokens on v3-8" in finding.text
    assert ("--embed.batch_tokens 64" in finding.fix) == (level != "ok")
    assert (asked["words"][0], asked["data"].max_tokens, asked["data"].path) == ("v3-8", 100, "")


def test_exit_codes(monkeypatch):
    """0 and 1 are what doctor found; 2 is a wrong flag, as everywhere."""
    monkeypatch.setattr("bioscan_jax.planning.doctor.doctor", lambda run: Diagnosis((Finding("x", level, str(run)),)))
    for level, code in (("ok", 0), ("warning", 0), ("problem", 1)):
        done = call("doctor", "--config", "finetune_demo", "--train.batch_size", "8")
        assert (done.returncode, done.stdout.split()[0]) == (code, level)
        assert "batch_size=8" in done.stdout
    done = call("doctor", "--json", "--sink.uri", "db")
    assert json.loads(done.stdout)["ok"] is False
    for words in (["--bogus", "3"], ["--config", "finetune_demo", "--train.bogus", "3"], ["--step", "x"]):
        done = call("doctor", *words)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.slow
def test_the_whole_command():
    flags = ["--model.checkpoint=random:tiny-v2", "--data.path=demo:coi", "--data.max_tokens=128"]
    flags.append("--embed.batch_tokens=1024")
    good = call("doctor", *flags, "--json")
    found = {one["subject"]: one for one in json.loads(good.stdout)["findings"]}
    assert found["devices"]["text"].startswith(f"{jax.local_device_count()} x cpu")
    assert found["fit"]["level"] == "ok"
    assert good.returncode == (0 if json.loads(good.stdout)["ok"] else 1)
    bad = call("doctor", *flags, "--mesh.data=99")
    assert bad.returncode == 1
    assert "--mesh.data 99" in bad.stdout
