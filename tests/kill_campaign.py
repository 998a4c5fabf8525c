"""Kills embed or finetune at random moments and compares what they leave with an uninterrupted run.

    python tests/kill_campaign.py --kills 50 --rows 3000 --seed 0
    python tests/kill_campaign.py --what finetune --kills 20
    python tests/kill_campaign.py --what finetune --bucket --kills 20

Half of the kills come at a random time; the others wait for a random file of the table to appear, since commits and
the finish are too short to be hit by chance. Each finished table is compared before the next one is started.

finetune, with the sizes of its demo and its run directory on the disk or on an S3 server in memory, is always ended by
SIGTERM: within 20 s, with every step saved that was done.
"""

import argparse
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

from support.embed_runs import Uninterrupted, campaign
from support.training_kills import training_campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["embed", "finetune"], default="embed")
    parser.add_argument("--bucket", action="store_true", help="finetune into a bucket")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["SIGKILL", "SIGTERM"], default="SIGKILL")
    given, say = parser.parse_args(), partial(print, flush=True)
    if given.what == "finetune":
        with tempfile.TemporaryDirectory(prefix="kill-campaign-") as directory:
            wrong = training_campaign(Path(directory), given.kills, given.seed, given.bucket, say)
        say(f"{given.kills} signals: {'; '.join(wrong) or 'every run ended as the uninterrupted one'}")
        sys.exit(bool(wrong))
    with tempfile.TemporaryDirectory(prefix="kill-campaign-") as directory:
        whole = Uninterrupted.make(Path(directory), given.rows, given.seed)
        counts = f"{whole.table.vectors.num_rows} vectors, {whole.table.rejects.num_rows} rejects"
        say(f"uninterrupted: {whole.seconds:.1f} s, {counts}")
        wrong = campaign(whole, Path(directory), given.kills, given.seed, say, signal.Signals[given.signal])
    say(f"{given.kills} kills: {'; '.join(wrong) or 'every table is identical to the uninterrupted one'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
