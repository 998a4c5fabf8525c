"""Turns sequences into vectors, in memory or into a table."""
