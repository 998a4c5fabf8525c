"""Bundles: a vector table as files that are carried on a stick or through a bucket, and merged at the destination."""
