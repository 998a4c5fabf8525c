"""A run on Weights & Biases, of training or of embedding; no failure of it ends that run."""

import os
import secrets
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from bioscan_jax.config import TrackingConfig
from bioscan_jax.errors import InputError, logger

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]
NOT_TRACKED = TrackingConfig(mode="disabled")

_WANDB = "Weights & Biases"
_INIT_SECONDS = 60.0
_FINISH_SECONDS = 60.0
_HOSTS = ("wandb.ai", "coreweave.com")


class Dashboard:
    """A run on Weights & Biases, from its start to the end of the context; does nothing where it is disabled or cannot start.

    Online, a run that cannot reach the server within a minute, or whose key is refused, becomes an offline run; a server
    that is lost later is retried in the background, and for a minute at the end. All of these log a warning.

    Args:
        tracking: Project and name.
        mode: From `mode_of`.
        step: The metric over which all others are drawn; every record must have it.
        settings: Shown as the run's config.
        elsewhere: What a warning says of where the figures are, too.
        directory: Holds `wandb/`; where Weights & Biases puts it (WANDB_DIR, or the working directory) if absent.
        run_id: Of the run to continue; a new one if absent.
        group: Runs with the same one are shown together.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        mode: Mode,
        *,
        step: str,
        settings: Mapping[str, Any],
        elsewhere: str,
        directory: Path | None = None,
        run_id: str | None = None,
        group: str | None = None,
    ) -> None:
        self._elsewhere, self._step, self._run = elsewhere, step, None
        self.run_id = run_id
        """Of the run that was started, to continue it later; as it was given where there is none."""
        if mode != "disabled":
            given = {
                "project": tracking.project,
                "name": tracking.name,
                "group": group,
                "id": run_id or secrets.token_hex(4),
                "dir": directory,
                "config": dict(settings),
            }
            self._run = self._start(mode, given)
        self._server_step = 0
        """Last step that the server had at the start."""
        if self._run is not None:
            self.run_id = self._run.id
            self._server_step = self._run.summary.get(step, 0) if self._run.resumed else 0

    def send(self, record: Mapping[str, float | int]) -> None:
        """Sends values by name; not those of steps that the server had at the start."""
        if self._run is not None and record[self._step] >= self._server_step:
            try:
                self._run.log(dict(record))
            except Exception as error:
                logger.warning(f"{_WANDB}: no longer logging ({_line(error)}); the run continues, {self._elsewhere}")
                self._run = None

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the run, as a failed one after an error; waits for at most a minute until everything is sent."""
        if self._run is not None:
            try:
                self._run.finish(exit_code=0 if kind is None else 1)
            except Exception as error:
                again = f"wandb sync --include-online {_files(self._run)}"
                logger.warning(f"{_WANDB}: not everything was sent ({_line(error)}); to upload: {again}")

    def _start(self, mode: Literal["online", "offline"], given: Mapping[str, Any]) -> "wandb.Run | None":
        """Starts or resumes the run: offline if online fails, None if that fails too."""
        import wandb

        quiet = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        try:
            resume = "allow" if mode == "online" else None
            run = wandb.init(mode=mode, resume=resume, reinit="create_new", settings=quiet, **given)
            run.define_metric("*", step_metric=self._step)
        except Exception as error:
            if mode == "online":
                logger.warning(f"{_WANDB}: not online ({_line(error)}); the run is logged offline")
                with suppress(Exception):
                    wandb.teardown()  # its service still holds the id of the run that failed to start
                return self._start("offline", given)
            logger.warning(f"{_WANDB}: did not start ({_line(error)}); {self._elsewhere}")
            return None
        logger.info(f"{_WANDB}: {run.url if mode == 'online' else f'offline; to upload: wandb sync {_files(run)}'}")
        return run


def mode_of(tracking: TrackingConfig) -> Mode:
    """Returns what a run does.

    With `auto` the environment variable WANDB_MODE decides, if set; otherwise the run is online if there is an API key
    (WANDB_API_KEY, WANDB_IDENTITY_TOKEN_FILE, wandb's settings or netrc) and offline without one.

    Raises:
        InputError: Online is requested without an API key, or WANDB_MODE is unknown.
    """
    mode, flag = tracking.mode, f"--tracking.mode {tracking.mode}"
    if mode == "auto":
        chosen = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        mode, flag = {"dryrun": "offline"}.get(chosen, chosen), f"WANDB_MODE={chosen}"
    if mode == "offline" or mode == "disabled":
        return mode
    if mode != "online":
        raise InputError(f"{flag} is not a mode; set WANDB_MODE to online, offline or disabled, or unset it")
    if not has_key():
        raise InputError(f"{flag} needs an API key; set WANDB_API_KEY, run `wandb login`, or pass offline")
    return "online"


def has_key() -> bool:
    """Returns whether wandb would find credentials, without prompting for them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import netrc

    import wandb

    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    host = urlsplit(settings.base_url).netloc
    hosts = [host, "api.wandb.ai"] if host.endswith(_HOSTS) else [host]
    homes = [Path(name).expanduser() for name in ("~/.netrc", "~/_netrc")]
    netrc_path = os.environ.get("NETRC")
    path = Path(netrc_path).expanduser() if netrc_path else next((home for home in homes if home.exists()), homes[0])
    try:
        logins = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        return False
    found = [logins.authenticators(host) for host in hosts]
    return any(login is not None and login[2] for login in found)


def _files(run: "wandb.Run") -> str:
    return shlex.quote(str(Path(run.dir).parent))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
