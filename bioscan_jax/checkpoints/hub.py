"""Finds a checkpoint: a directory here or in a bucket, or a pinned commit of a Hugging Face repository, downloaded if needed."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bioscan_jax.checkpoints.readers import FORMATS, weight_files
from bioscan_jax.errors import InputError, one_line
from bioscan_jax.location import is_remote, local_copy

DEFAULT = "default"
"""Names the model that comes with the package."""
DEFAULT_DIRECTORY = Path(__file__).parents[1] / "default_model"
_BESIDE_WEIGHTS = (
    *("config.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "README.md"),
    *("projection.json", "projection.safetensors"),
)
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
    """Directory of the adapter in use, as the user named it."""
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
    if checkpoint == DEFAULT:
        if not (DEFAULT_DIRECTORY / "config.json").is_file():
            raise InputError(
                f"--model.checkpoint {DEFAULT}: this installation has no default model in {DEFAULT_DIRECTORY}; install "
                "bioscan_jax again, or pass a directory, a hub id or random:PRESET"
            )
        return _from_directory(DEFAULT_DIRECTORY, checkpoint, revision)
    directory = local_copy(checkpoint, "model.checkpoint") if checkpoint else Path()
    if is_remote(checkpoint):
        return _from_directory(directory, checkpoint, revision)
    if checkpoint and directory.is_dir():
        return _from_directory(directory, checkpoint, revision)
    if directory.is_file():
        raise InputError(f"--model.checkpoint {checkpoint!r} is a file; pass the directory it is in")
    if checkpoint.startswith((".", "~", os.sep)) or checkpoint.count(os.sep) > 1:
        raise InputError(f"--model.checkpoint {checkpoint!r}: there is no such directory; check the path")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", checkpoint, re.ASCII) or re.search(r"--|\.\.|[.-]$|\.git$", checkpoint):
        raise InputError(f"--model.checkpoint {checkpoint!r} is neither a directory nor a hub id such as OWNER/NAME")
    commits = f"https://huggingface.co/{checkpoint}/commits/main"
    if revision is None:
        raise InputError(
            f"--model.checkpoint {checkpoint!r} is a hub id and needs its commit, so that the run can be repeated; "
            f"pass --model.revision COMMIT, 40 hex digits from {commits}"
        )
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise InputError(f"--model.revision {revision!r} can move; pass a full commit, 40 hex digits from {commits}")
    directory = _from_hub(checkpoint, revision)
    return ResolvedCheckpoint(directory, checkpoint, revision, _license(directory, checkpoint))


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
                f"revision=COMMIT from https://huggingface.co/{name}/commits/main, or a local directory"
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
    return ResolvedCheckpoint(directory, checkpoint, None, _license(directory, checkpoint))


def _from_hub(name: str, commit: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # huggingface_hub cannot check completeness here: it does not know that one weight format is enough.
        cached = Path(snapshot_download(name, revision=commit, local_files_only=True, allow_patterns=[_NEEDED[0]]))
        missing = _missing(cached)
    except LocalEntryNotFoundError:
        missing = "it has never been downloaded"
    else:
        if missing is None:
            return cached
    directory = _download(name, commit, missing)
    missing = _missing(directory)
    if missing is not None:
        raise InputError(f"{name} at {commit} is not a checkpoint this library can read: {missing}")
    return directory


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
        siblings = HfApi().model_info(name, revision=commit, timeout=_HUB_TIMEOUT_SECONDS).siblings or []
        patterns = [*_BESIDE_WEIGHTS, *_weight_patterns(name, commit, [file.rfilename for file in siblings])]
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated; accept its terms at https://huggingface.co/{name}, then run `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no model {name}, or it is private; check --model.checkpoint, or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{name} has no commit {commit}; pass --model.revision from https://huggingface.co/{name}/commits/main"
        ) from error
    except OfflineModeIsEnabled as error:
        _raise_unreachable(name, commit, missing, "HF_HUB_OFFLINE is set", error)
    except LocalEntryNotFoundError as error:
        _raise_unreachable(name, commit, missing, "the connection broke", error)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InputError(
                f"the hub refused the token for {name} ({error.response.status_code}); run `hf auth login` "
                "or fix HF_TOKEN"
            ) from error
        _raise_unreachable(name, commit, missing, f"it answered {error.response.status_code}", error)
    except TransportError as error:
        _raise_unreachable(name, commit, missing, one_line(error), error)
    except OSError as error:
        raise InputError(
            f"{name} cannot be stored: {error.strerror} {error.filename or ''}; set HF_HUB_CACHE to a directory "
            "with room"
        ) from error


def _raise_unreachable(name: str, commit: str, missing: str, reason: str, error: Exception) -> NoReturn:
    raise InputError(
        f"{name} at {commit} is not in the local cache ({missing}) and the hub cannot be used ({reason}); where it "
        f"can, run `hf download {name} --revision {commit} --local-dir DIR` and pass --model.checkpoint DIR"
    ) from error


def _weight_patterns(name: str, commit: str, files: list[str]) -> list[str]:
    for entry in FORMATS:
        if entry in files:
            stem, suffix = entry.removesuffix(".index.json").rsplit(".", 1)
            return [entry, f"{stem}-?????-of-?????.{suffix}"] if entry.endswith(".json") else [entry]
    raise InputError(f"{name} at {commit} has no weights this library reads ({', '.join(FORMATS)})")


def _license(directory: Path, name: str) -> str | None:
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
