"""Commands run inside the test's process, since a new process would import JAX each time."""

import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout

from bioscan_jax.cli import invoke


def call(name: str, *words: object) -> subprocess.CompletedProcess:
    """Runs `bioscan NAME WORDS` in this process; returns its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = invoke(name, [str(word) for word in words])
        except SystemExit as end:  # --help
            code = end.code
    return subprocess.CompletedProcess([name, *words], code or 0, out.getvalue(), err.getvalue())
