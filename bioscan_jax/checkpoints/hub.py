"""Finds a checkpoint, or a part such as an adapter: a directory here or in a bucket, or a pinned commit on the hub."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bioscan_jax.checkpoints.readers import FORMATS, weight_files
from bioscan_jax.errors import InputError, logger, one_line
from bioscan_jax.location import is_remote, local_copy

DEFAULT = "default"
"""Names the model that comes with the package."""
DEFAULT_DIRECTORY = Path(__file__).parents[1] / "default_model"
_PARTS = (
    *("config.json", "README.md", "bioscan_jax_export.json", "adapter_config.json", "adapter_model.safetensors"),
    *("adapter_model.bin", "heads.safetensors", "label_space.json", "projection.json", "projection.safetensors"),
)
"""Files of adapters, heads and projections, and what tells a checkpoint from an adapter."""
_BESIDE_WEIGHTS = ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", *_PARTS)
_NEEDED = ("config.json", "vocab.txt")
_HUB_TIMEOUT_SECONDS = 30
_LICENSES = {"InstaDeepAI/nucleotide-transformer": "cc-by-nc-sa-4.0"}


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """A checkpoint on this machine's disk and its source."""

    directory: Path
    """Holds config.json and the weights."""
    name: str
    """The directory or hub id as the user wrote it."""
    revision: str | None
    """Commit of the hub repository; None for a local directory."""
    license: str | None
    """Licence of the weights named by their model card; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Identity of the weights that made a table's vectors; stored in every table."""

    model: str
    """As the user named it."""
    revision: str | None
    weights_sha256: str
    """Of the published files; a converted copy keeps this value."""
    license: str | None
    """Of the weights."""
    dtype: str
    """Of the parameters in use."""
    adapter: str | None = None
    """Directory of the adapter in use, or OWNER/NAME@COMMIT, as the user named it."""
    adapter_sha256: str | None = None
    """Of the adapter's weights file and scaling."""


def resolve_checkpoint(checkpoint: str, revision: str | None) -> ResolvedCheckpoint:
    """Finds a checkpoint, downloading it into the Hugging Face cache if it is not there.

    A commit that is complete in the cache is used without network access. Otherwise the weights are fetched in
    one format only, the first of `readers.FORMATS` that the repository has. huggingface_hub's environment variables
    (HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT) apply.

    Args:
        checkpoint: A directory or URL of one with config.json, a hub id OWNER/NAME, or `default` for the model in the package.
        revision: The full commit of a hub id; None for a directory.

    Raises:
        InputError: `checkpoint` is neither; the hub id has no full commit; or neither the cache nor the hub can
            provide it (the message gives the reason and the fix).
    """
    directory = _directory_of(checkpoint, revision)
    if directory is not None:
        return _from_directory(directory, checkpoint, revision)
    assert revision is not None
    directory = _from_hub(checkpoint, revision)
    return ResolvedCheckpoint(directory, checkpoint, revision, stated_license(directory, checkpoint))


def cached_checkpoint(checkpoint: str, revision: str | None) -> Path | None:
    """Returns the directory of a checkpoint that is on this machine, and None where `resolve_checkpoint` downloads it.

    Raises:
        InputError: What `resolve_checkpoint` raises before it asks the network.
    """
    directory = _directory_of(checkpoint, revision)
    if directory is not None:
        return _from_directory(directory, checkpoint, revision).directory
    assert revision is not None
    return _cached(checkpoint, revision)[0]


def _directory_of(checkpoint: str, revision: str | None) -> Path | None:
    """Returns the directory that a name stands for; None for a hub id with its commit."""
    if checkpoint == DEFAULT:
        if not (DEFAULT_DIRECTORY / "config.json").is_file():
            raise InputError(
                f"--model.checkpoint {DEFAULT}: this installation has no default model in {DEFAULT_DIRECTORY}; install "
                "bioscan_jax again, or pass a directory, a hub id or random:PRESET"
            )
        return DEFAULT_DIRECTORY
    directory = local_copy(checkpoint, "model.checkpoint") if checkpoint else Path()
    if is_remote(checkpoint) or (checkpoint and directory.is_dir()):
        return directory
    if directory.is_file():
        raise InputError(f"--model.checkpoint {checkpoint!r} is a file; pass the directory it is in")
    if checkpoint.startswith((".", "~", os.sep)) or checkpoint.count(os.sep) > 1:
        raise InputError(f"--model.checkpoint {checkpoint!r}: there is no such directory; check the path")
    if not is_hub_id(checkpoint):
        raise InputError(
            f"--model.checkpoint {checkpoint!r} is neither a directory nor a hub id such as OWNER/NAME, nor 'default'"
        )
    commits = _commits(checkpoint)
    if revision is None:
        raise InputError(
            f"--model.checkpoint {checkpoint!r} is a hub id and needs its commit, so that the run can be repeated; "
            f"pass --model.revision COMMIT, 40 hex digits from {commits}"
        )
    _check_commit(checkpoint, revision, f"--model.revision {revision!r}")
    return None


def resolve_part(place: str, flag: str) -> Path:
    """Finds the directory of an adapter, of heads or of a projection, downloading it if it is in a bucket or on the hub.

    Of a repository on the hub only the files of such parts are fetched, not the weights of a checkpoint beside them.

    Args:
        place: A directory or URL, or OWNER/NAME@COMMIT on the Hugging Face hub. A local directory need not exist.
        flag: The flag that named it, for messages.

    Raises:
        InputError: The hub id has no full commit, or neither the cache nor the hub can provide it.
    """
    directory = local_copy(place, flag)
    name, at, commit = place.partition("@")
    if is_remote(place) or directory.exists() or not is_hub_id(name):
        return directory
    if not at:
        raise InputError(
            f"--{flag} {place!r}: there is no such directory; one on the hub needs its commit, so that the run can be "
            f"repeated: pass {name}@COMMIT, 40 hex digits from {_commits(name)}"
        )
    return download_parts(name, commit, flag)


def download_parts(name: str, commit: str, flag: str) -> Path:
    """Downloads the files of adapters, heads and projections that a hub repository has, if they are not in the cache.

    Raises:
        InputError: `commit` is not a full one, or neither the cache nor the hub can provide it.
    """
    from huggingface_hub import snapshot_download

    pin = f"--model.revision {commit!r}" if flag == "model.checkpoint" else f"--{flag} {name}@{commit}"
    _check_commit(name, commit, pin)
    with _hub_errors(name, commit, "it has never been downloaded whole", flag):
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(_PARTS)))


def _check_commit(name: str, commit: str, shown: str) -> None:
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise InputError(f"{shown} can move; pass a full commit, 40 hex digits from {_commits(name)}")


def pinned(place: str) -> str:
    """Adds its newest commit to a hub id that names none, with a warning; what is here stays as it is.

    Raises:
        InputError: The newest commit cannot be found out.
    """
    if not is_on_hub(place):
        return place
    commit = newest_commit(place)
    logger.warning("%s is loaded at its newest commit, %s; name it to get the same weights again", place, commit)
    return f"{place}@{commit}"


def is_hub_id(name: str) -> bool:
    """Returns whether a text has the form OWNER/NAME of the hub."""
    valid = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)
    return valid is not None and not re.search(r"--|\.\.|[.-]$|\.git$", name)


def is_on_hub(name: str) -> bool:
    """Returns whether a text means a repository of the hub: it has the form of one, and is no directory here."""
    return is_hub_id(name) and not Path(name).exists()


def _commits(name: str) -> str:
    return f"https://huggingface.co/{name}/commits/main"


def newest_commit(name: str) -> str:
    """Returns the newest commit of a hub id; where the hub cannot be reached, the newest one in the local cache.

    Raises:
        InputError: Neither knows it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as TransportError  # pyright: ignore[reportPrivateImportUsage]

    try:
        commit = HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS).sha
        assert commit is not None
        return commit
    except (HfHubHTTPError, TransportError, OfflineModeIsEnabled, OSError) as error:
        try:
            return Path(snapshot_download(name, local_files_only=True, allow_patterns=[_NEEDED[0]])).name
        except LocalEntryNotFoundError:
            raise InputError(
                f"the newest commit of {name} cannot be asked of the hub ({one_line(error, 200)}); pass "
                f"revision=COMMIT from {_commits(name)}, or a local directory"
            ) from error


def _from_directory(directory: Path, checkpoint: str, revision: str | None) -> ResolvedCheckpoint:
    if revision is not None:
        raise InputError(
            f"--model.revision {revision!r} is for a hub id, but --model.checkpoint {checkpoint!r} is a directory "
            "here; leave one of them out"
        )
    if not (directory / "config.json").is_file():
        there = ", ".join(sorted(path.name for path in directory.iterdir())[:20])
        raise InputError(
            f"--model.checkpoint {checkpoint!r} has no config.json, only {there or 'nothing'}; "
            "pass the directory that holds config.json and the weights"
        )
    return ResolvedCheckpoint(directory, checkpoint, None, stated_license(directory, checkpoint))


def _from_hub(name: str, commit: str) -> Path:
    cached, missing = _cached(name, commit)
    if cached is not None:
        return cached
    directory = _download(name, commit, missing)
    if (lacking := _missing(directory)) is not None:
        raise InputError(f"{name} at {commit} is not a checkpoint this library can read: {lacking}")
    return directory


def _cached(name: str, commit: str) -> tuple[Path | None, str]:
    """Returns the commit's directory in the hub cache if it is complete there, else None and what is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # huggingface_hub cannot check completeness here: it does not know that one weight format is enough.
        beside = list(_BESIDE_WEIGHTS)
        cached = Path(snapshot_download(name, revision=commit, local_files_only=True, allow_patterns=beside))
    except LocalEntryNotFoundError:
        return None, "it has never been downloaded"
    missing = _missing(cached)
    return (cached, "") if missing is None else (None, missing)


def _missing(directory: Path) -> str | None:
    for name in _NEEDED:
        if not (directory / name).is_file():
            return f"{name} is missing"
    try:
        weight_files(directory)
    except InputError as error:
        return str(error)
    return None


def _download(name: str, commit: str, missing: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    with _hub_errors(name, commit, missing, "model.checkpoint"):
        siblings = HfApi().model_info(name, revision=commit, timeout=_HUB_TIMEOUT_SECONDS).siblings or []
        patterns = [*_BESIDE_WEIGHTS, *_weight_patterns(name, commit, [file.rfilename for file in siblings])]
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))


@contextmanager
def _hub_errors(name: str, commit: str, missing: str, flag: str) -> Iterator[None]:
    """Turns what can go wrong with a download into an InputError; `missing` says what the cache lacks."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # httpx's base class, imported from here because huggingface_hub 2 moved from httpx to httpx2.
    from huggingface_hub.errors import HTTPError as TransportError  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated; accept its terms at https://huggingface.co/{name}, then run `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no model {name}, or it is private; check --{flag}, or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        pin = "--model.revision" if flag == "model.checkpoint" else f"--{flag} {name}@COMMIT"
        raise InputError(f"{name} has no commit {commit}; pass {pin} from {_commits(name)}") from error
    except OfflineModeIsEnabled as error:
        _raise_unreachable(name, commit, missing, flag, "HF_HUB_OFFLINE is set", error)
    except LocalEntryNotFoundError as error:
        offline = isinstance(error.__cause__, OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else "the connection broke"
        _raise_unreachable(name, commit, missing, flag, reason, error)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InputError(
                f"the hub refused the token for {name} ({error.response.status_code}); run `hf auth login` "
                "or fix HF_TOKEN"
            ) from error
        _raise_unreachable(name, commit, missing, flag, f"it answered {error.response.status_code}", error)
    except TransportError as error:
        _raise_unreachable(name, commit, missing, flag, one_line(error), error)
    except OSError as error:
        raise InputError(
            f"{name} cannot be stored: {error.strerror} {error.filename or ''}; set HF_HUB_CACHE to a directory "
            "with room"
        ) from error


def _raise_unreachable(name: str, commit: str, missing: str, flag: str, reason: str, error: Exception) -> NoReturn:
    raise InputError(
        f"{name} at {commit} is not in the local cache ({missing}) and the hub cannot be used ({reason}); where it "
        f"can, run `hf download {name} --revision {commit} --local-dir DIR` and pass --{flag} DIR"
    ) from error


def _weight_patterns(name: str, commit: str, files: list[str]) -> list[str]:
    for entry in FORMATS:
        if entry in files:
            stem, suffix = entry.removesuffix(".index.json").rsplit(".", 1)
            return [entry, f"{stem}-?????-of-?????.{suffix}"] if entry.endswith(".json") else [entry]
    raise InputError(f"{name} at {commit} has no weights this library reads ({', '.join(FORMATS)})")


def stated_license(directory: Path, name: str = "") -> str | None:
    """Returns the licence that the model card in a directory states, or the known one of a hub id; None without either."""
    # By regular expression, not huggingface_hub.ModelCard, which raises for cards with malformed YAML.
    readme = directory / "README.md"
    if readme.is_file():
        card = re.match(r"\s*---\s*\n(.*?)\n---", readme.read_text("utf-8-sig", "replace"), re.DOTALL)
        for key in ("license_name", "license"):
            value = re.search(
                rf"^{key}:(?:[ \t]*|[ \t]*\n[ \t]*-[ \t]*)[\['\"]*([\w.+-]+)", card[1] if card else "", re.M
            )
            if value:
                return value[1]
    return next((text for prefix, text in _LICENSES.items() if name.startswith(prefix)), None)
