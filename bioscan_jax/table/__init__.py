"""The Lance table of vectors: writing, reading, queries, later columns."""
