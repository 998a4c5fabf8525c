"""The Nucleotide Transformer and what is trained on it: configuration, layers, adapters, taxonomic heads."""
