"""The same as `bioscan doctor`; --help explains it."""

from bioscan_jax.cli import run_script

if __name__ == "__main__":
    run_script("doctor")
