"""Barcodes and their names: cleaning, 6-mer tokens, views, lineages, labels, simulated barcodes."""
