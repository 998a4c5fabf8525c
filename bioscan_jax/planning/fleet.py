"""Plans a fleet: hours, machines and price for rows, a model and a kind of device."""

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from bioscan_jax import config
from bioscan_jax.devices.chips import CHIPS, GPUS, find_slice
from bioscan_jax.errors import InputError, one_line
from bioscan_jax.fleet.schedule import BLOCK_SECONDS
from bioscan_jax.fleet.simulate import Fleet, Outcome, Policy, simulate
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.notebook import Shown
from bioscan_jax.planning.plan import model_size
from bioscan_jax.planning.workload import embedding_workload

_SIMULATED_BLOCKS = 50_000
"""Most blocks that are simulated; a longer run takes proportionally longer."""
_BLOCKS_EACH = 8
"""Fewest blocks for each machine, so that the last ones end at about the same time."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one machine of a fleet has."""

    devices: int
    """JAX devices that share a batch, those of one host, times `hosts`."""
    hosts: int
    device_kind: str
    bf16_tflops: float
    """Of one device, as is the next."""
    gb_per_second: float


@dataclass(frozen=True, kw_only=True)
class FleetPlan(Shown):
    """Hours, machines and price of embedding with a fleet; prints as a table.

    Example:
        >>> import bioscan_jax as bj
        >>> found = bj.plan_fleet(10**6, bj.ModelConfig(checkpoint="random:nt-v2-50m"), "v5e-1", 16, tokens=114)
        >>> found.rows, found.machines, found.measured
        (1000000, 16, False)
    """

    rows: int
    model: str
    device: str
    machine: Machine
    machines: int
    rows_per_second: float
    """Of one machine."""
    measured: bool
    """Whether the user gave that speed; else it is a bound."""
    speed: str
    """How the speed was found."""
    fleet: Fleet
    outcome: Outcome
    hours: float
    """From the simulation; at least so many where the speed is a bound, as are the next two."""
    machine_hours: float
    copies_between_blocks: bool
    """Whether a row that repeats a sequence of an earlier block waits until that block is written."""
    price: float | None
    """In the currency of the user's table; None without one."""

    def __str__(self) -> str:
        """Returns the table for the terminal."""
        least = "" if self.measured else "at least "
        rate = self.machines * self.rows_per_second
        share = self.outcome.share
        taken = f"each taken away every {self.fleet.preempted_hours:g} h on average, back after {self.fleet.away_minutes:g} min"
        lines = {
            "rows": f"{self.rows:,}, {self.model}",
            "machines": f"{self.machines:,}, each {self.device}: {self.machine.devices} x {self.machine.device_kind}",
            "speed": f"{_figure(self.rows_per_second)} rows/s for one machine, {_figure(rate)} for all: {self.speed}",
            "undisturbed": f"{least}{_figure(self.rows / rate / 3600)} h, with all machines all of the time",
            "hours": f"{least}{_figure(self.hours)} h with machines that are "
            f"{taken if self.fleet.preempted_hours else 'never taken away'}; SIMULATED with the scheduler: "
            f"{100 * share('starting'):.1f}% of the machine-hours go into starts, {100 * share('lost'):.1f}% into blocks cut "
            f"off, {100 * (share('idle') + share('copied')):.1f}% into waiting and copies",
            "paid": f"{least}{_figure(self.machine_hours)} machine-hours, those in which a machine is there",
            "price": "unknown; pass --prices FILE with the price of an hour of each device"
            if self.price is None
            else f"{least}{self.price:,.2f} in the currency of your table; storage, network and the driver come on top",
            "blocks": f"--data.block_rows {self.outcome.block_rows} makes a block of "
            f"{_figure(self.outcome.block_rows / self.rows_per_second)} s"
            + ("" if self.measured else " at that speed; measure yours with a short run and pass --rows_per_second"),
        }
        if self.copies_between_blocks:
            lines["repeats"] = (
                f"the fleet finishes a block every {_figure(self.outcome.block_rows / rate)} s; where most blocks repeat "
                "sequences of earlier ones, storage must read and write a block in less, or --embed.cache_rows 0 computes "
                "such rows again; not simulated"
            )
        return "\n".join(f"{name:>11}  {text}" for name, text in lines.items())


def plan_fleet(
    rows: int,
    model: config.ModelConfig,
    device: str,
    machines: int,
    *,
    prices: str | None = None,
    rows_per_second: float | None = None,
    tokens: int | None = None,
    data: config.DataConfig = config.DataConfig(path=""),  # noqa: B008 - frozen
    embed: config.EmbedConfig = config.EmbedConfig(),  # noqa: B008
    preempted_hours: float = 2.0,
    away_minutes: float = 10.0,
    startup_seconds: float = 120.0,
) -> FleetPlan:
    """Plan a fleet: the hours, machine-hours and price of embedding rows with a model on machines of one kind.

    Args:
        rows: Rows to embed.
        model: Which model; its weights are not read.
        device: A TPU slice such as v3-8 or v5e-1, or GPUs such as "NVIDIA L4" or "8 x NVIDIA L4".
        machines: Number of them.
        prices: CSV file with the columns device and price_per_hour, or JSON file {device: price_per_hour}.
        rows_per_second: Rows that one machine embeds in a second, measured; a bound by the peak rates if absent.
        tokens: Tokens of a row, for the bound; a barcode of 658 bases has 114.
        data: If data.path is given, the lengths of some of its rows are read instead.
        embed: Pooling, layer, strands and phases, for the bound.
        preempted_hours: Mean time until a machine is taken away; 0 for never.
        away_minutes: Mean time until it is back.
        startup_seconds: Time that it needs until it computes.

    Raises:
        InputError: A setting is wrong, or a file cannot be read.

    Example:
        >>> import bioscan_jax as bj
        >>> found = plan_fleet(10**6, bj.ModelConfig(checkpoint="random:nt-v2-50m"), "v5e-1", 16, tokens=114)
        >>> found.machine.device_kind, found.measured, found.price
        ('TPU v5 lite', False, None)
    """
    for name, value in {"rows": rows, "machines": machines}.items():
        if value < 1:
            raise InputError(f"--{name} {value} is too small; pass at least 1")
    price = None if prices is None else _price(prices, device)
    machine = find_machine(device)
    if rows_per_second is None:
        rate, speed = _bound(model_size(model), machine, embed, data, tokens)
    else:
        rate, speed = rows_per_second, "measured by you"
        if not 0 < rate < math.inf:
            raise InputError(
                f"--rows_per_second {rate} is out of range; pass the rows that one machine embeds in a second"
            )
    block_seconds = min(BLOCK_SECONDS, rows / (machines * rate * _BLOCKS_EACH))
    simulated = min(rows, math.ceil(_SIMULATED_BLOCKS * block_seconds * rate))
    fleet = Fleet(
        rows=simulated,
        workers=machines,
        rows_per_second=rate,
        preempted_hours=preempted_hours,
        away_minutes=away_minutes,
        startup_seconds=startup_seconds,
    )
    outcome = simulate(fleet, Policy(block_seconds))
    times = rows / simulated
    paid = sum(outcome.worker_hours.values()) * times
    return FleetPlan(
        rows=rows,
        model=model.checkpoint,
        device=device,
        machine=machine,
        machines=machines,
        rows_per_second=rate,
        measured=rows_per_second is not None,
        speed=speed,
        fleet=fleet,
        outcome=outcome,
        hours=outcome.hours * times,
        machine_hours=paid,
        copies_between_blocks=embed.deduplicate and embed.cache_rows >= outcome.block_rows,
        price=None if price is None else price * paid,
    )


def _figure(value: float) -> str:
    """Returns a number with three digits, or more where they stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def find_machine(name: str) -> Machine:
    """Returns the machine of a TPU slice's name, or of "N x KIND" with a GPU's `jax.Device.device_kind`.

    Raises:
        InputError: The name is unknown.

    Example:
        >>> find_machine("8 x NVIDIA L4").devices
        8
    """
    if name.partition("-")[0] in CHIPS:
        tpu = find_slice(name, flag="device")
        return Machine(
            devices=tpu.devices,
            hosts=tpu.hosts,
            device_kind=tpu.chip.device_kind,
            bf16_tflops=tpu.chip.bf16_tflops,
            gb_per_second=tpu.chip.hbm_gb_per_second,
        )
    count, kind = re.fullmatch(r"(?:(\d+) x )?(.*)", name, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    if kind not in GPUS or count == "0":
        slices = ", ".join(f"{key}-{min(chip.slices)}" for key, chip in CHIPS.items())
        raise InputError(
            f"--device {name!r} is unknown; pass a TPU slice such as {slices}, or N x one of {', '.join(GPUS)}"
        )
    gpu = GPUS[kind]
    return Machine(
        devices=int(count or 1),
        hosts=1,
        device_kind=kind,
        bf16_tflops=gpu.bf16_tflops,
        gb_per_second=gpu.gb_per_second,
    )


def _bound(
    transformer: TransformerConfig,
    machine: Machine,
    embed: config.EmbedConfig,
    data: config.DataConfig,
    tokens: int | None,
) -> tuple[float, str]:
    """Returns the most rows per second of one machine, and what that is derived from.

    For each batch the longer of two times counts: the matrix products at the peak rate, and reading the weights once at
    the peak memory rate. Sources: FLOPs from the model's sizes, rates from `devices.chips`.
    """
    layers = transformer.resolve_layer(embed.layer)
    if not layers:
        raise InputError("--embed.layer 0 has no matrix products to bound the time; pass a measured --rows_per_second")
    devices = machine.devices // machine.hosts
    weights = 2 * layers * transformer.layer_matmul_parameters

    def seconds(batch_rows: int, width: int) -> float:
        flops = transformer.forward_flops(1, width, layers) * batch_rows * width
        return max(flops / (devices * machine.bf16_tflops * 1e12), weights / (machine.gb_per_second * 1e9))

    if data.path:
        work = embedding_workload(data, embed, transformer, devices)
        total = sum(count * seconds(shape.rows, shape.tokens) for shape, count in work.batches.items())
        rate, of = work.rows / total, f"{work.rows:,} sampled rows of {data.path}, padding and repeats included"
    elif tokens is None:
        raise InputError(
            "the bound on the time needs the length of a row: pass --tokens (a barcode of 658 bases has 114), --data.path, "
            "or a measured --rows_per_second"
        )
    elif not 2 <= tokens <= transformer.max_tokens:
        raise InputError(f"--tokens {tokens} is outside 2 to the {transformer.max_tokens} positions of the model")
    else:
        batch_rows = devices * max(1, embed.batch_tokens // tokens)
        rate = batch_rows / embed.views / seconds(batch_rows, tokens)
        of = f"{embed.views} x {tokens} tokens a row, without padding"
    return rate * machine.hosts, (
        f"a bound, not a measurement ({of}; matrix products at {machine.bf16_tflops:g} bfloat16 TFLOP/s a device, weights "
        f"read at {machine.gb_per_second:g} GB/s); real runs are slower"
    )


def _price(path: str, device: str) -> float:
    """Returns the price of one machine-hour from the user's table.

    Raises:
        InputError: The table cannot be read, or does not have the device.
    """
    layout = "pass CSV with the columns device and price_per_hour, or JSON {device: price_per_hour}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.lower().endswith(".json"):
            table = {str(name): float(value) for name, value in json.loads(text).items()}
        else:
            table = {row["device"]: float(row["price_per_hour"]) for row in csv.DictReader(text.splitlines())}
    except OSError as error:
        raise InputError(f"--prices {path} cannot be read: {error.strerror or one_line(error, 150)}") from None
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise InputError(f"--prices {path} is not a table of prices ({one_line(error, 150)}); {layout}") from None
    if device not in table:
        raise InputError(
            f"--prices {path} has no {device!r}, only {', '.join(table) or 'nothing'}; add its price per hour"
        )
    if not 0 <= table[device] < math.inf:
        raise InputError(f"--prices {path}: {device!r} costs {table[device]}; pass a price per hour of 0 or more")
    return table[device]
