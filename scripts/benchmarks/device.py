"""Embedding and LoRA steps on one accelerator: ours beside PyTorch, with model FLOP utilisation and memory."""

import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.checkpoints import preset_size
from benchmarks.figures import Cell, Figures, at_least, in_a_process, require, rounded, run_in_turns
from bioscan_jax import config
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.devices.chips import peak_flops
from bioscan_jax.errors import InputError
from bioscan_jax.model.config import TransformerConfig

_CLS = 3
_GIB = 2**30
_GAIN = 1.03
"""A larger batch of PyTorch's is tried as long as the last one was faster by this factor."""
_TRAINING = 2
"""FLOPs of a LoRA step in forward passes: the backward pass computes no gradients of frozen weights."""


def device(
    presets: tuple[str, ...] = ("nt-v2-50m", "nt-v2-500m", "nt-v1-2.5b"),
    tokens: tuple[str | int, ...] = ("104-128", 1000, 512),
    batch_tokens: int = 65536,
    step_tokens: int = 16384,
    batches: int = 2,
    repeats: int = 5,
    minutes: float = 8.0,
    seed: int = 0,
    peers: bool = True,
) -> Figures:
    """Compare embedding and LoRA steps on this machine's first device with PyTorch: random bfloat16 weights, dropout 0.1.

    Each side has a process of its own, since each takes the device's memory; the two run one after the other for each
    preset and length. Rows are token ids in memory; rates count real tokens, from the median of `repeats` passes, and
    include copies to and from the device. Ours computes batches of the given sizes, halved until they fit. PyTorch
    (transformers' model with scaled_dot_product_attention, sorted by length, no mask where nothing is padded; PEFT for
    the step) takes the fastest batch of ours doubled and doubled again until memory ends or speed does not grow by 3%,
    and torch.compile (of the layers) where that works and is faster; on a CPU, neither. MFU is FLOPs / (seconds x peak), with FLOPs = tokens x layers x
    (2 x parameters multiplied per token and layer + 4 x row length x width), twice that for a LoRA step; adapters and
    language-model head are not counted. Peak memory is what JAX's allocator reports, planned memory the compiler's
    report on the largest program.

    Args:
        presets: Sizes of the model, in the order in which they are measured.
        tokens: Tokens of the rows, CLS included, such as 512; or from-to, uniformly distributed.
        batch_tokens: Tokens of an embedded batch of ours, padding included.
        step_tokens: Tokens of a LoRA step of ours, padding included.
        batches: Batches of a timed pass of embedding.
        repeats: Timed passes.
        minutes: What has not begun by then is left out; what is under way is ended.
        seed: Random seed of weights and rows.
        peers: Also measure PyTorch and PEFT.

    Raises:
        InputError: A number is too small, a preset or a length is unknown, or PyTorch or PEFT is not installed.
    """
    at_least(batches=(batches, 1), repeats=(repeats, 1), batch_tokens=(batch_tokens, 2), step_tokens=(step_tokens, 2))
    spans = {preset: [_span(text, preset_size(preset)) for text in tokens] for preset in presets}
    if peers:
        require("torch", "peft")
    common = {"batch_tokens": batch_tokens, "step_tokens": step_tokens}
    common |= {"batches": batches, "repeats": repeats, "seed": seed}
    found: Figures = {"device": "unknown", "versions": _versions("jax", "torch", "transformers", "peft")}
    rows: dict[str, dict[str, Cell]] = {}
    end, left_out = time.monotonic() + 60 * minutes, []
    for number in range(len(tokens)):
        for preset in presets:
            least, most = spans[preset][number]
            name = f"{preset} {least}-{most}" if least < most else f"{preset} {most}"
            sides = {}
            for side in ("ours", "theirs") if peers else ("ours",):
                seconds = end - time.monotonic()
                arguments = {"preset": preset, "least": least, "most": most} | common
                try:
                    if seconds <= 0:
                        raise subprocess.TimeoutExpired(side, 0)
                    sides[side] = in_a_process(f"benchmarks.device:measure_{side}", seconds=seconds, **arguments)
                except subprocess.TimeoutExpired:
                    left_out.append(f"{name} {side}")
                except RuntimeError as error:
                    sides[side] = {"error": str(error)[:200]}
            found["device"] = sides.get("ours", {}).get("device", found["device"])
            for step in ("embed", "lora"):
                rows[f"{name} {step}"] = _row(sides, step, peak_flops(str(found["device"])))
    peak = peak_flops(str(found["device"]))
    found["peak"] = "unknown" if peak is None else f"{peak / 1e12:g} TFLOP/s in bfloat16"
    found["left_out"] = ", ".join(left_out) or "nothing"
    return found | rows


def _span(text: str | int, transformer: TransformerConfig) -> tuple[int, int]:
    """Reads `512` or `104-128`."""
    first, _, last = str(text).partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and 2 <= int(first) <= int(last or first)):
        raise InputError(f"--tokens {text!r} is no length; pass such as 512 or 104-128")
    if int(last or first) > transformer.max_tokens:
        raise InputError(f"--tokens {text} exceeds the {transformer.max_tokens} positions of a preset; pass fewer")
    return int(first), int(last or first)


def _row(sides: dict[str, dict[str, Any]], step: str, peak: float | None) -> dict[str, Cell]:
    """Returns the cells of one step: ours, then theirs, then the ratio."""
    cells: dict[str, Cell] = {}
    for side, given in sides.items():
        one = given.get(step, {"error": given.get("error", "not measured")})
        prefix = "" if side == "ours" else "torch "
        if "error" in one:
            cells[f"{prefix}rows/s"] = one["error"]
            continue
        cells[f"{prefix}rows/s"] = rounded(one["rows"] / one["seconds"])
        cells[f"{prefix}tokens/s"] = rounded(one["tokens"] / one["seconds"])
        cells[f"{prefix}MFU"] = "-" if peak is None else rounded(one["flops"] / one["seconds"] / peak)
        cells[f"{prefix}batch"] = one["batch"]
        cells |= {
            f"{prefix}{name} GiB": rounded(one[name] / _GIB)
            for name in ("peak", "planned")
            if one.get(name) is not None
        }
    if isinstance(cells.get("rows/s"), int | float) and isinstance(cells.get("torch rows/s"), int | float):
        cells["ratio"] = rounded(float(cells["rows/s"]) / float(cells["torch rows/s"]))  # pyright: ignore[reportArgumentType]
    return cells


def _versions(*names: str) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def random_tokens(transformer: TransformerConfig, least: int, most: int, budget: int, seed: int) -> TokenRows:
    """Returns rows of random 6-mers after CLS that fill `budget` tokens when all are padded to `most`; at least one."""
    random = np.random.default_rng(seed)
    lengths = random.integers(least, most + 1, max(1, budget // most))
    lengths[0] = most
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(10, transformer.vocab_size - 10, offsets[-1]).astype(np.int32)
    ids[offsets[:-1]] = _CLS
    return TokenRows(ids, offsets)


def _padded(tokens: TokenRows, rows: np.ndarray, width: int, pad: int) -> np.ndarray:
    ids = np.full((len(rows), width), pad, np.int32)
    for place, row in enumerate(rows.tolist()):
        own = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]
        ids[place, : len(own)] = own
    return ids


def _counts(transformer: TransformerConfig, tokens: TokenRows, passes: int) -> dict[str, int]:
    """Returns rows, real tokens and FLOPs of a pass."""
    lengths = tokens.lengths.tolist()
    flops = passes * sum(transformer.forward_flops(length, length) for length in lengths)
    return {"rows": len(lengths), "tokens": sum(lengths), "flops": flops}


def measure_ours(
    preset: str, least: int, most: int, batch_tokens: int, step_tokens: int, batches: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Measures both steps of ours in this process; see `device`."""
    import jax
    import jax.numpy as jnp

    from benchmarks.finetuning import our_step
    from bioscan_jax.checkpoints.keys import random_model
    from bioscan_jax.data.batching import batch_shapes, choose_widths, make_batches
    from bioscan_jax.devices.memory import NeededMemory, needed_memory
    from bioscan_jax.devices.sharding import make_layout
    from bioscan_jax.embedding.dispatch import Dispatcher
    from bioscan_jax.embedding.step import CompiledSteps
    from bioscan_jax.embedding.summary import peak_device_bytes

    transformer, layout = preset_size(preset), make_layout(config.MeshConfig(data=1))
    pad = transformer.pad_token_id
    model = random_model(transformer, jnp.bfloat16, layout, seed=seed, lm_head=True)
    jax.block_until_ready(jax.tree.leaves(model))
    peaks: list[int | None] = [peak_device_bytes()]
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind}

    def peak() -> int | None:
        """Returns the peak if it is that of the step just measured, and not of something before it."""
        peaks.append(peak_device_bytes())
        before, now = peaks[-2:]
        return now if before is None or (now is not None and now > before) else None

    def planned_bytes(*memory: NeededMemory | None) -> int | None:
        return max((one.total for one in memory if one is not None), default=None)

    def fitting(step: str, budget: int, measure: Any) -> None:
        """Measures with the largest of `budget`, its half, its quarter, ... that fits."""
        while True:
            try:
                found[step] = measure(budget)
                return
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or budget <= most:
                    found[step] = {"error": " ".join(str(error).split())[:100]}
                    return
                budget //= 2

    def embed(budget: int) -> dict[str, Any]:
        tokens = random_tokens(transformer, least, most, batches * budget, seed)
        steps = CompiledSteps(model, layout, config.EmbedConfig())
        widths = choose_widths(tokens.lengths, most, config.EmbedConfig.max_shapes)
        shapes = batch_shapes(widths, devices=1, tokens_per_device=budget, most_rows=len(tokens))

        def run() -> None:
            made = make_batches(tokens, shapes, cls=_CLS, pad=pad)
            vectors = np.empty((len(tokens), transformer.hidden_size), np.float32)
            with Dispatcher(steps) as dispatcher:
                for future in [dispatcher.start(one, vectors) for one in made]:
                    future.result()

        run()
        seconds = float(np.median(run_in_turns({"ours": run}, repeats)["ours"]))
        planned = planned_bytes(*map(needed_memory, steps.shapes.values()))
        batch = f"{shapes[-1].rows} x {shapes[-1].tokens}"
        return _counts(transformer, tokens, 1) | {
            "seconds": seconds,
            "batch": batch,
            "planned": planned,
            "peak": peak(),
        }

    def lora(budget: int) -> dict[str, Any]:
        tokens = random_tokens(transformer, least, most, budget, seed)
        ids = _padded(tokens, np.arange(len(tokens)), most, pad)
        train = config.TrainConfig(objective="mlm", batch_size=len(ids), batch_tokens=ids.size)
        step = our_step(model, ids, config.LoRAConfig(), train)
        step.run()
        seconds = float(np.median(run_in_turns({"ours": step.run}, repeats)["ours"]))
        counts, batch = _counts(transformer, tokens, _TRAINING), f"{len(ids)} x {most}"
        return counts | {"seconds": seconds, "batch": batch, "planned": planned_bytes(step.memory), "peak": peak()}

    fitting("embed", batch_tokens, embed)
    fitting("lora", step_tokens, lora)
    return found


def measure_theirs(
    preset: str, least: int, most: int, batch_tokens: int, step_tokens: int, batches: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Measures both steps of PyTorch in this process; see `device`."""
    import torch

    from benchmarks.finetuning import peft_step
    from benchmarks.peers import esm_model

    transformer, where = preset_size(preset), "cuda" if torch.cuda.is_available() else "cpu"
    pad = transformer.pad_token_id
    torch.manual_seed(seed)

    def new_model() -> Any:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(where):
            model = esm_model(transformer, attention="sdpa")
        torch.set_default_dtype(torch.float32)
        return model

    def embedding(model: Any) -> Callable[[TokenRows, int], None]:
        def vectors(ids: np.ndarray) -> torch.Tensor:
            given = torch.from_numpy(ids.astype(np.int64)).to(where)
            real = given != pad
            mask = real.long() if (ids == pad).any() else None
            hidden = model.esm(given, attention_mask=mask).last_hidden_state
            return (hidden * real[:, :, None]).sum(1, dtype=torch.float32) / real.sum(1)[:, None]

        def run(tokens: TokenRows, budget: int) -> None:
            order, lengths = np.argsort(-tokens.lengths, kind="stable"), tokens.lengths
            first, every = 0, []
            with torch.inference_mode():
                while first < len(order):
                    width = int(lengths[order[first]])
                    chosen = order[first : first + max(1, budget // width)]
                    every.append(vectors(_padded(tokens, chosen, width, pad)))
                    first += len(chosen)
                torch.cat(every).cpu()

        return run

    def training(model: Any) -> Callable[[TokenRows, int], None]:
        step = peft_step(model, config.LoRAConfig(), config.TrainConfig(objective="mlm"), where)

        def run(tokens: TokenRows, budget: int) -> None:
            step(_padded(tokens, np.arange(len(tokens)), most, pad))

        return run

    def seconds_of(run: Callable[[TokenRows, int], None], parts: int, budget: int, passes: int) -> float | None:
        """Returns the median time of a pass after one that is not timed; None if memory ends."""
        tokens = random_tokens(transformer, least, most, parts * budget, seed)
        try:
            run(tokens, budget)
            return float(np.median(run_in_turns({"theirs": partial(run, tokens, budget)}, passes)["theirs"]))
        except torch.OutOfMemoryError:
            return None

    def fastest(make: Callable[[Any], Callable[[TokenRows, int], None]], parts: int, budget: int) -> dict[str, Any]:
        """Doubles the batch while it fits and gains, then compiles the layers and keeps what is faster."""
        model = new_model()
        run, speed, best = make(model), 0.0, None
        while budget >= most or best is None:
            taken = seconds_of(run, parts, budget, 1)
            if taken is None:
                torch.cuda.empty_cache()
                if best is not None or budget <= most:
                    break
                budget //= 2
                continue
            if best is not None and budget / taken < _GAIN * speed:
                break
            speed, best = budget / taken, budget
            if where == "cpu":
                break
            budget *= 2
        if best is None:
            return {"error": "not even one row fits"}
        tokens = random_tokens(transformer, least, most, parts * best, seed)
        seconds, batch = seconds_of(run, parts, best, repeats), f"{max(1, best // most)} x {most}"
        if where != "cpu":
            try:
                for layer in model.esm.encoder.layer:
                    layer.compile()
                compiled = seconds_of(run, parts, best, repeats)
                if compiled is not None and seconds is not None and compiled < seconds:
                    seconds, batch = compiled, f"{batch}, compiled"
            except Exception as error:  # torch.compile raises many kinds
                batch += f", does not compile: {type(error).__name__}"
        passes = _TRAINING if make is training else 1
        return _counts(transformer, tokens, passes) | {"seconds": seconds, "batch": batch}

    return {"embed": fastest(embedding, batches, batch_tokens), "lora": fastest(training, 1, step_tokens)}
