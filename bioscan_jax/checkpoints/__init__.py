"""Weights in and out: published files, adapters, heads, converted checkpoints."""
