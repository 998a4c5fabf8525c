"""The command `bioscan`: one module per subcommand, each of them also a file in scripts/."""

import sys
from importlib import import_module

COMMANDS = {
    "embed": "embed barcodes into a vector table",
    "describe": "tell what a file of barcodes holds and how it is read",
    "data": "get published reference sequences with lineages",
    "finetune": "train adapters and taxonomic heads on labelled barcodes",
    "export": "export the result of a training run, or a model as an ONNX graph",
    "push": "put a model, an adapter or a projection on the Hugging Face hub",
    "identify": "name barcodes by a vector table",
    "calibrate": "fit confidences and thresholds for identify",
    "default-model": "train a model like the one in the package",
    "fit-metric": "fit a projection that brings barcodes of one genus together",
    "search": "print the rows of a table nearest to a sequence",
    "project": "project the raw vectors of a table, without the model",
    "query": "ask a vector table in SQL",
    "annotate": "join later metadata onto a vector table",
    "compact": "join the small files of a finished table",
    "report": "write a report of a vector table as one HTML file",
    "bundle": "carry a vector table: export, verify, import",
    "sync": "keep a folder of tables and its copy elsewhere in step",
    "convert": "convert a checkpoint once, for faster starts",
    "fleet": "plan or simulate embedding with many machines",
    "plan": "compile for a TPU you do not have yet, and report what fits",
    "doctor": "tell what of this machine would stop a run, and what to change",
    "benchmark": "compare with other programs (needs a checkout)",
}
"""Each subcommand and its line in `bioscan --help`."""


def main() -> None:
    """Runs the subcommand that the first word of the command line names; the entry point of `bioscan`."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        run_script(words[0], words[1:])
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {does}" for name, does in COMMANDS.items())
    usage = f"usage: bioscan COMMAND [flags]\n\n{listing}\n\nbioscan COMMAND --help explains the flags of a command."
    if words and words[0] in ("-h", "--help"):
        from bioscan_jax.cli._command import exit_code_of

        sys.exit(exit_code_of(lambda _: print(usage), words))
    elif words and words[0] == "--version":
        from importlib.metadata import version

        print(f"bioscan_jax {version('bioscan_jax')}")
    else:
        given = f"no command {words[0]!r}" if words else "no command"
        print(f"error: {given}; pass one of {', '.join(COMMANDS)}; --help explains them", file=sys.stderr)
        sys.exit(2)


def run_script(name: str, words: list[str] | None = None) -> None:
    """Runs one subcommand and ends the process with its exit code.

    Args:
        name: One of `COMMANDS`.
        words: Its flags; those of the process if absent.
    """
    from bioscan_jax.cli._command import leave, own_process

    own_process()
    leave(invoke(name, sys.argv[1:] if words is None else words))


def invoke(name: str, words: list[str]) -> int:
    """Runs one subcommand inside this process.

    Args:
        name: One of `COMMANDS`.
        words: Its flags.

    Returns:
        The exit code: 0 for success; 1 where `doctor` finds a problem; 2 for a mistake that the user can fix, with one line on stderr; 128 + signal after
        a request to stop, or when the reader of the output has gone.
    """
    from bioscan_jax.cli._command import exit_code_of

    return exit_code_of(import_module(f"bioscan_jax.cli.{name.replace('-', '_')}").command, words)
