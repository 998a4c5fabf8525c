"""Reads and writes LoRA adapters in PEFT's file format.

Tensors are named as PEFT names them around `EsmForMaskedLM`. PEFT has no task type for masked-language models;
FEATURE_EXTRACTION keeps the model's call unchanged, and these adapters are for vectors. The targets are written as a
pattern that begins with `esm.`: plain names would also match `EsmModel`, where PEFT would find none of our tensors and
only warn that the adapter does nothing. With the pattern it raises.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from bioscan_jax import config
from bioscan_jax.checkpoints.head_files import Heads, write_heads
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.keys import published_names, shard_array, unneeded_module
from bioscan_jax.checkpoints.model_card import read_facts, write_facts
from bioscan_jax.checkpoints.projection_files import write_projection
from bioscan_jax.checkpoints.readers import StoredTensor, list_file, read_rows, sha256_of
from bioscan_jax.devices.sharding import Layout, stored_shardings
from bioscan_jax.errors import InputError, logger, one_line, shown
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.lora import TARGETS, LoRALinear, add_adapters, resolve_targets
from bioscan_jax.model.projection import Projection
from bioscan_jax.model.transformer import NucleotideTransformer
from bioscan_jax.output import whole_directory

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Names of the weights file, most preferred first."""

_PREFIX = "base_model.model."
# Keys of adapter_config.json that do not change what a plain LoRA adapter computes.
_IRRELEVANT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "lora_dropout"),
        *("megatron_core", "peft_version", "qalora_group_size", "revision", "target_modules", "task_type"),
        *("ensure_weight_tying", "layers_pattern", "layers_to_transform"),
    }
)
# Modules around the trunk, as modules_to_save names them: a vector needs none of their weights.
_AROUND_TRUNK = frozenset({"classifier", "score", "qa_outputs", "lm_head", "contact_head", "pooler"})
# Initialisations that leave the base weights unchanged; all others change them.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Settings and identity of an adapter that was read."""

    lora: config.LoRAConfig
    """Rank, targets and so on; alpha is such that alpha / rank is the adapter's scaling."""
    sha256: str
    """Of its weights file and its scaling."""
    facts: dict[str, Any] | None
    """Contents of `bioscan_jax_export.json`; None for an adapter made by another program."""


def write_adapter(
    directory: Path,
    trunk: NucleotideTransformer,
    lora: config.LoRAConfig,
    *,
    provenance: Provenance,
    heads: Heads | None = None,
    projection: Projection | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes the adapters of a model in PEFT's format, with heads, label space, projection, facts and a model card.

    Args:
        directory: Created, complete or not at all.
        trunk: The adapted model; its arrays must be addressable from this process.
        lora: The settings its adapters were made with.
        provenance: Of the trunk's weights.
        heads: Taxonomic heads trained on its vectors.
        projection: Fitted on its vectors.
        facts: Further entries of `bioscan_jax_export.json`; plain JSON values.

    Raises:
        InputError: The directory is not empty, or cannot be written.
        ValueError: The adapters do not match `lora`, or the heads do not match their label space.
    """
    stems = _stems(trunk.config)
    names = [re.escape(stems[name].rpartition("{}.")[2]) for name in resolve_targets(lora.targets)]
    parsed = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": provenance.model,
        "revision": provenance.revision,
        "target_modules": rf"esm\.encoder\.layer\.\d+\.({'|'.join(names)})",
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    with whole_directory(directory) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(parsed, indent=2, sort_keys=True) + "\n")
        save_file(dict(_tensors(trunk, lora)), temporary / WEIGHTS_FILES[0], {"format": "pt"})
        if heads is not None:
            write_heads(temporary, heads)
        if projection is not None:
            write_projection(temporary, projection)
        write_facts(temporary, "adapter", provenance, facts, heads=heads)


def read_adapter(directory: Path, model: NucleotideTransformer, layout: Layout, *, base: Provenance) -> Adapter:
    """Puts stored adapters around the layers of a model, in place.

    Reads the output of `write_adapter`, and plain LoRA adapters that PEFT made of any of transformers' ESM classes, on
    some or all layers. Those do not record the digest of their base weights, so another base is detected only by its
    shapes or hub id. Their tensors outside the trunk (classifier, lm_head, contact_head) are left out, with a warning.

    Args:
        directory: Holds `adapter_config.json` and the tensors.
        model: On its mesh, without adapters.
        layout: Placement of its arrays on the devices.
        base: Provenance of the model's weights.

    Raises:
        InputError: A file is missing or damaged, the adapter is of another model, or it is not plain LoRA.
    """
    parsed = _read_config(directory)
    facts = read_facts(directory)
    _check_base(directory, parsed, facts, base)
    file = _weights_file(directory)
    made_for = facts["base"]["model"] if facts else parsed.get("base_model_name_or_path")
    where = f"{directory}, an adapter of {made_for or 'an unnamed model'}"
    stored = _tensors_by_target(file, parsed, model.config, f"{where}:", base.model)
    rank, alpha = parsed["r"], parsed["lora_alpha"]
    # Rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) divides by the square root of the rank.
    scaling = alpha / math.sqrt(rank) if parsed.get("use_rslora") else alpha / rank
    lora = config.LoRAConfig(
        rank=rank,
        alpha=scaling * rank if parsed.get("use_rslora") else float(alpha),
        dropout=float(parsed["lora_dropout"]),
        targets=resolve_targets([name for name, _, _ in stored]),
    )
    add_adapters(model, lora, nnx.Rngs(0))
    shardings = stored_shardings(nnx.state(model, nnx.LoRAParam), layout)
    for name in lora.targets:
        layer = _layer(model, name)
        layer.scaling = scaling
        for matrix in ("a", "b"):
            variable = getattr(layer, matrix)
            layers, *shape = variable.get_value().shape
            values = np.zeros((layers, *shape), np.float32)  # a layer without an adapter adds nothing
            for i in range(layers):
                if (name, matrix, i) in stored:
                    values[i] = _read(stored[name, matrix, i], tuple(shape), f"{where}:", base.model)
            sharding = shardings["layers", *TARGETS[name], matrix]
            setattr(layer, matrix, variable.replace(shard_array(values, sharding)))
    digest = hashlib.sha256(f"{sha256_of([file])} scaling {scaling!r}".encode()).hexdigest()
    return Adapter(lora=lora, sha256=digest, facts=facts)


def adapter_base(directory: Path) -> dict[str, Any]:
    """Returns `model` and `revision` of the checkpoint that an adapter was trained on, as the adapter names them.

    Raises:
        InputError: A file is missing or damaged, or does not name the checkpoint.
    """
    if (facts := read_facts(directory)) is not None:
        return facts["base"]
    parsed = _read_config(directory)
    name = parsed.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{directory / CONFIG_FILE} does not name its base model; pass the checkpoint and the adapter")
    return {"model": name, "revision": parsed.get("revision")}


def _stems(transformer: TransformerConfig) -> dict[str, str]:
    """Returns the published name of each adaptable layer, with `{}` for the layer number."""
    table = {row.path: row.name for row in published_names(transformer, lm_head=False)}
    return {name: table["layers", *place, "kernel"].removesuffix(".weight") for name, place in TARGETS.items()}


def _layer(model: NucleotideTransformer, target: str) -> Any:
    parent, attribute = TARGETS[target]
    return getattr(getattr(model.layers, parent), attribute)


def _tensors(trunk: NucleotideTransformer, lora: config.LoRAConfig) -> Iterator[tuple[str, np.ndarray]]:
    stems, targets = _stems(trunk.config), resolve_targets(lora.targets)
    for name in TARGETS:
        layer = _layer(trunk, name)
        if isinstance(layer, LoRALinear) != (name in targets):
            raise ValueError(f"the adapters of the model are not on {targets}: {name} differs")
        if not isinstance(layer, LoRALinear):
            continue
        a, b = np.asarray(layer.a[...]), np.asarray(layer.b[...])
        if a.shape[2] != lora.rank or not math.isclose(layer.scaling, lora.alpha / lora.rank, rel_tol=1e-9):
            raise ValueError(f"the adapter of {name} has rank {a.shape[2]} and scaling {layer.scaling}, not {lora}")
        for i in range(len(a)):
            stem = f"{_PREFIX}{stems[name].format(i)}"
            yield f"{stem}.lora_A.weight", np.ascontiguousarray(a[i].T)
            yield f"{stem}.lora_B.weight", np.ascontiguousarray(b[i].reshape(lora.rank, -1).T)


def _read_config(directory: Path) -> dict[str, Any]:
    """Parses `adapter_config.json`; raises InputError for anything but plain LoRA."""
    path = directory / CONFIG_FILE
    if not directory.is_dir():
        raise InputError(f"--model.adapter {str(directory)!r}: there is no such directory; check the path")
    try:
        parsed = json.loads(path.read_text())
    except FileNotFoundError:
        there = ", ".join(sorted(one.name for one in directory.iterdir())[:20]) or "nothing"
        raise InputError(f"--model.adapter {str(directory)!r} has no {CONFIG_FILE}, only {there}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)}); export or download it again") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{path}: not a JSON object")
    if parsed.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type = {shown(parsed.get('peft_type'))} is not supported, only 'LORA'")
    for key, least, most in (("r", 1, 1e9), ("lora_alpha", -1e9, 1e9), ("lora_dropout", 0.0, 0.999)):
        value = parsed.setdefault(key, 0.0 if key == "lora_dropout" else None)
        number = isinstance(value, int if key == "r" else int | float) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            raise InputError(f"{path}: {key} = {shown(value)} is not a number of the right kind")
    start = parsed.get("init_lora_weights", True)
    if start not in _INITIALISATIONS:
        raise InputError(
            f"{path}: init_lora_weights = {shown(start)} may have changed the base's weights; convert the adapter to plain "
            "LoRA in PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key, value in parsed.items():
        if key in _IRRELEVANT or key in ("peft_type", "r", "lora_alpha", "init_lora_weights", "use_rslora"):
            continue
        if key == "modules_to_save" and _is_list_of(value, str) and _AROUND_TRUNK.issuperset(value):
            continue
        if value not in (None, False, "", [], {}) and (key, value) != ("bias", "none"):
            raise InputError(
                f"{path}: {shown(key)[1:-1]} = {shown(value)} is not supported, only plain LoRA of linear layers is"
            )
    _check_targets(path, parsed)
    return parsed


def _check_targets(path: Path, parsed: dict[str, Any]) -> None:
    """Raises InputError for entries that choose layers and are not of PEFT's kinds."""
    for key in ("target_modules", "exclude_modules"):
        value = parsed.get(key)
        if isinstance(value, str):
            try:
                with warnings.catch_warnings(action="ignore"):  # of patterns whose meaning may change in Python
                    re.compile(value)
            except (re.error, RecursionError, OverflowError):
                raise InputError(f"{path}: {key} = {shown(value)} is not a pattern; export it again") from None
        elif value is not None and not _is_list_of(value, str):
            raise InputError(f"{path}: {key} = {shown(value)} is neither a pattern nor names; export it again")
    layers = parsed.get("layers_to_transform")
    if layers is not None and not (isinstance(layers, int) or _is_list_of(layers, int)):
        raise InputError(f"{path}: layers_to_transform = {shown(layers)} are not layers; export it again")


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def _check_base(directory: Path, parsed: dict[str, Any], facts: dict[str, Any] | None, base: Provenance) -> None:
    """Raises InputError if the adapter names other base weights."""
    if facts is not None:
        made = facts["base"]
        if made["weights_sha256"] != base.weights_sha256:
            raise InputError(
                f"{directory} is an adapter of {made['model']} (sha256 {made['weights_sha256'][:12]}), not of "
                f"{base.model} (sha256 {base.weights_sha256[:12]}); pass the checkpoint it was made with"
            )
        return
    named = parsed.get("base_model_name_or_path")
    is_hub_id = isinstance(named, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", named, re.ASCII)
    if base.revision is not None and is_hub_id and named != base.model:
        raise InputError(
            f"{directory} is an adapter of {named}, not of {base.model}; pass the checkpoint it was made with"
        )


def _weights_file(directory: Path) -> Path:
    for name in WEIGHTS_FILES:
        if (directory / name).is_file():
            return directory / name
    raise InputError(f"{directory} has no {' or '.join(WEIGHTS_FILES)}; export or download the adapter again")


def _tensors_by_target(
    file: Path, parsed: Mapping[str, Any], transformer: TransformerConfig, where: str, model: str
) -> dict[tuple[str, str, int], StoredTensor]:
    """Returns stored tensors by target, matrix (a or b) and layer: both matrices of each layer that the config names."""
    expected, module_of = {}, {}
    for name, stem in _stems(transformer).items():
        for i in range(transformer.num_hidden_layers):
            for matrix in ("a", "b"):
                tensor_name = f"{stem.format(i)}.lora_{matrix.upper()}.weight"
                expected[tensor_name], module_of[tensor_name] = (name, matrix, i), stem.format(i)
    found: dict[tuple[str, str, int], StoredTensor] = {}
    left_out: set[str] = set()
    bare_trunk = False
    for tensor in list_file(file):
        bare = tensor.name.removeprefix(_PREFIX)
        whole = bare if bare in expected else f"esm.{bare}"
        key = expected.get(whole)
        module = unneeded_module(bare) or unneeded_module(f"esm.{bare}")
        if bare != tensor.name and key is None and module is not None:
            left_out.add(module)
            continue
        if bare == tensor.name or key is None:
            raise InputError(f"{where} unexpected tensor {shown(tensor.name)}; {model} has no such layer to adapt")
        if key in found:
            raise InputError(f"{where} {shown(tensor.name)} and {shown(found[key].name)} are the same; export it again")
        found[key] = tensor
        bare_trunk = bare_trunk or whole != bare
    if not found:
        only = f" but those of {', '.join(sorted(left_out))}, which vectors do not need" if left_out else ""
        raise InputError(f"{where} {file.name} holds no tensors{only}; export or download the adapter again")
    adapted = {name for name, _, _ in found}
    halves = {(name, i) for name, _, i in found}

    def is_due(tensor_name: str) -> bool:
        name, _, i = expected[tensor_name]
        if not parsed.get("target_modules"):
            return name in adapted
        module = module_of[tensor_name].removeprefix("esm." if bare_trunk else "")
        return (name, i) in halves or _is_adapted(parsed, module, i)

    missing = [name for name, key in expected.items() if key not in found and is_due(name)]
    if missing:
        raise InputError(
            f"{where} {len(missing)} tensor(s) missing, first {_PREFIX + missing[0]!r}; it is damaged or not of {model}"
        )
    layers = parsed.get("layers_to_transform")
    if layers is not None and (
        spare := {i for _, _, i in found} - set([layers] if isinstance(layers, int) else layers)
    ):
        raise InputError(
            f"{file.parent / CONFIG_FILE}: layers_to_transform = {shown(layers)}, but {file.name} also adapts layer "
            f"{min(spare)}; export it again"
        )
    if left_out:
        logger.warning("%s %s left out, which vectors do not need", where, ", ".join(sorted(left_out)))
    return found


def _is_adapted(parsed: Mapping[str, Any], module: str, layer: int) -> bool:
    """Returns whether the config puts an adapter on a module, as PEFT decides it."""

    def named(key: str) -> bool:
        wanted = parsed.get(key) or []
        if isinstance(wanted, str):
            return wanted == "all-linear" or re.fullmatch(wanted, module) is not None
        return any(module == one or module.endswith(f".{one}") for one in wanted)

    layers = parsed.get("layers_to_transform")
    chosen = layers is None or layer in ([layers] if isinstance(layers, int) else layers)
    return chosen and named("target_modules") and not named("exclude_modules")


def _read(tensor: StoredTensor, shape: tuple[int, ...], where: str, model: str) -> np.ndarray:
    """Reads one matrix and transposes it from [out, in] to [in, out...]."""
    published = (math.prod(shape[1:]), shape[0])
    if tensor.shape != published:
        raise InputError(f"{where} {tensor.name} has shape {list(tensor.shape)}, {model} and r need {list(published)}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"{where} {tensor.name} is {tensor.dtype}, not floating point")
    return read_rows(tensor).astype(np.float32).T.reshape(shape)
