"""Kills workers, nodes and the driver of a fleet at random, and compares the table with that of a single process.

    python tests/fleet_campaign.py --data coi.parquet --rows 60000 --nodes 7 --kills 30 --driver-kills 5 --seed 0

A Ray cluster is started on this machine: a head, and nodes with room for one worker each. Half of the kills hit
workers, the others raylets, and with them their nodes; other nodes join, and some leave in order. The driver is started
again with the same command. Needs the fleet extra.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from support.embed_runs import TABLES, Table, run, unnamed_files
from support.fleets import fleet_campaign, script_command

from bioscan_jax.barcodes.simulate import simulate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Parquet file of barcodes; simulated ones if absent")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--nodes", type=int, default=7)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--driver-kills", type=int, default=5)
    parser.add_argument("--block-rows", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="keeps the tables; that of the single process is made once")
    given, say = parser.parse_args(), partial(print, flush=True)
    with tempfile.TemporaryDirectory(prefix="fleet-campaign-") as name:
        directory = given.directory or Path(name)
        directory.mkdir(parents=True, exist_ok=True)
        data = directory / "input.parquet"
        table = (
            simulate(species=-(-given.rows // 10), per_species=10) if given.data is None else pq.read_table(given.data)
        )
        pq.write_table(table.slice(0, given.rows), data, row_group_size=5000)
        rows = min(given.rows, table.num_rows)

        def command(uri: Path) -> list[str]:
            settings = {"data__block_rows": given.block_rows, "embed__cache_rows": 8 * given.block_rows}
            return script_command(data, uri, **settings)

        begun = time.monotonic()
        single = run(command(directory / "single"), seconds=3600)
        if single.returncode:
            sys.exit(single.stderr)
        say(f"single process: {rows:,} rows in {time.monotonic() - begun:.1f} s")
        whole, summary = fleet_campaign(
            command(directory / "fleet"),
            directory / "fleet",
            rows,
            nodes=given.nodes,
            kills=given.kills,
            driver_kills=given.driver_kills,
            seed=given.seed,
            say=say,
        )
        say(summary)
        wrong = compare(directory / "single", directory / "fleet", rows, say) if whole else ["it did not finish"]
    say("; ".join(wrong) or "every row and every bit is that of the single process")
    sys.exit(bool(wrong))


def compare(single: Path, fleet: Path, rows: int, say: partial) -> list[str]:
    """Compares two tables row by row, and lists what differs."""
    one, two = Table.read(single), Table.read(fleet)
    for name, first, second in zip(TABLES, (one.vectors, one.rejects), (two.vectors, two.rejects), strict=True):
        equal = sum(
            a.equals(b)
            for a, b in zip(first.to_batches(max_chunksize=1), second.to_batches(max_chunksize=1), strict=False)
        )
        say(f"{name}: {first.num_rows:,} rows of the single process, {second.num_rows:,} of the fleet, {equal:,} equal")
    numbers = np.concatenate([part["source_row"].to_numpy() for part in (two.vectors, two.rejects)])
    once = np.array_equal(np.sort(numbers), np.arange(rows))
    return [
        *two.differences(one),
        *([] if once else ["rows are missing or repeated"]),
        *(f"left behind: {file}" for file in unnamed_files(fleet)),
    ]


if __name__ == "__main__":
    main()
