"""The Nucleotide Transformer: configuration, weights, forward pass."""
