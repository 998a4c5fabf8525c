"""Input rows: finding and reading files, encoding blocks of rows as tokens, batching them."""
