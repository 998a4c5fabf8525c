"""Function calls killed with SIGKILL at a chosen point, each in a process of its own: python killed.py JOBS.json."""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path


def run_killed(jobs: list[dict], scratch: Path) -> list[int]:
    """Runs the jobs; returns for each the signal that ended it, or 0.

    A job has `call` (MODULE:FUNCTION) and `args` (keywords). It is killed either after `seconds`, or before the `nth`
    call of the function `at` (MODULE:NAME.NAME); with `after`, when that call has returned.
    """
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, here, scratch / "jobs.json"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _find(name: str) -> tuple[object, str]:
    module, attribute = name.split(":")
    *owners, last = attribute.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), last


def _child(job: dict) -> None:
    if "at" in job:
        owner, name = _find(job["at"])
        original, calls = getattr(owner, name), []

        def kill(*arguments, **keywords):
            calls.append(1)
            if len(calls) == job.get("nth", 1) and not job.get("after"):
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **keywords)
            if len(calls) == job.get("nth", 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, staticmethod(kill) if isinstance(owner, type) and job.get("static") else kill)
    owner, name = _find(job["call"])
    getattr(owner, name)(**job["args"])


def main() -> None:
    jobs, ended = json.loads(Path(sys.argv[1]).read_text()), []
    for job in jobs:  # nothing may use Lance before the fork, since its threads do not exist in the child
        for name in (job["call"], job.get("at", job["call"])):
            importlib.import_module(name.split(":")[0])
        child = os.fork()
        if child == 0:
            try:
                _child(job)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        if "seconds" in job:
            time.sleep(job["seconds"])
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        ended.append(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
    sys.stdout.write(json.dumps(ended))


if __name__ == "__main__":
    main()
