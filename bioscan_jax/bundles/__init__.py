"""A table taken elsewhere, on a stick or through a bucket, and merged where it arrives."""
