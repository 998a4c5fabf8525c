"""Sequences to vectors, and a table of them."""
