"""Barcodes against a vector table: neighbours, alignments, votes, and what they are worth."""
