"""`python -m bioscan_jax` is the command `bioscan`."""

from bioscan_jax.cli import main

if __name__ == "__main__":
    main()
