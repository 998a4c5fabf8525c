"""`bioscan push DIR OWNER/NAME`: puts a model, an adapter or a projection on the Hugging Face hub."""

from collections.abc import Sequence

from bioscan_jax.cli._command import from_flags, positional


def main(
    directory: str,
    name: str,
    private: bool | None = None,
    branch: str = "main",
    commit_message: str | None = None,
) -> None:
    """Put a model, an adapter or a projection on the Hugging Face hub, in one commit; DIR and OWNER/NAME come first.

    Args:
        directory: Directory or URL that export, save_pretrained or fit-metric wrote; may stand first.
        name: OWNER/NAME of the repository, made if there is none; may stand second.
        private: Whether a new repository is private.
        branch: Made if there is none.
        commit_message: Of the commit.
    """
    from bioscan_jax.checkpoints.push import push_to_hub

    commit = push_to_hub(directory, name, private=private, branch=branch, commit_message=commit_message)
    print(f"{name} at commit {commit}")


def command(words: Sequence[str]) -> None:
    """Runs `bioscan push`."""
    first, rest = positional(words, "directory")[:1], list(words[1:])
    from_flags(main, "push")([*first, *positional(rest, "name")])
