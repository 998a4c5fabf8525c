"""Rows in a fixed order, read, cut into views and batched."""
