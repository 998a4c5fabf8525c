"""Examines this machine and a run's settings, without network: what would stop the run, and what to change.

Whatever may block (a busy TPU, a mount that does not answer) is asked with a time limit.
"""

import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from packaging.requirements import Requirement

from bioscan_jax import config
from bioscan_jax.cache import BOUND, bytes_below, cache_bound, cache_directory, downloads_directory
from bioscan_jax.checkpoints.hub import DEFAULT, cached_checkpoint
from bioscan_jax.checkpoints.load import RANDOM
from bioscan_jax.dashboard import has_key
from bioscan_jax.data.files import find_files
from bioscan_jax.devices.compile_cache import MOST_BYTES
from bioscan_jax.devices.memory import Memory, host_memory
from bioscan_jax.embedding.fitting import NO_ROW_FITS
from bioscan_jax.embedding.summary import VERSIONED
from bioscan_jax.errors import InputError
from bioscan_jax.location import is_remote, local_directory
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.notebook import Shown
from bioscan_jax.planning.plan import SPECIES, model_size, plan
from bioscan_jax.planning.probe import Devices, Failure, Step, StepFit, ask
from bioscan_jax.planning.programs import EmbedProgram, FinetuneProgram

DEVICE_SECONDS = 90.0
"""Most seconds for the devices to start; a TPU takes about ten."""
FIT_SECONDS = 300.0
"""Most seconds to compile the step."""
DISK_SECONDS = 10.0
"""Most seconds for a disk, a mount or a cache to be looked at."""
_GIB = 2**30
_LITTLE_MEMORY = 2 * _GIB
_LITTLE_SPACE = 2 * _GIB
_NO_SPACE = 64 << 20
_GOOGLE, _NVIDIA = "0x1ae0", "0x10de"
_TPUS = {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
"""PCI devices of Google that are TPUs (v2 and v3, v4, v5p, v5e, v6e, v7), as in jax._src.hardware_utils."""
_GPU_CLASSES = ("0x0300", "0x0302")
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
Level = Literal["ok", "warning", "problem"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis."""

    subject: str
    level: Level
    text: str
    fix: str = ""
    """What to change; empty where nothing is wrong."""


@dataclass(frozen=True)
class Diagnosis(Shown):
    """What `doctor` found; prints as a table.

    Example:
        >>> print(Diagnosis((Finding("devices", "warning", "8 x cpu", "unset JAX_PLATFORMS"),)))
        warning  devices  8 x cpu; unset JAX_PLATFORMS
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing would stop the run."""
        return all(finding.level != "problem" for finding in self.findings)

    def __str__(self) -> str:
        """Returns the table for the terminal."""
        width = max((len(finding.subject) for finding in self.findings), default=0)
        return "\n".join(
            f"{one.level:7}  {one.subject:{width}}  {one.text}{'; ' * bool(one.fix)}{one.fix}" for one in self.findings
        )

    def to_json(self) -> str:
        """Returns the findings as JSON."""
        return json.dumps({"ok": self.ok, "findings": [dataclasses.asdict(one) for one in self.findings]}, indent=2)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of a run that concern the machine."""

    model: config.ModelConfig | None = None
    data: config.DataConfig | config.ExamplesConfig | None = None
    sink: config.SinkConfig | None = None
    embed: config.EmbedConfig = field(default_factory=config.EmbedConfig)
    lora: config.LoRAConfig = field(default_factory=config.LoRAConfig)
    loss: config.LossConfig = field(default_factory=config.LossConfig)
    train: config.TrainConfig | None = None
    """Given for finetune, absent for embed."""
    tracking: config.TrackingConfig | None = None
    mesh: config.MeshConfig = field(default_factory=config.MeshConfig)
    simulated: bool = False
    """The run writes its input itself."""
    topology: str | None = None
    """A slice of TPUs that the run is meant for, such as v3-8, in place of the devices that are here."""

    @property
    def places(self) -> dict[str, str]:
        """Where it reads and writes, by flag."""
        given = {
            "model.checkpoint": self.model and self.model.checkpoint,
            "model.adapter": self.model and self.model.adapter,
            "data.path": self.data and self.data.path,
            "data.scratch": self.data and self.data.scratch,
            "sink.uri": self.sink and self.sink.uri,
            "train.output_dir": self.train and self.train.output_dir,
            "mesh.compilation_cache": self.mesh.compilation_cache,
        }
        return {flag: place for flag, place in given.items() if place}


def doctor(run: Run | None = None) -> Diagnosis:
    """Examines devices, memory, versions, caches, disks and credentials, and whether a run's step fits.

    Uses no network, changes nothing and prints no secret. It takes as long as JAX needs to start the devices and to
    compile the step, and no longer than `DEVICE_SECONDS` and `FIT_SECONDS`.

    Args:
        run: The run's settings; without a model only the machine is examined.
    """
    run, devices = run or Run(), ask(None, DEVICE_SECONDS)
    findings = [_devices(devices), _host(), _versions(), *_caches(run), *_space(run), *_credentials(run)]
    if run.data is not None and run.data.path and not run.simulated:
        findings.append(_input(run.data.path))
    if run.model is not None:
        findings += _model(run, run.model)
        findings += _fit(run, run.model, devices)
    return Diagnosis(tuple(findings))


def _within(seconds: float, function: Callable[..., Value], *arguments: object) -> Value | None:
    """Returns what a function returns, or None if it takes longer or fails; a mount may never answer.

    Raises:
        InputError: The function raised it.
    """
    found: list[Value] = []
    refused: list[InputError] = []

    def look() -> None:
        try:
            found.append(function(*arguments))
        except InputError as error:
            refused.append(error)
        except OSError:
            return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds)
    if refused:
        raise refused[0]
    return found[0] if found else None


def _pci(vendor: str) -> list[tuple[str, str]]:
    """Returns device id and class of the PCI devices of a vendor."""
    found = []
    for directory in Path("/sys/bus/pci/devices").glob("*"):
        try:
            names = [(directory / name).read_text().strip() for name in ("vendor", "device", "class")]
        except OSError:
            continue
        if names[0] == vendor:
            found.append((names[1], names[2]))
    return found


def accelerators() -> dict[str, int]:
    """Returns how many TPU chips and NVIDIA GPUs this machine has, by platform, whether or not JAX can use them."""
    tpus = sum(device in _TPUS for device, _ in _pci(_GOOGLE)) or len(list(Path("/dev").glob("accel[0-9]*")))
    gpus = sum(kind.startswith(_GPU_CLASSES) for _, kind in _pci(_NVIDIA))
    gpus = gpus or len(list(Path("/dev").glob("nvidia[0-9]*")))
    return {platform: count for platform, count in (("tpu", tpus), ("gpu", gpus)) if count}


def _devices(found: Devices | StepFit | Failure | InputError) -> Finding:
    """Says which devices JAX uses: TPU, then GPU, then CPU; and why not those that are there."""
    there, wanted = accelerators(), os.environ.get("JAX_PLATFORMS", "")
    if not isinstance(found, Devices):
        text = found.text if isinstance(found, Failure) else str(found)
        if not text:
            text, fix = f"no answer within {DEVICE_SECONDS:.0f} s", "another process may hold the TPU: end that"
        elif re.search("already in use|libtpu lockfile|Device or resource busy", text):
            fix = "end the other process that uses the TPU; only one can"
        else:
            fix = "set JAX_PLATFORMS=cpu to run without them" if there or wanted else "install jax again"
        return Finding("devices", "problem", f"JAX cannot start its devices ({text})", fix)
    memory = "" if found.memory is None else f", {found.memory.total / _GIB:.1f} GiB each"
    text = f"{found.count} x {found.kind} ({found.platform}){memory}"
    unused = next((name for name in ("tpu", "gpu") if name in there and found.platform not in ("tpu", name)), None)
    if unused is None:
        return Finding("devices", "ok", text + ("; no TPU, no GPU" if found.platform == "cpu" and not there else ""))
    text = f"{text}, but there are {there[unused]} {'TPU chips' if unused == 'tpu' else 'NVIDIA GPUs'}"
    why = found.errors.get("tpu" if unused == "tpu" else "cuda")
    why = "" if why is None else f" ({why})"
    if wanted and not {unused, "cuda" if unused == "gpu" else unused} & set(wanted.split(",")):
        return Finding("devices", "warning", f"{text}, which JAX_PLATFORMS={wanted} leaves out", "unset it to use them")
    if unused == "tpu":
        missing = importlib.util.find_spec("libtpu") is None
        fix = "pip install 'jax[tpu]'" if missing else "end the process that uses them, or restart the machine"
        return Finding("devices", "problem", f"{text}{', and libtpu is not installed' if missing else why}", fix)
    missing = not any(importlib.util.find_spec(name) for name in _PLUGINS)
    fix = "pip install 'jax[cuda12]'" if missing else "check the driver with nvidia-smi"
    return Finding("devices", "problem", f"{text}{', and jax has no CUDA plugin' if missing else why}", fix)


def _host() -> Finding:
    memory, cores = host_memory(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{cores} cores, {memory.free / _GIB:.1f} of {memory.total / _GIB:.1f} GiB of memory free"
    if memory.free < _LITTLE_MEMORY:
        return Finding("host", "warning", text, "end other programs, or take a machine with more memory")
    return Finding("host", "ok", text)


def _versions() -> Finding:
    """Compares what is installed with what this package and jax require; extras count where they are installed."""
    versions = {"Python": platform.python_version()} | {name: metadata.version(name) for name in VERSIONED}
    violated = [*_violated("bioscan_jax"), *_violated("jax")]
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    if not violated:
        return Finding("versions", "ok", text)
    words = [f"{one.name} {installed or 'is not installed'}" for one, installed in violated]
    wanted = " ".join(f"'{one.name}{one.specifier}'" for one, _ in violated)
    return Finding("versions", "problem", f"{', '.join(words)} ({text})", f"pip install {wanted}")


def _violated(package: str) -> Iterator[tuple[Requirement, str | None]]:
    """Yields the requirements of a package that are not met, and the version that is installed."""
    for text in metadata.requires(package) or ():
        requirement = Requirement(text)
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if optional and not re.search(r"extra == ['\"](tpu|cuda12|cuda13)['\"]", str(requirement.marker)):
            continue
        if not optional and requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = None
        if installed is None and optional:
            continue
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            yield requirement, installed


def _caches(run: Run) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    yield _cache("hub cache", Path(HF_HUB_CACHE), "`hf cache ls` and `hf cache rm` prune it")
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or run.mesh.compilation_cache
    if compiled is None:
        yield Finding("compile cache", "ok", "none: --mesh.compilation_cache null")
    elif is_remote(compiled):
        yield Finding("compile cache", "ok", f"{compiled}: not on this machine")
    else:
        ours = "JAX_COMPILATION_CACHE_DIR" not in os.environ
        bound = f"at most {MOST_BYTES >> 30} GiB (JAX_COMPILATION_CACHE_MAX_SIZE); " if ours else ""
        yield _cache("compile cache", Path(compiled).expanduser(), f"{bound}it may be removed at any time")
    try:
        bound = f"at most {cache_bound() / 1e9:g} GB ({BOUND})"
    except InputError as error:
        yield Finding("downloads", "problem", str(error))
    else:
        yield _cache("downloads", downloads_directory(), bound)


def _cache(subject: str, directory: Path, pruning: str) -> Finding:
    size = _within(DISK_SECONDS, bytes_below, directory)
    if size is None:
        text = f"{directory} was not measured within {DISK_SECONDS:.0f} s"
        return Finding(subject, "warning", text, "it is very large, or its mount does not answer")
    return Finding(subject, "ok", f"{directory}: {size / 1e9:.2f} GB; {pruning}")


def _space(run: Run) -> Iterator[Finding]:
    """Says how much room there is where the run and its caches write, once for each disk."""
    written = ("sink.uri", "train.output_dir", "data.scratch", "mesh.compilation_cache")
    places = {f"--{flag}": place for flag, place in run.places.items() if flag in written}
    places["the cache"] = str(cache_directory())
    seen: set[int] = set()
    for flag, place in places.items():
        if is_remote(place):
            continue
        directory = local_directory(place)
        found = None if directory is None else _within(DISK_SECONDS, _room, directory)
        if found is None:
            yield Finding("space", "problem", f"{flag} {place}: the disk or mount does not answer", "mount it again")
            continue
        existing, device, free, writable = found
        if not writable:
            yield Finding("space", "problem", f"{flag} {place}: {existing} may not be written", "pass another place")
        elif device not in seen:
            text = f"{free / 1e9:.1f} GB free at {existing} ({flag})"
            level = "problem" if free < _NO_SPACE else "warning" if free < _LITTLE_SPACE else "ok"
            yield Finding("space", level, text, "" if level == "ok" else "free space or pass another place")
        seen.add(device)


def _room(directory: Path) -> tuple[Path, int, int, bool]:
    """Returns the nearest directory that exists, its disk, the free bytes there and whether it may be written."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return existing, existing.stat().st_dev, shutil.disk_usage(existing).free, writable


def _credentials(run: Run) -> Iterator[Finding]:
    """Says which credentials are there and look right; none is shown, sent or tried."""
    schemes = {place.partition("://")[0] for place in run.places.values() if "://" in place}
    yield _hub_token()
    online = run.tracking is not None and run.tracking.mode == "online"
    has = bool(_within(DISK_SECONDS, has_key))
    text = "a key was found" if has else "no key: finetune logs offline"
    fix = "run `wandb login`, or pass --tracking.mode offline" if online and not has else ""
    yield Finding("W&B", "problem" if fix else "ok", text, fix)
    yield _google(needed=bool(schemes & {"gs", "gcs"}))
    if "s3" in schemes:
        there = bool(os.environ.get("AWS_ACCESS_KEY_ID")) or Path("~/.aws/credentials").expanduser().is_file()
        text = "credentials were found" if there else "no key in AWS_ACCESS_KEY_ID or ~/.aws/credentials"
        yield Finding("S3", *_driver("s3fs", "warning" if not there else "ok", text))
    yield _rclone()


def _driver(package: str, level: Level, text: str) -> tuple[Level, str, str]:
    """Returns a finding's level, text and fix; a driver that is missing is a problem."""
    if importlib.util.find_spec(package) is None:
        return "problem", f"{package} is not installed", f"pip install {package}"
    return level, text, ""


def _hub_token() -> Finding:
    from huggingface_hub import get_token

    token = _within(DISK_SECONDS, get_token)  # Colab's secrets are asked of its browser tab
    if token is None:
        return Finding("hub token", "ok", "none: public models only")
    if not re.fullmatch(r"hf_[A-Za-z0-9]{20,}|hf_oauth_\S+|hf_jwt_\S+", token):
        fix = "run `hf auth login`, or fix HF_TOKEN"
        return Finding("hub token", "warning", "a token was found, but it does not look like one", fix)
    return Finding("hub token", "ok", "found; whether it is valid only the hub knows")


def _google(*, needed: bool) -> Finding:
    """Looks for Google's application default credentials."""
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    home = Path(os.environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud").expanduser()
    file = Path(named) if named else home / "application_default_credentials.json"
    level: Level = "warning" if needed else "ok"
    text, fix = f"none in {file}", "run `gcloud auth application-default login`" if needed else ""
    if file.is_file():
        try:
            kind = json.loads(file.read_text())["type"]
            level, text, fix = "ok", f"{kind} in {file}", ""
        except (OSError, ValueError, LookupError, TypeError):
            level, text, fix = "problem" if needed else "warning", f"{file} is damaged", "log in again"
    elif named:
        level, text = "problem" if needed else "warning", f"GOOGLE_APPLICATION_CREDENTIALS={named}: no such file"
    elif "Google" in (_within(1.0, Path("/sys/class/dmi/id/product_name").read_text) or ""):
        level, text, fix = "ok", "those of this Google machine's service account", ""
    if needed and importlib.util.find_spec("gcsfs") is None:
        return Finding("Google", *_driver("gcsfs", level, text))
    return Finding("Google", level, text, fix)


def _rclone() -> Finding:
    if shutil.which("rclone") is None:
        return Finding("rclone", "ok", "not installed; only rclone:REMOTE:PATH needs it")
    named = os.environ.get("RCLONE_CONFIG")
    file = Path(named) if named else Path("~/.config/rclone/rclone.conf").expanduser()
    if not file.is_file():
        return Finding("rclone", "ok", f"no remotes: there is no {file}; `rclone config` makes it")
    try:
        remotes = re.findall(r"^\[(.+)\]$", file.read_text(), re.M)
    except (OSError, UnicodeDecodeError):
        return Finding("rclone", "warning", f"{file} cannot be read", "run `rclone config`")
    return Finding(
        "rclone", "ok", f"{len(remotes)} remotes: {', '.join(remotes)}" if remotes else f"no remotes in {file}"
    )


def _input(path: str) -> Finding:
    """Says whether the input is there; one in a bucket is not asked for."""
    if is_remote(path):
        return Finding("input", "ok", f"{path}: not on this machine, and not asked")
    try:
        found = _within(DISK_SECONDS, find_files, path)
    except InputError as error:
        return Finding("input", "problem", str(error))
    if found is None:
        return Finding(
            "input", "warning", f"{path}: not listed within {DISK_SECONDS:.0f} s", "see if its mount answers"
        )
    return Finding("input", "ok", f"{path}: {len(found.paths):,} {found.kind} files")


def _model(run: Run, model: config.ModelConfig) -> Iterator[Finding]:
    """Says whether the weights are here."""
    name = model.checkpoint
    if name == DEFAULT or name.startswith(RANDOM):
        yield Finding("weights", "ok", f"{name}: no download")
    elif is_remote(name):
        yield Finding("weights", "ok", f"{name}: not on this machine, and not asked")
    else:
        try:
            directory = cached_checkpoint(name, model.revision)
        except InputError as error:
            yield Finding("weights", "problem", str(error))
            return
        if directory is not None:
            yield Finding("weights", "ok", f"{name} is in {directory}")
        elif os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
            fix = "unset HF_HUB_OFFLINE, or pass a directory as --model.checkpoint"
            yield Finding("weights", "problem", f"{name} is not in the hub cache, and HF_HUB_OFFLINE is set", fix)
        else:
            yield Finding("weights", "ok", f"{name} is not in the hub cache: the run downloads it")


def _fit(run: Run, model: config.ModelConfig, devices: Any) -> Iterator[Finding]:
    """Compiles the step for the devices that are here; says what the weights alone take where that is not possible."""
    if is_remote(model.checkpoint):
        yield Finding("fit", "ok", f"not examined: {model.checkpoint} is not on this machine")
        return
    try:
        transformer = model_size(dataclasses.replace(model, adapter=None))
    except InputError as error:
        level: Level = "ok" if "has no layers" in str(error) else "warning"
        yield Finding("fit", level, str(error).split(": ", 1)[-1] if level == "ok" else str(error))
        return
    if run.topology is not None:
        yield _planned(run, model, run.topology)
        return
    if not isinstance(devices, Devices):
        yield Finding("fit", "warning", f"unknown without devices: {_weights(transformer, model, None)}")
        return
    flag = "embed.batch_tokens" if run.train is None else "train.batch_tokens"
    try:
        step = _step(run, model, transformer)
    except InputError as error:
        yield Finding("fit", "problem", str(error))
        return
    found = ask(step, FIT_SECONDS)
    if isinstance(found, InputError):  # more devices than there are, heads that do not divide
        fix = "pass --topology, such as v3-8, to examine it for TPUs that are elsewhere" * (devices.platform == "cpu")
        yield Finding("fit", "problem", str(found), fix)
    elif not isinstance(found, StepFit) or found.found is None:
        why = found.text if isinstance(found, Failure) and found.text else "the compiler gave no figure in time"
        yield Finding("fit", "warning", f"unknown ({why}): {_weights(transformer, model, devices)}")
    else:
        yield _verdict(found, found.found.rows, flag, run)


def _planned(run: Run, model: config.ModelConfig, topology: str) -> Finding:
    """Plans the step for a slice, as `bioscan plan` does."""
    data = None if run.data is None else dataclasses.replace(run.data, path="")  # no row is read
    step = "embed" if run.train is None else "finetune"
    own: dict[str, Any] = {"embed": run.embed}
    if run.train is not None:
        own = {"lora": run.lora, "loss": run.loss, "train": run.train}
    try:
        found = plan(topology, model, step, data=data, mesh=run.mesh, **own)
    except InputError as error:
        return Finding("fit", "problem", str(error))
    available, shape = found.tpu.chip.hbm_gib, f"{found.shape.rows:,} x {found.shape.tokens:,} tokens on {topology}"
    if found.hbm_gib is None:
        size = found.traced.argument_bytes / _GIB
        text = f"batches of {shape}: {size:.2f} GiB of {available} on each device before any result, by arithmetic"
        return Finding("fit", "problem" if found.fits is False else "warning", text, "; ".join(found.notes))
    text = f"batches of {shape} need {found.hbm_gib:.2f} GiB of {available} on each device, by libtpu's compiler"
    return Finding("fit", "ok", text) if found.fits else Finding("fit", "problem", text, "; ".join(found.notes))


def _verdict(found: StepFit, rows: int, flag: str, run: Run) -> Finding:
    assert found.found is not None
    shape, fit = found.shape, found.found
    need = "more" if fit.needed is None else f"{fit.needed / _GIB:.2f} GiB"
    text = (
        f"batches of {shape.rows:,} x {shape.tokens:,} tokens in {found.dtype} need {need} of "
        f"{fit.available / _GIB:.2f} GiB on each device, by its compiler"
    )
    if fit.fits:
        return Finding("fit", "ok", text)
    if not rows:
        return Finding("fit", "problem", f"{text}, and not one row fits", NO_ROW_FITS)
    more = ", or --train.remat layer" if run.train is not None and run.train.remat == "none" else ""
    return Finding("fit", "problem", text, f"pass --{flag} {rows * shape.tokens}{more}")


def _step(run: Run, model: config.ModelConfig, transformer: TransformerConfig) -> Step:
    """Returns the step with the widest batch that the settings allow."""
    limit, wanted = transformer.max_tokens, None if run.data is None else run.data.max_tokens
    if wanted is not None and wanted > limit:
        raise InputError(f"--data.max_tokens {wanted} exceeds the {limit} positions of the model; lower it")
    same = {"transformer": transformer, "dtype": model.dtype, "attention": model.attention}
    if run.train is None:
        transformer.resolve_layer(run.embed.layer)
        block = run.data.block_rows if isinstance(run.data, config.DataConfig) else config.DataConfig.block_rows
        program, rows = EmbedProgram(embed=run.embed, **same), block * run.embed.views
    else:
        program = FinetuneProgram(lora=run.lora, loss=run.loss, train=run.train, species=SPECIES, **same)
        rows = run.train.batch_size
    return Step(program=program, mesh=run.mesh, rows=rows, tokens=wanted or limit)


def _weights(transformer: TransformerConfig, model: config.ModelConfig, devices: Devices | None) -> str:
    """Returns what the weights take, by arithmetic."""
    numbers = transformer.num_hidden_layers * transformer.layer_matmul_parameters
    numbers += transformer.vocab_size * transformer.hidden_size
    wide = model.dtype == "float32" or (model.dtype == "auto" and devices is not None and devices.platform == "cpu")
    size = numbers * (4 if wide else 2)
    memory: Memory | None = None if devices is None else devices.memory
    of = "" if memory is None else f" of the {memory.total / _GIB:.1f} GiB of a device"
    return f"the weights alone take {size / _GIB:.2f} GiB{of}, by arithmetic"
