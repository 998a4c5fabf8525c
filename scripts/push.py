"""The same as `bioscan push`; --help explains it."""

from bioscan_jax.cli import run_script

if __name__ == "__main__":
    run_script("push")
