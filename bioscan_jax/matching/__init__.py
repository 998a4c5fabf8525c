"""Compares barcodes with a vector table: neighbours, alignments, votes, and confidences."""
