"""Runs a script that pauses after a number of commits: python paused.py COMMITS RESUME SCRIPT [ARGUMENT ...].

It continues once the file RESUME exists; RESUME.paused exists from the pause on. A test can thus act in the middle of a
run, however slow the machine is.
"""

import runpy
import sys
import time
from pathlib import Path

MAX_SECONDS = 600
"""Seconds after which the run continues by itself, so that a failed test leaves no process behind."""


def paused(script: Path, resume: Path, commits: int) -> list[str]:
    """Returns the command line that runs `script` with a pause; append the script's arguments."""
    return [str(Path(__file__)), str(commits), str(resume), str(script)]


def reached(resume: Path) -> bool:
    """Returns whether the run has paused."""
    return resume.with_name(f"{resume.name}.paused").exists()


def main() -> None:
    from bioscan_jax.table.sink import VectorTable

    commits, resume, script = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    append, done = VectorTable.append_fragments, []

    def append_and_pause(self, *arguments, **keywords):
        append(self, *arguments, **keywords)
        done.append(time.monotonic())
        if len(done) == commits:
            resume.with_name(f"{resume.name}.paused").touch()
            while not resume.exists() and time.monotonic() - done[-1] < MAX_SECONDS:
                time.sleep(0.01)

    VectorTable.append_fragments = append_and_pause
    sys.argv[:] = sys.argv[3:]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
