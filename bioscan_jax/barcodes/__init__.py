"""What a barcode and its names are: cleaning, 6-mers, views, lineages, labels, simulated barcodes."""
