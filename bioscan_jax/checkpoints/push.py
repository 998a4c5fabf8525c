"""Puts models, adapters and projections on the Hugging Face hub, each time in one commit."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bioscan_jax.checkpoints.head_files import HEADS_FILE, LABELS_FILE
from bioscan_jax.checkpoints.hub import is_hub_id, stated_license
from bioscan_jax.checkpoints.model_card import FACTS_FILE, read_facts
from bioscan_jax.checkpoints.peft import CONFIG_FILE
from bioscan_jax.checkpoints.projection_files import ARRAYS_FILE, SETTINGS_FILE
from bioscan_jax.errors import InputError, logger, one_line
from bioscan_jax.location import local_copy

_CARD = "README.md"
_TEXTS = (_CARD, FACTS_FILE, CONFIG_FILE, "fit_metric.json")
"""Files that may name directories of this machine."""
_FILES = (
    *(*_TEXTS, "config.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"),
    *("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    *("adapter_model.safetensors", HEADS_FILE, LABELS_FILE, SETTINGS_FILE, ARRAYS_FILE),
    *("model.onnx", "model.onnx.data", "onnx.json", "run_onnx.py"),
)
_PLACE = re.compile(r"(?!https?://)([/~]|\.\.?/|[a-z0-9+]+://|rclone:)[^\n]*\Z")
_OTHER_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


def push_to_hub(
    directory: str,
    name: str,
    *,
    private: bool | None = None,
    branch: str = "main",
    commit_message: str | None = None,
) -> str:
    """Puts a model, an adapter or a projection on the Hugging Face hub.

    All files travel in one commit, so that a push that is stopped leaves the repository as it was. Files of an earlier
    push that this one lacks are removed by the same commit. Where the files name directories of this machine or
    buckets, the hub gets the last part of the name alone. The token is that of `hf auth login` or HF_TOKEN.

    Args:
        directory: Directory or URL that `export`, `save_pretrained` or `fit_metric` wrote.
        name: OWNER/NAME of the repository, which is made if there is none.
        private: Whether a new repository is private; it is public if absent, where the owner's settings say no other.
        branch: Made if there is none.
        commit_message: Of the commit.

    Returns:
        The commit, for `bioscan_jax.load(name, revision=...)`, `adapter="NAME@COMMIT"` or `projection="NAME@COMMIT"`.

    Raises:
        InputError: The directory holds something else, or weights that are not safetensors; its card names another
            licence than its base has, or neither names one and the repository is public; the repository holds files of
            others; there is no token, or the hub refuses it or cannot be reached.

    Example:
        >>> import tempfile, bioscan_jax as bj
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     bj.load("random:tiny-v2").save_pretrained(f"{directory}/model")
        ...     bj.push_to_hub(f"{directory}/model", "not a name")
        Traceback (most recent call last):
        bioscan_jax.errors.InputError: --name 'not a name' is not a hub id such as OWNER/NAME
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if not is_hub_id(name):
        raise InputError(f"--name {name!r} is not a hub id such as OWNER/NAME")
    source = local_copy(directory, "directory")
    files, facts = _files(source, directory)
    with _push_errors(name):
        if get_token() is None:
            raise InputError(f"there is no token to push {name} with; run `hf auth login` or set HF_TOKEN")
        api = HfApi()
        try:
            repository = api.model_info(name)
        except RepositoryNotFoundError:
            repository = None
        is_private = private if repository is None else repository.private
        if private and not is_private:
            raise InputError(f"{name} exists and is public; leave --private out, or pass another name")
        _check_license(source, facts, bool(is_private))
        if repository is None:
            api.create_repo(name, private=private)
        try:
            head = api.model_info(name, revision=branch)
        except RevisionNotFoundError:
            api.create_branch(name, branch=branch, exist_ok=True)
            head = api.model_info(name, revision=branch)
        there = {one.rfilename for one in head.siblings or []} - {".gitattributes"}
        if FACTS_FILE not in there and (others := sorted(there - {_CARD})):
            raise InputError(
                f"{name} holds files of something else ({', '.join(others[:3])}), which a push would mix with these; pass "
                "another name"
            )
        stale = sorted(one for one in there - files.keys() if _is_ours(one))
        done = api.create_commit(
            name,
            [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path) for path in stale),
            ],
            commit_message=commit_message or f"{facts['kind']} of bioscan_jax {facts['library_version']}",
            revision=branch,
            parent_commit=head.sha,
        )
        return done.oid


def _is_ours(file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in _FILES)


def _files(source: Path, shown: str) -> tuple[dict[str, bytes | Path], dict[str, Any]]:
    """Returns what to upload, by its path in the repository, and the facts of the export.

    Raises:
        InputError: The directory is of another kind.
    """
    if not source.is_dir():
        raise InputError(f"--directory {shown!r}: there is no such directory; check the path")
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if not path.is_dir())
    if others := [name for name in names if any(fnmatch(name, pattern) for pattern in _OTHER_WEIGHTS)]:
        raise InputError(
            f"{shown}: {others[0]} is not safetensors, and others would have to trust it; push what "
            "save_pretrained writes after bioscan_jax.load"
        )
    facts = read_facts(source)
    if facts is None:
        raise InputError(
            f"{shown} has no {FACTS_FILE}, so its base and licence are not known; push what bioscan export, "
            "save_pretrained or fit-metric wrote"
        )
    if unknown := [name for name in names if not _is_ours(name)]:
        raise InputError(f"{shown}: {unknown[0]} is no part of a model; move it elsewhere, it would become visible")
    files: dict[str, bytes | Path] = {name: source / name for name in names}
    texts = {name: (source / name).read_text("utf-8") for name in _TEXTS if name in files}
    places = {place for name in texts if name != _CARD for place in _places(json.loads(texts[name]))}
    base = facts["base"]
    if base.get("revision") is None and "/" in base["model"]:
        places.add(base["model"])
    if facts["kind"] in ("adapter", "projection") and base["model"] in places:
        logger.warning(
            "%s needs the weights of %s, which is no repository of the hub: whoever loads it has to have them",
            shown,
            base["model"],
        )
    for name, text in texts.items():
        files[name] = _without_places(text, places).encode()
    return files, facts


def _places(value: Any) -> Iterator[str]:
    """Yields the texts in a JSON value that are paths of this machine or URLs of buckets."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _places(one)
    elif isinstance(value, str) and _PLACE.match(value):
        yield value


def _without_places(text: str, places: set[str]) -> str:
    """Replaces each place by the last part of its name, the longest first."""
    for place in sorted(places, key=len, reverse=True):
        last = re.split(r"[/:]", place.rstrip("/"))[-1] or "directory"
        for written in {place, json.dumps(place)[1:-1]}:
            text = text.replace(written, last)
    return text


def _check_license(source: Path, facts: dict[str, Any], private: bool) -> None:
    """Checks that the card passes on the licence of the base.

    Raises:
        InputError: It names another licence, or there is none and the repository is public.
    """
    stated, base = stated_license(source), facts["base"]
    if base["license"] is not None and (stated or "").lower() != base["license"].lower():
        raise InputError(
            f"{source / _CARD} names the licence {stated}, but the weights of {base['model']} that it was made from "
            f"have {base['license']}, which applies to what is derived from them; put that back"
        )
    if stated is None and not private and not base["model"].startswith("random:"):
        raise InputError(
            f"{base['model']} names no licence, so nobody may pass on what is derived from it; pass --private true, or "
            f"write `license:` into {source / _CARD} if its authors told you"
        )


@contextmanager
def _push_errors(name: str) -> Iterator[None]:
    """Turns what can go wrong with a push into an InputError."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as TransportError  # pyright: ignore[reportPrivateImportUsage]

    again = f"{name} has all of it or nothing; run `bioscan push` again"
    try:
        yield
    except InputError:
        raise
    except OfflineModeIsEnabled as error:
        raise InputError(f"HF_HUB_OFFLINE is set, so {name} cannot be pushed; unset it") from error
    except (HfHubHTTPError, TransportError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of an upload
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status in (401, 403):
            raise InputError(
                f"the hub refused the token for {name} ({status}); it needs write access to {name.partition('/')[0]}: "
                "run `hf auth login` or fix HF_TOKEN"
            ) from error
        if status == 409:
            raise InputError(
                f"{name} exists and is not yours, or somebody else changed it just now; {again}"
            ) from error
        raise InputError(f"the hub did not take the push ({one_line(cause)}); {again}") from error
