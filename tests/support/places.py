"""Paths of the checkout that tests read and run."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
TESTS = ROOT / "tests"
GOLDEN = TESTS / "golden"
"""Small checkpoints of both families, written by PyTorch, with its outputs."""
