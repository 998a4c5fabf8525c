"""Fine-tuning on labelled barcodes, and the export of its results."""
